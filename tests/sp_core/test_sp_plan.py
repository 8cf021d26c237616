"""Plans as data: what is refused and in which words, and the modules that their keys name."""

from typing import Any

import pytest

from sp_core.module_paths import resolve_modules
from sp_core.sp_plan import (
    SequenceParallelCompanion,
    SequenceParallelConvolution,
    SequenceParallelGrid,
    SequenceParallelInput,
    SequenceParallelLeadingCount,
    SequenceParallelOutput,
    SequenceParallelPartialInput,
    get_sp_plan_from_model,
    validate_sp_plan,
)
from tests.support.toys import SPLIT, Toy


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ([], "must be a dict"),
        ({1: SequenceParallelOutput(1)}, "keys must be strings"),
        ({"a": {1.5: SPLIT}}, "Input spec keys must be str or int"),
        ({"a": {True: SPLIT}}, "Input spec keys must be str or int"),
        ({"a": {0: SPLIT}}, "require split_output=True"),
        ({"a": {"x": SequenceParallelInput(1, split_output=True)}}, "use the output's index"),
        ({"a": {"x": 1}}, "Input spec values must be"),
        ({"a": {"x": []}}, "Input spec values must be .* has an empty list"),
        ({"a": {"x": [SPLIT, 1]}}, "Input spec values must be"),
        ({"a": {0: [SPLIT]}}, r"Integer keys \(output indices\) must map to"),
        ({"a": {0: SequenceParallelLeadingCount("x")}}, r"Integer keys \(output indices\) must map to"),
        ({"a": {0: SequenceParallelGrid()}}, r"Integer keys \(output indices\) must map to"),
        ({"a": {0: SequenceParallelPartialInput(1, 3)}}, "require split_output=True"),
        ({"a": 1}, r"_sp_plan values must be dict \(input spec\), SequenceParallelConvolution or "),
        ({"a": [None]}, "Expected SequenceParallelOutput elements"),
        ({"a": [SequenceParallelOutput(1), SPLIT]}, "Expected SequenceParallelOutput elements"),
        ({"a": 1}, "Unsupported plan type"),
        ({"a": []}, r"_sp_plan values must be dict \(input spec\), SequenceParallelConvolution or "),
    ],
)
def test_malformed_plans(plan: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        validate_sp_plan(plan)


def test_well_formed_plans() -> None:
    plan = {
        "": {"x": [SPLIT, None], "n": SequenceParallelLeadingCount("x")},
        "a": {"x": SequenceParallelPartialInput(1, "text"), "y": SequenceParallelCompanion(1)},
        "b": {0: SequenceParallelInput(1, split_output=True)},
        "c": [SequenceParallelOutput(1), None],
        "d": {"rows": SequenceParallelGrid(), "columns": SequenceParallelGrid()},
        "d.conv": SequenceParallelConvolution("rows"),
    }
    assert validate_sp_plan(plan) is plan
    assert validate_sp_plan({}) == {}


def test_names_of_modules() -> None:
    toy = Toy()
    assert resolve_modules(toy, "") == [toy]
    assert resolve_modules(toy, "blocks.1") == [toy.blocks[1]]
    assert resolve_modules(toy, "blocks.*") == list(toy.blocks)
    assert resolve_modules(toy, "outputs.main") == [toy.outputs["main"]]
    for name, says in (
        ("blocks.*.*", "can only be used once"),
        ("outputs.*", "can only be used with ModuleList"),
        ("blocks.7", r"'7' is not a submodule of ModuleList in Toy \(plan key 'blocks.7'\); it has: 0, 1"),
        ("training", "is not a submodule"),
    ):
        with pytest.raises(ValueError, match=says):
            resolve_modules(toy, name)


def test_a_model_may_carry_its_plan() -> None:
    toy = Toy()
    assert get_sp_plan_from_model(toy) is None
    toy._sp_plan = {"blocks.0": {"x": SPLIT}}  # type: ignore[assignment]
    assert get_sp_plan_from_model(toy) == {"blocks.0": {"x": SPLIT}}
