"""Deployments of the demo model for tests, and what tests look up in a running cluster."""

import base64
import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import ray
from PIL import Image

from deploy.gateway_spec import GatewaySpec
from deploy.model_sections import Defaults, Limits, Placement, Timeouts
from deploy.model_spec import ModelSpec
from deploy.spec import DeploymentSpec, Metrics
from service.rollout.local_cluster import LocalCluster
from sp_core.degrees import ParallelDegrees
from workers.messages import RankStatus

Seen = TypeVar("Seen")

PATIENCE_S = 240.0
"""For what must happen: far longer than it takes on a slow and busy machine, shorter than a test may take."""

PING_S = 300.0
"""After this, a silent rank counts as lost. It is longer than a busy machine takes to answer and than a test waits, so
that whatever a test sees was noticed by other means."""


def model(folder: Path, name: str = "demo", **degrees: int) -> ModelSpec:
    """The demo model with these degrees; each rank has a small fraction of a CPU."""
    return ModelSpec(
        name=name,
        source=str(folder),
        device="cpu",
        parallel=ParallelDegrees(**degrees),
        defaults=Defaults(width=64, height=48, num_inference_steps=4),
        limits=Limits(max_width=256, max_height=256, max_n=2, size_multiple=8),
        max_queued=3,
        placement=Placement(cpus_per_rank=0.1),
        timeouts=Timeouts(startup_s=550, ping_s=PING_S),
    )


def deployment(*models: ModelSpec) -> DeploymentSpec:
    """These models on free ports."""
    return DeploymentSpec(models=models, gateway=GatewaySpec(port=0, grpc_port=0), metrics=Metrics(port=0))


def pixels(b64_json: str) -> np.ndarray[Any, np.dtype[np.int16]]:
    """The picture of an answer, `(H, W, 3)`."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64_json))).convert("RGB"), dtype=np.int16)


def rank_actors(name: str) -> list[Any]:
    """Handles of the model's running ranks, in rank order."""
    actors = [a for a in ray.util.list_named_actors(all_namespaces=True) if a["name"].startswith(f"{name}-")]
    ranks = [ray.get_actor(actor["name"], namespace=actor["namespace"]) for actor in actors]
    numbers = [status.rank for status in ray.get([rank.status.remote() for rank in ranks], timeout=120)]
    numbered = sorted(zip(numbers, ranks, strict=True), key=lambda pair: pair[0])
    return [rank for number, rank in numbered if number >= 0]  # not spare ones


def rank_statuses(name: str) -> list[RankStatus]:
    """Status of the model's running ranks."""
    statuses: list[RankStatus] = ray.get([rank.status.remote() for rank in rank_actors(name)], timeout=120)
    return statuses


def on_rank(name: str, rank: int, work: Callable[..., Any], *args: Any) -> Any:
    """Run `work(rank_actor_instance, *args)` inside a rank's process."""
    return ray.get(rank_actors(name)[rank].__ray_call__.remote(work, *args), timeout=120)


def actor_of(part: str) -> Any:
    """The one actor whose name has this part."""
    (name,) = (a for a in ray.util.list_named_actors(all_namespaces=True) if part in a["name"])
    return ray.get_actor(name["name"], namespace=name["namespace"])


def pid_of(part: str) -> int:
    """The process of that actor."""
    return int(ray.get(actor_of(part).__ray_call__.remote(lambda _: os.getpid()), timeout=120))


def on_gang(name: str, work: Callable[..., Any], *args: Any) -> Any:
    """Run `work(actor_instance, *args)` inside a gang's own process."""
    return ray.get(actor_of(f"model-{name}#").__ray_call__.remote(work, *args), timeout=120)


def in_each_forward(actor: Any, work: Callable[[], object]) -> None:
    """In a rank's process: call this inside every forward from now on."""

    def before_block(*_: Any) -> None:
        work()

    actor._rank._loaded.pipeline.transformer.transformer_blocks[1].register_forward_pre_hook(before_block)


def wait_while(there: Path) -> None:
    """Block while a file exists; a request whose forwards do this runs for as long as a test wants."""
    while there.exists():
        time.sleep(0.01)


def wait_for(look: Callable[[], Seen], condition: Callable[[Seen], bool]) -> Seen:
    """Look until a condition holds, and return what was seen. It must come true, and stay true."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition(seen := look()):
        assert time.monotonic() < deadline, f"after {PATIENCE_S:g} s: {seen}"
        time.sleep(0.1)
    return seen


def ready(cluster: LocalCluster) -> None:
    """Wait until a cluster answers, for a long time: each rank imports for seconds, on few and busy cores."""
    cluster.wait_ready(timeout_s=560)
