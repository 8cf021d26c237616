"""Trace of one plain forward: the calls of modules in order, the shapes of their tensors, and which are the same.

A model and the keyword arguments of a forward come in; a `Trace` goes out to `sp_core.planner.movement`, which compares
traces of several lengths.
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Identity = tuple[int, torch.Size]


@dataclass(frozen=True)
class Seen:
    """A tensor that a module was given or has returned.

    Attributes:
        shape: its shape.
        floating: whether it holds real floating numbers, and so may be a token stream.
        identity: equal for the same memory in the same shape, within one trace.
    """

    shape: tuple[int, ...]
    floating: bool
    identity: Identity


@dataclass
class Call:
    """One call of a module.

    Attributes:
        name: of the module; empty for the model itself.
        arguments: its tensors, by parameter; an item of a list or tuple is `parameter.0`.
        outputs: what it has returned, by index; an only one is `0`.
        numbers: its integers, by parameter.
        begin: when it was called, in steps of calls and returns.
        end: when it returned.
    """

    name: str
    arguments: dict[str, Seen]
    numbers: dict[str, int]
    begin: int
    outputs: dict[str, Seen] = field(default_factory=dict)
    end: int = -1


class Trace:
    """All calls of a forward, in order of their beginning.

    Args:
        model: which is called once, in inference.
        inputs: keyword arguments.

    Attributes:
        calls: the model's own is the first.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        self.calls: list[Call] = []
        self._alive: list[torch.Tensor] = []  # memory that is not freed is not given to another tensor
        self._open: list[Call] = []
        self._now = 0
        hooks: list[Any] = []
        for name, module in model.named_modules():
            hooks.append(module.register_forward_pre_hook(self._begins(name), with_kwargs=True))
            hooks.append(module.register_forward_hook(self._ends))
        try:
            with torch.no_grad():
                model(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
            self._alive.clear()

    def of(self, name: str) -> list[Call]:
        """The calls of one module."""
        return [call for call in self.calls if call.name == name]

    def _begins(self, name: str) -> Any:
        def begins(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            try:
                given: Mapping[str, Any] = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            except TypeError:  # a forward that takes anything
                given = {"args": args, **kwargs}
            seen = {path: self._seen(tensor) for path, tensor in flat(given)}
            numbers = {path: value for path, value in given.items() if type(value) is int}
            call = Call(name, seen, numbers, self._tick())
            self.calls.append(call)
            self._open.append(call)

        return begins

    def _ends(self, module: nn.Module, args: Any, output: Any) -> None:
        call = self._open.pop()
        outputs = output if isinstance(output, list | tuple) else [output]
        if isinstance(output, Mapping):
            outputs = list(output.values())
        call.outputs = {path: self._seen(tensor) for path, tensor in flat(dict(enumerate(outputs)))}
        call.end = self._tick()

    def _tick(self) -> int:
        self._now += 1
        return self._now

    def _seen(self, tensor: torch.Tensor) -> Seen:
        self._alive.append(tensor)
        address = tensor.untyped_storage().data_ptr() + tensor.element_size() * int(tensor.storage_offset())
        return Seen(tuple(tensor.shape), tensor.is_floating_point(), (address, tensor.shape))


def flat(values: Mapping[Any, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a mapping, and of the lists, tuples and mappings in it, by their path."""
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            yield str(name), value
        elif isinstance(value, list | tuple):
            for path, tensor in flat(dict(enumerate(value))):
                yield f"{name}.{path}", tensor
        elif isinstance(value, Mapping):
            for path, tensor in flat(value):
                yield f"{name}.{path}", tensor
