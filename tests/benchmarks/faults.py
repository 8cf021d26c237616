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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx
import yaml

from tests.support.processes import hear_signals, marked_processes
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

SIGNALS = ("SIGKILL", "SIGSTOP")
OF_SERVE = ("SIGTERM", "SIGINT", "SIGHUP", "SIGKILL")
PHASES = ("load", "warm-up", "encode", "denoise", "decode", "idle")
STARTING = {"load": re.compile(r"demo: [1-9]\d*% loaded"), "warm-up": re.compile(r"demo: 100% loaded")}

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


class Serving:
    """`spray serve` of a demo model; a context manager.

    Attributes:
        url: of its server, once it is ready.
    """

    def __init__(self, model: Path, folder: Path) -> None:
        demo = {
            "name": "demo", "source": str(model), "device": "cpu", "parallel": {"ulysses_degree": 2},
            "placement": {"cpus_per_rank": 0.1}, "warmup_shapes": [{"width": 64, "height": 64}],
            "defaults": {"width": 64, "height": 64},
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
        self._folders: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        for pid in self.processes():  # of this cluster alone: they carry its mark
            os.kill(pid, signal.SIGKILL)

    @property
    def ended(self) -> bool:
        """True if the command has ended."""
        return self.process.poll() is not None

    def wait_said(self, pattern: str) -> bool:
        """Wait for a line of output; False if the command ended first."""
        while not any(re.search(pattern, line) for line in list(self._lines)):
            if self.ended:
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
        return marked_processes(self._mark)

    def find(self, process: str) -> int:
        """The id of a process; of ranks, that of the second one."""
        found = {pid: line for pid, line in self.processes().items() if TITLES[process] in line}
        self._folders |= set(re.findall(r"/[\w./-]*/spray-\w{8}\b", "\n".join(self.processes().values())))
        return self.process.pid if process == "serve" else max(found)

    def left(self) -> str:
        """What is there ten seconds after the command has ended."""
        deadline = time.monotonic() + 10
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        folders = [folder for folder in self._folders if Path(folder).exists()]
        return f"{len(self.processes())} processes, {len(folders)} folders"

    def _read(self) -> None:
        assert self.process.stdout is not None
        self._lines.extend(self.process.stdout)


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
    while time.monotonic() < deadline and not serving.ended:
        if serving.url and cell.process != "serve" and ask(serving.url) == "the picture":
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
    cell.gone = "yes" if pid not in serving.processes() else "no"


def measure(serving: Serving, cell: Cell) -> None:
    """Fill in one row. For `load` and `warm-up` the command must just have been started."""
    if cell.phase in STARTING:
        serving.wait_said(STARTING[cell.phase].pattern)
    elif not serving.url:
        serving.wait_ready()
        ask(serving.url)
    pid = serving.find(cell.process)
    if cell.phase in STARTING:
        os.kill(pid, getattr(signal, cell.signal))
        began, asked = time.monotonic(), None
    else:
        began, asked = strike_request(serving, cell, pid)
    watch(serving, cell, pid, began, asked)


def cells(arguments: argparse.Namespace) -> list[Cell]:
    """The rows, in an order in which a cluster is used for many."""
    return [
        Cell(process, sign, phase)
        for phase in arguments.phases
        for process in arguments.processes
        for sign in (OF_SERVE if process == "serve" else SIGNALS)
        if sign in arguments.signals
    ]


def main() -> None:
    """Measure the rows that were asked for, and print each when it is known."""
    parser = argparse.ArgumentParser(description="What a fault of each process costs its callers.")
    parser.add_argument("--processes", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--signals", nargs="+", choices=sorted({*SIGNALS, *OF_SERVE}), default=[*SIGNALS, *OF_SERVE])
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=["idle", "denoise"])
    arguments = parser.parse_args()
    print("| process | signal | phase | the caller saw | served again | process gone | `spray serve` exited | left |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_demo_model(model := Path(folder, "model"), "qwen-image")
        serving: Serving | None = None
        try:
            for cell in cells(arguments):
                if serving is None or serving.ended or cell.phase in STARTING:
                    if serving is not None:
                        serving.__exit__()
                    serving = Serving(model, Path(folder))
                measure(serving, cell)
                print(f"| {' | '.join(vars(cell).values())} |", flush=True)
        finally:
            if serving is not None:
                serving.__exit__()


if __name__ == "__main__":
    main()
