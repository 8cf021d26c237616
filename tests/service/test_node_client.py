"""OpenAI's client for Node against the API, without Ray. `make node` installs it beside the packages of Python."""

import base64
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.api.backend import Report
from service.api.rest import rest_app
from tests.support.films import Films, film
from tests.support.hostile import colored, file
from tests.support.in_process import served
from tests.support.programs import needs
from workers.messages import GenerationRequest

MODULES = Path(sys.prefix) / "node" / "node_modules"

pytestmark = [
    needs("node", "OpenAI's client for JavaScript runs on it"),
    pytest.mark.skipif(
        not (MODULES / "openai").is_dir() and "CI" not in os.environ,
        reason="OpenAI's client for Node is not installed: make node",
    ),
]

PROGRAM = """
const OpenAI = require("openai");
const client = new OpenAI({ baseURL: process.argv[1] + "/v1", apiKey: "none", maxRetries: 0 });
const failure = ({ constructor, status, code, param }) => ({ name: constructor.name, status, code, param });

const wait = (ms) => new Promise((done) => setTimeout(done, ms));

async function poll(id) {  // as the client for Python does; this one leaves it to its caller
  const states = [];
  while (true) {
    const { data, response } = await client.videos.retrieve(id).withResponse();
    if (states.at(-1) !== data.status) states.push(data.status);
    if (["completed", "failed"].includes(data.status)) return { states, video: data };
    await wait(Number(response.headers.get("openai-poll-after-ms")) / 10);
  }
}

async function videos() {
  const found = {};
  const body = { model: "film", prompt: "asleep", size: "64x64", seconds: "4", fps: 2, seed: 7 };
  const created = await client.videos.create(body);
  found.created = created;
  found.polled = await poll(created.id);
  const content = await client.videos.downloadContent(created.id);
  found.type = content.headers.get("content-type");
  found.content = Buffer.from(await content.arrayBuffer()).toString("base64");
  const picture = await client.videos.downloadContent(created.id, { variant: "thumbnail" });
  found.thumbnail = Buffer.from(await picture.arrayBuffer()).toString("base64");
  const cup = await OpenAI.toFile(Buffer.from(process.argv[2], "base64"), "cup.png");
  const moved = await client.videos.create({ model: "one", prompt: "a", size: "64x64", input_reference: cup });
  found.moved = await poll(moved.id);
  found.failed = await poll((await client.videos.create({ ...body, prompt: "failed" })).id);
  found.early = await client.videos.downloadContent(found.failed.video.id).catch(failure);
  const ids = async () => {
    const listed = [];
    for await (const video of client.videos.list({ limit: 1 })) listed.push(video.id);
    return listed;
  };
  found.listed = await ids();
  found.deleted = await client.videos.delete(created.id);
  found.gone = await client.videos.retrieve(created.id).catch(failure);
  found.left = await ids();
  return found;
}

async function main() {
  const found = {};
  const body = { model: "one", prompt: "a", size: "64x64", seed: 7 };
  const drawn = await client.images.generate({ ...body, n: 2, num_inference_steps: 4 });
  found.drawn = drawn.data.map((picture) => [picture.b64_json, picture.seed]);
  const byUrl = await client.images.generate({ ...body, response_format: "url" });
  found.fetched = Buffer.from(await (await fetch(byUrl.data[0].url)).arrayBuffer()).toString("base64");
  found.events = [];
  for await (const event of await client.images.generate({ ...body, stream: true })) {
    found.events.push([event.type, event.b64_json]);
  }
  found.models = [];
  for await (const model of client.models.list()) found.models.push(model.id);
  found.model = (await client.models.retrieve("brush")).id;
  found.typo = await client.images.generate({ ...body, num_infrence_steps: 3 }).catch(failure);
  found.full = await client.images.generate({ ...body, prompt: "full" }).catch(failure);
  found.absent = await client.models.retrieve("org/absent").catch(failure);
  found.later = await (async () => {
    for await (const event of await client.images.generate({ ...body, prompt: "later", stream: true })) {}
  })().catch(failure);
  const film = { model: "film", prompt: "a", seed: 7, response_format: "b64_json" };
  found.raw = await client.post("/videos/sync", { body: film });
  found.videos = await videos();
  const leaving = new AbortController();
  setTimeout(() => leaving.abort(), 300);
  found.left = await client.images.generate({ ...body, prompt: "slow" }, { signal: leaving.signal }).catch(failure);
  console.log(JSON.stringify(found));
}
main();
"""


class Watched(Films):
    """Knows the prompts that are under way."""

    def __init__(self) -> None:
        super().__init__()
        self.under_way: list[str] = []

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Report]:
        self.under_way.append(request.prompt)
        try:
            async with contextlib.aclosing(super().generate(request)) as reports:
                async for report in reports:
                    yield report
        finally:
            self.under_way.remove(request.prompt)


@pytest.fixture(scope="module")
def backend() -> Watched:
    return Watched()


@pytest.fixture(scope="module")
def found(backend: Watched, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the program has seen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPRAY_OUTPUTS_DIR", str(tmp_path_factory.mktemp("outputs")))
        with served(rest_app(backend)) as url:
            without_proxies = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
            picture = base64.b64encode(file(colored())).decode()
            ran = subprocess.run(
                ["node", "-e", PROGRAM, url, picture], env=without_proxies | {"NODE_PATH": str(MODULES)},
                capture_output=True, text=True, timeout=120,
            )  # fmt: skip
            assert ran.returncode == 0, ran.stderr
            until = time.monotonic() + 10  # the last has left
            while backend.under_way and time.monotonic() < until:
                time.sleep(0.01)
            yield json.loads(ran.stdout)


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def test_it_draws(found: dict[str, Any]) -> None:
    assert found["drawn"] == [[encoded("picture 7"), 7], [encoded("picture 8"), 8]]
    assert found["fetched"] == encoded("picture 7")
    assert base64.b64decode(found["raw"]["data"][0]["b64_json"])[4:8] == b"ftyp"


def test_it_streams(found: dict[str, Any]) -> None:
    assert found["events"][-1] == ["image_generation.completed", encoded("picture 7")]


def test_it_reads_models_and_errors(found: dict[str, Any]) -> None:
    assert set(found["models"]) == {"one", "two", "paint", "film"}
    assert found["model"] == "paint"
    typo = {"name": "BadRequestError", "status": 400, "code": "unknown_parameter", "param": "num_infrence_steps"}
    assert found["typo"] == typo
    assert (found["full"]["name"], found["full"]["code"]) == ("RateLimitError", "queue_full")
    assert (found["absent"]["name"], found["absent"]["code"]) == ("NotFoundError", "model_not_found")
    assert found["later"]["code"] == "worker_lost"


def test_it_makes_polls_fetches_lists_and_deletes_videos(found: dict[str, Any], backend: Watched) -> None:
    videos = found["videos"]
    created, polled = videos["created"], videos["polled"]["video"]
    assert (created["object"], created["status"], created["seconds"], created["size"]) == (
        "video", "queued", "4.5", "64x64",
    )  # fmt: skip
    states = videos["polled"]["states"]
    assert states[-1] == "completed" and set(states) <= {"queued", "in_progress", "completed"}
    assert (polled["id"], polled["progress"], polled["error"]) == (created["id"], 100, None)
    made = base64.b64decode(videos["content"])
    (request,) = (each for each in backend.requests if each.prompt == "asleep")
    assert (videos["type"], made[4:8], made) == ("video/mp4", b"ftyp", film(request))
    assert (request.num_frames, request.fps, request.seed) == (9, 2, 7)
    assert base64.b64decode(videos["thumbnail"])[8:12] == b"WEBP"
    assert videos["moved"]["video"]["status"] == "completed"
    assert [each.role for request in backend.requests for each in request.inputs] == ["image"]


def test_a_video_that_failed_is_an_answer_and_has_no_content(found: dict[str, Any]) -> None:
    failed = found["videos"]["failed"]["video"]
    assert (failed["status"], failed["error"]["code"]) == ("failed", "generation_failed")
    early = found["videos"]["early"]
    assert (early["name"], early["status"], early["code"]) == ("ConflictError", 409, "job_not_ready")


def test_a_video_that_is_deleted_is_gone(found: dict[str, Any]) -> None:
    videos = found["videos"]
    created, moved, failed = videos["created"]["id"], videos["moved"]["video"]["id"], videos["failed"]["video"]["id"]
    assert videos["listed"] == [failed, moved, created]
    assert videos["deleted"] == {"id": created, "object": "video.deleted", "deleted": True}
    assert (videos["gone"]["name"], videos["gone"]["code"]) == ("NotFoundError", "job_not_found")
    assert videos["left"] == [failed, moved]


def test_it_leaves(found: dict[str, Any], backend: Watched) -> None:
    """Its request is canceled: it would have waited for ever."""
    assert found["left"]["name"] == "APIUserAbortError"
    assert backend.requests[-1].prompt == "slow"
    assert backend.under_way == []
