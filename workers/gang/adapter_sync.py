"""AdapterSync: brings the adapters of running ranks to those that the deployment file names.

`workers.gang.gang` says what the file names, and lets it `follow`; `workers.gang.supervisor` gives it new ranks.
Both sets are stored. So a set that is deployed while another is on its way, a rank that dies meanwhile and a file that
cannot be read all end the same way: the ranks are asked again until they have what the file says.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Protocol

from deploy.model_sections import LoRA
from workers.errors import GangLost, RequestError, RequestFailed

logger = logging.getLogger("ray.serve")

Loras = tuple[LoRA, ...]

AGAIN_S = 30.0
"""Adapters that the ranks refused are tried again after this time: their file may have been mended."""


class Ranks(Protocol):
    """What it needs of a `RankGroup`."""

    async def set_loras(self, loras: Loras) -> None:
        """See `RankGroup.set_loras`."""


class AdapterSync:
    """The adapters of one gang.

    Args:
        loras: those with which the first ranks start.

    Attributes:
        wanted: those of the deployment file.
        loaded: those that the ranks have.
    """

    def __init__(self, loras: Loras) -> None:
        self.wanted = loras
        self.loaded = loras
        self._refusal = ""  # why the ranks do not take `wanted`
        self._told = asyncio.Event()  # of `wanted`, perhaps once more

    def want(self, loras: Loras) -> None:
        """Store another set."""
        if loras != self.wanted:
            self.wanted, self._refusal = loras, ""
        self._told.set()

    @property
    def differs(self) -> bool:
        """True if the ranks do not have what the file says."""
        return self.loaded != self.wanted

    @property
    def trouble(self) -> str:
        """The difference, for a person to read; empty if there is none."""
        if not self.differs:
            return ""
        return self._refusal or f"the adapters change to {_names(self.wanted)} after the running request"

    def start_over(self) -> Loras:
        """The adapters for new ranks: those that were loaded and stay. The rest follows by `apply`.

        A file that cannot be read therefore never keeps ranks from starting again.
        """
        self.loaded = tuple(lora for lora in self.loaded if lora in self.wanted)
        return self.loaded

    async def follow(
        self, name: str, alone: Callable[[], contextlib.AbstractAsyncContextManager[Ranks | None]]
    ) -> None:
        """Give the ranks what the file says, in turns of their own, until they have it.

        Args:
            name: of the model.
            alone: a turn on the ranks; None: they are lost, and whoever replaces them calls `apply`.
        """
        while self.differs:
            self._told.clear()
            async with alone() as ranks:
                if ranks is not None:
                    await self.apply(name, ranks)
            if self.differs:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(AGAIN_S):
                        await self._told.wait()

    async def apply(self, name: str, ranks: Ranks) -> None:
        """Ask the ranks for what the file says, between requests. If they refuse, all keep what they have.

        Args:
            name: of the model.
            ranks: all of them, in a turn of their own.
        """
        before = self.trouble
        try:
            await self._ask(ranks)
        except GangLost as error:
            logger.error("%s: lost while the adapters were changed: %s", name, error)
            return
        if self.trouble not in ("", before):  # they are tried again and again
            logger.error("%s: %s", name, self.trouble)

    async def _ask(self, ranks: Ranks) -> None:
        wanted = self.wanted
        if wanted == self.loaded:
            return
        try:
            await ranks.set_loras(wanted)
        except (RequestError, RequestFailed) as error:
            if wanted == self.wanted:
                self._refusal = f"the adapters cannot be changed: {error}"
        else:
            self.loaded = wanted


def _names(loras: Loras) -> str:
    return ", ".join(lora.name for lora in loras) or "none"
