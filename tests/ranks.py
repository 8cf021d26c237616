"""A pool of gloo ranks for tests: real processes, started once, reused by many cases of different world sizes.

`pool.run(degrees, fn, *args)` calls `fn(mesh, *args)` on `degrees.world_size` ranks at once and returns their results
in rank order. `fn` must be a module-level function. An exception on any rank is raised here with its traceback; the
whole pool is replaced then, because the others may sit in a collective that will not end.
"""

import socket
import traceback
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh

TIMEOUT_S = 60.0


class RankPool:
    """Up to `size` ranks; started on first use."""

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self._workers: list[tuple[Any, Connection]] = []

    def run(self, degrees: ParallelDegrees, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """Results of `fn(mesh, *args)` on each rank, in rank order."""
        if not self._workers:
            self._start()
        world = degrees.world_size
        port = _free_port()
        connections = [connection for _, connection in self._workers[:world]]
        for connection in connections:
            connection.send((degrees, port, fn, args))
        results: dict[int, Any] = {}
        while len(results) < world:
            for ready in wait([c for i, c in enumerate(connections) if i not in results], timeout=TIMEOUT_S * 2):
                ok, value = ready.recv()
                if not ok:
                    self.stop()
                    raise RuntimeError(f"rank {connections.index(ready)} failed:\n{value}")
                results[connections.index(ready)] = value
        return [results[i] for i in range(world)]

    def stop(self) -> None:
        """End all ranks, whatever they are doing."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers = []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            self._workers.append((process, ours))


def _serve(rank: int, connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            degrees, port, fn, args = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            connection.send((True, _run(rank, degrees, port, fn, args)))
        except Exception:
            connection.send((False, traceback.format_exc()))


def _run(rank: int, degrees: ParallelDegrees, port: int, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    timeout = timedelta(seconds=TIMEOUT_S)
    store = dist.TCPStore("127.0.0.1", port, is_master=rank == 0, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=degrees.world_size, timeout=timeout)
    try:
        return fn(ParallelMesh.create(degrees, device_type="cpu", timeout_s=TIMEOUT_S), *args)
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
