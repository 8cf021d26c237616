"""What a fault of each process of a served cluster costs its callers: one table.

    python -m tests.benchmarks.faults [--processes rank gang ...] [--signals SIGKILL ...] [--phases idle denoise ...]

`spray serve` runs a demo model on two ranks. While a request is in a phase, one process gets one signal. The table says
what that request's caller saw and when, after how many seconds a request that came next was answered, whether the
process is gone, and, where `spray serve` ended, its exit code and what it left: processes and folders.

A request is struck in `encode` 20 ms after it was sent, in `denoise` after its third step, in `decode` after its last.
`load` and `warm-up` are struck while `spray serve` starts, at the first line that says so; their seconds include what
was left of the start. `serve` is the command itself, for which SIGTERM, SIGINT and SIGHUP are tried as well.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import yaml

from service.cli.client import read_cluster
from tests.support.processes import cluster_processes, hear_signals
from workers.demo_models.writer import write_demo_model

TITLES = {
    "rank": "ray::RankActor",
    "gang": "ray::ServeReplica:model-",
    "gateway": "ray::ServeReplica:gateway:",
    "proxy": "ray::ProxyActor",
    "controller": "ray::ServeController",
    "raylet": "/raylet/raylet",
    "gcs": "/gcs/gcs_server",
    "serve": "service.cli.main",
}
"""How each process is found among those of the cluster."""

ENDS = ("raylet", "gcs", "serve")
"""The processes whose end is the end of `spray serve`: their rows wait for that first, for `END_S` seconds."""
END_S = 20.0

SIGNALS = ("SIGKILL", "SIGSTOP")
OF_SERVE = ("SIGTERM", "SIGINT", "SIGHUP", "SIGKILL")
EVERY = (*OF_SERVE, "SIGSTOP")
PHASES = ("load", "warm-up", "encode", "denoise", "decode", "idle")
STARTING = {"load": re.compile(r"demo: 0 % loaded"), "warm-up": re.compile(r"demo: [1-9]\d* % loaded")}

HEAD = """\
| process | signal | phase | the caller saw | served again | process gone | `spray serve` exited | left |
|---|---|---|---|---|---|---|---|"""

PATIENCE_S = 120.0
REQUEST = {"model": "demo", "prompt": "a cup of coffee", "seed": 7, "num_inference_steps": 10}


@dataclass
class Cell:
    """One row: a process, a signal, a phase, and what was seen."""

    process: str
    signal: str
    phase: str
    saw: str = "-"
    served: str = "-"
    gone: str = "-"
    exit: str = "-"
    left: str = "-"

    def __str__(self) -> str:
        return f"| {' | '.join(vars(self).values())} |"


class Serving:
    """`spray serve` of a demo model.

    Attributes:
        url: of its server, once it is ready.
        struck: the processes that have been given a signal.
    """

    def __init__(self, model: Path, folder: Path) -> None:
        demo = {
            "name": "demo", "source": str(model), "device": "cpu", "parallel": {"ulysses_degree": 2},
            "placement": {"cpus_per_rank": 0.1}, "warmup_shapes": [{"width": 64, "height": 64}],
            "defaults": {"width": 64, "height": 64}, "spare_ranks": True,
        }  # fmt: skip
        file = folder / "demo.yaml"
        file.write_text(yaml.safe_dump({"models": [demo], "metrics": {"port": None}}))
        self._mark = uuid.uuid4().hex
        self._lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service.cli.main", "serve", str(file), "--port", "0"],
            env=os.environ | {"TEST_MARK": self._mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=hear_signals,
        )
        threading.Thread(target=self._read, daemon=True).start()
        self.url = ""
        self.struck: set[int] = set()
        self._folders: set[str] = set()

    def close(self) -> None:
        """End the command, and whatever of its cluster is left."""
        if not self.struck & set(self.processes()):  # nothing of it is stopped, so that it can end by itself
            self.process.terminate()
            self.wait_ended(60)
        self.process.kill()
        self.process.wait()
        for pid in self.processes():  # of this cluster alone: they carry its mark
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @property
    def ended(self) -> bool:
        """True if the command has ended."""
        return self.process.poll() is not None

    def wait_said(self, pattern: str) -> bool:
        """Wait for a line of output; False if the command ended first, or said nothing of it for `PATIENCE_S`."""
        deadline = time.monotonic() + PATIENCE_S
        while not any(re.search(pattern, line) for line in list(self._lines)):
            if self.ended or time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def wait_ready(self) -> bool:
        """Wait until it serves; False if the command ended first."""
        ready = self.wait_said("^ready: ")
        if ready:
            line = next(line for line in self._lines if line.startswith("ready: "))
            self.url = re.search(r"http://[\w.:]+", line)[0]  # type: ignore[index]
        return ready

    def processes(self) -> dict[int, str]:
        """The living processes of this cluster, with their command lines."""
        return cluster_processes(self._mark, self._folders)

    def find(self, process: str) -> int:
        """The id of a process, once there is one that was not struck; of ranks that serve, that of the second one, once
        there is a spare one beside each."""
        deadline = time.monotonic() + PATIENCE_S
        while process == "rank" and self.url and time.monotonic() < deadline:
            for gang in read_cluster(self.url)["models"][0]["gangs"]:
                pids, spare = gang["now"]["pids"], gang["now"]["spare_ranks"]
                if spare == len(pids) > 0 and not self.struck & set(pids):
                    return int(pids[1])
            time.sleep(0.1)
        while time.monotonic() < deadline:
            living = self.processes()
            self._folders |= set(re.findall(r"/[\w./-]*/spray-\w{8}\b", "\n".join(living.values())))
            found = [pid for pid, line in living.items() if TITLES[process] in line and pid not in self.struck]
            if process == "serve" or found:
                return self.process.pid if process == "serve" else max(found)
            time.sleep(0.1)
        raise TimeoutError(f"no new {process} within {PATIENCE_S:g} s")

    def wait_ended(self, seconds: float) -> None:
        """Wait for the end of the command, at most so long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def wait_gone(self, pid: int, seconds: float) -> bool:
        """Wait for the end of a process; False if it is still there so many seconds later."""
        deadline = time.monotonic() + seconds
        while (there := pid in self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return not there

    def left(self) -> str:
        """What is there ten seconds after the end of the command; Ray's agents may miss their raylet only later."""
        deadline = time.monotonic() + 10
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        folders = [folder for folder in self._folders if Path(folder).exists()]
        kinds = sorted(_kind(line) for line in self.processes().values())
        return f"{', '.join(kinds) or 'no process'}; {len(folders)} folders"

    def _read(self) -> None:
        assert self.process.stdout is not None
        self._lines.extend(self.process.stdout)


def _kind(command_line: str) -> str:
    """The name of a process by its command line, or that line's beginning."""
    return next((kind for kind, title in TITLES.items() if title in command_line), command_line[:40].strip())


def ask(url: str, stepped: Callable[[int, int], None] = lambda step, of: None) -> str:
    """Ask for a picture as a stream, telling each step; return what came in the end."""
    try:
        with httpx.stream(
            "POST",
            f"{url}/v1/images/generations",
            json=REQUEST | {"stream": True, "stream_options": {"include_progress": True}},
            timeout=PATIENCE_S,
            trust_env=False,
        ) as answer:
            if answer.status_code != 200:
                answer.read()
                return f"{answer.status_code} {answer.json()['error']['code']}"
            saw = "an answer without an end"
            for line in answer.iter_lines():
                event = json.loads(line[6:]) if line.startswith("data: {") else {}
                if "step" in event:
                    stepped(event["step"], event["total_steps"])
                elif "error" in event:
                    saw = f"200, then {event['error']['code']}"
                elif str(event.get("type", "")).endswith("completed"):
                    saw = "the picture"
            return saw
    except httpx.TransportError as error:
        return type(error).__name__


def strike_request(serving: Serving, cell: Cell, pid: int) -> tuple[float, Future[str] | None]:
    """Send the signal in the cell's phase; return when, and the request that was in flight."""
    sign = getattr(signal, cell.signal)
    if cell.phase == "idle":
        os.kill(pid, sign)
        return time.monotonic(), None
    there = threading.Event()

    def stepped(step: int, of: int) -> None:
        if (cell.phase, step) in {("denoise", 3), ("decode", of)}:
            there.set()

    threads = ThreadPoolExecutor(1)
    asked = threads.submit(ask, serving.url, stepped)
    threads.shutdown(wait=False)
    if cell.phase == "encode":
        time.sleep(0.02)
    elif not there.wait(PATIENCE_S):
        raise TimeoutError(f"the request did not reach {cell.phase}")
    os.kill(pid, sign)
    return time.monotonic(), asked


def watch(serving: Serving, cell: Cell, pid: int, began: float, asked: Future[str] | None) -> None:
    """Fill in what follows a signal."""
    deadline = began + PATIENCE_S
    if asked is not None:
        saw_at: list[float] = []
        asked.add_done_callback(lambda _: saw_at.append(time.monotonic()))
    if cell.process in ENDS:
        serving.wait_ended(END_S)
    while time.monotonic() < deadline and not serving.ended:
        if serving.url and ask(serving.url) == "the picture":
            cell.served = f"{time.monotonic() - began:.1f} s"
            break
        if not serving.url and serving.wait_ready():
            continue
        time.sleep(0.1)
    else:
        cell.served = "not served again" if serving.ended else f"not within {PATIENCE_S:g} s"
    if asked is not None:
        saw = asked.result(PATIENCE_S)
        cell.saw = f"{saw}, {saw_at[0] - began:.1f} s"
    if serving.ended:
        cell.exit = f"{serving.process.returncode} after {time.monotonic() - began:.1f} s"
        cell.left = serving.left()
    cell.gone = "yes" if serving.wait_gone(pid, 10) else "no"


def measure(serving: Serving, cell: Cell) -> None:
    """Fill in one row. For `load` and `warm-up` the command must just have been started."""
    if cell.phase in STARTING:
        serving.wait_said(STARTING[cell.phase].pattern)
    elif not serving.url:
        serving.wait_ready()
        ask(serving.url)
    serving.struck.add(pid := serving.find(cell.process))
    if cell.phase in STARTING:
        os.kill(pid, getattr(signal, cell.signal))
        began, asked = time.monotonic(), None
    else:
        began, asked = strike_request(serving, cell, pid)
    watch(serving, cell, pid, began, asked)


def rows(phases: Iterable[str], processes: Iterable[str] = TITLES, signals: Iterable[str] = EVERY) -> list[Cell]:
    """The rows, in an order in which a cluster is used for many."""
    return [
        Cell(process, sign, phase)
        for phase, process in itertools.product(phases, processes)
        for sign in (OF_SERVE if process == "serve" else SIGNALS)
        if sign in signals
    ]


class Bench:
    """The cluster that rows are measured on: one for many, a new one where the last row may have harmed it."""

    def __init__(self, folder: Path) -> None:
        write_demo_model(folder / "model", "qwen-image")
        self._folder = folder
        self._serving: Serving | None = None

    def measure(self, cell: Cell) -> None:
        """Fill in one row."""
        if self._serving is None or self._serving.ended or cell.phase in STARTING:
            self.close()
            self._serving = Serving(self._folder / "model", self._folder)
        measure(self._serving, cell)
        if cell.served.startswith("not") or cell.gone == "no":
            self.close()

    def close(self) -> None:
        """End the cluster."""
        if self._serving is not None:
            self._serving.close()
            self._serving = None


def main() -> None:
    """Measure the rows that were asked for, and print each when it is known."""
    parser = argparse.ArgumentParser(description="What a fault of each process costs its callers.")
    parser.add_argument("--processes", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--signals", nargs="+", choices=sorted(EVERY), default=EVERY)
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=["idle", "denoise"])
    arguments = parser.parse_args()
    print(HEAD, flush=True)
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Bench(Path(folder))) as bench:
        for cell in rows(arguments.phases, arguments.processes, arguments.signals):
            bench.measure(cell)
            print(cell, flush=True)


if __name__ == "__main__":
    main()
