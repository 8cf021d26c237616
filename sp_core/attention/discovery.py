"""Which modules of a model attend, and whether all of that attention can go across ranks.

In: a model and its family. Out: `FoundAttention`, or an error that says why some attention would silently stay local.
Nothing is changed; `sp_core.attention.diffusers_backend` routes what is found. Called by `sp_core.parallelize`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch

import torch
from torch import nn

from sp_core import diffusers_private, kernels
from sp_core.attention import linear
from sp_core.attention.layer import SequenceParallelAttention
from sp_core.models.family import ModelFamily


@dataclass(frozen=True)
class FoundAttention:
    """The attention of a model that goes across ranks.

    Attributes:
        processors: modules with an attention processor of diffusers, by dotted name.
        layers: the model's own attention layers, by dotted name.
        streams: the names of the streams that a processor's attention joins, by the module's name; absent: all.
        keys_of: the stream of its keys, if its queries come from another one, by the module's name.
        keys_in_front: names of modules whose keys begin with tokens that every rank has whole and that are no queries.
        masks_queries: names of modules that make a mask of the keys hide the queries as well.
        linear: names of modules whose attention is linear.
        scales_by_length: for attention that scales by the logarithm of the number of all tokens: the parameter of the
            processor that is the base, by the module's name.
        drops_hidden: the model's input with the mask by which the processor drops tokens, by the module's name.
    """

    processors: Mapping[str, nn.Module]
    layers: Mapping[str, SequenceParallelAttention]
    streams: Mapping[str, str]
    keys_of: Mapping[str, str] = field(default_factory=dict)
    keys_in_front: frozenset[str] = frozenset()
    masks_queries: frozenset[str] = frozenset()
    linear: frozenset[str] = frozenset()
    scales_by_length: Mapping[str, str] = field(default_factory=dict)
    drops_hidden: Mapping[str, str] = field(default_factory=dict)

    @property
    def local_attention(self) -> Callable[..., torch.Tensor]:
        """The function with which the model computes attention outside a region."""
        return diffusers_private.attend_as_before if self.processors else kernels.local_attention


def find_attention(model: nn.Module, family: ModelFamily | None = None, *, optional: bool = False) -> FoundAttention:
    """All attention of a model, except what its family keeps local.

    Args:
        model: the model.
        family: the peculiarities of its attention.
        optional: whether a model without attention is accepted (its forward gathers what attention needs).

    Raises:
        ValueError: some attention would silently stay local or be wrong, or the model is parallelized already.
    """
    family = family or ModelFamily((), {})
    modules = dict(model.named_modules())
    processors = {
        name: module
        for name, module in modules.items()
        if hasattr(module, "processor") and not any(fnmatch(name, pattern) for pattern in family.local_attention)
    }
    layers = {name: module for name, module in modules.items() if isinstance(module, SequenceParallelAttention)}
    _require_reachable(model, processors, family)
    if not (processors or layers or optional):
        raise ValueError(
            f"{type(model).__name__} cannot be parallelized: it has neither attention processors of diffusers nor a "
            "SequenceParallelAttention, so each rank would attend only to its own tokens"
        )
    _require_free(model, processors, layers)
    config = getattr(model, "config", None)
    return FoundAttention(
        processors,
        layers,
        _declared(processors, family.own_streams(config if isinstance(config, Mapping) else {})),
        _declared(processors, family.keys_of),
        _matching(processors, family.keys_in_front),
        _matching(processors, family.masks_queries),
        _linear(model, processors, family),
        _declared(processors, family.scales_by_length),
        _declared(processors, family.drops_hidden),
    )


def _declared(names: Iterable[str], by_pattern: Mapping[str, str]) -> dict[str, str]:
    """The value of the first pattern that each name matches, for names that match one."""
    found = {name: next((said for pattern, said in by_pattern.items() if fnmatch(name, pattern)), "") for name in names}
    return {name: said for name, said in found.items() if said}


def _matching(names: Iterable[str], patterns: tuple[str, ...]) -> frozenset[str]:
    return frozenset(name for name in names if any(fnmatch(name, pattern) for pattern in patterns))


def _linear(model: nn.Module, processors: Mapping[str, nn.Module], family: ModelFamily) -> frozenset[str]:
    """The modules with a processor of linear attention.

    Raises:
        ValueError: the family names a kind of linear attention that is not known.
    """
    if unknown := set(family.linear_processors) - set(linear.KNOWN):
        raise ValueError(
            f"linear_processors of {type(model).__name__} has {', '.join(sorted(unknown))}; allowed: "
            f"{', '.join(linear.KNOWN)}, which sp_core.attention.linear can compute"
        )
    kinds = {name: type(module.processor).__name__ for name, module in processors.items()}
    return frozenset(name for name, kind in kinds.items() if kind in family.linear_processors)


def is_bound(processor: object) -> bool:
    """Whether the attention of a processor is routed to `region_attention`."""
    return diffusers_private.has_config(processor) or getattr(processor, "sequence_parallel", None) is not None


def _require_reachable(model: nn.Module, processors: Mapping[str, nn.Module], family: ModelFamily) -> None:
    """Raise if a processor's attention would be silently wrong."""
    unreachable = []
    for name, module in processors.items():
        kind = type(module.processor).__name__
        if kind in family.refused_processors:
            why = family.refused_processors[kind]
            raise ValueError(f"{type(model).__name__} cannot be parallelized with {kind} ({name}): {why}")
        is_captured = kind in (*family.captured_processors, *family.linear_processors) or is_bound(module.processor)
        if not (is_captured or diffusers_private.goes_through_table(module.processor)):
            unreachable.append(f"{name} ({kind})")
    if unreachable:
        raise ValueError(
            f"{type(model).__name__} cannot be parallelized: attention processors that do not go through diffusers' "
            f"dispatch would attend only to their own rank's tokens: {', '.join(unreachable)}"
        )


def _require_free(
    model: nn.Module, processors: Mapping[str, nn.Module], layers: Mapping[str, SequenceParallelAttention]
) -> None:
    """Raise if attention is routed already, or goes to a backend that would bypass ours."""
    bound = [name for name, module in processors.items() if is_bound(module.processor)]
    bound += [name for name, layer in layers.items() if layer.site is not None]
    if bound:
        raise ValueError(f"{type(model).__name__} is parallelized already ({bound[0]}); remove() that first")
    for name, module in processors.items():
        backend = diffusers_private.own_backend(module.processor)
        if backend is not None:
            raise ValueError(
                f"{name} has its own attention backend ({backend}), which would attend only to "
                "its own rank's tokens; call reset_attention_backend() on the model first"
            )
