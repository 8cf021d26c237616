"""Places of a gateway, of which one caller has at most a share. For what stays open long: watches, and who waits."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from workers.errors import QueueFull


class Places:
    """Counts what is open, in all and by caller."""

    def __init__(self) -> None:
        self._taken: Counter[str] = Counter()

    def __len__(self) -> int:
        """How many are taken."""
        return self._taken.total()

    @contextmanager
    def taken(self, caller: str, most: int, most_of_one: int, what: str) -> Iterator[None]:
        """Take a place while this is open.

        Args:
            caller: who takes it, such as the name of a key; empty: nobody knows, so it is no one's share.
            most: places in all.
            most_of_one: places of one caller.
            what: what the others do, and what to do instead, such as `wait; try again later`.

        Raises:
            QueueFull: no place is free, or the caller has its share.
        """
        if len(self) >= most:
            raise QueueFull(f"{most} calls {what}")
        if caller and self._taken[caller] >= most_of_one:
            raise QueueFull(f"{most_of_one} of your calls {what}")
        self._taken[caller] += 1
        try:
            yield
        finally:
            self._taken[caller] -= 1
            if not self._taken[caller]:
                del self._taken[caller]
