"""`spray generate` and `spray video` against a server of this process: files, JSON, colors, and who leaves."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.api.rest import rest_app
from service.cli.main import main
from service.cli.progress import StepProgress
from tests.support.backend import FakeBackend
from tests.support.command_line import run
from tests.support.hostile import colored, file
from tests.support.in_process import served


@pytest.fixture(scope="module")
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture(scope="module")
def server(backend: FakeBackend) -> Iterator[str]:
    with served(rest_app(backend)) as url:
        yield url


@pytest.fixture(autouse=True)
def here(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPRAY_SERVER", server)


def test_json_names_the_files_and_what_they_took(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "generate", "a", "--model", "one", "--seed", "7", "--n", "2", "--json")
    assert code == 0 and "step 1/1" in err and "seeds" not in err
    said = json.loads(out)
    assert said["files"] == [{"path": "picture.png", "seed": 7}, {"path": "picture-1.png", "seed": 8}]
    assert said["metrics"]["step_seconds"] == [0.5]
    assert [Path(file["path"]).read_bytes() for file in said["files"]] == [b"picture 7", b"picture 8"]


def test_a_place_that_takes_no_file_is_refused_before_anything_is_drawn(
    capsys: pytest.CaptureFixture[str], backend: FakeBackend
) -> None:
    Path("cups.png").mkdir()
    before = len(backend.requests)
    code, _, err = run(capsys, "generate", "a", "--model", "one", "--output", "cups.png")
    assert (code, "'cups.png' is a folder" in err, len(backend.requests)) == (2, True, before)


def test_what_cannot_be_written_leaves_the_former_file_and_can_be_drawn_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("picture.png").write_bytes(b"former")

    def full(path: Path, content: bytes) -> int:
        path.open("wb").write(content[:1])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        code, _, err = run(capsys, "generate", "a", "--model", "one", "--seed", "7")
    assert code == 1 and "seeds: 7" in err and "No space left" in err
    assert [(path.name, path.read_bytes()) for path in Path().iterdir()] == [("picture.png", b"former")]


def test_a_video_has_a_command_of_its_own(capsys: pytest.CaptureFixture[str], backend: FakeBackend) -> None:
    flags = ["--model", "film", "--seed", "7", "--num-frames", "9", "--fps", "8"]
    code, out, err = run(capsys, "video", "a", *flags)
    assert (code, out) == (0, "video.mp4\n"), err
    assert Path("video.mp4").read_bytes() == b"picture 7"
    assert (backend.requests[-1].num_frames, backend.requests[-1].fps) == (9, 8)
    assert run(capsys, "video", "a", "--output", "x.png")[0] == 2
    assert run(capsys, "video", "a", "--n", "1")[0] == 2


@pytest.mark.parametrize("command", ["edit", "generate"])
def test_a_picture_to_begin_with(capsys: pytest.CaptureFixture[str], backend: FakeBackend, command: str) -> None:
    Path("cup.webp").write_bytes(file(colored(64, 48), "WEBP"))
    Path("where.png").write_bytes(file(colored(64, 48, "L")))
    flags = ["--model", "one", "--seed", "7", "--image", "cup.webp", "--mask", "where.png", "--strength", "0.5"]
    code, out, err = run(capsys, command, "a", *flags)
    assert (code, out) == (0, "picture.png\n"), err
    request = backend.requests[-1]
    assert [each.role for each in request.inputs] == ["image", "mask"]
    assert (request.strength, request.width, request.height) == (0.5, 64, 48)


def test_pictures_of_a_video_and_several_of_an_edit(capsys: pytest.CaptureFixture[str], backend: FakeBackend) -> None:
    for name in ("a.png", "b.png"):
        Path(name).write_bytes(file(colored(64, 48)))
    Path("mask.png").write_bytes(file(colored(64, 48, "L")))
    code, _, err = run(capsys, "video", "a", "--model", "one", "--image", "a.png", "--last-image", "b.png")
    assert code == 0, err
    assert [each.role for each in backend.requests[-1].inputs] == ["image", "last_image"]
    flags = ["--image", "a.png", "--image", "b.png", "--control-image", "a.png"]
    code, _, err = run(capsys, "edit", "a", "--model", "one", *flags)
    assert code == 0, err
    assert [each.role for each in backend.requests[-1].inputs] == ["image", "image", "control_image"]
    code, _, err = run(capsys, "edit", "a", "--model", "one", "--control-image", "a.png", "--mask", "mask.png")
    assert code == 0, err
    assert [each.role for each in backend.requests[-1].inputs] == ["control_image", "mask"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["edit", "a"], 2, "--image is missing"),
        (["generate", "a", "--mask", "cup.png"], 2, "--mask needs --image"),
        (["generate", "a", "--strength", "0.5"], 2, "--strength needs --image"),
        (["edit", "a", "--image", "absent.png"], 2, "absent.png"),
        (
            ["generate", "a", "--image", "cup.png", "--mask", "cup.png", "--output", "a.mp4"],
            2,
            "--mask is not for a vi",
        ),
        (["video", "a", "--last-image", "cup.png"], 2, "--last-image needs --image"),
        (["video", "a", "--image", "cup.png", "--model", "film"], 1, "'film' is not for image-to-video"),
        (["edit", "a", "--image", "text.png", "--model", "one"], 1, "a picture must be a PNG, JPEG or WebP"),
        (["edit", "a", "--image", "cup.png", "--model", "paint"], 1, "'paint' is not for image-to-image"),
    ],
)
def test_a_picture_that_is_not_taken(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    Path("cup.png").write_bytes(file(colored()))
    Path("text.png").write_text("a cup")
    got, out, err = run(capsys, *arguments)
    assert (got, out) == (code, "") and said in err


@pytest.mark.parametrize(
    ("size", "asked"),
    [
        (["--size", "64x96"], (64, 96)),
        (["--width", "64", "--height", "96"], (64, 96)),
        ([], (1024, 1024)),
    ],
)
def test_sizes(
    capsys: pytest.CaptureFixture[str], backend: FakeBackend, size: list[str], asked: tuple[int, int]
) -> None:
    assert run(capsys, "generate", "a", "--model", "one", *size)[0] == 0
    assert (backend.requests[-1].width, backend.requests[-1].height) == asked


@pytest.mark.parametrize("flags", [["--width", "64"], ["--size", "64x64", "--width", "64", "--height", "64"]])
def test_sizes_that_contradict_are_wrong_usage(capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    code, _, err = run(capsys, "generate", "a", "--model", "one", *flags)
    assert code == 2 and "--width" in err


@pytest.mark.parametrize(
    ("model", "output", "said"),
    [
        ("paint", "x.mp4", "paint makes no videos, which --output x.mp4 asks for; name a file that ends in .png, .jpg"),
        ("film", "x.png", "film makes no pictures, which --output x.png asks for; name a file that ends in .mp4"),
    ],
)
def test_an_output_that_the_model_does_not_make(
    capsys: pytest.CaptureFixture[str], model: str, output: str, said: str
) -> None:
    code, out, err = run(capsys, "generate", "a", "--model", model, "--output", output)
    assert (code, out) == (2, "")
    assert said in err and "/v1/" not in err


def test_who_interrupts_it_cancels_the_work_of_the_server(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, backend: FakeBackend
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StepProgress, "show", interrupt)
    backend.closed = False
    code, out, err = run(capsys, "generate", "endless", "--model", "one")
    assert (code, out) == (130, "")
    assert err == "canceled: the server stops at the next step\nstopped\n"
    until = time.monotonic() + 30
    while not backend.closed and time.monotonic() < until:
        time.sleep(0.01)
    assert backend.closed
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("no_color", ["", "1"])
@pytest.mark.parametrize("command", [["models"], ["generate", "a", "--model", "one"]])
def test_colors_are_for_terminals_that_want_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str], no_color: str
) -> None:
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("NO_COLOR", no_color)
    code, out, err = run(capsys, *command)
    assert code == 0, err
    assert bool("\x1b[3" in out + err) == (no_color == "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--ulysses_degree", "2"], "--ulysses_degree: the deployment sets the layout of a server"),
        (["--ring-degree=2", "--server", "http://x"], "--ring_degree: the deployment sets the layout"),
        (["--device", "cpu"], "--device: the deployment sets the layout"),
        (["--local"], "--local needs --model FOLDER"),
        (["--local", "--server", "http://x"], "exclude each other"),
        (["--width", "64"], "--width and --height go together"),
        (["--output", "x.gif"], "--output must end in .png, .jpg, .jpeg, .webp"),
        (["--local", "--model", "m", "--ulysses_degree", "0"], "ulysses_degree must be a whole number"),
    ],
)
def test_command_lines_that_contradict_themselves(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "a cup", *arguments]) == 2
    assert says in capsys.readouterr().err
