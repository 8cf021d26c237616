"""Exporter: lets Prometheus read the metrics of a node. Started by gateways and gangs, and by ranks that are alone.

All processes of spray on a node try to bind one port. Whoever has it answers for all of them; when that process ends,
another takes over within `RETRY_S`. So there is nothing to deploy or to discover: every node answers at that port.
"""

import importlib.metadata
import logging
import os
import threading
import urllib.request
from collections.abc import Iterable
from http.client import HTTPException
from pathlib import Path

from workers.metrics import BUILD, FOLDER  # first: it says where prometheus_client keeps values

# isort: split
from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

logger = logging.getLogger("ray.serve")

RETRY_S = 2.0

FOREIGN_LOOKS = 3
"""So often in a row the port must be somebody else's before that is said; once, it may just have become free."""


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
    """The metrics of all processes of a node, without the gauges of those that have died."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._all = MultiProcessCollector(None, str(folder))

    def collect(self) -> Iterable[Metric]:
        """Called for each scrape."""
        for file in self._folder.glob("gauge_live*_*.db"):
            pid = int(file.stem.rpartition("_")[2])
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                mark_process_dead(pid, str(self._folder))
            except PermissionError:  # it lives, and belongs to somebody else
                continue
        yield from self._all.collect()


def _serve(host: str, port: int, folder: Path, over: threading.Event) -> None:
    registry = CollectorRegistry()
    registry.register(NodeCollector(folder))
    foreign = 0
    while not over.is_set():
        try:
            server, _ = start_http_server(port, host, registry)
        except OSError as error:
            foreign = 0 if _is_spray(host, port) else foreign + 1
            if foreign == FOREIGN_LOOKS:
                logger.warning("metrics: this node cannot answer at %s:%d (%s)", host, port, error.strerror)
            over.wait(RETRY_S)
            continue
        over.wait()
        server.shutdown()
        server.server_close()


def _is_spray(host: str, port: int) -> bool:
    """Whether it is a process of spray that answers there."""
    reachable = "127.0.0.1" if host == "0.0.0.0" else host
    try:
        with urllib.request.urlopen(f"http://{reachable}:{port}/metrics", timeout=RETRY_S) as answer:
            return b"spray_build_info" in answer.read()
    except (OSError, HTTPException):
        return False
