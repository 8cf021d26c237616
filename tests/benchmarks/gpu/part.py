"""What every part shares: its device, its clock, and what becomes of a row that fails."""

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from tests.benchmarks.gpu.table import Table


class LeftOut(Exception):
    """A row cannot be measured here, for a reason that is nobody's fault."""


@dataclass
class Part:
    """One part of a run.

    Attributes:
        table: where rows go.
        fake: on the CPU with small sizes, to see that the script works.
        deadline: by `time.monotonic`; rows that would begin later are left out.
        with_ray: whether Ray may be used.
        only: part of the names of the models to be measured.
        failures: rows that have failed.
    """

    table: Table
    fake: bool
    deadline: float
    with_ray: bool = True
    only: str = ""
    failures: int = field(default=0, init=False)

    @property
    def device(self) -> torch.device:
        """Where tensors live."""
        return torch.device("cpu") if self.fake else torch.device("cuda", torch.cuda.current_device())

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return torch.float32 if self.fake else torch.bfloat16

    def row(self, head: Sequence[object], measure: Callable[[], Sequence[object]], needs_s: float = 0) -> bool:
        """Measure a row and write it, whatever happens.

        Args:
            head: its first cells.
            measure: returns the others.
            needs_s: seconds that it takes at most.

        Returns:
            Whether it was measured.
        """
        try:
            if time.monotonic() + needs_s > self.deadline:
                raise LeftOut("the time of this part is over")
            cells = measure()
        except LeftOut as reason:
            self.table.row(*head, f"left out: {reason}")
            return False
        except Exception as error:
            said = (
                getattr(error, "said", None) or f"{type(error).__name__}: {error}"
            )  # a rank's own error, if it is one
            self.fail(head, str(said).partition("\n")[0][:200])
            traceback.print_exc()
            return False
        self.table.row(*head, *cells)
        return True

    def fail(self, head: Sequence[object], why: str) -> None:
        """Write a row that failed."""
        self.failures += 1
        self.table.row(*head, f"failed: {why}")


def release(device: torch.device) -> None:
    """Give memory back between rows."""
    import gc

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
