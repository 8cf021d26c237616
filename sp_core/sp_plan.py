"""The sequence-parallel plan: where a model's tensors are split and gathered, as data beside the model.

A plan maps module names to what happens at their boundary:

    _sp_plan = {
        "rope": {0: SequenceParallelInput(split_dim=1, split_output=True)},           # shard an output
        "blocks.0": {"hidden_states": SequenceParallelInput(split_dim=1)},            # shard a forward parameter
        "proj_out": SequenceParallelOutput(gather_dim=1),                             # gather the output
    }

Names: `""` is the model itself, a dotted path names a submodule (`"outputs.main"` reaches into a ModuleDict,
`"blocks.-1"` is the last block), and one `*` stands for every entry of a ModuleList. Floating tensors `(B, S, D)` are
token streams unless the entry is a `SequenceParallelCompanion`; all others only go along with streams. If attention
joins several streams, the plan names them in the order in which it joins them. A parameter that is a list of tensors
has a list of entries (None leaves one whole), or one companion entry for all of it. `{}` says that the model's forward
shards itself, by `sp_core.sp_sharding`.

Plans are written on model classes and in `sp_core.models`, validated here, and applied by `sp_core.hooks`. diffusers'
`_cp_plan` says the same in other words; `plan_from_diffusers` reads it. No torch, because `deploy` reads plans too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SequenceParallelInput:
    """Split a tensor over the sequence ranks.

    Attributes:
        split_dim: the tensor dimension to split, usually 1 of `(B, S, D)`.
        expected_dims: the rank that the tensor must have; another one is an error. None: any.
        split_output: False: a forward parameter, named by the entry's str key, is split before the module runs.
            True: the module's output at the entry's int key is split after it ran.
        auto_pad: pad to equal shares instead of splitting raggedly; the padding is hidden from attention.
    """

    split_dim: int
    expected_dims: int | None = None
    split_output: bool = False
    auto_pad: bool = False


@dataclass(frozen=True)
class OptionalSequenceParallelInput(SequenceParallelInput):
    """Like `SequenceParallelInput`, but a tensor of another rank than `expected_dims` is left whole.

    For parameters of several forms: Wan's timestep is one number per sample, or one per token.
    """


@dataclass(frozen=True)
class SequenceParallelCompanion(SequenceParallelInput):
    """Like `SequenceParallelInput`, for a `(B, S, D)` tensor that is not a token stream but is split along with one.

    For rotations, positions and residuals. On a list or a dict of tensors, of any length, one such entry splits each. A
    tensor of length 1 stays whole: it holds one value for all tokens.

    Attributes:
        optional: leave a tensor whole if its rank is not `expected_dims`, or if it lacks the dimension.
        per_sample: the dimension holds the tokens of one sample after those of another.
    """

    optional: bool = False
    per_sample: bool = False


@dataclass(frozen=True)
class SequenceParallelPartialInput:
    """Split the part of a tensor after its text: `[text, image]` along `split_dim`; the text stays whole.

    Attributes:
        split_dim: the tensor dimension to split.
        text_len_source: the length of the text: a number, or the name of a forward parameter that is a number or a
            tensor whose first dimension has that length.
        expected_dims: the rank that the tensor must have; another one is an error. None: any.
        split_output: as for `SequenceParallelInput`.
    """

    split_dim: int
    text_len_source: str | int
    expected_dims: int | None = None
    split_output: bool = False


@dataclass(frozen=True)
class SequenceParallelLeadingCount:
    """A forward parameter that counts the first tokens of a stream. It becomes the count that this rank holds.

    Attributes:
        stream: the parameter name by which the stream is split, in an earlier entry.
    """

    stream: str


@dataclass(frozen=True)
class SequenceParallelGrid:
    """A forward parameter that is a size of the grid that the stream's tokens form: its frames, rows or columns.

    A share of the tokens is no grid, so the module gets it as one line: each size becomes 1, and the last one -1 (all
    tokens that are there). Name all sizes, the outermost first; convolutions inside have an entry of their own.
    """


@dataclass(frozen=True)
class SequenceParallelConvolution:
    """A convolution over the grid that gets its tokens as one line, `(B, C, 1, L)`, and sees those of other ranks too.

    For an `nn.Conv2d` of odd kernel that keeps the size of the grid.

    Attributes:
        rows: the parameter with a `SequenceParallelGrid` along which the first dimension of the kernel lies. The second
            dimension lies along all later sizes, taken as one. The kernel does not reach along the earlier sizes.
    """

    rows: str


@dataclass(frozen=True)
class SequenceParallelOutput:
    """Gather a module's output from the sequence ranks.

    Attributes:
        gather_dim: the tensor dimension along which the shards are joined.
        expected_dims: the rank that the tensor must have; another one is an error. None: any.
        stream: the parameter name by which the stream was split. Needed only if two streams of different lengths can
            have the same shares (one token and two, on two ranks); without it that is refused.
    """

    gather_dim: int
    expected_dims: int | None = None
    stream: str | None = None


AnyInput = SequenceParallelInput | SequenceParallelPartialInput
NumberInput = SequenceParallelLeadingCount | SequenceParallelGrid
InputSpec = dict[str | int, AnyInput | NumberInput | list[AnyInput | None]]
OutputSpec = SequenceParallelOutput | list[SequenceParallelOutput | None]
SequenceParallelModelPlan = dict[str, InputSpec | OutputSpec | SequenceParallelConvolution]


def validate_sp_plan(plan: object) -> SequenceParallelModelPlan:
    """Check the shape of a plan, without a model.

    Returns:
        The plan, typed.

    Raises:
        ValueError: says which entry is wrong and what is allowed there.
    """
    if not isinstance(plan, dict):
        raise ValueError(f"_sp_plan must be a dict from module names to entries, got {type(plan).__name__}")
    for name, entry in plan.items():
        if not isinstance(name, str):
            raise ValueError(f"_sp_plan keys must be strings (module names), got {name!r}")
        if isinstance(entry, dict):
            _validate_inputs(name, entry)
        elif not isinstance(entry, SequenceParallelConvolution):
            _validate_output(name, entry)
    return plan


def _validate_inputs(name: str, entry: Mapping[object, object]) -> None:
    for key, value in entry.items():
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise ValueError(f"Input spec keys must be str or int, {name!r} has {key!r}")
        if isinstance(key, int) and not isinstance(value, AnyInput):
            raise ValueError(
                f"Integer keys (output indices) must map to a SequenceParallelInput, "
                f"{name!r}[{key}] is {type(value).__name__}"
            )
        if isinstance(key, str) and isinstance(value, NumberInput):
            continue
        entries = list(value) if isinstance(value, list | tuple) else [value]
        wrong = [e for e in entries if not isinstance(e, AnyInput) and not (e is None and any(entries))]
        if wrong or not entries:
            got = type(wrong[0]).__name__ if wrong else "an empty list"
            raise ValueError(
                f"Input spec values must be SequenceParallelInput, SequenceParallelPartialInput or a list of them, "
                f"{name!r}[{key!r}] is or has {got}"
            )
        for each in entries:
            _validate_side(f"{name!r}[{key!r}]", key, each)


def _validate_side(where: str, key: str | int, entry: Any) -> None:
    if isinstance(key, int) and not entry.split_output:
        raise ValueError(
            f"Integer keys (output indices) require split_output=True, {where} has False; "
            "use the parameter's name to split an input"
        )
    if isinstance(key, str) and entry is not None and entry.split_output:
        raise ValueError(
            f"Parameter names split an input, but {where} has split_output=True; "
            "use the output's index to split an output"
        )


def _validate_output(name: str, entry: object) -> None:
    if isinstance(entry, list | tuple) and entry:
        wrong = [e for e in entry if e is not None and not isinstance(e, SequenceParallelOutput)]
        if not wrong and any(entry):
            return
        kinds = ", ".join(sorted({type(e).__name__ for e in entry}))
        got = f"a list of {kinds}; Expected SequenceParallelOutput elements or None"
    else:
        got = type(entry).__name__
    if not isinstance(entry, SequenceParallelOutput):
        raise ValueError(
            f"Unsupported plan type: _sp_plan values must be dict (input spec), SequenceParallelConvolution or "
            f"SequenceParallelOutput (or a list of it and None); {name!r} has {got}"
        )


def get_sp_plan_from_model(model: object) -> SequenceParallelModelPlan | None:
    """The validated `_sp_plan` of the model or its class; None if it has none.

    Raises:
        ValueError: the plan is malformed.
    """
    plan = getattr(model, "_sp_plan", None)
    return None if plan is None else validate_sp_plan(plan)


def plan_from_diffusers(cp_plan: Mapping[str, Any]) -> SequenceParallelModelPlan:
    """diffusers' `_cp_plan` as a plan.

    Its inputs become optional ones, because diffusers leaves tensors of another rank whole. Parameters named
    `...hidden_states` are streams; outputs (rotations) and other parameters (positions, masks) are companions.

    Raises:
        ValueError: an entry that is neither diffusers' `ContextParallelInput` nor its `ContextParallelOutput`.
    """
    plan: SequenceParallelModelPlan = {}
    outputs = [entry for entry in cp_plan.values() if not isinstance(entry, Mapping)]
    only = "hidden_states" if len(outputs) == 1 else None  # what every transformer of diffusers returns
    for name, entry in cp_plan.items():
        if isinstance(entry, Mapping):
            plan[name] = {key: _input_from_diffusers(name, key, value) for key, value in entry.items()}
        elif isinstance(entry, list | tuple):
            plan[name] = [None if value is None else _output_from_diffusers(name, value, None) for value in entry]
        else:
            plan[name] = _output_from_diffusers(name, entry, only)
    return validate_sp_plan(plan)


def _input_from_diffusers(name: str, key: str | int, entry: Any) -> SequenceParallelInput:
    if not hasattr(entry, "split_dim"):
        raise ValueError(f"_cp_plan[{name!r}] has a {type(entry).__name__}, expected ContextParallelInput")
    if isinstance(key, str) and key.endswith("hidden_states"):
        return OptionalSequenceParallelInput(entry.split_dim, entry.expected_dims)
    return SequenceParallelCompanion(entry.split_dim, entry.expected_dims, entry.split_output, optional=True)


def _output_from_diffusers(name: str, entry: Any, stream: str | None) -> SequenceParallelOutput:
    if not hasattr(entry, "gather_dim"):
        raise ValueError(f"_cp_plan[{name!r}] has a {type(entry).__name__}, expected ContextParallelOutput")
    return SequenceParallelOutput(entry.gather_dim, entry.expected_dims, stream)
