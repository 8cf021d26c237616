"""What each API key uses in each gateway, so that its limits hold for all gateways together.

No request waits for this: once a second each gateway tells the keeper of `service.state.shared_turns` what its own
requests use, and hears the sum of the others. So a key may exceed a limit by what other gateways accept within a
second. Without a keeper each gateway counts for itself. For `service.access`; the numbers are those of
`service.state.keyring`.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ray.exceptions import RayError

logger = logging.getLogger("ray.serve")

PERIOD_S = 1.0

SILENT_S = 5.0
"""Seconds after which a gateway's last report no longer counts, and after which a silent keeper is away."""


class Use(NamedTuple):
    """The use of one key.

    Attributes:
        running: requests that wait or run.
        spent: work that its bucket of a minute still holds.
    """

    running: int = 0
    spent: float = 0.0


class KeyUses:
    """The keeper's part. All its methods run on one event loop."""

    def __init__(self) -> None:
        super().__init__()
        self._told: dict[str, tuple[float, Mapping[str, Use]]] = {}  # by gateway: when, and what

    async def share_use(self, gateway: str, used: Mapping[str, Use]) -> dict[str, Use]:
        """Record what the keys use in a gateway; return what they use in all others, by key."""
        now = time.monotonic()
        told = {name: each for name, each in self._told.items() if now - each[0] < SILENT_S}
        self._told = told | {gateway: (now, used)}
        found: dict[str, Use] = {}
        for name, (_, theirs) in told.items():
            for key, use in theirs.items() if name != gateway else ():
                before = found.get(key, Use())
                found[key] = Use(before.running + use.running, before.spent + use.spent)
        return found


class SharedUse:
    """A gateway's part.

    Args:
        gateway: its name.
        limited: whether any key has limits. If none has, the keeper is not asked.
        used: returns what its own requests use, by key.
        hear: is called with what the requests of other gateways use.
        find_keeper: returns the handle of the actor with the methods of `KeyUses`; blocks.
    """

    def __init__(
        self,
        gateway: str,
        limited: Callable[[], bool],
        used: Callable[[], Mapping[str, Use]],
        hear: Callable[[Mapping[str, Use]], None],
        find_keeper: Callable[[], Any],
    ) -> None:
        self._gateway, self._limited, self._used, self._hear = gateway, limited, used, hear
        self._find_keeper = find_keeper
        self._several = False
        self._keeper: Any = None  # while it answers
        self._sharing: asyncio.Task[None] | None = None

    def follow(self, several: bool) -> None:
        """Say whether there are other gateways."""
        self._several = several
        if several and (self._sharing is None or self._sharing.done()):
            self._sharing = asyncio.create_task(self._share())

    async def _share(self) -> None:
        while self._several:
            if self._limited():
                try:
                    self._keeper = self._keeper or await asyncio.to_thread(self._find_keeper)
                    asked = _result(self._keeper.share_use.remote(self._gateway, self._used()))
                    self._hear(await asyncio.wait_for(asked, SILENT_S))
                except (RayError, TimeoutError, ValueError) as error:
                    if self._keeper is not None:
                        logger.warning("limits of keys count for this gateway alone: %s", error)
                    self._keeper = None
                    self._hear({})
            await asyncio.sleep(PERIOD_S)
        self._hear({})


async def _result(reference: Any) -> Any:
    return await reference
