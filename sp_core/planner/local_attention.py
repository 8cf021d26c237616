"""Which attention of a model stays on each rank, which sees one of several streams, and which is to be captured.

Tells a `Proposal` so, by what each attention is given. Called by `sp_core.planner.proposals`.
"""

import re
from collections.abc import Iterable

from torch import nn

from sp_core import diffusers_private
from sp_core.planner.movement import Movement, MovingCall
from sp_core.planner.proposal import Proposal
from sp_core.planner.stacks import Stack, attends


def tell_attention(proposal: Proposal, model: nn.Module, movement: Movement, inside: Iterable[Stack]) -> None:
    """Keep attention local that is outside the region, or only looks at a text that is whole."""
    within = tuple(inside)
    begin, end = within[0].first.begin, within[-1].last.end
    for call in movement.calls[1:]:
        module = model.get_submodule(call.name)
        if not attends(module):
            continue
        pattern = _pattern(call.name)
        if not begin < call.begin < end or not any(call.name.startswith(f"{stack.name}.") for stack in within):
            proposal.local_attention[pattern] = "it is not among the blocks whose tokens are split"
            continue
        if context := _context_of(call, _stack_of(call.name, within)):
            proposal.local_attention[pattern] = f"it only looks at {context!r}, which stays whole"
            continue
        if own := _only_stream(call, _stack_of(call.name, within)):
            proposal.own_stream[pattern] = own
        if hasattr(module, "processor") and not diffusers_private.goes_through_table(module.processor):
            proposal.captured_processors.add(type(module.processor).__name__)


def _stack_of(name: str, stacks: Iterable[Stack]) -> Stack:
    return next(stack for stack in stacks if name.startswith(f"{stack.name}."))


def _context_of(call: MovingCall, stack: Stack) -> str | None:
    """The argument of an attention that is no stream of its stack and has other tokens than its queries."""
    streams = {moving.tokens for moving in stack.streams().values()}
    tokens = [
        (path, moving) for path, moving in call.arguments.items() if len(moving.dims) == 3 and moving.seen.floating
    ]
    if not tokens:
        return None
    queries = tokens[0][1]
    for path, moving in tokens[1:]:
        if moving.seen.shape[1] != queries.seen.shape[1] and moving.tokens not in streams and "emb" not in path:
            return path
    return None


def _only_stream(call: MovingCall, stack: Stack) -> str | None:
    """The stream of its stack that an attention sees, if it sees one of several."""
    streams = stack.streams()
    seen = {moving.seen.shape[1] for moving in call.arguments.values() if moving.is_stream}
    own = [path for path, moving in streams.items() if {moving.seen.shape[1]} == seen]
    return own[0] if len(streams) > 1 and len(own) == 1 else None


def _pattern(name: str) -> str:
    """A module's name with every number in it as `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
