"""Which faults of a plan strike together: two in a row, of which the second does not wait for the end of the first.

Where the first one holds for a while, as a full disk does, and the second kills or stops one process, it does so
meanwhile; else it strikes as soon as the first one is over. For `__main__`.
"""

import random
from collections.abc import Container

SHARE = 0.3
"""Of the faults, those that the next one joins, unless a run asks for more or fewer."""

HOLDING = ("store full", "outputs full", "store stopped", "database", "partition")
"""Kinds that hold for a while; see `Scene.hold`."""

PLAIN = ("gateway", "rank", "gang", "proxy", "controller", "rank stopped")
"""Kinds that strike one process, in whatever state the cluster is."""


def groups(seed: int, kinds: list[str], share: float = SHARE) -> list[list[int]]:
    """The numbers of the faults of a plan, alone or in pairs; a longer plan begins the same, but for its last fault."""
    rng, found, number = random.Random(f"{seed}/together"), list[list[int]](), 0
    while number < len(kinds):
        size = min(1 + (rng.random() < share), len(kinds) - number)
        found.append(list(range(number, number + size)))
        number += size
    return found


def remaining(planned: list[list[int]], done: Container[int]) -> list[list[int]]:
    """What is left of such a plan. A later fault may be done first: each is when all that it has met has ended."""
    left = [[number for number in group if number not in done] for group in planned]
    return [group for group in left if group]


def meanwhile(first: str, second: str) -> bool:
    """Whether the second one strikes while the first one holds."""
    return first in HOLDING and second in PLAIN
