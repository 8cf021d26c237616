"""The tensor-parallel plan: how the ranks of the `tp` axis divide a model's weights, as data.

A plan maps patterns of module names, in which `*` matches anything, to a style:

    {
        "blocks.*.attn1.to_q": Colwise(),     # this rank's output features; each attention head is on one rank
        "blocks.*.attn1.to_out.0": Rowwise(), # this rank's input features; the partial outputs are summed
        "blocks.*.attn1": Heads(),            # its processor asks for the number of heads
        "blocks.*.attn1.norm_q": AcrossHeads(),
    }

All other modules are the same on every rank. Plans are written in `sp_core.models` and applied by
`sp_core.tensor_parallel`. diffusers' `_tp_plan` says part of this; `tp_plan_from_diffusers` reads it. No torch, because
`deploy` reads plans too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Colwise:
    """Each rank computes a part of a linear layer's output features (Megatron-LM's column parallel).

    Attributes:
        blocks: proportions of the parts that are fused in the output features (query, key, ...). Ranks share each
            part separately. Empty: one part.
    """

    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rowwise:
    """Each rank takes a part of a linear layer's input features. The outputs are summed; the bias is added once.

    Attributes:
        blocks: proportions of the parts that are fused in the input features; empty: one part.
    """

    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class AcrossHeads:
    """A root-mean-square norm over the features of all heads; each rank has some of them."""


@dataclass(frozen=True)
class Heads:
    """A module with an attribute `heads`, the number of attention heads that its processor sees."""


@dataclass(frozen=True)
class Channels:
    """A module whose outputs are features of all heads; each rank takes its part.

    Attributes:
        dim: the dimension of the features.
    """

    dim: int = -1


TensorParallelStyle = Colwise | Rowwise | AcrossHeads | Heads | Channels
TensorParallelPlan = Mapping[str, TensorParallelStyle]


def sharded_tensors(plan: TensorParallelPlan) -> list[str]:
    """Patterns of the names of the tensors of which each rank holds only a part.

    A row-wise layer keeps its bias whole: it is added once, after the sum.
    """
    leaves: dict[type, tuple[str, ...]] = {
        Colwise: ("weight", "bias"), Rowwise: ("weight",), AcrossHeads: ("weight",), Heads: (), Channels: (),
    }  # fmt: skip
    return [f"{pattern}.{leaf}" for pattern, style in plan.items() for leaf in leaves[type(style)]]


def tp_plan_from_diffusers(tp_plan: Mapping[str, Any]) -> TensorParallelPlan:
    """diffusers' `_tp_plan` as a plan.

    Raises:
        ValueError: diffusers has no such style.
    """
    return {name: _style_from_diffusers(name, entry) for name, entry in tp_plan.items()}


def _style_from_diffusers(name: str, entry: Any) -> TensorParallelStyle:
    kind = entry if isinstance(entry, str) else type(entry).__name__
    blocks = tuple(getattr(entry, "blocks", None) or ())
    if kind in ("colwise", "PackedColwiseParallel"):
        return Colwise(blocks)
    if kind in ("rowwise", "PackedRowwiseParallel"):
        return Rowwise(blocks)
    raise ValueError(f"_tp_plan[{name!r}] is {entry!r}, expected 'colwise', 'rowwise' or a packed style")
