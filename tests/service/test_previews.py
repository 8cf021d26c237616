"""Previews over REST, gRPC and in a terminal, without Ray: who gets them, in what shape, and what is refused."""

import base64
import io
import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from fastapi.testclient import TestClient
from openai.types import ImageGenPartialImageEvent
from PIL import Image

from service.api.responses import generation_response, video_object
from service.api.rest import rest_app
from service.cli.commands import generate as generate_command
from service.cli.main import main
from service.cli.pictures import for_iterm, for_kitty, shown_by_terminal
from service.jobs.records import Job, JobOutput
from service.jobs.requests import new_job
from service.proto.mediagen.v1 import generation_service_pb2 as pb
from service.rpc.answers import finished_events, header, output_header
from service.state.quarantine import fingerprint
from sp_core.degrees import ParallelDegrees
from tests.support.backend import FakeBackend
from tests.support.grpc_calls import Backend, stream
from tests.support.in_process import served
from workers.errors import InvalidParameter
from workers.messages import GenerationRequest, GenerationResult, PreviewOptions
from workers.model.media import what_differs

IMAGES, VIDEOS = ("/v1/images/generations", "one", "image"), ("/v1/videos/sync", "film", "video")


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


def events(backend: FakeBackend, path: str, model: str, **body: Any) -> list[dict[str, Any]]:
    answer = TestClient(rest_app(backend)).post(path, json={"model": model, "prompt": "a", "stream": True} | body)
    assert answer.status_code == 200, answer.text
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize(("path", "model", "made"), [IMAGES, VIDEOS])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_stream_has_as_many_as_are_asked_for(
    backend: FakeBackend, path: str, model: str, made: str, count: int
) -> None:
    *partial, last = events(backend, path, model, size="64x48", partial_images=count)
    assert last["type"] == f"{made}_generation.completed"
    assert [event["partial_image_index"] for event in partial] == list(range(count))
    for index, event in enumerate(partial):
        assert time.time() - event.pop("created_at") < 60
        assert event == {
            "type": f"{made}_generation.partial_image",
            "b64_json": base64.b64encode(f"preview {index}".encode()).decode(),
            "partial_image_index": index,
            "size": "64x48",
            "quality": "auto",
            "background": "opaque",
            "output_format": "jpeg",
        }
    assert backend.requests[0].previews == (PreviewOptions(count=count) if count else None)


def test_the_event_is_openais(backend: FakeBackend) -> None:
    """Its fields are all that OpenAI's client declares, and their values are those that it allows."""
    event, _ = events(backend, *IMAGES[:2], size="1024x1024", partial_images=1)
    assert event.keys() == ImageGenPartialImageEvent.model_fields.keys()
    assert ImageGenPartialImageEvent.model_validate(event).model_dump() == event


def test_the_decoder_is_chosen(backend: FakeBackend) -> None:
    events(backend, *IMAGES[:2], partial_images=2, stream_options={"preview_decoder": "vae"})
    assert backend.requests[0].previews == PreviewOptions(count=2, decoder="vae")


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"partial_images": 4}, "partial_images", "less than or equal to 3"),
        ({"partial_images": -1}, "partial_images", "greater than or equal to 0"),
        ({"partial_images": 1, "stream": False}, "partial_images", "add stream: true"),
        ({"stream_options": {"preview_decoder": "png"}}, "stream_options.preview_decoder", "'linear' or 'vae'"),
    ],
)
@pytest.mark.parametrize(("path", "model"), [IMAGES[:2], VIDEOS[:2]])
def test_refused(backend: FakeBackend, path: str, model: str, body: dict[str, Any], param: str, said: str) -> None:
    answer = TestClient(rest_app(backend)).post(path, json={"model": model, "prompt": "a", "stream": True} | body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert said in answer.json()["error"]["message"]


def test_no_preview_without_a_stream(backend: FakeBackend) -> None:
    answer = TestClient(rest_app(backend)).post(IMAGES[0], json={"model": "one", "prompt": "a", "partial_images": 0})
    assert answer.status_code == 200
    assert backend.requests[0].previews is None


def test_a_request_is_the_same_with_previews_and_without() -> None:
    """For its idempotency key, and for the count of gangs that it has cost."""
    request = GenerationRequest("a", "one", "a", 64, 64, 4, seed=1)
    assert fingerprint("", replace(request, previews=PreviewOptions(count=3))) == fingerprint("", request)
    assert fingerprint("", replace(request, traceparent="a")) == fingerprint("", request)
    assert fingerprint("", replace(request, n=2)) != fingerprint("", request)


def kinds(messages: list[Any]) -> list[str]:
    return [message.WhichOneof("event") for message in messages]


def test_grpc_sends_them_when_its_options_ask() -> None:
    backend = Backend()
    answer = stream(backend, pb.StreamOptions(preview_every_n_steps=4, preview_max_edge=256, preview_decoder="vae"))
    assert kinds(answer.messages) == ["accepted", "progress", "preview", "output_header", "output_chunk", "done"]
    preview = answer.messages[2].preview
    assert (preview.index, preview.step, preview.mime_type, preview.data) == (0, 1, "image/jpeg", b"preview 0")
    assert backend.requests[0].previews == PreviewOptions(every=4, decoder="vae", max_edge=256)
    assert "preview" not in kinds(stream(backend).messages)
    assert backend.requests[1].previews is None
    stream(backend, pb.StreamOptions(preview_every_n_steps=1))
    assert backend.requests[2].previews == PreviewOptions(every=1)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"preview_every_n_steps": -1}, "options.preview_every_n_steps"),
        ({"preview_every_n_steps": 3, "preview_max_edge": 16}, "options.preview_max_edge"),
        ({"preview_every_n_steps": 3, "preview_max_edge": 4096}, "options.preview_max_edge"),
        ({"preview_every_n_steps": 3, "preview_decoder": "png"}, "options.preview_decoder"),
    ],
)
def test_grpc_refuses_by_name(options: dict[str, Any], param: str) -> None:
    backend = Backend()
    answer = stream(backend, pb.StreamOptions(**options))
    assert (answer.code, answer.messages[0].error.param) == (grpc.StatusCode.INVALID_ARGUMENT, param)
    assert backend.requests == []


def test_grpc_says_which_option_has_no_effect() -> None:
    (warning,) = stream(Backend(), pb.StreamOptions(preview_max_edge=64)).messages[-1].done.warnings
    assert (warning.code, warning.param) == ("parameter_ignored", "options.preview_max_edge")


def test_grpc_names_its_own_option_for_a_model_without_previews() -> None:
    backend = Backend()
    backend.raises["odd"] = InvalidParameter("partial_images", "'one' has no previews")
    answer = stream(backend, pb.StreamOptions(preview_every_n_steps=3), prompt="odd")
    assert answer.messages[-1].error.param == "options.preview_every_n_steps"


def test_grpc_says_that_previews_have_failed() -> None:
    request = GenerationRequest("a", "one", "a", 64, 64, 4, seed=1)
    texts = ("prompt: cut", "previews: none from step 2 on")
    result = GenerationResult((b"a",), (1,), ParallelDegrees(), 0.1, (0.1,), 0.1, texts)
    *_, done = finished_events(request, result, 1 << 20, 0.0, [])
    assert [(warning.code, warning.param) for warning in done.done.warnings] == [
        ("prompt_truncated", "params.prompt"),
        ("previews_failed", "options.preview_every_n_steps"),
    ]


def test_answers_have_the_size_that_the_model_has_made() -> None:
    request = GenerationRequest("a", "one", "a", 64, 64, 4, seed=1, num_frames=9, fps=4, output_format="mp4")
    texts = tuple(what_differs([Image.new("RGB", (96, 80))] * 5, request))
    result = GenerationResult((b"a",), (1,), ParallelDegrees(), 0.1, (0.1,), 0.1, texts)
    *_, done = finished_events(request, result, 1 << 20, 0.0, [])
    assert [(warning.code, warning.param) for warning in done.done.warnings] == [
        ("size_changed", "params.width"),
        ("num_frames_changed", "params.num_frames"),
    ]
    told = header(request, result, 0)
    assert (told.width, told.height, told.num_frames) == (96, 80, 5)
    answer = generation_response(request, result, [{}])
    assert (answer["size"], answer["num_frames"]) == ("96x80", 5)
    kept = new_job(request, "").request
    job = Job("job_1", "video", "film", "", kept, 1, "standard", "succeeded", 1.0, warnings=texts)
    video, of_job = video_object(job), output_header(job, JobOutput("a", "mp4", 1, "", 1), 0)
    assert (video["size"], video["num_frames"], video["seconds"]) == ("96x80", 5, "1.25")
    assert (of_job.width, of_job.height, of_job.num_frames) == (96, 80, 5)


PICTURE = Image.effect_noise((96, 64), 50).convert("RGB")


def jpeg() -> bytes:
    PICTURE.save(buffer := io.BytesIO(), format="jpeg")
    return buffer.getvalue()


def test_kitty_is_sent_a_png_in_parts() -> None:
    text = for_kitty(jpeg())
    commands = re.findall("\x1b_G(.*?);(.*?)\x1b\\\\", text)
    assert len(commands) > 2
    assert text == "".join(f"\x1b_G{keys};{part}\x1b\\" for keys, part in commands) + "\n"
    assert [keys.rpartition("m=")[2] for keys, _ in commands] == ["1"] * (len(commands) - 1) + ["0"]
    assert commands[0][0].startswith("a=T,f=100,")
    assert all(0 < len(part) <= 4096 for _, part in commands)
    picture = Image.open(io.BytesIO(base64.b64decode("".join(part for _, part in commands))))
    assert (picture.format, picture.size) == ("PNG", (96, 64))


def test_iterm_is_sent_the_file() -> None:
    sent = re.fullmatch("\x1b]1337;File=inline=1;size=([0-9]+);.*?:(.*)\x07\n", for_iterm(jpeg()))
    assert sent is not None
    assert (int(sent[1]), base64.b64decode(sent[2])) == (len(jpeg()), jpeg())


@pytest.mark.parametrize(
    ("variables", "terminal", "shown"),
    [
        ({"TERM": "xterm-kitty"}, True, for_kitty),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "ghostty"}, True, for_kitty),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, True, for_iterm),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, True, for_iterm),
        ({"TERM": "xterm-256color"}, True, None),
        ({"TERM": "xterm-kitty"}, False, None),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux"}, True, None),
        ({"TERM": "screen-256color", "LC_TERMINAL": "iTerm2"}, True, None),
    ],
)
def test_a_terminal_is_known_by_its_environment(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], terminal: bool, shown: Any
) -> None:
    for name in ("TERM", "TERM_PROGRAM", "LC_TERMINAL", "TMUX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert shown_by_terminal() is shown


@pytest.mark.parametrize("can", [True, False])
def test_the_command_shows_previews_and_warnings(
    backend: FakeBackend, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, can: bool
) -> None:
    monkeypatch.setattr(
        generate_command, "shown_by_terminal", lambda: (lambda picture: f"[{picture!r}]") if can else None
    )
    output = tmp_path / "long.png"
    with served(rest_app(backend)) as url:
        command = ["generate", "long", "--model", "one", "--seed", "7", "--previews"]
        assert main([*command, "--server", url, "--output", str(output)]) == 0
    out, err = capsys.readouterr()
    assert (out, output.read_bytes()) == (f"{output}\n", b"picture 7")
    assert "warning: prompt: text_encoder reads 512 of 719 tokens\n" in err
    assert [f"[b'preview {index}']" in err for index in range(3)] == [can] * 3
    assert ("no previews: standard error is no terminal" in err) == (not can)
    assert backend.requests[0].previews == (PreviewOptions(count=3) if can else None)
