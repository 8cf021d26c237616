"""Tensor parallelism: each rank of the `tp` axis holds a part of the weights and computes a part of each layer.

After Megatron-LM (arXiv 1909.08053): column-wise layers compute some of the heads or hidden features, row-wise layers
take these and sum the partial outputs over the ranks, with one all-reduce. The parts are plain tensors in modules of
the same names, so hooks, LoRA and torch.compile see ordinary layers. Called by `sp_core.parallelize` before any hook is
installed.
"""

from collections.abc import Callable
from fnmatch import fnmatch

import torch
from torch import nn
from torch.nn.functional import linear

from sp_core import collectives, diffusers_private
from sp_core.mesh import MeshAxis
from sp_core.tp_plan import AcrossHeads, Channels, Colwise, Heads, TensorParallelPlan, TensorParallelStyle


class ColumnParallelLinear(nn.Linear):
    """`(..., in)` to this rank's part of the output features, `(..., part of out)`.

    Attributes:
        index: this rank's output features.
        whole_shape: of the weight on all ranks together, `(out, in)`.
    """

    def __init__(self, whole: nn.Linear, index: torch.Tensor) -> None:
        nn.Module.__init__(self)
        self.index, self.whole_shape = index, whole.weight.shape
        self.in_features, self.out_features = whole.in_features, len(index)
        self.weight = _part(whole.weight, 0, index)
        self.bias = None if whole.bias is None else _part(whole.bias, 0, index)


class RowParallelLinear(nn.Linear):
    """This rank's part of the input features, `(..., part of in)`, to the sum over all ranks, `(..., out)`.

    Attributes:
        index: this rank's input features.
        whole_shape: of the weight on all ranks together, `(out, in)`.
    """

    def __init__(self, whole: nn.Linear, index: torch.Tensor, axis: MeshAxis) -> None:
        nn.Module.__init__(self)
        self.index, self.whole_shape = index, whole.weight.shape
        self.in_features, self.out_features = len(index), whole.out_features
        self.weight = _part(whole.weight, 1, index)
        self.bias = whole.bias
        self._axis = axis

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`(..., out)`, the same on every rank."""
        summed = collectives.all_reduce(self.partial(input), self._axis)
        return summed if self.bias is None else summed + self.bias

    def partial(self, input: torch.Tensor) -> torch.Tensor:
        """This rank's term of the sum, `(..., out)`."""
        return linear(input, self.weight)


class AcrossHeadsRMSNorm(nn.Module):
    """RMSNorm over the features of all ranks, `(..., part of the features)`, computed in fp32.

    Args:
        whole: torch's or diffusers' RMSNorm.
        index: this rank's features.
        axis: the ranks.
    """

    def __init__(self, whole: nn.Module, index: torch.Tensor, axis: MeshAxis) -> None:
        super().__init__()
        weight = whole.weight
        assert isinstance(weight, nn.Parameter)
        self.weight = _part(weight, 0, index)
        self.index = index
        self._features = len(weight)
        self._eps: float | None = whole.eps  # type: ignore[assignment]
        self._axis = axis

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The whole norm, over the features of all ranks."""
        wide = hidden_states.float()
        squares = collectives.all_reduce(wide.square().sum(dim=-1, keepdim=True), self._axis)
        return self.normed(hidden_states, squares, self.weight)

    def normed(self, hidden_states: torch.Tensor, squares: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Some features, `(..., N)`, normalized by the sum of squares of all, `(..., 1)`; `weight` is `(N,)`."""
        eps = torch.finfo(hidden_states.dtype).eps if self._eps is None else self._eps
        normed = hidden_states.float() * torch.rsqrt(squares / self._features + eps)
        return (normed * weight.float()).to(hidden_states.dtype)


def apply_tensor_parallel(model: nn.Module, plan: TensorParallelPlan, axis: MeshAxis) -> None:
    """Keep this rank's part of the weights of `model`. It cannot be undone.

    Args:
        model: the model whose modules the plan names.
        plan: see `sp_core.tp_plan`.
        axis: the ranks that divide the weights.

    Raises:
        ValueError: a pattern names no module, or the number of ranks does not divide a layer. Nothing is changed.
    """
    changes: list[Callable[[], None]] = []
    modules = dict(model.named_modules())
    for pattern, style in plan.items():
        names = [name for name in modules if fnmatch(name, pattern)]
        if not names:
            raise ValueError(
                f"the tensor-parallel plan of {type(model).__name__} names {pattern!r}, which the model does not have"
            )
        for name in names:
            if not isinstance(modules[name], nn.Identity):
                changes.append(_change(modules, name, style, axis))
    for change in changes:
        change()


def _change(modules: dict[str, nn.Module], name: str, style: TensorParallelStyle, axis: MeshAxis) -> Callable[[], None]:
    """The change to one module, checked but not made yet, so that a plan that fails leaves the model whole."""
    module = modules[name]
    parent, child = modules[name.rpartition(".")[0]], name.rpartition(".")[2]
    if isinstance(style, Heads):
        heads = module.heads
        assert isinstance(heads, int)
        mine = len(part_of(name, heads, (), axis))
        return lambda: _set_heads(module, mine, heads)
    if isinstance(style, Channels):
        return lambda: _narrow_outputs(module, style.dim, axis)
    replacement: Callable[[], nn.Module]
    if isinstance(style, AcrossHeads):
        index = part_of(name, len(module.weight), (), axis)  # type: ignore[arg-type]
        replacement = lambda: AcrossHeadsRMSNorm(module, index, axis)  # noqa: E731
    elif not isinstance(module, nn.Linear):
        raise ValueError(f"{name!r} is a {type(module).__name__}; only nn.Linear can be shared by columns or rows")
    elif isinstance(style, Colwise):
        blocks = style.blocks or diffusers_private.packed_columns(module)
        index = part_of(name, module.out_features, blocks, axis)
        replacement = lambda: ColumnParallelLinear(module, index)  # noqa: E731
    else:
        blocks = style.blocks or diffusers_private.packed_rows(module)
        index = part_of(name, module.in_features, blocks, axis)
        replacement = lambda: RowParallelLinear(module, index, axis)  # noqa: E731
    return lambda: parent.add_module(child, replacement())


def _set_heads(module: nn.Module, mine: int, heads: int) -> None:
    module.heads, module.heads_of_all_ranks = mine, heads  # type: ignore[assignment]


def part_of(name: str, features: int, blocks: tuple[int, ...], axis: MeshAxis) -> torch.Tensor:
    """Indices of this rank's features: the same part of each block.

    Raises:
        ValueError: the number of ranks does not divide a block.
    """
    unit, rest = divmod(features, sum(blocks or (1,)))
    sizes = [unit * block for block in blocks or (1,)]
    if rest or any(size % axis.size for size in sizes):
        raise ValueError(
            f"tensor_parallel_size={axis.size} does not divide the {features} features of {name!r}"
            + (f", which are {' + '.join(map(str, sizes))}" if len(sizes) > 1 else "")
        )
    parts, start = [], 0
    for size in sizes:
        mine = size // axis.size
        parts.append(torch.arange(start + axis.rank * mine, start + (axis.rank + 1) * mine))
        start += size
    return torch.cat(parts)


def _part(whole: torch.Tensor, dim: int, index: torch.Tensor) -> nn.Parameter:
    """This rank's part of a parameter. Its attribute `part` tells the loader of the weights which part to read."""
    parameter = nn.Parameter(whole.detach().index_select(dim, index.to(whole.device)), requires_grad=False)
    parameter.part = (dim, index)  # type: ignore[attr-defined]
    return parameter


def _narrow_outputs(module: nn.Module, dim: int, axis: MeshAxis) -> None:
    def narrow(_module: nn.Module, _args: object, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if not module.narrows:
            return output
        return tuple(tensor.chunk(axis.size, dim=dim)[axis.rank] for tensor in output)

    module.narrows = True  # type: ignore[assignment]
    module.register_forward_hook(narrow)
