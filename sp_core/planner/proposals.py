"""Proposals: sequence plans that fit the observed changes, each entry with its reason.

A `Movement` comes in; `Proposal`s go out, the likeliest first. `sp_core.planner.planner` proves them. The code of a
forward between its modules cannot be observed, so there are several ways to read the same calls:

- split at the model's own parameters, if they hold the tokens already;
- split at the first block, with rotations at the module that makes them and the rest at every block;
- split and gather around each stack of blocks, if the stacks' streams are joined in between.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from sp_core.planner.local_attention import tell_attention
from sp_core.planner.movement import BATCH, CannotPlan, Letters, Movement, Moving, MovingCall
from sp_core.planner.proposal import Proposal
from sp_core.planner.stacks import Stack, find_stacks
from sp_core.sp_plan import (
    OptionalSequenceParallelInput,
    SequenceParallelCompanion,
    SequenceParallelInput,
    SequenceParallelLeadingCount,
    SequenceParallelOutput,
)

Order = Callable[[Mapping[str, "Moving"]], dict[str, "Moving"]]
"""Puts streams in the order in which attention joins them."""


def proposals(model: nn.Module, movement: Movement) -> dict[str, Proposal]:
    """The proposals for one variant of a model, by the way of reading its calls, the likeliest first.

    Raises:
        CannotPlan: none fits; the message names the module.
    """
    stacks = find_stacks(model, movement)
    ways: dict[str, Callable[[Order], Proposal]] = {
        "split at the first block": lambda order: _at_blocks(model, movement, stacks, order, False),
        "split at the first block, the timestep at the model": lambda order: _at_blocks(
            model, movement, stacks, order, True
        ),
        "split at the model": lambda order: _at_root(model, movement, stacks, order, False),
        "split at the model, rotations where they are made": lambda order: _at_root(
            model, movement, stacks, order, True
        ),
        "split and gather around each stack": lambda order: _around_stacks(model, movement, stacks, order),
    }
    made: dict[str, Proposal] = {}
    reasons = []
    for way, make in ways.items():
        for order, how in ((_text_first, way), (_text_last, f"{way}, the text last")):
            try:
                made[how] = make(order)
            except CannotPlan as reason:
                reasons.append(f"{how}: {reason}")
    if not made:
        raise CannotPlan("; ".join(dict.fromkeys(reasons)))
    return made


def _text_first(streams: Mapping[str, Moving]) -> dict[str, Moving]:
    return dict(sorted(streams.items(), key=lambda item: not _is_text(item[0])))


def _text_last(streams: Mapping[str, Moving]) -> dict[str, Moving]:
    return dict(sorted(streams.items(), key=lambda item: _is_text(item[0])))


def _is_text(parameter: str) -> bool:
    return parameter.startswith(("encoder", "text", "context", "txt", "cap"))


def _main(stacks: list[Stack]) -> list[Stack]:
    """The stacks from the first with the streams of the last on. Earlier ones refine the text or the image."""
    letters = _letters(stacks[-1])
    start = next(at for at, stack in enumerate(stacks) if _letters(stack) >= letters or at == len(stacks) - 1)
    return stacks[start:]


def _letters(stack: Stack) -> Letters:
    return frozenset().union(*(moving.tokens for moving in stack.streams().values()))


def _at_blocks(
    model: nn.Module, movement: Movement, stacks: list[Stack], order: Order, root_timestep: bool
) -> Proposal:
    proposal = Proposal()
    root, main = movement.calls[0], _main(stacks)
    own = _per_token(root) if root_timestep else {}
    for path, moving in own.items():
        entry = OptionalSequenceParallelInput(split_dim=1, expected_dims=2)
        proposal.add(
            "", path, entry, f"one number per token, {moving.seen.shape}: what derives from it is split with it"
        )
    streams = order(main[0].streams())
    _split_residuals(proposal, root, main[:1])
    _split_streams(proposal, main[0], streams)
    derived = frozenset().union(*(moving.tokens for moving in own.values()))
    for stack in main:
        _split_companions(proposal, movement, stack, streams, derived)
        for path, letters in stack.first.numbers.items():
            counted = next((name for name, stream in streams.items() if letters and letters <= stream.tokens), None)
            if counted is not None:
                count = SequenceParallelLeadingCount(counted)
                proposal.add(_block(stack, "*"), path, count, f"may count the first tokens of {counted!r}")
    for stack in main[1:]:
        for path, moving in stack.streams().items():
            if _is_whole(movement, main[0], moving):
                again = SequenceParallelCompanion(split_dim=1, expected_dims=3)
                proposal.add(_block(stack, 0), path, again, f"the same tokens once more, {moving.seen.shape}")
    _gather(proposal, movement, main, streams)
    tell_attention(proposal, model, movement, main)
    return proposal


def _split_residuals(proposal: Proposal, root: MovingCall, stacks: Sequence[Stack]) -> None:
    """Split parameters of the model that are lists, or by layer, and are as long as a stream of these blocks."""
    shapes = {stream.seen.shape for stack in stacks for stream in stack.streams().values()}
    for path, moving in root.arguments.items():
        if "." in path and moving.is_stream and moving.seen.shape in shapes:
            residual = SequenceParallelCompanion(split_dim=1, expected_dims=3)
            proposal.add("", path.split(".")[0], residual, f"residuals of the blocks, each {moving.seen.shape}")


def _is_whole(movement: Movement, first: Stack, moving: Moving) -> bool:
    """Whether a tensor was there before the first block was called, and so has not been split."""
    before = [call.outputs for call in movement.calls if -1 < call.end < first.first.begin]
    return any(
        moving.seen.identity == each.seen.identity
        for seen in (*before, first.first.arguments)
        for each in seen.values()
    )


def _at_root(model: nn.Module, movement: Movement, stacks: list[Stack], order: Order, with_rotations: bool) -> Proposal:
    proposal = Proposal()
    root, main = movement.calls[0], _main(stacks)
    wanted: Letters = _letters(main[-1])
    streams = order(_widest({path: each for path, each in root.arguments.items() if each.tokens <= wanted}))
    if wanted - frozenset().union(*(moving.tokens for moving in streams.values())):
        raise CannotPlan("the tokens do not exist yet when the model is called")
    for path, moving in streams.items():
        entry = SequenceParallelInput(split_dim=1, expected_dims=3)
        proposal.add("", path, entry, f"a stream of tokens, {moving.seen.shape}, when the model is called")
    for path, moving in root.arguments.items():
        dim = moving.token_dim
        if path in streams or dim is None or not moving.tokens <= wanted or "mask" in path:
            continue
        per_sample = BATCH in moving.dims[0]
        companion = SequenceParallelCompanion(
            split_dim=dim if per_sample else dim - len(moving.dims),
            expected_dims=len(moving.dims) if path not in root.arguments or "." in path else None,
            optional=per_sample and "." not in path,
        )
        proposal.add("", path.split(".")[0], companion, f"goes along with the tokens, {moving.seen.shape}")
    if with_rotations:
        for stack in main:
            _split_produced(proposal, movement, stack, streams)
    _gather(proposal, movement, main, streams)
    tell_attention(proposal, model, movement, stacks)
    return proposal


def _widest(arguments: Mapping[str, Moving]) -> dict[str, Moving]:
    """Among parameters with the same tokens, the one with the most numbers per token; the others are positions."""
    widest: dict[Letters, str] = {}
    for path, moving in arguments.items():
        best = widest.get(moving.tokens)
        if (
            "." not in path
            and moving.is_stream
            and (best is None or moving.seen.shape[2] > arguments[best].seen.shape[2])
        ):
            widest[moving.tokens] = path
    return {path: arguments[path] for path in widest.values()}


def _around_stacks(model: nn.Module, movement: Movement, stacks: list[Stack], order: Order) -> Proposal:
    proposal = Proposal()
    _split_residuals(proposal, movement.calls[0], stacks)
    for stack in stacks:
        streams = order(stack.streams())
        _split_streams(proposal, stack, streams)
        _split_companions(proposal, movement, stack, streams, frozenset(), made=False)
        _gather_stack(proposal, stack)
    tell_attention(proposal, model, movement, stacks)
    return proposal


def _per_token(root: MovingCall) -> dict[str, Moving]:
    return {
        path: moving
        for path, moving in root.arguments.items()
        if moving.seen.floating and len(moving.dims) == 2 and moving.token_dim == 1
    }


def _split_streams(proposal: Proposal, stack: Stack, streams: Mapping[str, Moving]) -> None:
    for path, moving in streams.items():
        entry = SequenceParallelInput(split_dim=1, expected_dims=3)
        proposal.add(_block(stack, 0), path, entry, f"a stream of tokens, {moving.seen.shape}, that leaves each block")


def _split_companions(
    proposal: Proposal,
    movement: Movement,
    stack: Stack,
    streams: Mapping[str, Moving],
    derived: Letters,
    made: bool = True,
) -> None:
    """Split the companions of the streams: at the module that makes them if `made`, else at every block."""
    if made:
        _split_produced(proposal, movement, stack, streams)
    for path, moving in stack.companions().items():
        dim = moving.token_dim
        if dim is None or (made and _producer(movement, stack, moving)):
            continue
        if not any((moving.tokens, moving.seen.shape[dim]) == _size(stream) for stream in streams.values()):
            continue
        if moving.tokens <= derived and moving.seen.floating:
            continue
        if len(moving.dims) > 3 and not moving.seen.floating:
            continue  # a mask of scores: attention takes each rank's part of it
        if "." in path:
            raise CannotPlan(f"{stack.first.name!r} is given {path!r}, an item of a list that no module has made")
        entry = _companion(moving, dim, split_output=False)
        proposal.add(
            _block(stack, "*"), path, entry, f"the same for all blocks, {moving.seen.shape}, one for each token"
        )


def _size(stream: Moving) -> tuple[Letters, int]:
    return stream.tokens, stream.seen.shape[1]


def _companion(moving: Moving, dim: int, split_output: bool) -> SequenceParallelInput:
    if moving.seen.floating and (len(moving.dims) == 3 or (len(moving.dims) > 3 and not split_output)):
        return SequenceParallelCompanion(dim, len(moving.dims), split_output, optional=not split_output)
    return SequenceParallelInput(dim, len(moving.dims), split_output)


def _split_produced(proposal: Proposal, movement: Movement, stack: Stack, streams: Mapping[str, Moving]) -> None:
    """Split rotations and the like where the module that makes them returns them."""
    for path, moving in stack.companions().items():
        made = _producer(movement, stack, moving)
        dim = moving.token_dim
        if made is None or dim is None:
            continue
        if not any(moving.tokens == stream.tokens for stream in streams.values()):
            if any(moving.tokens > stream.tokens for stream in streams.values()) and len(streams) > 1:
                raise CannotPlan(f"{made[0]!r} makes {path!r} for several streams at once, {moving.seen.shape}")
            continue
        name, key = made
        entry = _companion(moving, dim, split_output=bool(name))
        if not name:  # one entry for all items of a list
            entry = SequenceParallelCompanion(dim, len(moving.dims))
        proposal.add(name, key, entry, f"is {path!r} of the blocks, {moving.seen.shape}, one for each token")


def _producer(movement: Movement, stack: Stack, moving: Moving) -> tuple[str, int | str] | None:
    """The module that returned a tensor before the stack, and at which index; the outermost.

    For an item of a list that the model itself was given: the model, and the parameter.
    """
    for path, given in movement.calls[0].arguments.items():
        if "." in path and given.seen.identity == moving.seen.identity:
            return "", path.split(".")[0]
    for call in movement.calls[1:]:
        if call.end > stack.first.begin or call.end < 0:
            continue
        for path, out in call.outputs.items():
            if out.seen.identity == moving.seen.identity and path.isdecimal():
                return call.name, int(path)
    return None


def _gather(proposal: Proposal, movement: Movement, main: list[Stack], streams: Mapping[str, Moving]) -> None:
    """Gather at the last module that returns the stream, or after the last block."""
    name, stream = next(
        ((path, each) for path, each in streams.items() if not _is_text(path)), next(iter(streams.items()))
    )
    lengths = {stream.seen.shape[1]} | {moving.seen.shape[1] for moving in main[-1].streams().values()}
    after = [
        call
        for call in movement.calls[1:]
        if call.begin > main[-1].last.end
        and len(call.outputs) == 1
        and (out := call.outputs.get("0")) is not None
        and out.is_stream
        and out.seen.shape[1] in lengths
    ]
    outermost = [call for call in after if not any(o.begin < call.begin and o.end > call.end for o in after)]
    if not outermost:
        _gather_stack(proposal, main[-1])
        return
    last = outermost[-1]
    shape = last.outputs["0"].seen.shape
    only = name if last.outputs["0"].seen.shape[1] == stream.seen.shape[1] and len(streams) > 1 else None
    entry = SequenceParallelOutput(gather_dim=1, expected_dims=3, stream=only)
    proposal.add(last.name, "", entry, f"the last module that returns the tokens, {shape}")


def _gather_stack(proposal: Proposal, stack: Stack) -> None:
    if list(stack.last.outputs) != ["0"]:
        raise CannotPlan(f"{stack.last.name!r} returns several streams, and no module returns the last of them alone")
    entry = SequenceParallelOutput(gather_dim=1, expected_dims=3)
    shape = stack.last.outputs["0"].seen.shape
    proposal.add(f"{stack.name}.-1", "", entry, f"the stack's last block returns the tokens, {shape}")


def _block(stack: Stack, at: int | str) -> str:
    return f"{stack.name}.{at}"
