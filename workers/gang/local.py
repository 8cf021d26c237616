"""A gang without Ray: ranks as child processes of this one, for `spray generate --local`.

A `ModelSpec` and a `GenerationRequest` come in, step events go to a callback, the result is returned.
"""

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from deploy.model_spec import ModelSpec
from workers.errors import GangLost, PeerFailed, SprayError
from workers.gang.device import environment
from workers.gang.network import use_interface
from workers.gang.rank_process import import_rank
from workers.messages import Drawn, GenerationRequest, GenerationResult, Preview, StepEvent

LOOPBACK = "127.0.0.1"

Report = StepEvent | Preview | GenerationResult | int | None
"""What a rank's process sends. Rank 0: its port, its events, its result. All: None when they are done."""


def generate_locally(
    model: ModelSpec,
    request: GenerationRequest,
    on_step: Callable[[StepEvent], None],
    on_preview: Callable[[Preview], None] = lambda preview: None,
) -> GenerationResult:
    """Start the ranks, run one request, end the ranks.

    Args:
        model: what to load and the layout.
        request: what to draw.
        on_step: called after each step.
        on_preview: called with each preview that the request asks for.

    Raises:
        RequestError: the request does not suit the model.
        RequestFailed: it failed.
        GangLost: a rank could not start, or died.
    """
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(model.parallel.world_size)]
    processes: list[BaseProcess] = [
        context.Process(target=_serve_rank, args=(i, model, request, theirs), daemon=True)
        for i, (_, theirs) in enumerate(pipes)
    ]
    try:
        with _environment(environment(model)):
            for process in processes:
                process.start()
        for _, theirs in pipes:
            theirs.close()
        return _collect([ours for ours, _ in pipes], on_step, on_preview)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Give these variables to processes that start inside: some are read while a module is imported."""
    before, path = dict(os.environ), list(sys.path)
    os.environ.update(variables)
    if "PYTHONPATH" in variables:  # a spawned process copies its parent's sys.path, whatever the variable says
        sys.path[:0] = variables["PYTHONPATH"].split(os.pathsep)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        sys.path[:] = path


def _collect(
    connections: list[Connection], on_step: Callable[[StepEvent], None], on_preview: Callable[[Preview], None]
) -> GenerationResult:
    """Tell the ranks where to meet, then follow their reports until rank 0's result or the first reason to stop."""
    rank_of = {connection: rank for rank, connection in enumerate(connections)}
    failure: SprayError | None = None
    port = _receive(0, connections[0])
    for rank, connection in enumerate(connections[1:], 1):
        try:
            connection.send(port)
        except OSError:
            raise GangLost(f"rank {rank} died") from None
    while rank_of and not (failure and not isinstance(failure, PeerFailed)):
        for ready in wait(list(rank_of)):
            assert isinstance(ready, Connection)
            try:
                report = _receive(rank_of[ready], ready)
            except SprayError as error:  # PeerFailed is not the reason: go on until the rank that has it reports
                failure = error if failure is None or isinstance(failure, PeerFailed) else failure
                del rank_of[ready]
                continue
            if isinstance(report, StepEvent):
                on_step(report)
            elif isinstance(report, Preview):
                on_preview(report)
            elif isinstance(report, GenerationResult):
                return report
            else:
                del rank_of[ready]
    raise failure or GangLost("the ranks ended without a result")


def _receive(rank: int, connection: Connection) -> Report:
    try:
        report: Report | SprayError = connection.recv()
    except EOFError:
        raise GangLost(f"rank {rank} died") from None
    if isinstance(report, SprayError):
        raise report
    return report


def _serve_rank(index: int, model: ModelSpec, request: GenerationRequest, parent: Connection) -> None:
    try:
        use_interface(None, LOOPBACK)
        rank = import_rank()(index, model, device_index=index)
        if index == 0:
            port = rank.open_rendezvous(LOOPBACK)
            parent.send(port)
        else:
            port = parent.recv()
        rank.join(LOOPBACK, port)
        for report in rank.generate(request):
            parent.send(rank.answer(report.request_id) if isinstance(report, Drawn) else report)
        parent.send(None)
    except SprayError as error:
        parent.send(error)
    except Exception as error:
        parent.send(GangLost(f"rank {index}: {type(error).__name__}: {error}"))
