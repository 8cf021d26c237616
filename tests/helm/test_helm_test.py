"""What the pods of `helm test` ask for: a picture, or a video where no model draws pictures; by their own commands."""

import asyncio
import dataclasses
import os
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import grpc
import pytest

from service.api.backend import Report
from service.api.rest import rest_app
from service.proto.mediagen.v1 import generation_service_pb2_grpc as services
from tests.helm.chart import CHART, Values, of_kind, profile, render, texts, with_values
from tests.support.grpc_calls import Backend
from tests.support.in_process import served
from workers.messages import GenerationRequest, GenerationResult

FILM: Values = {"name": "film", "source": "/film", "device": "cpu", "defaults": {"num_frames": 9}}
PAINT: Values = {"name": "paint", "source": "/paint", "device": "cpu"}


class Drawing(Backend):
    """Its files begin as a PNG or an MP4 does, whatever the request wants them to be."""

    async def _generate(self, request: GenerationRequest) -> AsyncGenerator[Report]:
        begins = b"\x00\x00\x00\x20ftyp" if request.output_format == "mp4" else b"\x89PNG"
        async for report in super()._generate(request):
            yield dataclasses.replace(report, outputs=(begins,)) if isinstance(report, GenerationResult) else report


def release(*models: Values, **tests: Any) -> Values:
    return with_values(profile("trial"), {"models": [*models], "tests": tests})


def pods(values: Values) -> dict[str, Any]:
    """The container of each pod of `helm test`, by its API."""
    made = of_kind(render(values), "Pod")
    return {pod["metadata"]["name"].rpartition("-")[2]: pod["spec"]["containers"][0] for pod in made}


def run(container: Any, address: str) -> str:
    """What the command of a pod says, which asks at this address."""
    rendered = {each["name"]: each["value"] for each in container["env"]}
    told = {"SPRAY_HTTP": address, "SPRAY_GRPC": address, "PYTHONPATH": str(CHART.parent), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, *container["command"][1:]]
    done = subprocess.run(command, env=os.environ | rendered | told, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("model", "made"), [(PAINT, "a PNG of"), (FILM, "an MP4 of")], ids=["picture", "video"])
def test_what_the_model_makes_is_asked_for(
    model: Values, made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPRAY_OUTPUTS_DIR", str(tmp_path))
    asking = pods(release(model))
    with served(rest_app(Drawing())) as url:
        assert made in run(asking["rest"], url.removeprefix("http://"))

    async def by_grpc() -> str:
        server = grpc.aio.server()
        services.add_MediaGenerationServiceServicer_to_server(Drawing(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            return await asyncio.to_thread(run, asking["grpc"], f"127.0.0.1:{port}")
        finally:
            await server.stop(None)

    assert made in asyncio.run(by_grpc())


@pytest.mark.parametrize(
    ("values", "model", "makes"),
    [
        (release(PAINT, FILM), "paint", "picture"),
        (release(FILM, PAINT), "paint", "picture"),
        (release(FILM), "film", "video"),
        (release(FILM, PAINT, model="film"), "film", "video"),
        (release(PAINT, FILM | {"aliases": ["movie"]}, model="movie"), "movie", "video"),
        (release(PAINT | {"tasks": ["text-to-video"]}), "paint", "video"),
        (release(FILM | {"tasks": ["text-to-image", "text-to-video"]}), "film", "picture"),
    ],
)
def test_the_first_model_that_draws_is_asked_or_the_one_that_is_named(values: Values, model: str, makes: str) -> None:
    for container in pods(values).values():
        told = {each["name"]: each["value"] for each in container["env"]}
        assert (told["SPRAY_MODEL"], told["SPRAY_MAKES"]) == (model, makes)
    notes = texts(values)["spray/templates/NOTES.txt"]
    path = {"picture": "/v1/images/generations -H", "video": "/v1/videos/sync --output video.mp4 -H"}
    assert f"curl http://127.0.0.1:8000{path[makes]}" in notes and f'"model": "{model}"' in notes
    assert ("b64_json" in notes) == (makes == "picture") and f"One {makes} by REST" in notes


def test_named_clients_do_not_keep_the_tests_out() -> None:
    clients = {"networkPolicy": {"clients": [{"podSelector": {"matchLabels": {"app": "web"}}}]}}
    values = with_values(profile("production"), clients)

    def peers(values: Values) -> list[Any]:
        (policy,) = of_kind(render(values), "NetworkPolicy")
        return [
            rule["from"]
            for rule in policy["spec"]["ingress"]
            if {"port": 9000, "protocol": "TCP"} in rule.get("ports", [])
        ]

    ((web, tests),) = peers(values)
    assert web == clients["networkPolicy"]["clients"][0]
    for pod in of_kind(render(values), "Pod"):
        assert tests["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert tests["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "test"
    assert peers(with_values(values, {"tests": {"enabled": False}})) == [[web]]
