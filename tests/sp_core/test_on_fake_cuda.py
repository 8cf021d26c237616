"""Every family in full width on fake CUDA tensors: one device, no wait that is not known, and all that is sent.

`tests.support.fake_cuda` says what this can see of CUDA and what it cannot.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch

from sp_core import collectives, kernels
from sp_core.attention import masks
from sp_core.degrees import ParallelDegrees
from sp_core.models.lookup import families, planned_families
from sp_core.token_layout import TokenLayout
from tests.support.fake_cuda.families import FULL_WIDTH
from tests.support.fake_cuda.forward import Watched, batched, guided, watch_forward
from tests.support.fake_cuda.guard import needs_guard
from tests.support.fake_cuda.pretend import PretendCuda, pretended
from tests.support.fake_cuda.seen import Seen
from tests.support.fake_cuda.world import kernel_chosen
from tests.support.traffic import Bytes, Shape, predicted

pytestmark = needs_guard

LAYOUTS = {
    "1": ParallelDegrees(),
    "u2": ParallelDegrees(ulysses_degree=2),
    "u4": ParallelDegrees(ulysses_degree=4),
    "u8": ParallelDegrees(ulysses_degree=8),
    "r2": ParallelDegrees(ring_degree=2),
    "u2r2": ParallelDegrees(ulysses_degree=2, ring_degree=2),
    "t2": ParallelDegrees(tensor_parallel_size=2),
    "t2u2": ParallelDegrees(tensor_parallel_size=2, ulysses_degree=2),
    "c2": ParallelDegrees(cfg_parallel_size=2),
}
"""Ulysses, ring, tensor, guidance."""


@dataclass(frozen=True)
class Expected:
    """What one forward does, with two layers of each kind.

    Attributes:
        layouts: those that it is tried on.
        regions: what attention spans, with as many layers as attend to it.
        sums: of tensor parallelism.
        local: kernels of the attention that stays on each rank.
        kernel: that of the attention across ranks.
        waits: times that the host waits for the device, by place and reason.
    """

    layouts: str
    regions: tuple[Shape, ...]
    sums: int = 0
    local: Mapping[str, int] = field(default_factory=dict)
    kernel: str = "cudnn"
    waits: Mapping[str, int] = field(default_factory=dict)

    def attention(self, degrees: ParallelDegrees) -> dict[str, int]:
        """Calls of each kernel; every chunk of a ring is one."""
        across = degrees.ring_degree * sum(region.layers for region in self.regions)
        return dict(Counter({self.kernel: across}) + Counter(self.local))

    def exchanges(self, degrees: ParallelDegrees) -> dict[str, int]:
        """Collectives of each kind."""
        shared = sum(size > 1 for size in (degrees.tensor_parallel_size, degrees.sequence_parallel_size))
        attentions, regions = sum(region.layers for region in self.regions), sum(r.out > 0 for r in self.regions)
        counts = {
            "exchange": 2 * attentions if degrees.ulysses_degree > 1 else 0,
            "shift": (degrees.ring_degree - 1) * attentions,
            "sum": self.sums if degrees.tensor_parallel_size > 1 else 0,
            "gather": (regions if degrees.sequence_parallel_size > 1 else 0)
            + sum(shared for region in self.regions if region.modulation),
        }
        return {kind: count for kind, count in counts.items() if count}

    def sent(self, degrees: ParallelDegrees, rank: int, forwards: int = 1) -> dict[str, object]:
        """Bytes to other ranks between devices; `predicted` is for the two forwards of a guided step."""
        total: Bytes = sum((predicted(region, degrees, rank) for region in self.regions), Counter())
        return {kind: forwards * count / 2 for kind, count in total.items() if count and kind != "integers"}


def region(layers: int, heads: int, head_size: int, out: int, *split: int, **rest: Any) -> Shape:
    """Its predicted stream is the last; `out` is 0 where another region gathers it."""
    options: Any = {"row_layers": 2, "itemsize": 2, **rest}
    return Shape(layers, heads, head_size, out, split, **options)


MASK_OF_TEXT = (
    "diffusers/models/transformers/transformer_qwenimage.py compute_text_seq_len_from_mask: copies from cpu to cuda"
)
"""The mask's length, a number that the host knows, is made a tensor."""

OF_QWEN_IMAGE, OF_FLUX, OF_SD3 = (4 * (18432,), 4 * (18432,) + 2 * (9216,), 3 * (9216,) + (3072,))
"""Features that the layers of modulation make, which ranks share. SD3's last block modulates its text once."""

QWEN_IMAGE = region(2, 24, 128, 64, 24, 4096, modulation=OF_QWEN_IMAGE)
WAN = region(2, 40, 128, 64, 75600, row_layers=3, norms=3, whole=512)

EXPECTED = {
    "qwen-image": Expected("1,u2,u4,u8,r2,u2r2,t2,t2u2", (QWEN_IMAGE,), sums=8),
    "qwen-image, masked": Expected(
        "u2,u2r2",
        (region(2, 24, 128, 64, 24, 4096, batch=2, masked=True, modulation=OF_QWEN_IMAGE),),
        kernel="efficient",
        waits={MASK_OF_TEXT: 1},
    ),
    "z-image": Expected(
        "1,u2,u4,r2,t2",
        (region(2, 30, 128, 3840, 4096), region(2, 30, 128, 3840, 64), region(2, 30, 128, 3840, 4160)),
        sums=12,
    ),
    "wan": Expected("1,u2,u8,r2,u2r2,t2", (WAN,), sums=14, local={"cudnn": 2}),
    "wan vace": Expected(
        "u2,r2,t2", (region(3, 40, 128, 64, 75600, row_layers=3, norms=3, whole=512),), sums=21, local={"cudnn": 3}
    ),
    "flux": Expected(
        "1,u2,u8,r2,u2r2,t2",
        (region(2, 24, 128, 64, 512, 4096, modulation=OF_FLUX), region(2, 24, 128, 0, 512, 4096, row_layers=1)),
        sums=10,
    ),
    "flux-2": Expected(
        "u2,r2,t2", (region(2, 48, 128, 128, 512, 4096), region(2, 48, 128, 0, 512, 4096, row_layers=1)), sums=10
    ),
    "ltx": Expected(
        "1,u2,u8,r2,t2",
        (region(2, 32, 64, 128, 2688, row_layers=3, norms=3, whole=128),),
        sums=14,
        local={"efficient": 2},
    ),
    "hunyuan-video": Expected(
        "1,u2,u8,r2", (region(4, 24, 128, 64, 256, 4800, masked=True),), local={"efficient": 2}, kernel="efficient"
    ),
    "sd3": Expected("u2,u8,r2", (region(2, 24, 64, 64, 328, 4096, modulation=OF_SD3),)),
}
"""By name in `FULL_WIDTH`. A wait that is not here fails its test, and says where it is."""

OF_LOADING = {"workers/model/weights.py _move_buffers"}
"""Where the host may wait while weights are read."""


NO_WAITS: Mapping[str, int] = {}
FINE = {"refused": "", "faults": {}, "waits": {}}


def both_ends(layout: str) -> list[int]:
    """The first rank and the last."""
    return sorted({0, LAYOUTS[layout].world_size - 1})


def reported(watched: Watched, known: Mapping[str, int] = NO_WAITS) -> dict[str, object]:
    """All that is wrong on a GPU; and where the host waits, but for known waits."""
    faults, waits = watched.loading.faults + watched.forward.faults, Counter(watched.forward.waits_in(""))
    return {"refused": watched.refused, "faults": dict(faults), "waits": dict(waits - Counter(known))}


ON_EVERY_LAYOUT = ("qwen-image", "wan")


def marks(name: str, layout: str) -> list[pytest.MarkDecorator]:
    """The quick loop runs one layout of each family, and leaves the others out as if they started ranks.

    Most layouts of most families are left to the soak.
    """
    few = name in ON_EVERY_LAYOUT or layout in ("u2", "t2")
    return [pytest.mark.processes] * (layout != "u2") + [pytest.mark.soak] * (not few)


CASES = [
    pytest.param(name, layout, marks=marks(name, layout))
    for name, expected in EXPECTED.items()
    for layout in expected.layouts.split(",")
]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_forward_does_what_is_expected_on_a_gpu(name: str, layout: str) -> None:
    expected, degrees = EXPECTED[name], LAYOUTS[layout]
    for rank in both_ends(layout):
        watched = watch_forward(FULL_WIDTH[name], degrees, rank)
        assert reported(watched, expected.waits) == FINE
        assert {wait.partition(":")[0] for wait in watched.loading.waits_in("")} <= OF_LOADING
        assert watched.forward.attention == expected.attention(degrees)
        assert watched.forward.exchanges == expected.exchanges(degrees)
        assert +watched.sent == expected.sent(degrees, rank)


def test_every_family_is_tried_on_fake_cuda() -> None:
    tried = {FULL_WIDTH[name].transformer_class for name in EXPECTED}
    written = [family for family in families() if not family.refused and family not in planned_families()]
    assert tried == {name for family in written for name in family.transformer_classes}


def test_groups_for_guidance_exchange_predictions_on_their_devices() -> None:
    degrees = LAYOUTS["c2"]
    for rank in both_ends("c2"):
        watched = watch_forward(FULL_WIDTH["qwen-image"], degrees, rank, run=guided)
        assert reported(watched) == FINE
        assert watched.forward.exchanges == {"gather": 1}
        assert +watched.sent == EXPECTED["qwen-image"].sent(degrees, rank, forwards=2)


@pytest.mark.parametrize("layout", ["u2", "u2r2"])
@pytest.mark.parametrize("name", ["qwen-image", "z-image", "wan"])
def test_both_branches_in_one_forward_send_as_much_in_half_as_many_calls(name: str, layout: str) -> None:
    """And attend by the fast kernel, for no mask appears."""
    expected, degrees = EXPECTED[name], LAYOUTS[layout]
    watched = watch_forward(FULL_WIDTH[name], degrees, 0, run=batched)
    assert reported(watched, expected.waits) == FINE
    assert watched.forward.attention == expected.attention(degrees)
    assert watched.forward.exchanges == expected.exchanges(degrees)
    assert +watched.sent == expected.sent(degrees, 0, forwards=2)


def test_text_shorter_than_the_ranks_leaves_attention_its_fast_kernel() -> None:
    """Its padding is left out; a mask over the whole sequence would cost the kernel."""
    watched = watch_forward(FULL_WIDTH["qwen-image, 5 tokens of text"], LAYOUTS["u8"], rank=7)
    assert reported(watched) == FINE
    assert watched.forward.attention == {"cudnn": 2}


def index_on_the_cpu() -> Any:
    own_order = TokenLayout.own_order
    return mock.patch.object(TokenLayout, "own_order", lambda layout, device: own_order(layout, torch.device("cpu")))


def index_that_is_copied_over() -> Any:
    """What torch allows on a GPU, at the price of a wait."""

    def pick(mask: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        return mask[:, torch.arange(len(order), device="cpu")]

    return mock.patch.object(masks, "_pick", pick)


def decision_on_a_value() -> Any:
    pick = masks._pick
    return mock.patch.object(masks, "_pick", lambda mask, order: pick(mask, order) if (order < 0).any() else mask)


def strided_exchange() -> Any:
    exchange = collectives.all_to_all

    def strided(packed: torch.Tensor, *rest: Any) -> torch.Tensor:
        return exchange(torch.stack((packed, packed), dim=1)[:, 0], *rest)

    return mock.patch.object(collectives, "all_to_all", strided)


def exchange_on_the_cpu() -> Any:
    exchange = collectives.all_to_all
    return mock.patch.object(collectives, "all_to_all", lambda packed, *rest: exchange(packed.cpu(), *rest).cuda())


PLANTED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "an index on the CPU": (
        index_on_the_cpu,
        "faults",
        "sp_core/attention/masks.py _pick: Expected all tensors to be on the same device",
    ),
    "an index that is copied over": (
        index_that_is_copied_over,
        "waits",
        "sp_core/attention/masks.py _for_ranks: copies an index from cpu to cuda",
    ),
    "a decision on a value": (
        decision_on_a_value,
        "waits",
        "sp_core/attention/masks.py _for_ranks: reads a value (_local_scalar_dense)",
    ),
    "a strided exchange": (
        strided_exchange,
        "faults",
        "sp_core/collectives.py all_to_all: alltoall_base_ of a tensor that is not contiguous",
    ),
    "an exchange on the CPU": (
        exchange_on_the_cpu,
        "faults",
        "sp_core/collectives.py all_to_all: alltoall_base_ of a tensor on cpu by a group of devices",
    ),
}
"""A fault, and where it must be reported: as what, and with which words."""


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name: str) -> None:
    plant, kind, words = PLANTED[name]
    model, layout = FULL_WIDTH["hunyuan-video"], LAYOUTS["u2"]
    with plant():
        found = reported(watch_forward(model, layout, rank=0))
    assert any(words in line for line in found[kind]), found  # type: ignore[attr-defined]


@pytest.mark.parametrize("kernel", ["torch-cudnn", "torch-flash", "torch-efficient"])
def test_kernels_of_cuda_give_what_a_merge_needs(kernel: str) -> None:
    """Each takes and returns its tensors in shapes of its own; the arithmetic in between is a stand-in."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 40, 6, 16, generator=generator).bfloat16() for _ in range(3))
    expected = kernels.attention_with_lse(query, key, value)
    seen = Seen()
    with pretended(seen, set()), kernel_chosen(kernel):
        found = kernels.attention_with_lse(*(PretendCuda(each) for each in (query, key, value)))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.is_cuda and ours.shape == theirs.shape
        torch.testing.assert_close(ours.host, theirs, atol=0.02, rtol=0.02)
    assert seen.attention == {kernel.removeprefix("torch-"): 1}
    assert not seen.waits
    assert not seen.faults
