"""A cluster that serves a demo model in processes of its own, on one node or two, and can be killed as a whole.

Every process carries a mark in its environment, and only processes with that mark are ever struck. What has to outlive
the cluster, jobs and outputs, lies in a folder that the caller gives.
"""

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from service.rollout.environment import PRIVATE_CLUSTER
from tests.support.processes import cluster_processes, hear_signals, marked_processes
from workers.demo_models.writer import write_demo_model

ROOT = Path(__file__).parents[3]

TITLES = {
    "store": "ray::StoreActor",
    "gateway": "ray::ServeReplica:gateway:",
    "rank": "ray::RankActor",
    "gang": "ray::ServeReplica:model-",
    "controller": "ray::ServeController",
    "proxy": "ray::ProxyActor",
    "raylet": "/raylet/raylet",
}
"""How each process is found among those of the cluster."""

NEAR, FAR = "near", "far"
"""The models: one on two ranks of the head's node, one on the second node."""

START_S = 300.0
"""For a start on a busy machine; a quiet one takes about fifteen seconds."""

STARTS = 3
"""On a busy machine Ray gives up waiting for itself; a supervisor starts it again then, and so does this."""

Found = TypeVar("Found")


class ClusterFailed(Exception):
    """The cluster does not start, or has ended by itself."""


def wait(seconds: float, look: Callable[[], Found]) -> Found:
    """What `look` finds as soon as it finds something, or what it found last after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(0.2)  # a look at all processes takes ten milliseconds
    return found


class Cluster:
    """`spray serve` of a demo model with two gateways, and perhaps a second node.

    Args:
        folder: for jobs, outputs and the model; what is there already is used.
        two_nodes: with a second node, and a model on it.
        jobs_url: of a PostgreSQL database for jobs; None: SQLite in the folder.

    Attributes:
        url: of its server, since it was ready for the last time.
    """

    def __init__(self, folder: Path, two_nodes: bool = False, jobs_url: str | None = None) -> None:
        self.url = ""
        self.folder, self.models = folder, (NEAR, FAR) if two_nodes else (NEAR,)
        self.outputs, self.store = folder / "outputs", folder / "store"
        self._mark = uuid.uuid4().hex
        self._environment = os.environ | PRIVATE_CLUSTER | {
            "TEST_MARK": self._mark, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        if jobs_url is not None:
            self._environment["JOBS_URL"] = jobs_url
        self._file = folder / "deployment.yaml"
        self._address = ""
        self._lines: list[str] = []
        self._serve: subprocess.Popen[str] | None = None
        self._node: subprocess.Popen[bytes] | None = None
        if not (folder / "model").exists():
            write_demo_model(folder / "model", "qwen-image")
        self._file.write_text(yaml.safe_dump(self._deployment(jobs_url is not None)))

    def start(self) -> None:
        """Start it, and wait until all its models answer. What ends meanwhile is started again, `STARTS` times in all.

        Raises:
            ClusterFailed: it ends each time, or is not ready within `START_S`.
        """
        for left in reversed(range(STARTS)):
            try:
                self._start()
                return
            except ClusterFailed:
                if not left:
                    raise
                self.kill()

    def _start(self) -> None:
        self._lines = []
        self._serve = subprocess.Popen(
            [sys.executable, "-m", "service.cli.main", "serve", str(self._file), "--port", "0"],
            env=self._environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=hear_signals,
        )
        threading.Thread(target=self._read, args=(self._serve, self._lines), daemon=True).start()
        self._address = self._said(r"--address (\S+)")
        if FAR in self.models:
            self.start_node()
        self.url = self._said(r"^ready: .*?(http://[\w.:]+)")

    def start_node(self) -> None:
        """Start the second node; its processes carry a mark of their own besides."""
        with (self.folder / "node.log").open("ab") as log:
            self._node = subprocess.Popen(
                [sys.executable, "-m", "tests.benchmarks.job_faults.node", self._address, f"zone={FAR}"],
                env=self._environment | {"TEST_MARK": f"{self._mark}-{FAR}"},
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def processes(self, node: str = "") -> dict[int, str]:
        """The living processes of the cluster, or of its second node, with their command lines."""
        return marked_processes(f"{self._mark}-{node}" if node else self._mark)

    def find(self, process: str, node: str = "") -> set[int]:
        """The ids of its processes of one kind."""
        return {pid for pid, line in self.processes(node).items() if TITLES[process] in line}

    def check(self) -> None:
        """Raise `ClusterFailed` if it has ended by itself."""
        if self._serve is None or self._serve.poll() is not None:
            raise ClusterFailed(f"spray serve has ended: {self._tail()}")

    def end_node(self, seconds: float) -> bool:
        """Wait for the end of all processes of the second node; those that are left are killed, and make it False."""
        gone = wait(seconds, lambda: not self.processes(FAR))
        self._kill(FAR)
        if self._node is not None:
            self._node.wait(60)
        return gone

    def kill(self) -> list[int]:
        """Kill every process of the cluster at once; return their ids."""
        killed = self._kill()
        for process in (self._serve, self._node):
            if process is not None:
                process.wait(60)
        self._serve = self._node = None
        return killed

    def stop(self) -> None:
        """End it as its operator does, then whatever is left of it."""
        if self._serve is not None:
            self._serve.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._serve.wait(60)
        self.kill()

    def _kill(self, node: str = "") -> list[int]:
        killed = []
        folders = set() if node else set(re.findall(r"/[\w./-]*/spray-\w{8}\b", "\n".join(self.processes().values())))
        # In a loop, for some start others before their turn comes.
        while living := self.processes(node) if node else cluster_processes(self._mark, folders):
            for pid in living:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            killed += living
            time.sleep(0.05)
        return sorted(set(killed))

    def _said(self, pattern: str) -> str:
        """The group of a line of output, once there is such a line."""
        deadline = time.monotonic() + START_S
        while True:
            found = next((hit for line in list(self._lines) if (hit := re.search(pattern, line))), None)
            if found is not None:
                return found[1]
            self.check()
            if self._node is not None and self._node.poll() is not None:
                raise ClusterFailed(f"the second node has ended: {(self.folder / 'node.log').read_text()[-2000:]}")
            if time.monotonic() > deadline:
                raise ClusterFailed(f"spray serve did not say {pattern!r} within {START_S:g} s: {self._tail()}")
            time.sleep(0.05)

    def _tail(self) -> str:
        return "".join(self._lines[-20:])

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: list[str]) -> None:
        assert process.stdout is not None
        lines.extend(process.stdout)

    def _deployment(self, postgres: bool) -> Mapping[str, Any]:
        model: dict[str, Any] = {
            "source": str(self.folder / "model"), "device": "cpu", "max_queued": 64,
            "defaults": {"width": 64, "height": 64, "num_inference_steps": 20},
        }  # fmt: skip
        near = model | {"name": NEAR, "parallel": {"ulysses_degree": 2}, "placement": {"cpus_per_rank": 0.1}}
        far = model | {"name": FAR, "placement": {"cpus_per_rank": 0.1, "node_labels": {"zone": FAR}}}
        week = 7 * 24 * 3600
        return {
            "models": [near, far][: len(self.models)],
            "gateway": {"replicas": 2, "grpc_port": None},
            "storage": {"outputs": {"folder": str(self.outputs), "ttl_s": week}}
            | ({"jobs_url_env": "JOBS_URL"} if postgres else {"jobs": str(self.store)}),
            "metrics": {"port": None},
        }
