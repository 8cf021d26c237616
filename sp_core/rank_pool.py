"""A pool of gloo ranks on this machine: real processes, started once, reused for many runs of different world sizes.

`pool.run(degrees, fn, *args)` calls `fn(mesh, *args)` on `degrees.world_size` ranks at once and returns their results
in rank order. `fn` must be a module-level function. Used by `sp_core.verify`, by benchmarks and by the tests.
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

TIMEOUT_S = 180.0
"""Of each exchange; long, because the ranks of a pool may share few cores with other work."""

RENDEZVOUS_S = 240.0
"""Until all ranks have met: on first use each imports what `fn` needs, and they may share few cores."""


RUNS_PER_PROCESS = 60
"""Then new processes take over: gloo's groups leave threads behind that wake up for ever, some eight for each run."""


class RankFailed(RuntimeError):
    """A rank raised. The whole pool is replaced then, because the others may sit in a collective that will not end.

    Attributes:
        said: what it raised, in a line.
    """

    def __init__(self, rank: int, said: str, trace: str) -> None:
        super().__init__(f"rank {rank} failed:\n{trace}")
        self.said = said


class RankPool:
    """Up to `size` ranks, with one thread each; started on first use."""

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self._workers: list[tuple[Any, Connection]] = []
        self._runs = 0

    def run(self, degrees: ParallelDegrees, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """Results of `fn(mesh, *args)` on each rank, in rank order.

        Raises:
            RankFailed: it raised on some rank.
        """
        if self._runs == RUNS_PER_PROCESS:
            self.stop()
        if not self._workers:
            self._start()
        self._runs += 1
        world = degrees.world_size
        port = _free_port()
        connections = [connection for _, connection in self._workers[:world]]
        for connection in connections:
            connection.send((degrees, port, fn, args))
        results: dict[int, Any] = {}
        while len(results) < world:
            waiting = {connection: rank for rank, connection in enumerate(connections) if rank not in results}
            for ready in wait(list(waiting)):
                rank = waiting[ready]  # type: ignore[index]
                ok, value = _receive(connections[rank])
                if not ok:
                    self.stop()
                    raise RankFailed(rank, *value)
                results[rank] = value
        return [results[i] for i in range(world)]

    def stop(self) -> None:
        """End all ranks, whatever they are doing."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers = []

    def _start(self) -> None:
        self._runs = 0
        context = mp.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            self._workers.append((process, ours))


def _receive(connection: Connection) -> tuple[bool, Any]:
    try:
        return connection.recv()  # type: ignore[no-any-return]
    except EOFError:
        return False, ("the process died", "the process died")


def _serve(rank: int, connection: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            degrees, port, fn, args = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            connection.send((True, _run(rank, degrees, port, fn, args)))
        except Exception as error:
            connection.send((False, (f"{type(error).__name__}: {error}", traceback.format_exc())))


def _run(rank: int, degrees: ParallelDegrees, port: int, fn: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    timeout = timedelta(seconds=RENDEZVOUS_S)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, is_master=rank == 0, timeout=timeout
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=degrees.world_size, timeout=timeout)
    try:
        return fn(ParallelMesh.create(degrees, device_type="cpu", timeout_s=TIMEOUT_S), *args)
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
