"""Finds which dimensions of tensors change with which length, by comparing traces of one model at several lengths.

A length is a letter: `B` is the batch, any other a number of tokens, such as `S` of the image and `T` of the text. Each
trace changes one letter. From them every dimension of every tensor at a module's boundary gets the letters that it
changes with. For `sp_core.planner.proposals`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sp_core.planner.trace import Call, Seen, Trace

BATCH = "B"

Letters = frozenset[str]


class CannotPlan(ValueError):
    """No plan can be made; says why, and by which module."""


@dataclass(frozen=True)
class Moving:
    """A tensor at a module's boundary, and the letters with which its dimensions change.

    Attributes:
        seen: the tensor at the usual lengths.
        dims: the letters of each dimension; empty if it never changes.
    """

    seen: Seen
    dims: tuple[Letters, ...]

    @property
    def token_dim(self) -> int | None:
        """The only dimension that changes with numbers of tokens; None if there is none, or several."""
        found = [dim for dim, letters in enumerate(self.dims) if letters - {BATCH}]
        return found[0] if len(found) == 1 else None

    @property
    def tokens(self) -> Letters:
        """The letters of numbers of tokens with which it changes."""
        return frozenset().union(*self.dims) - {BATCH}

    @property
    def is_shaped_as_stream(self) -> bool:
        """Whether a plan takes it for a token stream unless it says otherwise: `(B, S, D)`."""
        return self.seen.floating and len(self.dims) == 3 and self.token_dim == 1

    @property
    def is_stream(self) -> bool:
        """Whether it has that shape, a row for each sample, and more than one number for each token."""
        return self.is_shaped_as_stream and BATCH in self.dims[0] and self.seen.shape[2] > 1


@dataclass(frozen=True)
class MovingCall:
    """A call of a module; see `sp_core.planner.trace.Call`. `numbers` are the letters of its integers."""

    name: str
    arguments: Mapping[str, Moving]
    numbers: Mapping[str, Letters]
    outputs: Mapping[str, Moving]
    begin: int
    end: int


class Movement:
    """The changes in a model's forward.

    Args:
        model: its forward runs once per entry of `cases`.
        cases: keyword arguments by letter, with that length longer; for the empty letter, with the usual lengths.

    Attributes:
        calls: of all modules, in order of their beginning; the first is the model's own.

    Raises:
        CannotPlan: which modules are called depends on a length.
    """

    def __init__(self, model: nn.Module, cases: Mapping[str, Mapping[str, Any]]) -> None:
        usual = Trace(model, cases[""])
        others = {letter: Trace(model, inputs) for letter, inputs in cases.items() if letter}
        names = [call.name for call in usual.calls]
        for letter, trace in others.items():
            if [call.name for call in trace.calls] != names:
                at = next((a for a, b in zip(names, trace.calls, strict=False) if a != b.name), names[-1])
                raise CannotPlan(f"which modules are called depends on {letter}: {at!r} is called at one length only")
        self.calls = [
            _moving(call, {letter: trace.calls[at] for letter, trace in others.items()})
            for at, call in enumerate(usual.calls)
        ]

    def of(self, name: str) -> list[MovingCall]:
        """The calls of one module."""
        return [call for call in self.calls if call.name == name]


def _moving(call: Call, others: Mapping[str, Call]) -> MovingCall:
    arguments = {
        path: _moved(seen, {letter: other.arguments.get(path) for letter, other in others.items()})
        for path, seen in call.arguments.items()
    }
    outputs = {
        path: _moved(seen, {letter: other.outputs.get(path) for letter, other in others.items()})
        for path, seen in call.outputs.items()
    }
    numbers = {
        path: frozenset(letter for letter, other in others.items() if other.numbers.get(path) != value)
        for path, value in call.numbers.items()
    }
    return MovingCall(call.name, arguments, numbers, outputs, call.begin, call.end)


def _moved(seen: Seen, others: Mapping[str, Seen | None]) -> Moving:
    letters: Sequence[set[str]] = [set() for _ in seen.shape]
    for letter, other in others.items():
        if other is None or len(other.shape) != len(seen.shape):
            continue
        for dim, (size, now) in enumerate(zip(seen.shape, other.shape, strict=True)):
            if size != now:
                letters[dim].add(letter)
    return Moving(seen, tuple(frozenset(each) for each in letters))
