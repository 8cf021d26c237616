"""A pool of ranks on this machine: real processes, started once, reused for many runs of different world sizes.

`pool.run(degrees, fn, *args)` calls `fn(mesh, *args)` on `degrees.world_size` ranks at once and returns their results
in rank order. `fn` must be a module-level function. Used by `sp_core.verify.verify`, by benchmarks and by the tests.
"""

import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.torchvision_operators import declare_missing_operators

TIMEOUT_S = 180.0
"""Seconds for each collective; many, because the ranks may share few cores with other work."""

RENDEZVOUS_S = 240.0
"""Seconds until all ranks have met: on first use each imports what `fn` needs, and they may share few cores."""

AFTERMATH_S = 5.0
"""Seconds for the other ranks to end after one has failed; about the time that new processes take to start."""

DIED = (False, ("the process died", "the process died"))
"""Stands for the answer of a rank that died."""


class RankFailed(RuntimeError):
    """A rank raised. If another rank does not end soon, the pool is replaced: it may hang in a collective.

    Attributes:
        said: the exception, in one line.
    """

    def __init__(self, rank: int, said: str, trace: str) -> None:
        super().__init__(f"rank {rank} failed:\n{trace}")
        self.said = said


class RankPool:
    """Up to `size` ranks, started on first use.

    Args:
        size: the most ranks that a run may have.
        device_type: `cpu`: ranks with one thread each, over gloo; `cuda`: one GPU each, over NCCL.
    """

    def __init__(self, size: int = 4, device_type: str = "cpu") -> None:
        self.size = size
        self.device_type = device_type
        self._workers: list[tuple[Any, Connection]] = []
        self._store: Any = None
        self._runs = 0

    def run(self, degrees: ParallelDegrees, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """Results of `fn(mesh, *args)` on each rank, in rank order.

        Raises:
            RankFailed: `fn` raised on some rank.
        """
        if not self._workers:
            self._start()
        self._runs += 1
        connections = [connection for _, connection in self._workers[: degrees.world_size]]
        for connection in connections:
            connection.send((self._runs, degrees, fn, args))
        answers: dict[int, tuple[bool, Any]] = {}
        failed: int | None = None
        while len(answers) < len(connections):
            waiting = {connection: rank for rank, connection in enumerate(connections) if rank not in answers}
            ready = wait(list(waiting), None if failed is None else AFTERMATH_S)
            for answering in ready:
                rank = waiting[answering]  # type: ignore[index]
                answers[rank] = _receive(connections[rank])
                if failed is None and not answers[rank][0]:
                    failed = rank
            if not ready or any(answer is DIED for answer in answers.values()):
                self.stop()
                break
        if failed is not None:
            raise RankFailed(failed, *answers[failed][1])
        return [answers[rank][1] for rank in range(len(connections))]

    def stop(self) -> None:
        """End all ranks, whatever they are doing."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
            process.join()
        self._workers = []
        self._store = None

    def _start(self) -> None:
        # One store for all runs: a rank that connects before a new store listens would retry only after seconds.
        self._store = _store(0, is_master=True)
        context = mp.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self._store.port, theirs, self.device_type), daemon=True
            )
            process.start()
            self._workers.append((process, ours))


def _receive(connection: Connection) -> tuple[bool, Any]:
    try:
        return connection.recv()  # type: ignore[no-any-return]
    except (EOFError, ConnectionResetError):
        return DIED


def _serve(rank: int, port: int, connection: Connection, device_type: str) -> None:
    declare_missing_operators()  # what is received may import anything
    device: torch.device | None = None
    if device_type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # what is compared must be exact; matmul does without by default
    else:
        torch.set_num_threads(1)
    store = _store(port, is_master=False)
    while True:
        try:
            run, degrees, fn, args = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            own = dist.PrefixStore(f"run {run}", store)  # type: ignore[attr-defined]
            connection.send((True, _run(rank, degrees, own, device, fn, args)))
        except Exception as error:
            connection.send((False, (f"{type(error).__name__}: {error}", traceback.format_exc())))


def _run(
    rank: int,
    degrees: ParallelDegrees,
    store: Any,
    device: torch.device | None,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> Any:
    timeout = timedelta(seconds=RENDEZVOUS_S)
    backend, size = "nccl" if device else "gloo", degrees.world_size
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=device)
    mesh: ParallelMesh | None = None
    try:
        mesh = ParallelMesh.create(degrees, device_type="cuda" if device else "cpu", timeout_s=TIMEOUT_S)
        mesh.agree(0)  # wait until all have met: a quick `fn` would hang up on ranks that are still connecting
        return fn(mesh, *args)
    finally:
        if mesh is not None:
            mesh.close()
        dist.destroy_process_group()


def _store(port: int, *, is_master: bool) -> Any:
    timeout = timedelta(seconds=RENDEZVOUS_S)
    return dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, is_master=is_master, wait_for_workers=False, timeout=timeout
    )
