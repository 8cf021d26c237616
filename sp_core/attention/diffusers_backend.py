"""Routes a model's attention to `region_attention`, and undoes that.

In: what `sp_core.attention.discovery` found, and the model's context. A processor that goes through diffusers' table of
backends gets a `BoundAttention` as its configuration (`sp_core.diffusers_private` has the table); one that calls
torch's attention itself is wrapped, if its family says that all its attention is over the region's tokens; one of
linear attention is replaced by ours; our own layer gets its site. Called by `sp_core.parallelize`.
"""

import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from sp_core import diffusers_private, torch_private
from sp_core.attention.discovery import FoundAttention
from sp_core.attention.linear import LinearProcessor
from sp_core.attention.region_attention import AttentionSite, region_attention
from sp_core.region import SequenceContext


class BoundAttention(diffusers_private.AttentionConfig):
    """Attention of one module, across the sequence ranks inside a region and local outside one.

    Attributes:
        site: which attention this is.
        length_base: the parameter of its processor's call that says how it scales by the number of tokens.
        drops_hidden: whether its processor drops the tokens that a mask hides.
    """

    def __init__(self, site: AttentionSite, length_base: str = "", drops_hidden: bool = False) -> None:
        self.site = site
        self.length_base = length_base
        self.drops_hidden = drops_hidden

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        """`(B, L, H, D)` for this rank's queries; options as diffusers' backends take them.

        Raises:
            ValueError: the tokens are not those of the region, or an option that cannot be honored across ranks.
        """
        if options.get("is_causal") or options.get("dropout_p"):
            raise ValueError(
                f"attention {self.site.name!r} asks for is_causal or dropout, which sequence parallelism does not "
                "support"
            )
        return region_attention(
            query,
            key,
            value,
            options.get("attn_mask"),
            options.get("scale"),
            self.site,
            length_base=options.get("length_base") or 0.0,
        )


def bind_attention(model: nn.Module, found: FoundAttention, context: SequenceContext) -> Callable[[], None]:
    """Route all attention that was found to `region_attention`.

    Args:
        model: the model.
        found: its attention.
        context: how the model is split.

    Returns:
        The function that undoes it.
    """
    if found.processors:
        diffusers_private.put_into_table()
    originals = {name: module.processor for name, module in found.processors.items()}
    for name, module in found.processors.items():
        site = AttentionSite(
            context,
            name,
            found.streams.get(name, ""),
            found.keys_of.get(name, ""),
            name in found.keys_in_front,
            name in found.masks_queries,
        )
        across = BoundAttention(site, found.scales_by_length.get(name, ""), name in found.drops_hidden)
        is_linear = name in found.linear
        processor: Any = LinearProcessor(site) if is_linear else _bound(module.processor, across)
        module.processor = processor
    for name, layer in found.layers.items():
        layer.site = AttentionSite(context, name)
    bound = {name: module.processor for name, module in found.processors.items()}
    hooks = [model.register_forward_pre_hook(lambda *_: _require_bound(model, found.processors, bound))]
    for mask in set(found.drops_hidden.values()):
        hooks.append(model.register_forward_pre_hook(_AtEnd(mask), with_kwargs=True))
    if found.processors or found.layers:  # in front of the hook that ends the forward
        hooks.append(model.register_forward_hook(lambda *_: _require_attended(context), prepend=True))

    def release() -> None:
        for hook in hooks:
            hook.remove()
        for name, module in found.processors.items():
            module.processor = originals[name]
        for layer in found.layers.values():
            layer.site = None

    return release


def _bound(processor: Any, attention: BoundAttention) -> Any:
    """A copy of the processor with its attention routed here. A copy, because modules may share one."""
    copied = copy.copy(processor)
    if diffusers_private.goes_through_table(processor):
        diffusers_private.set_config(copied, attention)
    else:
        copied.__class__ = captured(copied.__class__)
        copied.sequence_parallel = attention
    return copied


@functools.cache
def captured(kind: type) -> type:
    """A subclass, for processors that call torch's attention themselves, which routes these calls to
    `sequence_parallel`.

    diffusers reads the signature of a processor and drops the arguments that are not in it, hence the wrapping.
    """

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        attend = self.sequence_parallel
        capture = _CaptureHidden if attend.drops_hidden else _Capture
        if attend.length_base:  # taken from the processor: it would count this rank's tokens only
            attend = functools.partial(attend, length_base=kwargs.pop(attend.length_base, None))
        with capture(attend):
            return kind.__call__(self, *args, **kwargs)

    return type(f"Captured{kind.__name__}", (kind,), {"__call__": call, "sequence_parallel": None})


class _Capture(TorchFunctionMode):
    """While it is active, it replaces torch's attention, `(B, H, L, D)`."""

    def __init__(self, attention: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.attention = attention

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.Tensor.unflatten:  # the compiler cannot follow the method here
            return torch.unflatten(*args, **(kwargs or {}))
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
        tokens_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return self.attention(*tokens_first, attn_mask=attn_mask, **options).transpose(1, 2)


class _CaptureHidden(_Capture):
    """The same for a processor that drops hidden tokens, so that prompts would decide how many tokens a rank holds.

    No token is left out: the mask of the sample, `(tokens,)`, that the processor looks at hides them as keys instead.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.nonzero:
            self.shown = args[0].bool()
            return torch.arange(self.shown.shape[0], device=self.shown.device)[:, None]
        if function is scaled_dot_product_attention:
            before = args[1].shape[2] - self.shown.shape[0]
            mask = pad(self.shown, (before, 0), value=True)[None, None, None]
            return self._attend(*args[:3], mask, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs)


class _AtEnd:
    """Raises where an input, a mask `(B, S)`, hides tokens in front of others. All ranks have all of it.

    A processor that drops tokens packs what it computes of the others, in front of what was hidden. A mask is looked at
    once, for all steps: the host waits for it.

    Args:
        name: of the input.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._seen: tuple[weakref.ref[torch.Tensor], int | None] | None = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = inspect.signature(model.forward).bind(*args, **kwargs).arguments[self._name]
        version = torch_private.version(mask)
        if version is not None and self._seen and self._seen[0]() is mask and self._seen[1] == version:
            return
        shown = mask.bool()
        if (shown[:, 1:] & ~shown[:, :-1]).any():
            raise ValueError(
                f"{self._name} hides tokens in front of others; pad at the end, so that it hides only the last ones"
            )
        self._seen = weakref.ref(mask), version


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _require_bound(model: nn.Module, processors: Mapping[str, nn.Module], bound: Mapping[str, Any]) -> None:
    """Raise if a processor was replaced after parallelize: it would attend only to its own rank's tokens."""
    for name, module in processors.items():
        processor = module.processor
        if processor is not bound[name] or diffusers_private.own_backend(processor) is not None:
            raise RuntimeError(
                f"the attention processor of {name} in {type(model).__name__}, or its backend, was changed after "
                "parallelize and would attend only to its own rank's tokens: remove() the handle, change it, and "
                "parallelize again"
            )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _require_attended(context: SequenceContext) -> None:
    """Raise at the end of a forward whose attention never came here."""
    forward = context.running()
    if forward is None or not forward.region.streams or context.mesh.axis("sequence").size == 1:
        return
    if not forward.attended:
        raise RuntimeError(
            "no attention of this forward went across ranks; an attention backend was chosen that bypasses sp_core "
            "after parallelize (with attention_backend(...), say): leave the one that was active then"
        )
