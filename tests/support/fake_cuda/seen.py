"""What a run was seen to do."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.utils._pytree import tree_leaves

from tests.support.fake_cuda.calls import Call, size_of
from tests.support.fake_cuda.places import place


@dataclass
class Seen:
    """Counts of one run on one rank.

    Attributes:
        kernels: operators that start a kernel, by name.
        moved: bytes that those of them read and write that are no matrix product or attention.
        attention: calls of each attention kernel.
        exchanges: collectives between devices, by kind.
        waits: how often the host waits for the device, by phase, and by place and reason.
        faults: what a GPU or NCCL would refuse, or do on the wrong processor, with its place.
        phase: what is being done now.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    moved: int = 0
    attention: Counter[str] = field(default_factory=Counter)
    exchanges: Counter[str] = field(default_factory=Counter)
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    phase: str = ""

    def wait(self, why: str) -> None:
        """The host waits here."""
        self.waits[self.phase, f"{place()}: {why}"] += 1

    def fault(self, what: str) -> None:
        """Something is wrong here."""
        self.faults[f"{place()}: {what}"] += 1

    def computed(self, call: Call, made: object) -> bool:
        """An operator, if it has started a kernel on CUDA. Returns whether it has."""
        tensors = device_tensors([*call.tensors, *tree_leaves(made)])
        if not call.starts_kernel or not tensors:
            return False
        self.kernels[call.name] += 1
        if call.attention:
            self.attention[call.attention] += 1
        if not call.is_matmul:
            self.moved += size_of(tensors)
        return True

    def exchange(self, call: Call, between_devices: bool) -> None:
        """A collective, of NCCL between devices or of gloo between hosts. NCCL takes contiguous CUDA tensors only."""
        for tensor in call.tensors:
            if tensor.is_cuda != between_devices:
                owner = "a group of devices" if between_devices else "a group of hosts"
                self.fault(f"{call.name} of a tensor on {tensor.device.type} by {owner}")
            if between_devices and not tensor.is_contiguous():
                self.fault(f"{call.name} of a tensor that is not contiguous")
        if between_devices and call.name != "recv_":  # the other end of a shift
            self.exchanges[call.kind] += 1

    def waits_in(self, phase: str) -> dict[str, int]:
        """The waits of one phase, by place and reason."""
        return {what: count for (of, what), count in self.waits.items() if of == phase}


def device_tensors(values: Iterable[object]) -> list[torch.Tensor]:
    """Those of the values that are tensors on CUDA."""
    return [value for value in values if isinstance(value, torch.Tensor) and value.is_cuda]
