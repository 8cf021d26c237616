"""Journey: one request on its way through an elastic gang: what is kept of it outside its ranks, and where it stands.

`workers.gang.elastic` writes it; `workers.gang.gang` holds it while lost ranks are replaced.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from deploy.model_sections import LoRA
from workers.gang.dealer import Block
from workers.messages import GenerationRequest

FALLBACKS = 1
"""Gangs' ranks whose loss a request survives here. Then whoever asked decides: it may be the cause."""


@dataclass
class Journey:
    """One request on its way through the gang.

    Attributes:
        request: what is drawn.
        forwards: of the transformer in one step.
        arrived: on the monotonic clock, in seconds.
        adapters: those that it names, each with the digest of its file, as the ranks have them.
        encoded: its prompts, or a reference to them; None until they are encoded.
        progress: where it stands.
        total_steps: of its scheduler, as far as is known.
        steps_done: those that its ranks have reported.
        step_s: seconds of each of them.
        stood_since: when its last step ended, or its latest part began.
        unit_s: the same, times the units that it had in the step.
        at: the ranks that it has, or had until its last boundary.
        before: those of its latest part.
        part: number of the latest part; 0 before the first.
        turn: what it waits for: its next ranks.
        leaving: it was told to pause.
        cancelled: it was told to stop.
        computes: ranks encode its prompts, or take its steps. If they are lost, it may be the cause.
        begun: `begins` was asked.
        fallbacks: times that it went on after it had lost its ranks; again on others that were started with them counts
            once.
        lost: the ranks of which it has lost some last.
        gone: set while it is not among the requests of the gang.
    """

    request: GenerationRequest
    forwards: int
    arrived: float
    total_steps: int
    stood_since: float
    adapters: frozenset[LoRA] = frozenset()
    encoded: Any = None
    progress: bytes = b""
    kept_steps: int = 0
    steps_done: int = 0
    step_s: list[float] = field(default_factory=list)
    unit_s: list[float] = field(default_factory=list)
    at: Block | None = None
    before: Block | None = None
    part: int = 0
    turn: "asyncio.Future[Block] | None" = None
    leaving: bool = False
    cancelled: bool = False
    computes: bool = False
    begun: bool = False
    fallbacks: int = 0
    lost: object = None
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def has_ranks(self) -> bool:
        """Whether some ranks take its steps, or decode it."""
        return self.at is not None and self.turn is None

    @property
    def decodes(self) -> bool:
        """Whether all of its steps are done."""
        return self.has_ranks and self.steps_done == self.total_steps

    def begins(self) -> bool:
        """It has its first ranks. True once."""
        first, self.begun = not self.begun, True
        return first

    def use(self, loaded: Iterable[LoRA]) -> bool:
        """It has ranks with these adapters. False: it cannot go on on them, as one that it names is another file by
        now, or is gone."""
        names = {name for name, _ in self.request.loras}
        before, self.adapters = self.adapters, frozenset(lora for lora in loaded if lora.name in names)
        return self.encoded is None or self.adapters == before

    def fall_back(self, ranks: object) -> bool:
        """It has lost some of these ranks: go back to what was kept. False: it may be the cause, and it cannot, or has
        done so."""
        if self.computes:
            again = ranks is self.lost  # those that outlived the others, which may have died of one cause
            if not self.kept_steps or (self.fallbacks >= FALLBACKS and not again):
                return False
            self.fallbacks += not again
            self.lost = ranks
        self.computes = False
        del self.step_s[self.kept_steps :], self.unit_s[self.kept_steps :]
        self.steps_done, self.at, self.turn, self.leaving = self.kept_steps, None, None, False
        return True
