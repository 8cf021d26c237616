"""Real clients against the API, without Ray: those of OpenAI, the requests of others, each way to get a file."""

import base64
import io
import json
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import httpx_sse
import openai
import pytest
from openai.types import ImageGenPartialImageEvent

from service.api.rest import rest_app
from service.cli.main import main
from tests.support.backend import FakeBackend
from tests.support.films import Films, film
from tests.support.hostile import colored, file
from tests.support.in_process import served


class OneModel(Films):
    """A server with one model, as other servers are; `film` stays for videos."""

    def __init__(self, name: str = "one") -> None:
        super().__init__()
        self._models = [model for model in self._models if model.name == name]


@pytest.fixture(scope="module")
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture(scope="module")
def server(backend: FakeBackend, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPRAY_OUTPUTS_DIR", str(tmp_path_factory.mktemp("outputs")))
        with served(rest_app(backend)) as url:
            yield url


@pytest.fixture(scope="module")
def client(server: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


def post(url: str, path: str, body: dict[str, Any]) -> httpx.Response:
    answer = httpx.post(f"{url}{path}", json=body, trust_env=False, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer


def events(text: str) -> list[dict[str, Any]]:
    assert text.endswith("data: [DONE]\n\n")
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize(
    ("path", "model", "made"), [("/v1/images/generations", "one", "image"), ("/v1/videos/sync", "film", "video")]
)
def test_one_file_has_the_same_bytes_each_way(server: str, path: str, model: str, made: str) -> None:
    body = {"model": model, "prompt": "a", "seed": 7}
    found = {}
    in_json = post(server, path, body | {"response_format": "b64_json"}).json()
    found["b64_json"] = base64.b64decode(in_json["data"][0]["b64_json"])
    by_url = post(server, path, body | {"response_format": "url"}).json()
    found["url"] = httpx.get(by_url["data"][0]["url"], trust_env=False).content
    file = post(server, path, body | {"response_format": "file"})
    found["file"] = file.content
    for form in ("b64_json", "url"):
        stream = post(server, path, body | {"stream": True, "response_format": form})
        assert stream.headers["content-type"].startswith("text/event-stream")
        (event,) = events(stream.text)
        assert event["type"] == f"{made}_generation.completed"
        given = event.get("b64_json")
        found[f"stream, {form}"] = (
            base64.b64decode(given) if given else httpx.get(event["url"], trust_env=False).content
        )
        assert (given is None) == (form == "url")
    assert found == dict.fromkeys(found, b"picture 7")
    assert (file.headers["x-seed"], by_url["data"][0]["seed"]) == ("7", 7)
    assert file.headers["content-type"] == ("image/png" if made == "image" else "video/mp4")
    assert file.headers["content-disposition"].startswith("attachment; filename=")
    other = post(server, path, body | {"seed": 8, "response_format": "file"})
    assert other.content != found["file"]


def test_several_files_come_as_a_zip(server: str) -> None:
    body = {
        "model": "one",
        "prompt": "a",
        "n": 3,
        "seeds": [7, 5, 9],
        "output_format": "webp",
        "response_format": "file",
    }
    answers = [post(server, "/v1/images/generations", body) for _ in range(2)]
    assert answers[0].headers["content-type"] == "application/zip"
    assert answers[0].headers["x-seed"] == "7, 5, 9"
    assert answers[0].content == answers[1].content
    with zipfile.ZipFile(io.BytesIO(answers[0].content)) as archive:
        found = {name: archive.read(name) for name in archive.namelist()}
    assert found == {"0-7.webp": b"picture 7", "1-5.webp": b"picture 5", "2-9.webp": b"picture 9"}


def test_a_stream_of_a_video_has_progress(server: str) -> None:
    body = {"model": "film", "prompt": "asleep", "stream": True, "stream_options": {"include_progress": True}}
    text = post(server, "/v1/videos/sync", body).text
    assert ": film is running, 0 wait" in text
    first, last = events(text)
    assert (first["type"], first["step"], first["total_steps"]) == ("video_generation.progress", 1, 1)
    assert (last["num_frames"], last["fps"], last["output_format"]) == (5, 16, "mp4")
    failing = post(server, "/v1/videos/sync", body | {"prompt": "later"}).text
    assert json.loads(failing.splitlines()[-2][6:])["error"]["code"] == "worker_lost"


def test_openais_client_draws(client: openai.OpenAI, backend: FakeBackend) -> None:
    extra = {"seed": 7, "lora": {"name": "ink", "scale": 0.5}}
    drawn = client.images.generate(model="one", prompt="a", n=2, size="64x64", quality="high", extra_body=extra)
    assert drawn.data is not None
    assert [base64.b64decode(picture.b64_json or "") for picture in drawn.data] == [b"picture 7", b"picture 8"]
    assert drawn.data[0].model_extra == {"seed": 7}
    assert backend.requests[-1].loras == (("ink", 0.5),)
    by_url = client.images.generate(model="one", prompt="a", response_format="url", extra_body={"seed": 7})
    assert by_url.data is not None
    assert httpx.get(by_url.data[0].url or "", trust_env=False).content == b"picture 7"


def test_openais_client_streams(client: openai.OpenAI) -> None:
    stream = client.images.generate(model="one", prompt="a", n=2, stream=True, extra_body={"seed": 3})
    found = list(stream)
    assert [event.type for event in found] == ["image_generation.completed"] * 2
    assert [base64.b64decode(event.b64_json) for event in found] == [b"picture 3", b"picture 4"]
    *partial, _ = client.images.generate(model="one", prompt="a", stream=True, partial_images=3)
    for index, event in enumerate(partial):
        assert isinstance(event, ImageGenPartialImageEvent)
        assert (event.partial_image_index, event.output_format) == (index, "jpeg")
        assert base64.b64decode(event.b64_json) == f"preview {index}".encode()
    assert len(partial) == 3


def test_openais_client_reads_the_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="did you mean 'num_inference_steps'") as refused:
        client.images.generate(model="one", prompt="a", extra_body={"num_infrence_steps": 3})
    assert (refused.value.param, refused.value.code) == ("num_infrence_steps", "unknown_parameter")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("org/absent")
    with pytest.raises(openai.RateLimitError):
        client.images.generate(model="one", prompt="full")
    with pytest.raises(openai.APIStatusError) as large:
        client.images.generate(model="one", prompt="a", extra_body={"negative_prompt": "a" * (1 << 20)})
    assert (large.value.status_code, large.value.code) == (413, "body_too_large")
    assert client.models.retrieve("brush").id == "paint"
    assert {model.id for model in client.models.list()} == {"one", "two", "paint", "film"}


def test_a_client_of_server_sent_events_reads_a_stream(server: str) -> None:
    """httpx-sse, which takes comments for nothing and insists on the content type."""
    body = {"model": "one", "prompt": "asleep", "seed": 7, "stream": True, "stream_options": {"include_progress": True}}
    with httpx.Client(trust_env=False) as http:
        with httpx_sse.connect_sse(http, "POST", f"{server}/v1/images/generations", json=body) as source:
            first, last, done = source.iter_sse()
        assert (first.event, first.json()["step"]) == ("image_generation.progress", 1)
        assert last.event == last.json()["type"] == "image_generation.completed"
        assert base64.b64decode(last.json()["b64_json"]) == b"picture 7"
        assert (done.event, done.data) == ("message", "[DONE]")
        failing = body | {"prompt": "later"}
        with httpx_sse.connect_sse(http, "POST", f"{server}/v1/images/generations", json=failing) as source:
            *_, error = source.iter_sse()
        assert error.json()["error"]["code"] == "worker_lost"


@pytest.mark.parametrize("name", ["cup.mp4", "cup.webp"])
def test_spray_generate_shows_steps(
    server: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = "film" if name.endswith("mp4") else "one"
    code = main(["generate", "a", "--model", model, "--seed", "7", "--output", name, "--server", server])
    said = capsys.readouterr()
    assert (code, said.out) == (0, f"{name}\n"), said.err
    assert "seeds: 7" in said.err
    assert "step 1/1" in said.err
    assert Path(name).read_bytes() == b"picture 7"


RIVALS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("/v1/images/generations", "one", "ComfyUI nodes of SGLang",
     {"prompt": "a", "size": "1024x1024", "n": 1, "response_format": "b64_json", "negative_prompt": "b",
      "guidance_scale": 4.0, "num_inference_steps": 20, "seed": 42, "enable_teacache": True, "background": "auto",
      "output_format": "png", "generator_device": "cuda", "enhance_prompt": True, "quality": "auto", "style": "vivid"}),
    ("/v1/images/generations", "one", "SGLang's benchmark",
     {"model": "one", "prompt": "a", "n": 1, "response_format": "b64_json", "size": "512x512",
      "num_inference_steps": 4}),
    ("/v1/videos/sync", "film", "ComfyUI nodes of SGLang, a video",
     {"prompt": "a", "size": "64x64", "seconds": 4, "fps": 16, "num_frames": 5, "guidance_scale": 4.0,
      "num_inference_steps": 4, "seed": 42, "enable_teacache": True, "generator_device": "cuda"}),
    ("/v1/videos/sync", "film", "SGLang's benchmark, a video",
     {"model": "film", "prompt": "a", "num_outputs_per_prompt": 1, "size": "64x64", "num_frames": 5,
      "num_inference_steps": 4, "fps": 16}),
    ("/v1/images/generations", "one", "vLLM-Omni's benchmark",
     {"prompt": "a", "width": 512, "height": 512, "num_inference_steps": 4, "true_cfg_scale": 4.0, "seed": 42,
      "n": 1, "response_format": "b64_json"}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "model", "whose", "body"), RIVALS, ids=[row[2] for row in RIVALS])
@pytest.mark.parametrize("form", [False, True])
def test_clients_of_other_servers_need_no_change(
    path: str, model: str, whose: str, body: dict[str, Any], form: bool
) -> None:
    """With the key that vLLM-Omni's benchmark always sends, and for forms with fields as their clients write them."""
    headers = {"authorization": "Bearer EMPTY"}
    with served(rest_app(OneModel(model))) as url:
        if form:
            parts: Any = {name: (None, str(value)) for name, value in body.items()}
            answer = httpx.post(f"{url}{path}", files=parts, headers=headers, trust_env=False)
        else:
            answer = httpx.post(f"{url}{path}", json=body, headers=headers, trust_env=False)
    assert answer.status_code == 200, answer.text
    known = {"enable_teacache", "generator_device", "enhance_prompt", "quality", "style"}
    assert answer.headers.get("x-ignored-params", "") == ", ".join(sorted(known & body.keys()))


def test_extra_body_of_a_form_as_sglangs_benchmark_sends_it(server: str, backend: FakeBackend, tmp_path: Path) -> None:
    extra = json.dumps({"seed": 5, "num_inference_steps": 2})
    parts: Any = {"model": (None, "film"), "prompt": (None, "a"), "extra_body": (None, extra)}
    answer = httpx.post(f"{server}/v1/videos/sync", files=parts, trust_env=False)
    assert answer.status_code == 200, answer.text
    assert (backend.requests[-1].seed, backend.requests[-1].num_inference_steps) == (5, 2)


@dataclass(frozen=True)
class VideoClient:
    """How a client of another server makes a video at `/v1/videos`.

    Attributes:
        model: that the server has.
        body: the fields that it sends.
        form: as a form; False: as JSON.
        key: that it sends; empty: none.
        picture: the name and the type with which it sends a picture; None: it sends none.
        deletes: it deletes the video once it has the file.
    """

    model: str
    body: dict[str, Any]
    form: bool = False
    key: str = ""
    picture: tuple[str, str] | None = None
    deletes: bool = False


BENCH: dict[str, Any] = {
    "prompt": "a", "height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 4, "seed": 42, "fps": 16,
}  # fmt: skip
"""As vLLM-Omni's benchmark writes it: no model."""

VIDEO_CLIENTS = {
    "ComfyUI nodes of SGLang": VideoClient(
        "film",
        {"prompt": "a", "size": "64x64", "seconds": 4, "fps": 16, "num_frames": 5, "negative_prompt": "b",
         "guidance_scale": 4.0, "num_inference_steps": 4, "seed": 42, "enable_teacache": True,
         "generator_device": "cuda", "output_path": "/outputs"},
        key="sk-proj-1234567890",
    ),
    "SGLang's benchmark": VideoClient(
        "film",
        {"model": "film", "prompt": "a", "size": "64x64", "num_frames": 5, "fps": 16, "num_inference_steps": 4,
         "num_outputs_per_prompt": 1, "seed": 42},
    ),
    "SGLang's benchmark, with a picture": VideoClient(
        "one",
        {"model": "one", "prompt": "a", "size": "64x64", "num_frames": 5, "fps": 16,
         "extra_body": json.dumps({"num_inference_steps": 4, "seed": 42, "fps": 16})},
        form=True, picture=("cup.png", "application/octet-stream"),
    ),
    "vLLM-Omni's benchmark": VideoClient("film", BENCH, form=True, deletes=True),
    "vLLM-Omni's benchmark, with a picture": VideoClient(
        "one", BENCH, form=True, picture=("cup.png", "image/png"), deletes=True
    ),
    "ComfyUI nodes of vLLM-Omni": VideoClient(
        "film",
        BENCH | {"model": "film", "negative_prompt": "b", "guidance_scale": 4.0, "guidance_scale_2": 3.0,
                 "lora": json.dumps({"name": "ink", "scale": 0.5})},
        form=True, deletes=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("whose", VIDEO_CLIENTS)
def test_videos_of_other_servers_clients_need_no_change(whose: str) -> None:
    """Each submits, looks until it has ended, and fetches the file; some delete it then."""
    given = VIDEO_CLIENTS[whose]
    headers = {"authorization": f"Bearer {given.key}"} if given.key else {}
    backend = OneModel(given.model)
    with served(rest_app(backend)) as url, httpx.Client(base_url=url, headers=headers, trust_env=False) as http:
        if given.form:
            parts: list[Any] = [(name, (None, str(value))) for name, value in given.body.items()]
            if given.picture:
                name, kind = given.picture
                parts.append(("input_reference", (name, file(colored()), kind)))
            accepted = http.post("/v1/videos", files=parts)
        else:
            accepted = http.post("/v1/videos", json=given.body)
        assert accepted.status_code == 200, accepted.text  # they take no 202
        assert accepted.json()["status"] == "queued"
        at = f"/v1/videos/{accepted.json()['id']}"
        until = time.monotonic() + 60
        while (video := http.get(at)).json()["status"] not in ("completed", "failed"):
            assert video.status_code == 200 and time.monotonic() < until, video.text
            time.sleep(0.05)
        content = http.get(f"{at}/content")
        deleted = http.delete(at).json() if given.deletes else None
        left = http.get(at).status_code
    assert (video.json()["status"], video.json()["error"]) == ("completed", None), video.text
    (request,) = backend.requests
    assert (content.headers["content-type"], content.content) == ("video/mp4", film(request))
    asked = (request.width, request.height, request.num_frames, request.fps, request.num_inference_steps, request.seed)
    assert asked == (64, 64, 5, 16, 4, 42)
    assert [each.role for each in request.inputs] == (["image"] if given.picture else [])
    assert request.loras == ((("ink", 0.5),) if "lora" in given.body else ())
    known = {"enable_teacache", "generator_device", "output_path"}
    assert accepted.headers.get("x-ignored-params", "") == ", ".join(sorted(known & given.body.keys()))
    assert (left, deleted and deleted["deleted"]) == ((404, True) if given.deletes else (200, None))
