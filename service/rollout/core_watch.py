"""Notices when the core of a local cluster is gone, and limits the calls that wait for it. For `spray serve`.

Ray's own calls wait for minutes, or forever, if the processes that should answer are gone or stopped. So this module
looks at Ray's processes directly, and asks Serve in threads that may be left behind.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from types import TracebackType
from typing import Self, TypeVar

from ray import serve

from service.rollout.serve_client import dead_processes, kill_node

T = TypeVar("T")

PERIOD_S = 5.0

MEANWHILE_S = 0.5

ASIDE_S = 0.02

SILENT_S = 30.0
"""Seconds of silence after which a controller is gone. Serve restarts a dead one within seconds."""


class CoreWatch:
    """Watches Ray's processes and Serve's controller while the context lasts."""

    def __init__(self) -> None:
        self._heard_at = time.monotonic()
        self._ended = threading.Event()
        self._asking = threading.Thread(target=self._ask, name="spray-core-watch", daemon=True)

    def __enter__(self) -> Self:
        self._asking.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._asking.join(1.0)  # a call of Serve after Ray has stopped would start another Ray

    def failure(self) -> str:
        """Why the cluster can no longer serve; empty while it can."""
        dead = dead_processes()
        if dead:
            return f"Ray has ended: {' and '.join(dead)} died"
        silent_s = time.monotonic() - self._heard_at
        return f"Serve's controller has not answered for {silent_s:.0f} s" if silent_s > SILENT_S else ""

    def _ask(self) -> None:
        while not self._ended.wait(PERIOD_S):
            with contextlib.suppress(Exception):  # a controller that is starting again
                serve.status()
                self._heard_at = time.monotonic()


def within(seconds: float, call: Callable[[], T], name: str, meanwhile: Callable[[], None] = lambda: None) -> T:
    """What the call returns, but wait no longer than this. A slower call goes on in its thread.

    Args:
        seconds: how long to wait.
        call: is called in a thread.
        name: says what it is.
        meanwhile: is called here every half second. What it raises ends the wait.

    Raises:
        TimeoutError: the call has not returned in time.
        Exception: what the call or `meanwhile` raised.
    """
    called, deadline = _in_thread(call, name, daemon=True), time.monotonic() + seconds
    while not futures.wait([called], min(MEANWHILE_S, max(0.0, deadline - time.monotonic()))).done:
        if time.monotonic() >= deadline:
            raise TimeoutError(f"{name} did not end within {seconds:g} s")
        meanwhile()
    return called.result()


@contextlib.contextmanager
def impatient() -> Iterator[Callable[[], None]]:
    """While the context lasts, signals that would end this process end the processes of the cluster at once instead.

    Yields:
        A function that restores this after other code has set a signal's action. It acts only in the main thread.
    """

    def hurry(number: int, frame: object) -> None:
        threading.Thread(target=kill_node, name="spray: kill", daemon=True).start()  # this thread may hold Ray's locks

    former = {}
    if threading.current_thread() is threading.main_thread():
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        former = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}

    def arm() -> None:
        for number in former:
            signal.signal(number, hurry)

    try:
        arm()
        yield arm
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def aside(call: Callable[[], None], meanwhile: Callable[[], None]) -> None:
    """Call in another thread, and do something else every `ASIDE_S` until it has returned.

    Raises:
        Exception: what the call raised.
    """
    called = _in_thread(call, "aside", daemon=False)
    while not called.done():
        futures.wait([called], ASIDE_S)
        meanwhile()
    called.result()


def _in_thread(call: Callable[[], T], name: str, daemon: bool) -> "futures.Future[T]":
    called: futures.Future[T] = futures.Future()

    def run() -> None:
        try:
            result = call()
        except BaseException as error:
            called.set_exception(error)
        else:
            called.set_result(result)

    threading.Thread(target=run, name=f"spray: {name}", daemon=daemon).start()
    return called
