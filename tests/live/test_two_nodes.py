"""A gang over two Ray nodes: PACK finds room where STRICT_PACK has none, draws the same, survives a far rank's end."""

import asyncio
import itertools
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import httpx
import numpy as np
import pytest
from ray.cluster_utils import Cluster

from deploy.gateway_spec import GatewaySpec
from deploy.model_sections import Placement
from deploy.model_spec import ModelSpec
from deploy.spec import DeploymentSpec, Metrics
from deploy.yaml_text import to_yaml
from service.cli.main import main
from service.rollout.attach import attach
from service.rollout.cluster_folder import place
from service.rollout.local_cluster import LOOPBACK, METRICS_PORTS
from service.rollout.ports import bind_error
from service.state import prefetch
from tests.support.deployments import in_each_forward, model, on_rank, pixels, rank_statuses, wait_for

NODE = {"num_cpus": 1, "object_store_memory": 10**8, "node_ip_address": LOOPBACK}
"""With room for one rank of the wide model, and a little more."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="ray-", dir=place())
    head = NODE | {"include_dashboard": False, "temp_dir": folder}
    # Cluster writes its address into /tmp/ray, a folder that may not exist, where other people's ray.init() reads it.
    with (
        mock.patch("ray._private.utils.write_ray_address"),
        mock.patch("ray._common.utils.reset_ray_address"),
    ):
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            cluster.add_node(**NODE)
            yield cluster.address
        finally:
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def spec(demo_model: Path) -> DeploymentSpec:
    wide, narrow = model(demo_model, "wide", ulysses_degree=2), model(demo_model, "narrow")
    wide = wide.model_copy(update={"placement": Placement(strategy="PACK", cpus_per_rank=0.8)})
    ports = random.sample(METRICS_PORTS, 20)
    port = next(port for port in ports if not bind_error(LOOPBACK, port))
    return DeploymentSpec(
        models=(wide, narrow), gateway=GatewaySpec(port=port, grpc_port=None), metrics=Metrics(port=None)
    )


def deployed(spec: DeploymentSpec, address: str, folder: Path) -> int:
    file = folder / "deployment.yaml"
    file.write_text(to_yaml(spec.model_dump(mode="json", exclude_none=True) | {"metrics": {"port": None}}))
    return main(["deploy", str(file), "--address", address])


def draw(spec: DeploymentSpec, name: str) -> httpx.Response:
    body = {"model": name, "prompt": "a cup of coffee", "seed": 7}
    url = f"http://{LOOPBACK}:{spec.gateway.port}/v1/images/generations"
    return httpx.post(url, json=body, timeout=300, trust_env=False)


def strike(actor: Any) -> None:
    """In the rank's process: end it in the third forward from now."""
    forwards = itertools.count(1)
    in_each_forward(actor, lambda: next(forwards) == 3 and os.kill(os.getpid(), signal.SIGKILL))


def test_one_node_alone_has_no_room(
    address: str, spec: DeploymentSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = spec.models[0].model_copy(update={"placement": Placement(cpus_per_rank=0.8)})
    assert deployed(spec.model_copy(update={"models": (wide,)}), address, tmp_path) == 1
    said = capsys.readouterr().err
    assert "wide: needs 1.6 CPU cores on one node, the largest node has 1" in said
    assert "nothing was changed" in said


def test_a_gang_over_two_nodes(address: str, spec: DeploymentSpec, tmp_path: Path) -> None:
    assert deployed(spec, address, tmp_path) == 0
    with attach(address):
        first, second = rank_statuses("wide")
        assert first.node_id != second.node_id
        reference = pixels(draw(spec, "narrow").json()["data"][0]["b64_json"])
        drawn = pixels(draw(spec, "wide").json()["data"][0]["b64_json"])
        assert np.abs(drawn - reference).max() <= 1

        on_rank("wide", 1, strike)  # far from the gang, which sits beside rank 0
        answer = draw(spec, "wide")
        assert answer.status_code == 200, answer.text
        assert np.array_equal(pixels(answer.json()["data"][0]["b64_json"]), drawn)
        after = rank_statuses("wide")
        assert {status.node_id for status in after} == {first.node_id, second.node_id}
        assert not {status.pid for status in after} & {first.pid, second.pid}


def test_nodes_fetch_ahead(address: str, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    logger = SimpleNamespace(warning=lambda message, *values: said.append(message % values))
    monkeypatch.setattr(prefetch, "logger", logger)
    models = [model(Path("/nowhere"), name) for name in ("folder", "there", "missing", "too-large")]
    for i, update in ((1, {"source": "acme/demo"}), (2, {"source": "acme/other"}), (3, {"source": "acme/huge"})):
        models[i] = models[i].model_copy(update=update)
    models[3] = models[3].model_copy(update={"placement": Placement(cpus_per_rank=2)})
    ahead = prefetch.Prefetch()
    with attach(address):
        asyncio.run(_settled(ahead, models, str(hub)))
        nodes = {node_id for node_id, *_ in ahead._requested}
    assert len(nodes) == 2
    assert {source for _, source, _ in ahead._requested} == {"acme/demo", "acme/other"}
    assert len(list((hub / ".spray").glob("*.checked"))) == 1  # both nodes share this machine's folder
    assert [line.partition(": ")[0] for line in sorted(said)] == sorted(f"node {node_id[:8]}" for node_id in nodes)
    assert all("missing: acme/other, revision main, cannot be fetched" in line for line in said)


async def _settled(ahead: prefetch.Prefetch, models: list[ModelSpec], folder: str) -> None:
    ahead.follow(models, folder)
    await asyncio.to_thread(wait_for, lambda: ahead._requested and not ahead._fetching, bool)
    assert ahead._polling is not None
    ahead._polling.cancel()
