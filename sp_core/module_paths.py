"""Finds the modules of a model that the keys of a sequence plan name. Called by `sp_core.hooks`."""

import re

from torch import nn


def resolve_modules(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that a plan key names, in order.

    Raises:
        ValueError: no such submodule, more than one `*`, or `*` on something that is not a ModuleList.
    """
    if name.count("*") > 1:
        raise ValueError(f"Wildcard '*' can only be used once in a plan key, got {name!r}")
    found = [model]
    for atom in name.split(".") if name else []:
        if atom == "*":
            parent = found[0]
            if not isinstance(parent, nn.ModuleList):
                raise ValueError(
                    f"Wildcard '*' can only be used with ModuleList, but in {name!r} it is applied to a "
                    f"{type(parent).__name__}"
                )
            found = list(parent)
        else:
            found = [_child(model, module, atom, name) for module in found]
    if not found:
        raise ValueError(f"the plan key {name!r} names no module: that ModuleList of {type(model).__name__} is empty")
    return found


def _child(model: nn.Module, module: nn.Module, atom: str, name: str) -> nn.Module:
    if isinstance(module, nn.ModuleList) and re.fullmatch(r"-[0-9]+", atom):
        atom = str(len(module) + int(atom))  # "blocks.-1" is the last block
    try:
        return module.get_submodule(atom)
    except AttributeError:
        here = ", ".join(child for child, _ in module.named_children()) or "nothing"
        raise ValueError(
            f"{atom!r} is not a submodule of {type(module).__name__} in {type(model).__name__} (plan key {name!r}); "
            f"it has: {here}"
        ) from None
