"""How many ranks one model copy spans, along each axis. Intent only: the live groups are `sp_core.mesh`.

Comes from the deployment YAML or from command-line flags; goes to every layer. Standard library only.
"""

from dataclasses import asdict, dataclass, fields

_IMPLEMENTED = frozenset({"ulysses_degree", "ring_degree"})


@dataclass(frozen=True)
class ParallelDegrees:
    """The degrees of one gang; their product is its number of ranks.

    Attributes:
        ulysses_degree: ranks that trade sequence for heads around each attention (DeepSpeed-Ulysses, arXiv 2309.14509).
        ring_degree: ranks that pass keys and values round a ring (Ring Attention, arXiv 2310.01889).
        tensor_parallel_size: ranks that share each layer's weights (Megatron-LM, arXiv 1909.08053).
        cfg_parallel_size: ranks groups that evaluate the branches of classifier-free guidance side by side.

    Raises:
        ValueError: a degree is not a whole number of at least 1.
    """

    ulysses_degree: int = 1
    ring_degree: int = 1
    tensor_parallel_size: int = 1
    cfg_parallel_size: int = 1

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


def check_layout(degrees: ParallelDegrees, num_heads: int | None) -> None:
    """Refuse a layout that cannot run, before any process is started.

    Args:
        degrees: the layout asked for.
        num_heads: attention heads of the model, or None where its config cannot be read yet.

    Raises:
        ValueError: an axis that spray does not run yet, or heads that the Ulysses degree does not divide.
    """
    for name, value in asdict(degrees).items():
        if value > 1 and name not in _IMPLEMENTED:
            raise ValueError(f"{name}={value} is not supported yet; allowed: 1. Use ulysses_degree and ring_degree")
    ulysses = degrees.ulysses_degree
    if num_heads is not None and num_heads % ulysses:
        allowed = ", ".join(str(d) for d in range(1, num_heads + 1) if num_heads % d == 0)
        raise ValueError(
            f"ulysses_degree={ulysses} does not divide the model's {num_heads} attention heads; "
            f"allowed: {allowed}. Set ulysses_degree to one of these; ring_degree works with any number of heads"
        )
