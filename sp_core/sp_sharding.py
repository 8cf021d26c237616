"""Splitting and gathering one tensor, eagerly or in a compiled graph.

Models that shard themselves call `sp_shard` and `sp_gather` inside their forward; the hooks of a plan (`sp_core.hooks`)
call `shard` and `gather`. All four record in the running forward (`sp_core.region`) what is split.

Under `torch.compile` splits and gathers are opaque operators: a compiled block keeps one graph, and the region is
looked up when the graph runs, not when it is traced.
"""

from typing import Any

import torch

from sp_core.region import RunningForward, SequenceContext
from sp_core.token_layout import Stream


def sp_active() -> bool:
    """Whether the forward of a parallelized model is running, so that `sp_shard` and `sp_gather` may be called."""
    return RunningForward.innermost() is not None


def sp_shard(tensor: torch.Tensor, dim: int, *, companion: bool = False) -> torch.Tensor:
    """Split `tensor` along `dim` over the sequence ranks, from inside the forward of a parallelized model.

    As in a plan, a floating tensor `(B, S, D)` is a token stream, and attention spans it until it is gathered; streams
    are joined in the order in which they are split. A length that the ranks do not divide is split unevenly.

    Args:
        tensor: whole, the same on every rank.
        dim: the dimension to split.
        companion: the tensor looks like a stream, but is only split along with one.

    Raises:
        RuntimeError: no forward of a parallelized model is running.
    """
    forward = _innermost("sp_shard")
    is_stream = tensor.ndim == 3 and tensor.is_floating_point() and not companion
    return shard(forward.context, tensor, dim, stream=forward.name_of_next_stream() if is_stream else None)


def sp_gather(tensor: torch.Tensor, dim: int, *, stream: str | None = None, closes: bool = True) -> torch.Tensor:
    """Join the sequence ranks' shares of `tensor` along `dim`, from inside the forward of a parallelized model.

    Args:
        tensor: this rank's share.
        dim: the dimension that is split.
        stream: the parameter name by which a plan split it, or its number among the streams of `sp_shard`. Needed only
            if two streams can have the same shares.
        closes: whether attention no longer sees the stream; False to read the whole tensor (for a mean) and go on.

    Raises:
        RuntimeError: no forward of a parallelized model is running.
        ValueError: no stream has the lengths of this tensor, or more than one has.
    """
    return gather(_innermost("sp_gather").context, tensor, dim, stream=stream, closes=closes)


def shard(
    context: SequenceContext,
    tensor: torch.Tensor,
    dim: int,
    *,
    stream: str | None,
    padded: bool = False,
    replicated: int = 0,
) -> torch.Tensor:
    """See `Region.split`."""
    if torch.compiler.is_compiling():
        axis, padded = context.mesh.axis("sequence"), padded or context.auto_pad
        return _shard_operator(  # type: ignore[no-any-return]
            tensor, dim, context.number, stream, padded, replicated, axis.rank, axis.size
        )
    return running_forward(context).split(tensor, dim, stream, padded=padded, replicated=replicated)


def gather(
    context: SequenceContext, tensor: torch.Tensor, dim: int, *, stream: str | None, closes: bool = True
) -> torch.Tensor:
    """See `Region.gather`."""
    if torch.compiler.is_compiling():
        return _gather_operator(tensor, dim, context.number, stream, closes)  # type: ignore[no-any-return]
    return running_forward(context).gather(tensor, dim, stream, closes=closes)


def leading(context: SequenceContext, count: int, stream: str) -> int:
    """See `Region.leading`.

    Raises:
        RuntimeError: torch.compile traces, and lengths are not known yet.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("a count of tokens cannot be split while torch.compile traces; do not compile this block")
    return running_forward(context).region.leading(count, stream)


def on_line(context: SequenceContext, name: str, size: int, *, last: bool) -> int:
    """Record a size of the grid; returns the size that replaces it, since this rank's tokens are one line.

    Args:
        context: the context of the model.
        name: the parameter.
        size: of the grid.
        last: whether it is the innermost size.
    """
    if torch.compiler.is_compiling():
        _grid_operator(context.noted, name, size, context.number)
    else:
        running_forward(context).region.grid[name] = size
    return -1 if last else 1


def tokens_of_region(context: SequenceContext) -> int:
    """How many tokens all streams of the region have on all ranks.

    Raises:
        RuntimeError: torch.compile traces, and lengths are not known yet.
        ValueError: no stream is split.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "the tokens of samples cannot be split while torch.compile traces; do not compile this block"
        )
    layout = running_forward(context).region.layout()
    if layout is None:
        raise ValueError("the plan splits what goes along with the tokens of each sample, but no stream is split here")
    return layout.total


def running_forward(context: SequenceContext) -> RunningForward:
    """The running forward of a model.

    Raises:
        RuntimeError: it is not running.
    """
    forward = context.running()
    if forward is None:
        raise RuntimeError(
            "a module that the plan splits or gathers was called outside its model's forward, where its share would "
            "never be joined; call the whole model, or remove() the handle first"
        )
    return forward


def _innermost(caller: str) -> RunningForward:
    forward = RunningForward.innermost()
    if forward is None:
        raise RuntimeError(
            f"{caller} was called outside the forward of a parallelized model; "
            "call sp_core.parallelize.parallelize(model, mesh) first and use it inside model.forward, if sp_active()"
        )
    return forward


@torch.library.custom_op("sp_core::shard", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _shard_operator(
    tensor: torch.Tensor, dim: int, number: int, stream: str | None, padded: bool, replicated: int, rank: int, size: int
) -> torch.Tensor:
    """`rank` and `size` give the shape of the result: compiled graphs are cached on disk by their arguments alone, and
    a rank must not be handed another's graph."""
    share = shard(SequenceContext.numbered(number), tensor, dim, stream=stream, padded=padded, replicated=replicated)
    return share.clone(memory_format=torch.contiguous_format)  # an operator may not return a view of its argument


@_shard_operator.register_fake
def _(
    tensor: torch.Tensor, dim: int, number: int, stream: str | None, padded: bool, replicated: int, rank: int, size: int
) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[dim] = replicated + Stream(tensor.shape[dim] - replicated, size, padded).share(rank)
    return tensor.new_empty(shape)


@torch.library.custom_op("sp_core::gather", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _gather_operator(tensor: torch.Tensor, dim: int, number: int, stream: str | None, closes: bool) -> torch.Tensor:
    whole = gather(SequenceContext.numbered(number), tensor, dim, stream=stream, closes=closes)
    return whole.clone(memory_format=torch.contiguous_format)


@_gather_operator.register_fake
def _(tensor: torch.Tensor, dim: int, number: int, stream: str | None, closes: bool) -> torch.Tensor:
    shape: list[Any] = list(tensor.shape)
    shape[dim] = torch.library.get_ctx().new_dynamic_size()
    return tensor.new_empty(shape)


@torch.library.custom_op("sp_core::grid", mutates_args=("noted",), tags=(torch.Tag.cudagraph_unsafe,))
def _grid_operator(noted: torch.Tensor, name: str, size: int, number: int) -> None:
    """A compiled graph keeps an operator without a result only if it says that it changes something: `noted`."""
    running_forward(SequenceContext.numbered(number)).region.grid[name] = size


@_grid_operator.register_fake
def _(noted: torch.Tensor, name: str, size: int, number: int) -> None:
    pass
