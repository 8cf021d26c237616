"""Boundary: where all ranks of a gang agree, between collectives, whether a request goes on.

`workers.gang.rank` passes one after each part of a request. A failure or a cancellation then stops all ranks at the
same place, and the gang is sound.
"""

from collections.abc import Callable
from typing import TypeVar

from sp_core.mesh import ParallelMesh
from workers.errors import PeerFailed, RequestCancelled, RequestError, RequestFailed
from workers.messages import GenerationRequest
from workers.model.out_of_memory import is_device_failure

Result = TypeVar("Result")

REMEMBERED = 1000
"""Cancellations that a rank keeps. A request that has ended is never asked for again."""


class Boundary:
    """One rank's part of it.

    Args:
        rank: its number.

    Attributes:
        progress: boundaries passed; read by another thread. The gang takes a rank for stuck if it stands still for too
            long.
        pauses: all ranks have agreed, at the latest boundary, to leave the request here.
    """

    def __init__(self, rank: int) -> None:
        self.progress = 0
        self._rank = rank
        self.pauses = False
        self._cancelled: dict[str, None] = {}  # requests, in order, by another thread; as is the next
        self._paused: dict[str, int] = {}  # parts of requests
        self._part = 0

    def cancel(self, request_id: str) -> None:
        """Stop this request, and no other, at the next boundary. From any thread."""
        self._cancelled[request_id] = None
        if len(self._cancelled) > REMEMBERED:  # those that had ended before nobody forgets
            self._cancelled.pop(next(iter(self._cancelled)), None)

    def begin(self, part: int) -> None:
        """Part `part` of a request begins, in an elastic gang."""
        self._part, self.pauses = part, False

    def pause(self, request_id: str, part: int) -> None:
        """Leave this part of a request at the next boundary. From any thread."""
        self._paused[request_id] = part
        if len(self._paused) > REMEMBERED:
            self._paused.pop(next(iter(self._paused)), None)

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self._cancelled.pop(request_id, None)
        self._paused.pop(request_id, None)

    def run(self, mesh: ParallelMesh, request: GenerationRequest | None, work: Callable[[], Result]) -> Result:
        """Do what every rank does by itself, without collectives, and return only if it worked on all of them."""
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        self.cross(mesh, request, failure)
        return result

    def cross(
        self,
        mesh: ParallelMesh,
        request: GenerationRequest | None,
        failure: Exception | None = None,
        in_collectives: float = 0.0,
    ) -> float:
        """All ranks learn whether one failed or was told to stop, and raise or go on together.

        The rank with the reason raises it; the others raise `PeerFailed`. A cancellation is agreed like a failure,
        because it reaches the ranks at different moments.

        Args:
            mesh: the ranks.
            request: what they run, if any.
            failure: what this rank has raised.
            in_collectives: seconds that this rank was in collectives of the step.

        Returns:
            How much more that is than on the rank with the least, which the others have waited for.

        Raises:
            RequestError, RequestFailed: on all ranks.
            RuntimeError: this rank's device has failed. It is not agreed, for the rank is lost.
        """
        if is_device_failure(failure):
            raise failure
        self.progress += 1
        stop = request is not None and request.request_id in self._cancelled
        pause = request is not None and self._paused.get(request.request_id) == self._part
        own_ns = round(in_collectives * 1e9)
        failed, cancelled, pauses, least = mesh.agree(failure is not None, stop, pause, -own_ns)  # the least, negative
        self.pauses = bool(pauses)
        if isinstance(failure, RequestError):
            raise failure
        if failure is not None:
            raise RequestFailed(f"rank {self._rank}: {type(failure).__name__}: {failure}") from failure
        if failed:
            raise PeerFailed(f"rank {self._rank} stopped because another rank failed")
        if request and cancelled:
            raise RequestCancelled(f"request {request.request_id} was canceled")
        return (own_ns + least) / 1e9
