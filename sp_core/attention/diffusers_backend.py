"""The seam: attention calls of diffusers' models come here while a model is parallelised.

diffusers sends every attention through a table of backends and passes along the `_parallel_config` of the calling
processor. This file puts one entry into the table and one `BoundAttention` into each processor. Calls that carry
something else (models that are not ours, Wan's cross-attention) go on to the backend that was active before.

All of diffusers' private names that sp_core relies on are used here and nowhere else;
`tests/sp_core/test_parallelize.py` fails when a new release moves them.
"""

import copy
import functools
from collections.abc import Callable
from enum import StrEnum
from fnmatch import fnmatch
from typing import Any

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from sp_core.attention.layer import SequenceParallelAttention
from sp_core.attention.region import region_attention
from sp_core.models.family import ModelFamily
from sp_core.sp_sharding import SequenceShards


class _Backend(StrEnum):
    SEQUENCE_PARALLEL = "sp_core"


class BoundAttention:
    """Attention of one module, across the sequence ranks inside a region and local outside one.

    Args:
        name: the module's dotted name, for messages.
        shards: the model's record of what is split.
        stream: the parameter name of the only stream that it sees; empty: it joins all.
    """

    def __init__(self, name: str, shards: SequenceShards, stream: str = "") -> None:
        self.name = name
        self.shards = shards
        self.stream = stream

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        """`(B, L, H, D)` for this rank's queries; options as diffusers' backends take them.

        Raises:
            ValueError: the tokens are not those of the region, or an option that cannot be honoured across ranks.
        """
        if options.get("is_causal") or options.get("dropout_p"):
            raise ValueError(
                f"attention {self.name!r} asks for is_causal or dropout, which sequence parallelism does not support"
            )
        mask, scale = options.get("attn_mask"), options.get("scale")
        return region_attention(query, key, value, mask, scale, self.shards, name=self.name, stream=self.stream)


@functools.cache
def captured(kind: type) -> type:
    """A class of processors that call torch's attention themselves, with those calls brought to `sequence_parallel`.

    Only for processors of which a family says that all their attention is over the region's own tokens. diffusers reads
    the signature of a processor and drops the arguments that are not in it, hence the wrapping.
    """

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _Capture(self.sequence_parallel):
            return kind.__call__(self, *args, **kwargs)

    return type(f"Captured{kind.__name__}", (kind,), {"__call__": call, "sequence_parallel": None})


class _Capture(TorchFunctionMode):
    """While it is active, torch's attention, `(B, H, L, D)`, is ours."""

    def __init__(self, attention: BoundAttention) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is not scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: Any = None,
        *args: Any,
        **options: Any,
    ) -> torch.Tensor:
        options |= dict(zip(("dropout_p", "is_causal"), args, strict=False))
        heads_behind = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return self.attention(*heads_behind, attn_mask=attn_mask, **options).transpose(1, 2)


def bind_attention(
    model: nn.Module, shards: SequenceShards, family: ModelFamily | None = None, *, optional: bool = False
) -> Callable[[], None]:
    """Bring the attention of all of the model's processors, and of all its `SequenceParallelAttention`, here.

    Args:
        model: the model.
        shards: its record of what is split.
        family: what is peculiar to its attention.
        optional: whether the model may do without any (its forward gathers what attention needs).

    Returns:
        The function that lets them go again.

    Raises:
        ValueError: a processor's attention would stay local without a word, or the model is parallelised already.
    """
    family = family or ModelFamily((), {})
    found = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "processor") and not any(fnmatch(name, pattern) for pattern in family.local_attention)
    }
    layers = {n: module for n, module in model.named_modules() if isinstance(module, SequenceParallelAttention)}
    _require_within_reach(model, found, family)
    if not (found or layers or optional):
        raise ValueError(
            f"{type(model).__name__} cannot be parallelised: it has neither attention processors of diffusers nor a "
            "SequenceParallelAttention, so each rank would attend only to its own tokens"
        )
    _require_free(model, found, list(layers.values()))
    if found and _AttentionBackendRegistry.get_active_backend()[1] is not _dispatch:
        _take_over()
    originals = {name: module.processor for name, module in found.items()}
    for name, module in found.items():
        stream = next((s for pattern, s in family.own_stream.items() if fnmatch(name, pattern)), "")
        module.processor = _bound(module.processor, BoundAttention(name, shards, stream))
    for name, layer in layers.items():
        layer.record, layer.name = shards.number, name
    if found:
        shards.local_attention = _local
    bound = {name: module.processor for name, module in found.items()}
    hooks = [
        model.register_forward_pre_hook(lambda *_: _require_bound(model, found, bound)),
        model.register_forward_hook(lambda *_: _require_attended(shards), prepend=True) if found or layers else None,
    ]

    def release() -> None:
        for hook in hooks:
            if hook is not None:
                hook.remove()
        for name, module in found.items():
            module.processor = originals[name]
        for layer in layers.values():
            layer.record = None

    return release


def _bound(processor: Any, attention: BoundAttention) -> Any:
    """A copy of the processor whose attention comes here. A copy, because modules may share one."""
    copied = copy.copy(processor)
    if hasattr(processor, "_parallel_config"):
        copied._parallel_config = attention
    else:
        copied.__class__ = captured(copied.__class__)
        copied.sequence_parallel = attention
    return copied


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _require_bound(model: nn.Module, found: dict[str, nn.Module], bound: dict[str, Any]) -> None:
    """Raise where a processor was replaced after parallelize: it would attend only to its own rank's tokens."""
    for name, module in found.items():
        processor = module.processor
        if processor is not bound[name] or getattr(processor, "_attention_backend", None) is not None:
            raise RuntimeError(
                f"the attention processor of {name} in {type(model).__name__}, or its backend, was changed after "
                "parallelize and would attend only to its own rank's tokens: remove() the handle, change it, and "
                "parallelize again"
            )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _require_attended(shards: SequenceShards) -> None:
    """Raise at the end of a forward whose attention never came here."""
    if shards.streams and not shards.attended and shards.mesh.axis("sequence").size > 1:
        raise RuntimeError(
            "no attention of this forward went across ranks; an attention backend was chosen that bypasses sp_core "
            "after parallelize (with attention_backend(...), say): leave the one that was active then"
        )


def _require_within_reach(model: nn.Module, found: dict[str, nn.Module], family: ModelFamily) -> None:
    """Raise where a processor's attention would be silently wrong."""
    deaf = []
    for name, module in found.items():
        kind = type(module.processor).__name__
        if kind in family.refused_processors:
            why = family.refused_processors[kind]
            raise ValueError(f"{type(model).__name__} cannot be parallelised with {kind} ({name}): {why}")
        is_captured = kind in family.captured_processors or _is_bound(module.processor)
        if not hasattr(module.processor, "_parallel_config") and not is_captured:
            deaf.append(f"{name} ({kind})")
    if deaf:
        raise ValueError(
            f"{type(model).__name__} cannot be parallelised: attention processors that do not go through diffusers' "
            f"dispatch would attend only to their own rank's tokens: {', '.join(deaf)}"
        )


def _require_free(model: nn.Module, found: dict[str, nn.Module], layers: list[SequenceParallelAttention]) -> None:
    """Raise where attention is bound already, or set to a backend that would pass us by."""
    again = [name for name, module in found.items() if _is_bound(module.processor)]
    if again or any(layer.record is not None for layer in layers):
        at = again[0] if again else SequenceParallelAttention.__name__
        raise ValueError(f"{type(model).__name__} is parallelised already ({at}); remove() that first")
    for name, module in found.items():
        backend = getattr(module.processor, "_attention_backend", None)
        if backend is not None:
            raise ValueError(
                f"{name} has its own attention backend ({backend}), which would attend only to "
                "its own rank's tokens; call reset_attention_backend() on the model first"
            )


def _is_bound(processor: Any) -> bool:
    return any(getattr(processor, name, None) is not None for name in ("_parallel_config", "sequence_parallel"))


_previous: Any = None


def _take_over() -> None:
    """Make our entry the active one of diffusers' table, and remember the one before it for local attention.

    It stays when the last model lets go: it only forwards then, and another owner may have been put on top of it.
    """
    global _previous
    _previous = _AttentionBackendRegistry.get_active_backend()[0]
    _AttentionBackendRegistry.register(_Backend.SEQUENCE_PARALLEL, constraints=[])(_dispatch)
    _AttentionBackendRegistry.set_active_backend(_Backend.SEQUENCE_PARALLEL)


def _local(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    **options: Any,
) -> torch.Tensor:
    """Attention on this rank alone, by the backend that diffusers would have used without us."""
    accepted = _AttentionBackendRegistry._supported_arg_names[_previous]
    options |= {"attn_mask": mask, "scale": scale, "enable_gqa": query.shape[2] != key.shape[2]}
    known = {name: option for name, option in options.items() if name in accepted}
    attended: torch.Tensor = _AttentionBackendRegistry._backends[_previous](query, key, value, **known)
    return attended


def _dispatch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,  # the shapes say it
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> torch.Tensor:
    options = {"dropout_p": dropout_p, "is_causal": is_causal}
    if isinstance(_parallel_config, BoundAttention):
        return _parallel_config(query, key, value, attn_mask=attn_mask, scale=scale, **options)
    options |= {"return_lse": return_lse, "_parallel_config": _parallel_config}
    return _local(query, key, value, attn_mask, scale, **options)
