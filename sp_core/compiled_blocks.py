"""Compiles the blocks of a transformer. All blocks of one class share a graph.

A model comes in, parallelized or not; its blocks are compiled at their first forward. Called by `workers.model.loader`.
"""

from typing import Any

from torch import nn

from sp_core import diffusers_private, torch_private

IN_ORDER = {"reorder_for_peak_memory": False}
"""Inductor may exchange operators that do not need each other's results, as an estimate of memory says, which depends
on the lengths. Ranks have different ones, and all must enter the same collectives in the same order: a block with two
attentions side by side would hang."""


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Compile the blocks that diffusers names for the model's class, or else those in the model's own lists.

    In a parallelized model, blocks whose split depends on the lengths of all ranks are left out: a graph cannot know
    them.

    Args:
        model: the transformer.
        options: of `torch.compile`; graphs are full.

    Raises:
        ValueError: the model has no blocks.
    """
    names = diffusers_private.names_of_blocks(model)
    if names:
        blocks = [module for module in model.modules() if type(module).__name__ in names]
    else:
        blocks = [block for part in model.children() if isinstance(part, nn.ModuleList) for block in part]
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no blocks to compile: neither its _repeated_blocks "
            f"({', '.join(names) or 'none'}) nor an nn.ModuleList of its own; leave compile out"
        )
    if "backend" not in options:
        options["options"] = IN_ORDER | options.get("options", {})
    for block in blocks:
        if _needs_lengths(block):
            continue
        block.compile(fullgraph=True, **options)


def _needs_lengths(block: nn.Module) -> bool:
    owners = (getattr(hook, "__self__", None) for hook in torch_private.hooks(block))
    return any(getattr(owner, "needs_lengths", False) for owner in owners)
