"""What the API costs a request: REST in JSON, as a stream, and gRPC, by callers and by the length of steps.

    python -m tests.benchmarks.api [--requests 60] [--callers 1 8 64] [--step-ms 0 10 100] [--steps 4] [--overload-s 30]
        [--overload-step-ms 100]

A local cluster with the real proxies, gateway and gang; only the ranks are replaced, by such whose steps take a given
time (`tests.benchmarks.timed_gang`). Callers send their next request when their last is answered. One gang works for
all of them, one request at a time, so `overhead` is what a request took beyond the steps of as many requests as there
are callers. The first row of each number of callers is a bare deployment of Serve, behind the same proxy, that answers
at once with as many bytes.

Then: how long after a caller has left a stream in the middle of a step of 100 ms the gang answers the next one; and
the answers to ten times as many requests of one step a second as the gang can do.

The last line says whether the bar is held: with 1 caller, steps of 0 ms and JSON, the median is at most 10 ms above
that of the bare deployment.
"""

import argparse
import asyncio
import contextlib
import math
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import httpx

from deploy.spec import DeploymentSpec
from service.app import serve_config
from service.cli.bench.driving import Drive
from service.cli.bench.load import Kind, complete, drawn
from service.cli.bench.sending import OK
from service.names import GATEWAY_APP
from service.proto.mediagen.v1 import generation_service_pb2 as pb
from service.proto.mediagen.v1.generation_service_pb2_grpc import MediaGenerationServiceStub
from service.rollout.local_cluster import LocalCluster
from tests.support.deployments import deployment, model, ready
from workers.demo_models.writer import write_demo_model

BAR_MS = 10.0
PICTURES = "/v1/images/generations"
WARM_UP = 5
MOST_QUEUED = 8

TO_GATEWAY = (("application", GATEWAY_APP),)
"""Where several applications have a route, Serve's gRPC proxy asks which is meant."""

Call = Callable[[int, float, int], Awaitable[None]]
"""One request: the number of the caller, milliseconds of a step, steps."""


def config(spec: DeploymentSpec, instance_id: str = "") -> dict[str, Any]:
    """As `service.app.serve_config`, with gangs that only take time, and the bare deployment beside them."""
    made = serve_config(spec, instance_id)
    *models, gateway = made["applications"]
    for each in models:
        each["import_path"] = "tests.benchmarks.timed_gang:timed_gang_app"
    bare = {"name": "hop", "route_prefix": "/hop", "import_path": "tests.benchmarks.timed_gang:hop_app"}
    return made | {"applications": [*models, gateway, bare]}


@contextlib.contextmanager
def cluster() -> Iterator[LocalCluster]:
    """A cluster whose model `demo` only takes time."""
    with tempfile.TemporaryDirectory() as scratch:
        write_demo_model(folder := Path(scratch) / "demo", "flux")
        roomy = model(folder).model_copy(update={"max_queued": 1000})
        short = model(folder, "short").model_copy(update={"max_queued": MOST_QUEUED})
        with mock.patch("service.rollout.local_cluster.serve_config", config):
            running = LocalCluster(deployment(roomy, short))
            with running:
                ready(running)
                yield running


@contextlib.asynccontextmanager
async def protocols(server: str, grpc_target: str, callers: int) -> AsyncIterator[dict[str, Call]]:
    """How each protocol asks. Every caller has a connection of its own, which stays open."""
    clients = [httpx.AsyncClient(base_url=server, trust_env=False, timeout=600) for _ in range(callers)]
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    channels = [grpc.aio.insecure_channel(grpc_target, options=options) for _ in range(callers)]
    stubs = [MediaGenerationServiceStub(channel) for channel in channels]

    def body(step_ms: float, steps: int, **more: Any) -> dict[str, Any]:
        return {"model": "demo", "prompt": f"{step_ms} ms", "num_inference_steps": steps, "seed": 7} | more

    async def hop(caller: int, step_ms: float, steps: int) -> None:
        sound(await clients[caller].post("/hop/", json=body(step_ms, steps)))

    async def rest(caller: int, step_ms: float, steps: int) -> None:
        sound(await clients[caller].post(PICTURES, json=body(step_ms, steps)))

    async def stream(caller: int, step_ms: float, steps: int) -> None:
        async with clients[caller].stream("POST", PICTURES, json=body(step_ms, steps, stream=True)) as answer:
            last = [line async for line in answer.aiter_lines() if line][-1]
        assert last == "data: [DONE]", last

    async def rpc(caller: int, step_ms: float, steps: int) -> None:
        request = pb.GenerateImageRequest(params=pb.GenerationParams(**body(step_ms, steps)))
        answer = await stubs[caller].GenerateImage(request, metadata=TO_GATEWAY, timeout=600)
        assert answer.outputs

    try:
        yield {"bare Serve": hop, "REST, JSON": rest, "REST, stream": stream, "gRPC": rpc}
    finally:
        for client in clients:
            await client.aclose()
        for channel in channels:
            await channel.close()


def sound(answer: httpx.Response) -> None:
    """Raise if it is an error, with what the server says."""
    assert answer.status_code == 200, f"{answer.status_code}: {answer.text[:500]}"


async def closed_loop(call: Call, callers: int, requests: int, step_ms: float, steps: int) -> tuple[list[float], float]:
    """Seconds of each request, and of all together."""
    numbers = iter(range(requests))
    took: list[float] = []

    async def caller(number: int) -> None:
        for _ in numbers:
            began = time.perf_counter()
            await call(number, step_ms, steps)
            took.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(caller(number) for number in range(callers)))
    return took, time.perf_counter() - began


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least so many percent do not exceed."""
    return sorted(values)[math.ceil(percent / 100 * len(values)) - 1]


async def overheads(
    server: str, grpc_target: str, callers: Sequence[int], step_ms: Sequence[float], steps: int, requests: int
) -> float:
    """Print a row for each cell; return by how many ms the cell of the bar is above the bare deployment."""
    medians: dict[tuple[str, int, float], float] = {}
    print("| callers | protocol | steps of, ms | requests/s | overhead p50, ms | p99, ms |")
    print("|---|---|---|---|---|---|")
    for number in callers:
        async with protocols(server, grpc_target, number) as calls:
            for name, call in calls.items():
                await closed_loop(call, number, max(WARM_UP, number), 0, 1)
                for length in step_ms if name != "bare Serve" else [0.0]:
                    took, wall_s = await closed_loop(call, number, max(requests, 2 * number), length, steps)
                    worked_s = 0.0 if name == "bare Serve" else number * steps * length / 1000
                    over = [1e3 * (each - worked_s) for each in took]
                    medians[name, number, length] = statistics.median(over)
                    shown = "-" if name == "bare Serve" else f"{length:g}"
                    print(
                        f"| {number} | {name} | {shown} | {len(took) / wall_s:.1f} | {statistics.median(over):.1f} | "
                        f"{percentile(over, 99):.1f} |",
                        flush=True,
                    )
    return medians["REST, JSON", callers[0], step_ms[0]] - medians["bare Serve", callers[0], 0.0]


async def cancellations(server: str, times: int) -> list[float]:
    """Milliseconds from when a caller leaves in the middle of a step to the answer to the next one."""
    found = []
    endless = {"model": "demo", "prompt": "100 ms", "num_inference_steps": 50, "stream": True}
    short = {"model": "demo", "prompt": "0 ms", "num_inference_steps": 1}
    async with httpx.AsyncClient(base_url=server, trust_env=False, timeout=600) as http:
        for _ in range(times):
            async with http.stream("POST", PICTURES, json=endless) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith(": step 1/"):
                        break
            began = time.perf_counter()
            sound(await http.post(PICTURES, json=short))
            found.append(1e3 * (time.perf_counter() - began))
    return found


async def overload(server: str, seconds: float, step_ms: float) -> dict[str, Any]:
    """Ten times as many requests a second as the gang can do, in an open loop."""
    capacity = 1e3 / step_ms  # one step each
    kinds = {"short": Kind(body={"num_inference_steps": 1})}
    load = (complete(one, f"{step_ms:g} ms", "short") for one in drawn(kinds, 0, 10 * capacity, None, seconds))
    drive = Drive(server, 60.0, lambda line: None)
    await drive.open_loop(load)
    refused = [1e3 * one.seconds for one in drive.outcomes if one.code == "queue_full"]
    answered = sum(one.code == OK for one in drive.outcomes)
    others = [one for one in drive.outcomes if one.code not in (OK, "queue_full")]
    return {
        "sent": len(drive.outcomes),
        "answered": answered,
        "refused": len(refused),
        "others": ", ".join(sorted({f"{one.code} {one.message}" for one in others})) or "none",
        "of capacity": answered / (capacity * drive.seconds),
        "p50": percentile(refused, 50) if refused else math.nan,
        "p99": percentile(refused, 99) if refused else math.nan,
        "late p99": percentile([1e3 * one.sent_late_s for one in drive.outcomes], 99),
    }


async def measure(running: LocalCluster, arguments: argparse.Namespace) -> float:
    """Print all tables; return what the bar is about, in ms."""
    a = arguments
    above_ms = await overheads(running.url, running.grpc_target, a.callers, a.step_ms, a.steps, a.requests)
    found = await cancellations(running.url, a.cancellations)
    print("\n| canceled | next answer after, p50 ms | most, ms |\n|---|---|---|")
    print(f"| {len(found)} | {statistics.median(found):.0f} | {max(found):.0f} |")
    under = await overload(running.url, a.overload_s, a.overload_step_ms)
    print(
        "\n| overload: sent | answered | of capacity | refused | p50 ms | p99 ms | other errors | sent late, p99 ms |"
    )
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {under['sent']} | {under['answered']} | {under['of capacity']:.0%} | {under['refused']} | "
        f"{under['p50']:.1f} | {under['p99']:.1f} | {under['others']} | {under['late p99']:.1f} |"
    )
    return above_ms


def main(given: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="What the API costs a request.")
    parser.add_argument("--requests", type=int, default=60, help="of each row, and at least two for each caller")
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--step-ms", type=float, nargs="+", default=[0.0, 10.0, 100.0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--cancellations", type=int, default=20)
    parser.add_argument("--overload-s", type=float, default=30.0)
    parser.add_argument("--overload-step-ms", type=float, default=100.0)
    arguments = parser.parse_args(given)
    with cluster() as running:
        above_ms = asyncio.run(measure(running, arguments))
    held = above_ms <= BAR_MS
    callers = arguments.callers[0]
    cell = f"{callers} caller{'s' if callers > 1 else ''}, steps of {arguments.step_ms[0]:g} ms, JSON"
    print(f"\n{cell}: {above_ms:.1f} ms above bare Serve, {'at most' if held else 'more than'} {BAR_MS:g} ms")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
