"""Exporter: lets Prometheus read the metrics of a node. Started by gateways and gangs, and by ranks that are alone.

All processes of spray on a node wait for one lock. Whoever has it answers for all of them at one port; when that
process ends, another takes over within `RETRY_S`. So there is nothing to deploy or to discover.
"""

import fcntl
import importlib.metadata
import logging
import os
import threading
from collections.abc import Iterable
from pathlib import Path

from workers.metrics import BUILD, FOLDER  # first: it says where prometheus_client keeps values

# isort: split
from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

logger = logging.getLogger("ray.serve")

RETRY_S = 2.0


KEPT = "kept"
"""In the place of a process's number, in the name of a file with what ended processes have counted."""


class Exporter:
    """One process's share in answering Prometheus."""

    def __init__(self) -> None:
        self._where: tuple[str, int | None] | None = None
        self._over = threading.Event()

    def serve_at(self, host: str, port: int | None) -> None:
        """From now on, answer or wait to answer at `http://host:port/metrics`.

        Args:
            host: address to bind.
            port: the same for all processes of the node; None: do not answer.
        """
        if (host, port) == self._where:
            return
        self._where = host, port
        self._over.set()
        self._over = threading.Event()
        if port is not None and FOLDER is not None:
            BUILD.labels(importlib.metadata.version("spray")).set(1)
            arguments = host, port, FOLDER, self._over
            threading.Thread(target=_serve, args=arguments, name="spray-metrics", daemon=True).start()


class NodeCollector(Collector):
    """The metrics of all processes of a node, also of those that have ended, without the gauges of these."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        """Called for each scrape, from a thread of its own."""
        with (self._folder / "collect.lock").open("a") as lock:  # files go while they are read
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
            self._bury()
            return list(MultiProcessCollector(None, str(self._folder)).collect())

    def _bury(self) -> None:
        """Keep what ended processes have counted in one file for each kind, else their files would be more and more."""
        for file in self._folder.glob("*_*.db"):
            kind, _, process = file.stem.rpartition("_")
            if process == KEPT or _lives(int(process)):
                continue
            if not kind.startswith("gauge"):
                kept = MmapedDict(str(self._folder / f"{kind}_{KEPT}.db"))
                for key, value, *_ in MmapedDict.read_all_values_from_file(str(file)):
                    kept.write_value(key, kept.read_value(key)[0] + value, 0.0)
                kept.close()
            file.unlink()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _serve(host: str, port: int, folder: Path, over: threading.Event) -> None:
    """Wait for the lock, then for the port, then answer; until it is over."""
    registry = CollectorRegistry()
    registry.register(NodeCollector(folder))
    told = False
    with (folder / f"port-{port}.lock").open("a") as lock:
        while not _has(lock.fileno()):
            if over.wait(RETRY_S):
                return
        while not over.is_set():
            try:
                server, _ = start_http_server(port, host, registry)
            except OSError as error:
                if not told:
                    logger.warning("metrics: this node cannot answer at %s:%d: %s", host, port, error.strerror)
                told = True
                over.wait(RETRY_S)
                continue
            over.wait()
            server.shutdown()
            server.server_close()


def _has(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
