"""Sees that the process which sent a request has died, and cancels the request. For `workers.gang.gang`, and for
`service.state.kept_answers`.

Serve cancels what a living caller no longer wants. For a caller that was killed it cancels nothing, and the ranks would
compute to the last step for nobody.
"""

import asyncio
from collections.abc import Callable

import ray

PERIOD_S = 1.0

SERVE_NAMESPACE = "serve"


async def cancel_when_gone(caller: str, cancel: Callable[[], None]) -> None:
    """Look every second until the caller is gone, then cancel once.

    Args:
        caller: the name of its actor; empty: do not look.
        cancel: what to call.
    """
    while caller:
        await asyncio.sleep(PERIOD_S)
        if not await asyncio.to_thread(is_alive, caller):
            cancel()
            return


def is_alive(name: str) -> bool:
    """Whether an actor lives. Its name ends with it. Where Ray does not run nobody can tell, and Ray is not started."""
    if not ray.is_initialized():
        return True
    try:
        ray.get_actor(name, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    except Exception:  # the head is away: that says nothing of the caller
        return True
    return True
