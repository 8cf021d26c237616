"""`spray jobs`, `job`, `download`, `cancel`, `--detach` and `--wait` against a server of this process."""

import asyncio
import json
import shlex
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.api import job_calls
from service.api.rest import rest_app
from service.cli import client, job_client
from service.cli.output import job_table, jobs_table, plain
from service.jobs.store import JobStore
from tests.support.backend import FakeBackend
from tests.support.command_line import run
from tests.support.in_process import served

pytestmark = pytest.mark.timeout(120)  # a job that does not end would be followed for ever

UNKNOWN = f"job_{'0' * 44}"


@pytest.fixture
def backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeBackend:
    monkeypatch.setattr(job_calls, "LOOK_S", 0.02)
    monkeypatch.setattr(job_client, "AGAIN_S", 0.02)
    monkeypatch.chdir(tmp_path)
    return FakeBackend()


@pytest.fixture
def server(backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv("SPRAY_API_KEY", raising=False)
    with served(rest_app(backend)) as url:
        monkeypatch.setenv("SPRAY_SERVER", url)
        yield url


def test_a_video_is_left_to_the_server_and_fetched_later(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "video", "a", "--model", "film", "--seed", "7", "--num-frames", "9", "--detach")
    job_id = out.strip()
    assert (code, err) == (0, f"accepted; `spray download {job_id} --wait --output video.mp4` fetches it\n")
    assert not Path("video.mp4").exists()
    code, out, err = run(capsys, "download", job_id, "--wait", "--output", "film.mp4")
    assert (code, out) == (0, "film.mp4\n")
    assert "seeds: 7\n" in err
    assert Path("film.mp4").read_bytes() == b"picture 7"
    assert list(Path().glob("*.part")) == []
    code, out, _ = run(capsys, "job", job_id, "--json")
    assert (code, json.loads(out)["request"]["num_frames"]) == (0, 9)


def test_a_server_that_stops_to_answer_is_asked_again_for_the_same_job(
    server: str, backend: FakeBackend, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have accepted the job: another one would be paid for, too."""
    asked: list[Any] = []
    request = httpx.request

    def lost(method: str, url: str, **options: Any) -> httpx.Response:
        answer = request(method, url, **options)
        asked.append((options["timeout"].read, answer.json()["id"]))
        if len(asked) == 1:
            raise httpx.ReadError("gone")
        return answer

    monkeypatch.setattr(httpx, "request", lost)
    code, out, _ = run(capsys, "video", "a", "--model", "film", "--detach")
    assert (code, asked) == (0, [(None, out.strip())] * 2)  # a clip may be read for minutes before it answers


def test_pictures_too(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--model", "one", "--seed", "7", "--n", "2", "--output", "cup.webp", "--detach", "--json")
    code, out, _ = run(capsys, "generate", "a", *flags)
    job = json.loads(out)
    assert (code, job["kind"], job["request"]["output_format"]) == (0, "image", "webp")
    code, out, err = run(capsys, "download", job["id"], "--wait")
    assert (code, out.split()) == (0, [f"{job['id']}.webp", f"{job['id']}-1.webp"])
    assert "seeds: 7, 8" in err
    assert [Path(name).read_bytes() for name in out.split()] == [b"picture 7", b"picture 8"]


def test_whoever_waits_gets_the_files_of_the_job(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "video", "long", "--model", "film", "--seed", "7", "--wait")
    (job,) = json.loads(run(capsys, "jobs", "--json")[1])["data"]
    assert (code, out) == (0, "video.mp4\n"), err
    first, *_, warning, seeds = err.splitlines()
    assert first == f"accepted as {job['id']}; Ctrl-C ends the waiting, not the job"
    assert "step 1/1" in err
    assert (warning, seeds) == ("warning: prompt: text_encoder reads 512 of 719 tokens", "seeds: 7")
    assert Path("video.mp4").read_bytes() == b"picture 7"
    code, out, err = run(capsys, "generate", "a", "--model", "one", "--seed", "7", "--n", "2", "--wait", "--json")
    said = json.loads(out)
    assert (code, said["metrics"]["step_seconds"]) == (0, [0.5]), err
    assert said["files"] == [{"path": "picture.png", "seed": 7}, {"path": "picture-1.png", "seed": 8}]
    assert [Path(file["path"]).read_bytes() for file in said["files"]] == [b"picture 7", b"picture 8"]
    assert json.loads(run(capsys, "job", said["job"], "--json")[1])["kind"] == "image"


def test_whoever_stops_to_wait_cancels_nothing_and_hears_how_to_go_on(
    server: str, backend: FakeBackend, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.delenv("SPRAY_SERVER")
    flags = ("--model", "film", "--seed", "7", "--output", "a cup.mp4", "--server", server)
    with monkeypatch.context() as patch:
        patch.setattr(job_client, "_events", interrupt)
        code, out, err = run(capsys, "video", "slow", "--wait", *flags)
    accepted, hint, stopped = err.splitlines()
    job_id = accepted.split()[2].rstrip(";")
    fetch = f"spray download {job_id} --wait --output 'a cup.mp4' --server {server}"
    assert (code, out, stopped) == (130, "", "stopped")
    assert hint == f"nothing is canceled: `{fetch}` waits for the job, `spray cancel {job_id}` ends it"
    backend.released.set()
    assert run(capsys, *shlex.split(fetch)[1:])[:2] == (0, "a cup.mp4\n")
    assert Path("a cup.mp4").read_bytes() == b"picture 7"
    with monkeypatch.context() as patch:
        patch.setattr(job_client, "download_output", interrupt)
        code, _, err = run(capsys, "video", "a", "--wait", *flags)
    assert code == 130 and "the server keeps the files: `spray download job_" in err and "--wait" not in err
    with monkeypatch.context() as patch:
        patch.setattr(job_client, "ask", interrupt)
        code, _, err = run(capsys, "video", "a", "--wait", *flags)
    assert code == 130 and "`spray jobs` shows whether it has accepted the job" in err


def test_a_job_that_is_waited_for_may_fail(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "generate", "failed", "--model", "one", "--wait")
    assert (code, out) == (1, "") and err.endswith("error: the job is failed: rank 1: MemoryError\n")
    assert "nothing is canceled" not in err


def test_somebody_may_hear_of_its_end(server: str, backend: FakeBackend, capsys: pytest.CaptureFixture[str]) -> None:
    backend.webhooks._hosts = frozenset({"hooks.example.com"})
    flags = ("--model", "one", "--webhook", "https://hooks.example.com/a")
    job_id = run(capsys, "generate", "a", *flags, "--detach")[1].strip()
    kept = asyncio.run(backend.jobs.ask(JobStore.get, job_id, None))
    assert kept.webhook_url == flags[-1]
    code, _, err = run(capsys, "generate", "a", *flags)
    assert (code, "--webhook needs --detach or --wait" in err) == (2, True)
    job_id = json.loads(run(capsys, "generate", "a", *flags, "--wait", "--json")[1])["job"]
    assert asyncio.run(backend.jobs.ask(JobStore.get, job_id, None)).webhook_url == flags[-1]


def test_jobs_are_listed_shown_waited_for_and_cancelled(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    never = run(capsys, "generate", "never", "--model", "one", "--detach")[1].strip()
    waits = run(capsys, "generate", "a cup", "--model", "one", "--seed", "7", "--detach")[1].strip()
    code, out, _ = run(capsys, "jobs")
    head, *rows = out.splitlines()
    assert (code, head.split()) == (0, ["ID", "KIND", "MODEL", "STATE", "PRIORITY", "CREATED", "STEPS"])
    assert [row.split()[0] for row in rows] == [waits, never]
    assert "--limit" in run(capsys, "jobs", "--limit", "1")[1]
    assert len(json.loads(run(capsys, "jobs", "--json")[1])["data"]) == 2
    code, out, err = run(capsys, "download", waits)
    assert (code, out, err) == (1, "", "error: the job is queued; --wait waits for it\n")
    assert run(capsys, "cancel", never) == (0, f"{never}\n", "canceled; its gang is free within a step\n")
    code, out, err = run(capsys, "job", waits, "--wait")
    assert code == 0 and "step 1/1" in err
    said = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (said["state"], said["seeds"], said["prompt"]) == ("succeeded", "7", "a cup")
    assert run(capsys, "cancel", waits) == (0, f"{waits}\n", "it has ended before: succeeded\n")
    code, out, err = run(capsys, "job", never, "--wait")
    assert code == 1 and "cancelled: the job was cancelled" in out
    assert err == "error: the job is cancelled: the job was cancelled\n"
    assert run(capsys, "download", never)[2] == err


def test_a_stream_that_ends_early_is_asked_for_again(
    server: str, backend: FakeBackend, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = run(capsys, "generate", "slow", "--model", "one", "--seed", "7", "--detach")[1].strip()
    while httpx.get(f"{server}/v1/jobs/{slow}").json()["state"] != "running":
        time.sleep(0.01)
    backend.draining = True  # each stream ends with its first event
    asked = 0
    events = job_client._events

    def counted(*args: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 3:
            backend.released.set()
        return events(*args)

    monkeypatch.setattr(job_client, "_events", counted)
    found = job_client.follow_job(server, slow, lambda step: None)
    assert asked >= 3 and found["state"] == "succeeded"


@pytest.mark.parametrize(
    "error",
    [
        client.NoAnswer("no answer from here", again=True),
        client.refusal(b"{}", 503),
        client.refusal(b'{"error": {"message": "too many", "code": "queue_full"}}', 429),
        client.ServerError("away", "jobs_unavailable", again=True),
    ],
)
def test_a_job_is_waited_for_while_the_server_does_not_answer(
    server: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    slow = run(capsys, "generate", "slow", "--model", "one", "--seed", "7", "--detach")[1].strip()
    job, asked = job_client.read_job(server, slow), 0

    def sometimes(*args: Any) -> Iterator[dict[str, Any]]:
        nonlocal asked
        asked += 1
        yield job
        if asked < 4:
            raise error
        yield job | {"state": "succeeded"}

    monkeypatch.setattr(job_client, "_events", sometimes)
    assert job_client.follow_job(server, slow, lambda step: None)["state"] == "succeeded"
    monkeypatch.setattr(job_client, "PATIENCE_S", 0.0)
    asked = 0
    with pytest.raises(client.ServerError):
        job_client.follow_job(server, slow, lambda step: None)


@pytest.mark.timeout(30)
def test_a_stream_that_says_nothing_is_given_up(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(job_client, "SILENT_S", 0.2)
        with pytest.raises(client.NoAnswer):
            next(job_client._events(f"http://127.0.0.1:{silent.getsockname()[1]}", UNKNOWN))


def test_a_job_that_is_deleted_meanwhile_is_said_so(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    never = run(capsys, "generate", "never", "--model", "one", "--detach")[1].strip()
    threading.Timer(0.3, lambda: httpx.delete(f"{server}/v1/jobs/{never}")).start()
    code, _, err = run(capsys, "job", never, "--wait")
    assert code == 1 and f"there is no job '{never}' of yours" in err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("job", "a"), 2, "'a' is no id of a job"),
        (("job", UNKNOWN), 1, "there is no job"),
        (("job", UNKNOWN, "--wait"), 1, "there is no job"),
        (("download", UNKNOWN), 1, "there is no job"),
        (("download", UNKNOWN, "--output", "nowhere/a.png"), 2, "there is no folder 'nowhere'"),
        (("cancel", UNKNOWN), 1, "there is no job"),
        (("jobs", "--limit", "0"), 2, "greater than or equal to 1"),
        (("generate", "a", "--detach", "--local", "--model", "x"), 2, "--detach and --local exclude each other"),
        (("video", "a", "--detach", "--previews"), 2, "--detach and --previews exclude each other"),
        (("video", "a", "--wait", "--detach"), 2, "--detach and --wait exclude each other"),
        (("generate", "a", "--wait", "--local", "--model", "x"), 2, "--wait and --local exclude each other"),
        (("video", "a", "--wait", "--previews"), 2, "--wait and --previews exclude each other"),
        (("video", "a", "--model", "paint", "--wait"), 2, "paint makes no videos"),
        (("video", "a", "--model", "paint", "--detach"), 2, "paint makes no videos"),
        (("jobs", "--server", "http://127.0.0.1:1"), 1, "no answer from"),
        (("job", UNKNOWN, "--wait", "--server", "http://127.0.0.1:1"), 1, "no answer from"),
    ],
)
def test_what_is_wrong_is_one_line(
    server: str, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, said: str
) -> None:
    found, out, err = run(capsys, *arguments)
    assert (found, out) == (code, "")
    assert said in err and err.count("\n") == 1


def test_tables_say_what_is_known() -> None:
    request = {
        "prompt": "a", "size": "64x64", "seeds": [7], "num_frames": 5, "fps": 8, "output_format": "mp4",
    }  # fmt: skip
    job = {
        "id": "job_1", "kind": "video", "model": "film", "state": "failed", "priority": "batch", "created_at": 0.0,
        "ended_at": 1.0, "expires_at": None, "step": 2, "total_steps": 4, "position": 0, "attempt": 2,
        "request": request, "outputs": [], "warnings": [],
        "error": {"code": "generation_failed", "message": "rank 1: [x]", "param": None},
    }  # fmt: skip
    said = dict(line.split(maxsplit=1) for line in plain(job_table(job)).splitlines())
    assert said["error"] == "generation_failed: rank 1: [x]"
    assert said["size"] == "64x64, 5 frames at 8 a second"
    assert said["created"].startswith(("1970-", "1969-"))
    assert not {"place", "files", "kept"} & set(said)
    (_, row) = plain(jobs_table({"data": [job], "has_more": False})).splitlines()
    assert row.split()[-2:] == ["[##########..........]", "2/4"]
