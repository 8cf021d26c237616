"""What the gateway itself costs a request, and a deployment file, with 1, 10 and 50 models in the table.

    python -m tests.benchmarks.gateway_overhead [--turns 100] [--requests 25]

A request goes through the REST API and the real `Gateway` in one process: the API parses, validates, finds the model,
settles the request, admits it, and answers; only the call of the gang is replaced, by one that has a small picture at
once. Neither Ray nor a socket takes part. The models of a table differ in name and have an alias each; asked for is the
last one, by its name or by its alias.

All tables take turns in one run on one event loop, in shuffled order. The milliseconds are the median over the turns of
a turn's mean per request; the ratio is the median of the ratios to the table of one model in the same turn. Another
table of one model is among them: how far its ratio is from 1 is the noise. `GET /livez` is what the web framework takes
by itself.

The file: seconds to read it (`load_spec`), to check it against the model folders (`check_deployment`), to build the
config that Serve takes (`serve_config`), and for the gateway to take over its table (`reconfigure`).
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import yaml
from ray.serve.schema import ServeStatus

from deploy.check import check_deployment
from deploy.load import load_spec
from service.api.rest import rest_app
from service.app import serve_config
from service.gateway import Gateway
from sp_core.degrees import ParallelDegrees
from workers.demo_models.writer import write_demo_model
from workers.messages import GenerationRequest, GenerationResult

SIZES = (1, 10, 50)
AGAIN = "1 (again)"
PICTURE = bytes(range(256)) * 40
ROOMY = {"cpu": 1e6, "cuda": 1e6}


class Alone(Gateway):
    """A gateway without a cluster: every gang has its picture at once."""

    def __init__(self, instance_id: str) -> None:
        super().__init__(instance_id)
        self._dispatcher.run = self._draw  # type: ignore[method-assign]

    async def _draw(self, request: GenerationRequest, *_: Any) -> AsyncGenerator[Any]:
        yield GenerationResult((PICTURE,), (request.seed,), ParallelDegrees(), 0.0, (0.0,), 0.0)


def main() -> None:
    """Run both parts and print their tables."""
    parser = argparse.ArgumentParser(description="Cost of the gateway by the number of models.")
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--requests", type=int, default=25, help="per turn and table")
    arguments = parser.parse_args()
    sees_no_cluster = mock.patch(
        "service.state.poller._read", lambda: (ServeStatus(), [], [], {})
    )  # looking would start Ray
    with tempfile.TemporaryDirectory() as folder, sees_no_cluster:
        write_demo_model(Path(folder) / "demo", "qwen_image")
        files = {size: write(Path(folder), size) for size in SIZES}
        configs = {str(size): serve_config(load_spec(file)) for size, file in files.items()}
        configs[AGAIN] = configs["1"]
        asyncio.run(of_requests(configs, arguments.turns, arguments.requests))
        print()
        asyncio.run(of_files(files, max(3, arguments.turns // 4)))


def write(folder: Path, size: int) -> Path:
    """A deployment file with so many models, each with a folder of its own."""
    models = []
    for i in range(size):
        (source := folder / f"{size}-{i}").symlink_to(folder / "demo")
        model = {"name": f"model-{i}", "source": str(source), "aliases": [f"alias-{i}"]}
        models.append(model | {"parallel": {"ulysses_degree": 2}, "tasks": ["text-to-image"]})
    file = folder / f"{size}.yaml"
    file.write_text(yaml.safe_dump({"models": models}))
    return file


async def of_requests(configs: dict[str, dict[str, Any]], turns: int, requests: int) -> None:
    """Print what a request costs with each table."""
    calls: dict[tuple[str, str], Callable[[], Awaitable[httpx.Response]]] = {}
    for table, config in configs.items():
        gateway = await opened(config)
        last = len(gateway.models()) - 1
        client = httpx.AsyncClient(transport=httpx.ASGITransport(rest_app(gateway)), base_url="http://127.0.0.1")
        for asked, name in (("by name", f"model-{last}"), ("by alias", f"alias-{last}")):
            body = json.dumps({"model": name, "prompt": "a cup of coffee", "size": "1024x1024", "seed": 7})
            calls[asked, table] = lambda client=client, body=body: client.post("/v1/images/generations", content=body)
        calls["livez", table] = lambda client=client: client.get("/livez")
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for turn in range(turns + 2):
        for key in random.sample(list(calls), len(calls)):
            began = time.perf_counter()
            for _ in range(requests):
                (await calls[key]()).raise_for_status()
            if turn >= 2:  # the first two warm everything up
                seconds[key].append((time.perf_counter() - began) / requests)
    print(f"Medians of {turns} turns of {requests} requests each.\n")
    print("| models | by name, ms | ratio | by alias, ms | ratio | GET /livez, ms |")
    print("|---|---|---|---|---|---|")
    for table in configs:
        cells = [f"{milliseconds(seconds['by name', table])} | {ratio(seconds, 'by name', table)}"]
        cells += [f"{milliseconds(seconds['by alias', table])} | {ratio(seconds, 'by alias', table)}"]
        print(f"| {table} | {' | '.join(cells)} | {milliseconds(seconds['livez', table])} |")


async def of_files(files: dict[int, Path], turns: int) -> None:
    """Print what it takes to read, check, build and take over a file of each size."""
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(turns):
        for size in random.sample(list(files), len(files)):
            moments = [time.perf_counter()]
            spec = load_spec(files[size])
            moments.append(time.perf_counter())
            check_deployment(spec, ROOMY)
            moments.append(time.perf_counter())
            config = serve_config(spec)
            moments.append(time.perf_counter())
            await opened(config)
            moments.append(time.perf_counter())
            for i, part in enumerate(("load", "check", "build", "reconfigure")):
                seconds.setdefault((part, size), []).append(moments[i + 1] - moments[i])
    print(f"Medians of {turns} turns, ms.\n")
    print("| models | load_spec | check_deployment | serve_config | Gateway.reconfigure |")
    print("|---|---|---|---|---|")
    for size in files:
        cells = [milliseconds(seconds[part, size]) for part in ("load", "check", "build", "reconfigure")]
        print(f"| {size} | {' | '.join(cells)} |")


async def opened(config: dict[str, Any]) -> Gateway:
    """A gateway that has the table of this config."""
    gateway = Alone("benchmark")
    await gateway.reconfigure(config["applications"][-1]["deployments"][0]["user_config"])
    return gateway


def milliseconds(seconds: list[float]) -> str:
    """The median."""
    return f"{1e3 * statistics.median(seconds):.2f}"


def ratio(seconds: dict[tuple[str, str], list[float]], asked: str, table: str) -> str:
    """The median over the turns of the ratio to the table of one model."""
    pairs = zip(seconds[asked, table], seconds[asked, "1"], strict=True)
    return f"{statistics.median(mine / one for mine, one in pairs):.2f}"


if __name__ == "__main__":
    main()
