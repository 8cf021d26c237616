"""Exporter: lets Prometheus read the metrics of a whole node at one port.

Each process of a cluster calls `share_values` once, so that its values lie in files of one folder per node, and makes
an `Exporter`. All exporters wait for one lock. The process that holds it answers for all processes; when it ends,
another takes over within `RETRY_S`. So there is nothing to deploy or to discover.

The only file that uses prometheus_client's private parts: `values` and `mmap_dict`. `tests/workers/test_exporter.py`
pins what it relies on.
"""

import fcntl
import importlib.metadata
import logging
import os
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, start_http_server, values
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from workers.metrics import BUILD
from workers.private_folder import make_private

logger = logging.getLogger("ray.serve")

RETRY_S = 2.0

KEPT = "kept"
"""Takes the place of a pid in the name of the files that hold what ended processes have counted."""


def share_values() -> Path | None:
    """Keep this process's metrics where the whole node can read them.

    Call it once, at the start of a process: each labeled series keeps the kind of value with which it was created.

    Returns:
        The folder of this node and cluster. None outside Ray's worker processes, and where the folder cannot be used:
        then values stay in the process, which costs its metrics and nothing else.
    """
    raylet = os.environ.get("RAY_RAYLET_PID")
    if raylet is None:
        return None
    named = os.environ.get("SPRAY_METRICS_DIR")
    folder = Path(named or f"{tempfile.gettempdir()}/spray-metrics-{raylet}")
    try:
        if named:
            folder.mkdir(parents=True, exist_ok=True)
        else:
            make_private(folder)
        for file in folder.glob(f"gauge_*_{os.getpid()}.db"):  # left by an ended process that had the same pid
            file.unlink()
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        logger.warning("this process exports no metrics: %s: %s", folder, error.strerror or error)
        return None
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)  # in this process only: Ray's own processes read it too
    values.ValueClass = values.MultiProcessValue()
    return folder


class Exporter:
    """One process's share in answering Prometheus.

    Args:
        folder: what `share_values` returned; None: never answer.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._where: tuple[str, int | None] | None = None
        self._stopped = threading.Event()

    def serve_at(self, host: str, port: int | None) -> None:
        """From now on, answer or wait to answer at `http://host:port/metrics`.

        Args:
            host: address to bind.
            port: the same for all processes of the node; None: do not answer.
        """
        if (host, port) == self._where:
            return
        self._where = host, port
        self._stopped.set()
        self._stopped = threading.Event()  # a new one: the former thread must not miss that its own is set
        if port is not None and self._folder is not None:
            BUILD.labels(importlib.metadata.version("spray")).set(1)
            arguments = host, port, self._folder, self._stopped
            threading.Thread(target=_serve, args=arguments, name="spray-metrics", daemon=True).start()


class NodeCollector(Collector):
    """The metrics of all processes of a node: counts of the running and the ended ones, gauges of the running ones."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        """Read all files. Each scrape calls it from a thread of its own."""
        with (self._folder / "collect.lock").open("a") as lock:  # or one scrape would unlink what another reads
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
            self._fold_ended_processes()
            return list(MultiProcessCollector(None, str(self._folder)).collect())

    def _fold_ended_processes(self) -> None:
        """Add what ended processes have counted to one file per kind; else files would pile up with every restart."""
        for file in self._folder.glob("*_*.db"):
            kind, _, process = file.stem.rpartition("_")
            if process == KEPT or _is_alive(int(process)):
                continue
            if not kind.startswith("gauge"):
                kept = MmapedDict(str(self._folder / f"{kind}_{KEPT}.db"))
                for key, value, *_ in MmapedDict.read_all_values_from_file(str(file)):
                    kept.write_value(key, kept.read_value(key)[0] + value, 0.0)
                kept.close()
            file.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _serve(host: str, port: int, folder: Path, stopped: threading.Event) -> None:
    """Wait for the lock, then for the port, then answer until stopped.

    The lock elects the process, not the port: another program may hold the port, and closing the file gives the lock
    up however this process ends.
    """
    registry = CollectorRegistry()
    registry.register(NodeCollector(folder))
    warned = False
    with (folder / f"port-{port}.lock").open("a") as lock:
        while not _try_lock(lock.fileno()):
            if stopped.wait(RETRY_S):
                return
        while not stopped.is_set():
            try:
                server, _ = start_http_server(port, host, registry)
            except OSError as error:
                if not warned:
                    logger.warning("metrics: this node cannot answer at %s:%d: %s", host, port, error.strerror)
                warned = True
                stopped.wait(RETRY_S)
                continue
            stopped.wait()
            server.shutdown()
            server.server_close()


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
