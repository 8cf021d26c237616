"""AdapterSync: brings the adapters of running ranks to those that the deployment file names. For `workers.gang.gang`.

Both sets are stored. So a set that is deployed while another is on its way, a rank that dies meanwhile and a file that
cannot be read all end the same way: the ranks are asked again until they have what the file says.
"""

from typing import Protocol

from deploy.spec import LoRA
from workers.errors import RequestError, RequestFailed

Loras = tuple[LoRA, ...]


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

    def want(self, loras: Loras) -> None:
        """Store another set."""
        if loras != self.wanted:
            self.wanted, self._refusal = loras, ""

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

    async def apply(self, ranks: Ranks) -> None:
        """Ask the ranks for what the file says, between requests. If they refuse, all keep what they have.

        Raises:
            GangLost: the ranks are lost.
        """
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
