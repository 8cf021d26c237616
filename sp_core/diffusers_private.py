"""Every private name of diffusers that sp_core relies on, used here and nowhere else.

diffusers sends each attention through a table of backends, by the name that is active, and passes along the
`_parallel_config` of the calling processor. `put_into_table` makes our entry the active one; `attend_as_before` calls
the one that it replaced. The rest is attributes of models, processors and guiders.

`tests/sp_core/test_private_names.py` fails when a release of diffusers moves one of them, or when another file of
sp_core reaches for one.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import torch
from diffusers.guiders import BaseGuidance
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import nn


class _Backend(StrEnum):
    SEQUENCE_PARALLEL = "sp_core"


class AttentionConfig:
    """The `_parallel_config` of a processor whose attention is ours."""

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        """`(B, L, H, D)` for this rank's queries; options as diffusers' backends take them."""
        raise NotImplementedError


_previous: Any = None


def put_into_table() -> None:
    """Make our entry the active one of diffusers' table, and remember the one before it.

    It stays after the last model's attention is restored: it only forwards then, and another entry may be on top of it.
    """
    global _previous
    name, function = _AttentionBackendRegistry.get_active_backend()
    if function is _dispatch:
        return
    _previous = name
    _AttentionBackendRegistry.register(_Backend.SEQUENCE_PARALLEL, constraints=[])(_dispatch)
    _AttentionBackendRegistry.set_active_backend(_Backend.SEQUENCE_PARALLEL)


def attend_as_before(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    **options: Any,
) -> torch.Tensor:
    """Attention on this rank alone, by the backend that diffusers would use without us."""
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
    """Our entry. Calls with another configuration (other models, Wan's cross-attention) go on as before."""
    options = {"dropout_p": dropout_p, "is_causal": is_causal}
    if isinstance(_parallel_config, AttentionConfig):
        return _parallel_config(query, key, value, attn_mask=attn_mask, scale=scale, **options)
    options |= {"return_lse": return_lse, "_parallel_config": _parallel_config}
    return attend_as_before(query, key, value, attn_mask, scale, **options)


def goes_through_table(processor: Any) -> bool:
    """Whether the attention of a processor reaches diffusers' table, with the processor's configuration."""
    return hasattr(processor, "_parallel_config")


def has_config(processor: Any) -> bool:
    """Whether a processor has a configuration, ours or diffusers' own."""
    return getattr(processor, "_parallel_config", None) is not None


def set_config(processor: Any, config: AttentionConfig) -> None:
    """Route the attention of a processor to our entry."""
    processor._parallel_config = config


def own_backend(processor: Any) -> object:
    """The backend that a processor uses instead of the active one; None: it uses the active one."""
    return getattr(processor, "_attention_backend", None)


def context_parallel_plan(model: nn.Module) -> Mapping[str, Any] | None:
    """The `_cp_plan` that diffusers ships for the model's class."""
    plan: Mapping[str, Any] | None = getattr(model, "_cp_plan", None)
    return plan or None


def tensor_parallel_plan(model: nn.Module) -> Mapping[str, Any] | None:
    """The `_tp_plan` that diffusers ships for the model's class."""
    plan: Mapping[str, Any] | None = getattr(model, "_tp_plan", None)
    return plan or None


def names_of_blocks(model: nn.Module) -> tuple[str, ...]:
    """The classes of the blocks that diffusers would compile; empty: it names none for the model's class."""
    return tuple(getattr(model, "_repeated_blocks", None) or ())


def packed_columns(layer: nn.Module) -> tuple[int, ...]:
    """Proportions of the parts that are fused in a linear layer's output features; empty: it is one part."""
    return tuple(getattr(layer, "_tp_packed_col_blocks", ()))


def packed_rows(layer: nn.Module) -> tuple[int, ...]:
    """The same for its input features."""
    return tuple(getattr(layer, "_tp_packed_row_blocks", ()))


def set_branch(guider: Any, branch: int) -> None:
    """Tell a guider which branch its next `prepare_models` is for. By default it counts the calls."""
    guider._count_prepared = branch


def changes_model(guider: Any) -> bool:
    """Whether a guider changes the model before and after each branch, such as by skipping layers."""
    kind = type(guider)
    own = kind.prepare_models, kind.cleanup_models
    return own != (BaseGuidance.prepare_models, BaseGuidance.cleanup_models)
