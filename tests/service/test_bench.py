"""`spray bench` against the API without Ray: what is sent, what is measured, and what is said of it."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.api.backend import Report
from service.api.rest import rest_app
from service.cli.bench import plot, report
from service.cli.bench.load import Planned, complete, drawn, read_mix, read_trace, seconds
from service.cli.bench.sending import Outcome
from service.cli.main import main
from service.cli.options import UsageError
from tests.support.backend import FakeBackend
from tests.support.in_process import served
from tests.support.processes import hear_signals
from workers.messages import GenerationRequest

ROOT = Path(__file__).parents[2]


class OneAtATime(FakeBackend):
    """A gang: one request at a time, each for 5 ms; the one with the number `held` takes `held_s` longer.

    Nobody is answered before `together` requests were under way at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.turn = asyncio.Lock()
        self.at_once = self.most = self.count = 0
        self.held, self.held_s, self.together = -1, 0.0, 1

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Report]:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            async with self.turn:
                self.count += 1
                while self.most < self.together:
                    await asyncio.sleep(0.005)
                await asyncio.sleep(0.005 + (self.held_s if self.count == self.held else 0.0))
            async with contextlib.aclosing(super().generate(request)) as reports:
                async for each in reports:
                    yield each
        finally:
            self.at_once -= 1


@pytest.fixture
def backend() -> OneAtATime:
    return OneAtATime()


@pytest.fixture
def server(backend: OneAtATime, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv("SPRAY_API_KEY", raising=False)
    with served(rest_app(backend)) as url:
        yield url


def bench(server: str, folder: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and what the file says."""
    file = folder / "found.json"
    code = main(["bench", "--server", server, "--model", "one", "--json", str(file), *flags])
    return code, json.loads(file.read_text())


def test_an_open_loop_sees_a_stall_by_all_who_would_have_called(
    server: str, backend: OneAtATime, tmp_path: Path
) -> None:
    """And a closed one, whose only caller is held up with it, by that one. That is the difference between the two."""
    backend.held, backend.held_s = 5, 1.0  # the warm-up is one
    code, opened = bench(server, tmp_path, "--rate", "40", "--requests", "60")
    late = [one for one in opened["requests"] if one["seconds"] > 0.4]
    assert code == 0
    assert opened["total"]["ok"] == 60
    assert len(late) >= 8  # 40 a second, in 0.6 s
    backend.count = 0
    code, closed = bench(server, tmp_path, "--concurrency", "1", "--requests", "60")
    assert (code, closed["total"]["ok"], backend.count) == (0, 60, 61)
    assert 1 <= len([one for one in closed["requests"] if one["seconds"] > 0.4]) < 8  # one, and a busy machine's own


def test_a_request_that_this_program_sends_late_has_taken_longer(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep = asyncio.sleep

    async def oversleep(delay: float) -> None:
        await sleep(max(delay, 0) + 0.3)

    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"at_s": 0.6, "body": {"prompt": "a"}}')
    with monkeypatch.context() as patch:
        patch.setattr("service.cli.bench.driving.asyncio.sleep", oversleep)
        _, found = bench(server, tmp_path, "--trace", str(trace))
    (one,) = found["requests"]
    assert one["sent_late_s"] >= 0.3
    assert one["seconds"] >= 0.3


def test_a_closed_loop_has_so_many_under_way(server: str, backend: OneAtATime, tmp_path: Path) -> None:
    backend.together = 6
    flags = ["--warmup", "0", "--concurrency", "6", "--duration", "400ms", "--slo", "5ms", "--timeout", "30s"]
    code, found = bench(server, tmp_path, *flags)
    assert (code, backend.most) == (0, 6)
    assert found["total"]["ok"] == found["total"]["sent"] >= 6
    assert found["total"]["within_slo"] < found["total"]["ok"]
    assert 0.4 <= found["seconds"] < 30
    assert found["times_s"]["one step"]["p99"] == 0.5
    assert found["times_s"]["decode"]["p50"] == 0.2


@pytest.mark.parametrize("flags", [("--concurrency", "3"), ("--rate", "40", "--warmup", "3")])
def test_the_warm_up_comes_at_once_so_that_each_gang_gets_one(
    server: str, backend: OneAtATime, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    backend.together = 3  # else the first is never answered
    code, found = bench(server, tmp_path, *flags, "--requests", "3", "--timeout", "20s")
    assert (code, found["total"]["ok"], backend.count) == (0, 3, 6)


def test_errors_are_counted_by_code_and_do_not_count_as_fast_answers(
    server: str, backend: OneAtATime, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.jsonl"
    prompts = ["a", "full", "later", "full", "b", "failed"]
    rows = [{"at_s": i / 50, "body": {"prompt": prompt, "seed": i}, "kind": "mine"} for i, prompt in enumerate(prompts)]
    rows.append(
        {"at_s": 0.01, "body": {"model": "film", "seed": 9, "prompt": "v"}, "path": "/v1/videos/sync", "kind": "film"}
    )
    trace.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    code, found = bench(server, tmp_path, "--trace", str(trace), "--warmup", "2")
    assert code == 0
    assert found["errors"] == {"queue_full": 2, "worker_lost": 1, "generation_failed": 1}
    assert (found["kinds"]["mine"]["sent"], found["kinds"]["mine"]["ok"], found["kinds"]["film"]["ok"]) == (6, 2, 1)
    assert found["total"]["end_to_end_s"]["count"] == 3
    assert [request.prompt for request in backend.requests[:4]] == ["a", "a", "v", "v"]  # the warm-up
    assert sorted(r.seed for r in backend.requests[4:]) == [0, 1, 2, 3, 4, 5, 9]
    said = capsys.readouterr().out
    assert "2 x queue_full" in said
    assert [line.split()[:3] for line in said.splitlines()[2:5]] == [
        ["all", "7", "3"],
        ["film", "1", "1"],
        ["mine", "6", "2"],
    ]


def test_what_cannot_be_answered_ends_with_1(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["bench", "--requests", "2", "--concurrency", "1", "--server"]
    assert main([*flags, server, "--mix", "a=64x64x4", "--model", "absent"]) == 1
    assert "warm-up, a request of 'a': the model 'absent'" in capsys.readouterr().err
    assert main([*flags, server, "--model", "one", "--prompt", "full", "--warmup", "0"]) == 1
    assert "no request was answered: queue_full" in capsys.readouterr().err
    assert main([*flags, "http://127.0.0.1:9", "--warmup", "0"]) == 1
    assert "no_answer" in capsys.readouterr().err
    assert main([*flags, "http://a:b"]) == 1
    assert "is no URL" in capsys.readouterr().err
    assert main([*flags, server, "--model", "one", "--prompt", "slow", "--warmup", "0", "--timeout", "200ms"]) == 1
    assert "no request was answered: timeout" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", "give --rate for an open loop"),
        ("--rate 1 --concurrency 2", "give --rate for an open loop"),
        ("--trace a.jsonl --rate 2", "leave out --rate and --mix"),
        ("--trace absent.jsonl", "--trace absent.jsonl"),
        ("--rate 1 --mix small=64x64", "expected NAME=WIDTHxHEIGHTxSTEPS"),
        ("--rate 1 --mix a=64x64x4:0", "share: Input should be greater than 0"),
        ("--rate 1 --mix a=64x64x4,a=32x32x4", "'a' comes twice"),
        ("--rate 1 --mix absent.yaml", "absent.yaml"),
        ("--rate 1 --slo soon", "expected a time above 0, such as 500ms"),
        ("--rate 0", "--rate"),
        ("--concurrency 0", "--concurrency"),
        ("--rate 1 --plot times.txt", ".png, .svg or .pdf"),
        ("--rate 1 --plot nowhere/times.png", "there is no folder nowhere"),
        ("--rate 1 --json nowhere/times.json", "there is no folder nowhere"),
    ],
)
def test_wrong_flags_are_usage_errors(flags: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *flags.split()]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: Invalid JSON"),
        ('{"at_s": -1, "body": {}}', "line 2: at_s"),
        ('{"at_s": 1}', "line 2: body: Field required"),
        ('{"at_s": 1, "body": {}, "at": 2}', "line 2: at: Extra"),
        ('{"at_s": 1, "body": {}, "path": "/v1/models"}', "line 2: path"),
    ],
)
def test_a_wrong_line_of_a_trace_is_named(line: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"at_s": 1, "body": {}}\n' + line)
    with pytest.raises(UsageError, match=said):
        read_trace(file)


def test_a_seed_is_a_load_whose_gaps_and_shares_are_as_asked(tmp_path: Path) -> None:
    kinds = read_mix("small=512x512x20:0.7, film=64x64x4x5:0.3")
    assert kinds["film"].path == "/v1/videos/sync"
    assert kinds["film"].body == {"size": "64x64", "num_inference_steps": 4, "num_frames": 5}
    once, again, other = (list(drawn(kinds, seed, 5.0, 4000, None)) for seed in (3, 3, 4))
    assert once == again != other
    gaps = [after.at_s - before.at_s for before, after in itertools.pairwise(once)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(0.2, rel=0.1)
    assert spread == pytest.approx(mean, rel=0.1)  # exponential: as wide as its mean
    assert sum(one.kind == "small" for one in once) == pytest.approx(2800, rel=0.05)
    assert len({one.body["seed"] for one in once}) > 3990
    assert all(one.at_s <= 10 for one in drawn(kinds, 0, 5.0, None, 10.0))
    file = tmp_path / "mix.yaml"
    file.write_text("small: {share: 0.7, body: {size: 512x512, num_inference_steps: 20}}\n")
    assert read_mix(str(file))["small"] == kinds["small"]
    assert [seconds(text) for text in ("500ms", "5s", "2m", "1h", "7")] == [0.5, 5.0, 120.0, 3600.0, 7.0]


def test_a_body_becomes_a_stream() -> None:
    asked = complete(Planned(0, "a", "/v1/images/generations", {"response_format": "file", "n": None}), "a cup", "one")
    assert asked.body == {
        "prompt": "a cup",
        "model": "one",
        "stream": True,
        "stream_options": {"include_progress": True},
    }
    named = complete(Planned(0, "a", "/v1/images/generations", {"model": "two", "prompt": "b"}), "a cup", "one")
    assert (named.body["model"], named.body["prompt"]) == ("two", "b")


def test_percentiles_are_times_of_requests() -> None:
    outcomes = [Outcome("a", 0.0, seconds=float(i + 1)) for i in range(100)]
    found = report.summary(outcomes, 0, 50.0, slo_s=25.0)
    told = found["total"]["end_to_end_s"]
    assert (told["p50"], told["p90"], told["p99"], told["max"]) == (50.0, 90.0, 99.0, 100.0)
    assert (found["total"]["within_slo"], found["total"]["goodput_per_second"]) == (25, 0.5)
    outcomes = [
        Outcome("a", 0.0, seconds=3.0, stages={"encode": 0.5}, steps=[1.0, 1.0]),
        Outcome("a", 0.0, code="queue_full"),
    ]
    found = report.summary(outcomes, 0, 2.0, None)
    assert found["times_s"]["waited"] == {
        "count": 1,
        "mean": 0.5,
        **dict.fromkeys(("p50", "p90", "p95", "p99", "max"), 0.5),
    }
    assert (found["total"]["per_second"], found["errors"]) == (0.5, {"queue_full": 1})
    assert report.summary([], 3, 0.0, None)["total"]["per_second"] == 0.0


def test_a_plot_is_drawn_or_what_it_needs_is_said(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "times.png"
    flags = ["--mix", "a=64x64x4,b=128x128x4", "--rate", "50", "--requests", "8", "--slo", "1s", "--plot", str(file)]
    assert bench(server, tmp_path, *flags)[0] == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "--server", server, *flags]) == 2
    assert "pip install 'spray[plot]'" in capsys.readouterr().err


def test_ctrl_c_shows_what_was_measured(server: str, backend: OneAtATime, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    command = [sys.executable, "-m", "service.cli.main", "bench", "--concurrency", "2", "--duration", "10m"]
    flags = ["--server", server, "--model", "one", "--json", str(file)]
    running = subprocess.Popen(
        [*command, *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_signals,
    )
    try:
        until = time.monotonic() + 60
        while backend.count < 10:
            assert running.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        os.kill(running.pid, signal.SIGINT)
        out, said = running.communicate(timeout=60)
    finally:
        running.kill()
    assert running.returncode == 130, said
    assert out.splitlines()[1].split()[:3] == ["REQUESTS", "SENT", "OK"]
    assert "stopped" in said
    found = json.loads(file.read_text())
    assert found["total"]["ok"] >= 5
    assert found["unfinished"] <= 2
