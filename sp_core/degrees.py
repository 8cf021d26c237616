"""How many ranks one copy of a model spans along each axis. Intent only: `sp_core.mesh` makes the live groups.

Degrees come from the deployment YAML or from command-line flags and go to every layer. Standard library only.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal


def _degree(description: str) -> int:
    """A field that `deploy.schema` can describe: pydantic reads the metadata of a dataclass."""
    return field(default=1, metadata={"description": description, "ge": 1})


@dataclass(frozen=True)
class ParallelDegrees:
    """The degrees of one gang; their product is its number of ranks.

    Raises:
        ValueError: a degree is not a whole number of at least 1.
    """

    ulysses_degree: int = _degree(
        "ranks that trade sequence for heads around each attention (DeepSpeed-Ulysses, arXiv 2309.14509)"
    )
    ring_degree: int = _degree("ranks that pass keys and values around a ring (Ring Attention, arXiv 2310.01889)")
    tensor_parallel_size: int = _degree("ranks that share each layer's weights (Megatron-LM, arXiv 1909.08053)")
    cfg_parallel_size: int = _degree(
        "groups of ranks that evaluate the branches of classifier-free guidance side by side"
    )

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")

    @property
    def sequence_parallel_size(self) -> int:
        """Ranks that share one sequence: ulysses x ring."""
        return self.ulysses_degree * self.ring_degree

    @property
    def world_size(self) -> int:
        """Ranks of one gang: the product of all degrees."""
        return self.sequence_parallel_size * self.tensor_parallel_size * self.cfg_parallel_size

    def __str__(self) -> str:
        wide = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) > 1]
        return " x ".join(wide) or "1 rank"


AxisName = Literal["cfg", "ring", "ulysses", "tp", "sequence", "gang"]

AXES: tuple[AxisName, ...] = ("cfg", "ring", "ulysses", "tp")
"""Mesh axes, outermost first: tensor parallelism communicates most, so its ranks are neighbors."""


def axis_groups(degrees: ParallelDegrees) -> dict[AxisName, list[list[int]]]:
    """The global ranks of each group of each axis, in the order in which all ranks must create them.

    Besides the four axes: `"sequence"` joins ring and ulysses, `"gang"` is all ranks.
    """
    sizes = [degrees.cfg_parallel_size, degrees.ring_degree, degrees.ulysses_degree, degrees.tensor_parallel_size]
    places = list(itertools.product(*(range(size) for size in sizes)))  # the rank is the index

    def grouped(axes: set[AxisName]) -> list[list[int]]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(places):
            others = tuple(at for at, axis in zip(place, AXES, strict=True) if axis not in axes)
            groups.setdefault(others, []).append(rank)
        return list(groups.values())

    single = {axis: grouped({axis}) for axis in AXES}
    return {"gang": grouped(set(AXES)), "sequence": grouped({"ring", "ulysses"}), **single}


def units(degrees: ParallelDegrees) -> int:
    """Ranks of an elastic gang, counted in tensor-parallel groups, which share weights and stay together.

    Raises:
        ValueError: the number is not a power of two, so blocks of half the size would not fit into one another.
    """
    found = degrees.world_size // degrees.tensor_parallel_size
    if found & (found - 1):
        raise ValueError(
            f"an elastic gang needs a power of two of ranks, or of tensor-parallel groups, and {degrees} has {found}; "
            "change ulysses_degree, ring_degree or cfg_parallel_size"
        )
    return found


def smaller_layout(degrees: ParallelDegrees, count: int, guided: bool) -> ParallelDegrees:
    """How `count` units of an elastic gang share a request.

    The ring is given up first, then Ulysses, then the groups of guidance, which communicate least. A request without
    guidance has no branches to divide among the groups, so their ranks share its sequence.

    Args:
        degrees: the layout of the gang.
        count: a power of two, at most `units(degrees)`.
        guided: whether the request has two branches.
    """
    sizes = {
        "ring_degree": degrees.ring_degree,
        "ulysses_degree": degrees.ulysses_degree * (1 if guided else degrees.cfg_parallel_size),
        "cfg_parallel_size": degrees.cfg_parallel_size if guided else 1,
    }
    for name in sizes:
        while math.prod(sizes.values()) > count and sizes[name] > 1:
            sizes[name] //= 2
    return replace(degrees, **sizes)


def smaller_layouts(degrees: ParallelDegrees, least: int) -> tuple[ParallelDegrees, ...]:
    """All layouts that requests of an elastic gang may have besides the gang's own, the largest first.

    Args:
        degrees: the layout of the gang.
        least: the least number of units of a request.

    Raises:
        ValueError: the gang's units, or `least`, are not a power of two, or `least` is more than all.
    """
    all_units = units(degrees)
    if least < 1 or least & (least - 1) or least > all_units:
        allowed = ", ".join(str(2**i) for i in range(all_units.bit_length()))
        raise ValueError(f"min_degree must be one of {allowed}, got {least}")
    counts = [2**i for i in reversed(range(all_units.bit_length())) if 2**i >= least]
    found = [smaller_layout(degrees, count, guided) for count in counts for guided in (True, False)]
    return tuple(dict.fromkeys(each for each in found if each != degrees))


def num_heads(config: Mapping[str, Any]) -> int | None:
    """The attention heads of a transformer, by its `config.json`; None if it does not say."""
    heads = config.get("num_attention_heads", config.get("n_heads"))
    return heads if isinstance(heads, int) else None


def head_shares(num_heads: int, ulysses_degree: int) -> list[int]:
    """Heads of each Ulysses rank: equal shares, of which the last may be smaller or empty."""
    share = -(-num_heads // ulysses_degree)
    return [max(0, min(share, num_heads - rank * share)) for rank in range(ulysses_degree)]


def head_cost(num_heads: int, ulysses_degree: int) -> float:
    """Time of attention relative to an even share of the heads: all ranks wait for the one with the most heads."""
    return max(head_shares(num_heads, ulysses_degree)) * ulysses_degree / num_heads


def check_layout(degrees: ParallelDegrees, num_heads: int | None, ffn_dim: int | None = None) -> None:
    """Reject a layout that cannot run, before any process starts.

    Args:
        degrees: the layout.
        num_heads: attention heads of the model, or None where its config does not say.
        ffn_dim: hidden features of its feed-forward layers, or None where they follow from the heads.

    Raises:
        ValueError: the tensor-parallel ranks cannot share the heads or the features.
    """
    size = degrees.tensor_parallel_size
    if num_heads is not None and num_heads % size:
        allowed = ", ".join(str(d) for d in range(1, num_heads + 1) if num_heads % d == 0)
        raise ValueError(
            f"tensor_parallel_size={size} does not divide the model's {num_heads} attention heads; allowed: {allowed}. "
            "Ulysses and ring degrees work with any number of heads"
        )
    if ffn_dim is not None and ffn_dim % size:
        raise ValueError(
            f"tensor_parallel_size={size} does not divide the {ffn_dim} features of the model's feed-forward layers"
        )


def layout_advice(degrees: ParallelDegrees, num_heads: int | None) -> str | None:
    """What an uneven share of the heads costs, and a layout with the same ranks and even shares.

    Args:
        degrees: the layout.
        num_heads: attention heads of the model, or None where its config does not say.

    Returns:
        A sentence; None if the heads are shared evenly.
    """
    ulysses, ranks = degrees.ulysses_degree, degrees.sequence_parallel_size
    if num_heads is None:
        return None
    num_heads //= degrees.tensor_parallel_size
    if head_cost(num_heads, ulysses) == 1:
        return None
    shares = ", ".join(str(share) for share in head_shares(num_heads, ulysses))
    even = next(d for d in range(ranks, 0, -1) if ranks % d == 0 and num_heads % d == 0)
    better = replace(degrees, ulysses_degree=even, ring_degree=ranks // even)
    return (
        f"ulysses_degree={ulysses} shares {num_heads} attention heads as {shares}, so attention takes "
        f"{head_cost(num_heads, ulysses):.2f}x an even share's time; {better} shares them evenly"
    )
