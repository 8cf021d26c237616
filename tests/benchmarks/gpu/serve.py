"""Part 5: what a caller and an operator see: a cold start, whole requests, cancellation, running out of memory."""

import contextlib
import importlib.util
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploy.gateway_spec import GatewaySpec
from deploy.model_sections import Defaults, Limits, Placement
from deploy.model_spec import ModelSpec
from deploy.spec import DeploymentSpec, Metrics
from tests.benchmarks.gpu import model_folder, rank_work
from tests.benchmarks.gpu.part import LeftOut, Part
from workers.gang.local import generate_locally
from workers.messages import GenerationRequest, GenerationResult, StepEvent

SERVER = ("ray", "fastapi", "uvicorn", "httpx")
"""What a served gang needs; without these the ranks of `spray generate --local` draw."""

READY_S = 300.0

TABLES = {
    "cold": (
        "Cold start and requests of one rank",
        "In a process of its own, without Ray. The files were written just before, so they come from memory, not from "
        "the disk.",
        ("phase", "s", "note"),
    ),
    "cancel": (
        "Cancellation",
        "Asked for half a step after the second step; until the rank is free.",
        ("ms", "step ms", "steps", "ended with"),
    ),
    "memory": (
        "Out of memory, on purpose",
        "The same rank, then the next requests on it.",
        ("request", "how", "outcome"),
    ),
}


def run(part: Part) -> None:
    """Write the tables."""
    with tempfile.TemporaryDirectory(prefix="spray-gpu-") as folder:
        source = Path(folder) / "z-image"
        part.table.begin("The model", "Random weights in diffusers' format.", ("what", "GB", "s", "GB/s"))

        def write() -> Sequence[object]:
            began = time.monotonic()
            size = model_folder.write(source, part.device, part.dtype, part.fake)
            took = time.monotonic() - began
            return size / 1e9, took, size / 1e9 / took

        if part.row(("written" + (", the demo model" if part.fake else ", Z-Image"),), write):
            model, request = _spec(part, source), _request(part)
            _through_the_gang(part, model, request)
            _on_a_rank(part, model, request)


def _spec(part: Part, source: Path) -> ModelSpec:
    side, steps = (64, 4) if part.fake else (1024, 9)
    return ModelSpec(
        name="z-image",
        source=str(source),
        device="cpu" if part.fake else "cuda",
        defaults=Defaults(width=side, height=side, num_inference_steps=steps, guidance_scale=0.0),
        limits=Limits(max_num_frames=1),
        placement=Placement(cpus_per_rank=0.5 if part.fake else 2.0),
    )


def _request(part: Part) -> GenerationRequest:
    side, steps = (64, 4) if part.fake else (1024, 9)
    return GenerationRequest("a", "z-image", "a cup of coffee", side, side, steps, seed=7, guidance_scale=0.0)


def _through_the_gang(part: Part, model: ModelSpec, request: GenerationRequest) -> None:
    missing = [name for name in SERVER if importlib.util.find_spec(name) is None]
    missing = missing or ([] if part.with_ray else ["ray (as told)"])
    part.table.begin(
        "A whole request through the gang",
        f"Not through Ray and REST, but the ranks of `spray generate --local`: missing are {', '.join(missing)}."
        if missing
        else "Through REST, the gateway and a gang on Ray, on this machine.",
        ("what", "s", "note"),
    )
    if missing:
        part.row(("start of the ranks and one picture",), lambda: _local(model, request), needs_s=60)
        return
    with contextlib.ExitStack() as stack:
        post: list[Any] = []

        def start() -> Sequence[object]:
            began = time.monotonic()
            post.append(stack.enter_context(_served(model)))
            return time.monotonic() - began, "until `/readyz` says so"

        if part.row(("start of Ray, Serve and the gang",), start, needs_s=90):
            for name in ("first request", "second request"):
                part.row((name,), lambda: _ask(post[0], request))


def _local(model: ModelSpec, request: GenerationRequest) -> Sequence[object]:
    steps: list[StepEvent] = []
    began = time.monotonic()
    result = generate_locally(model, replace(request, report_steps=True), steps.append)
    return time.monotonic() - began, _note(result, len(steps))


def _note(result: GenerationResult, reported: int) -> str:
    return f"{result.seconds:.2f} s of it to draw; {reported} steps reported; PNG of {len(result.outputs[0])} bytes"


@contextlib.contextmanager
def _served(model: ModelSpec) -> Iterator[Any]:
    """Serve the model; yield what posts a body to it."""
    import httpx  # these two here: they may be missing

    from service.rollout.local_cluster import LocalCluster

    spec = DeploymentSpec(models=(model,), gateway=GatewaySpec(port=0, grpc_port=None), metrics=Metrics(port=None))
    with LocalCluster(spec) as cluster, httpx.Client(trust_env=False, timeout=READY_S) as client:
        cluster.wait_ready(timeout_s=READY_S)
        yield lambda body: client.post(f"{cluster.url}/v1/images/generations", json=body)


def _ask(post: Any, request: GenerationRequest) -> Sequence[object]:
    body = {"prompt": request.prompt, "seed": request.seed, "size": f"{request.width}x{request.height}"}
    began = time.monotonic()
    answer = post(body)
    took = time.monotonic() - began
    answer.raise_for_status()
    return took, f"{len(answer.json()['data'])} picture, answered {answer.status_code}"


def _on_a_rank(part: Part, model: ModelSpec, request: GenerationRequest) -> None:
    """Start a rank, and write what it finds as it finds it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    arguments = (model, request, time.time(), theirs)
    process = context.Process(target=rank_work.work, args=arguments, daemon=True)
    process.start()
    theirs.close()
    current = ""
    try:
        while True:
            if not ours.poll(max(0.0, part.deadline - time.monotonic()) + 10):
                raise LeftOut("the time of this part is over")
            table, cells, failed = ours.recv()
            if table != current:
                part.table.begin(*TABLES[table])
                current = table
            part.table.row(*cells[:-1], f"failed: {cells[-1]}" if failed else cells[-1])
            part.failures += failed
    except EOFError:
        process.join()
        if process.exitcode:
            if not current:
                part.table.begin(*TABLES["cold"])
            part.fail((), f"the rank's process ended with exit code {process.exitcode}; its error is on the screen")
    except LeftOut as reason:
        part.table.row(f"left out: {reason}")
    finally:
        process.kill()
        process.join()
