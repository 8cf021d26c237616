"""The stacks of blocks of a model: lists of modules that attend, and hand a stream of tokens from one to the next.

A model and its `Movement` come in; `Stack`s go out, to `sp_core.planner.proposals`.
"""

from dataclasses import dataclass

from torch import nn

from sp_core.attention.layer import SequenceParallelAttention
from sp_core.planner.movement import CannotPlan, Movement, Moving, MovingCall


@dataclass(frozen=True)
class Stack:
    """A list of blocks that were called one after the other.

    Attributes:
        name: of the `ModuleList`.
        calls: of its blocks, in order.
    """

    name: str
    calls: tuple[MovingCall, ...]

    @property
    def first(self) -> MovingCall:
        return self.calls[0]

    @property
    def last(self) -> MovingCall:
        return self.calls[-1]

    def streams(self) -> dict[str, Moving]:
        """The token streams, by parameter: they enter the first block and leave each block as another tensor."""
        return {
            path: moving
            for path, moving in self.first.arguments.items()
            if moving.is_stream and "." not in path and not self.is_repeated(path) and self._comes_out(moving)
        }

    def is_repeated(self, path: str) -> bool:
        """Whether all blocks get the same tensor."""
        given = {call.arguments[path].seen.identity for call in self.calls if path in call.arguments}
        return len(self.calls) > 1 and len(given) == 1

    def _comes_out(self, moving: Moving) -> bool:
        return any(out.seen.shape == moving.seen.shape for out in self.first.outputs.values())

    def companions(self) -> dict[str, Moving]:
        """The other inputs of the blocks that change with numbers of tokens, by path."""
        streams = self.streams()
        return {
            path: moving
            for call in self.calls[:2]
            for path, moving in call.arguments.items()
            if path not in streams and moving.tokens
        }


def find_stacks(model: nn.Module, movement: Movement) -> list[Stack]:
    """The outermost lists of blocks that attend and through which a stream goes, in order of their calls.

    Raises:
        CannotPlan: there are none.
    """
    found: list[Stack] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{stack.name}.") for stack in found):
            continue
        calls = [call for at in range(len(module)) for call in movement.of(f"{name}.{at}")]
        if not calls or not attention_in(model, calls[0].name):
            continue
        if len(calls) != len(module) or sorted(calls, key=lambda call: call.begin) != calls:
            raise CannotPlan(f"the blocks of {name!r} are not called once each, in order")
        stack = Stack(name, tuple(calls))
        if stack.streams():
            found.append(stack)
    if not found:
        raise CannotPlan(
            "no list of modules attends and hands on a (B, S, D) tensor that moves with a number of tokens"
        )
    return sorted(found, key=lambda stack: stack.first.begin)


def attention_in(model: nn.Module, name: str) -> list[str]:
    """The modules below one (or it itself) that attend, by their full names."""
    return [
        f"{name}.{inner}" if inner else name
        for inner, module in model.get_submodule(name).named_modules()
        if attends(module)
    ]


def attends(module: nn.Module) -> bool:
    """Whether attention of this module can go across ranks."""
    return hasattr(module, "processor") or isinstance(module, SequenceParallelAttention)
