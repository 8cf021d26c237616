"""`spray generate --local`: ranks of its own, without Ray and without a server."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.cli.main import main
from tests.support.deployments import model
from workers.errors import GangLost, InvalidParameter
from workers.gang.local import generate_locally
from workers.messages import GenerationRequest, StepEvent

pytestmark = pytest.mark.processes

REQUEST = GenerationRequest("a", "demo", "a cup", 64, 48, 3, seed=7, report_steps=True)


def test_the_command_draws_the_same_on_one_and_two_ranks(demo_model: Path, tmp_path: Path) -> None:
    pictures = []
    for degree in ("1", "2"):
        output = tmp_path / f"{degree}.png"
        command = ["generate", "a cup", "--local", "--model", str(demo_model), "--device", "cpu", "--seed", "7"]
        size = ["--width", "64", "--height", "48", "--num-inference-steps", "3"]
        assert main([*command, *size, "--ulysses-degree", degree, "--output", str(output)]) == 0
        pictures.append(np.asarray(Image.open(output), dtype=np.int16))
    assert pictures[0].shape == (48, 64, 3)
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_steps_are_told_and_mistakes_are_the_callers(demo_model: Path) -> None:
    steps: list[StepEvent] = []
    result = generate_locally(model(demo_model, ring_degree=2), REQUEST, steps.append)
    assert [event.step for event in steps] == [1, 2, 3]
    assert result.seeds == (7,)
    wrong = GenerationRequest("a", "demo", "a cup", 72, 48, 3, seed=7)
    with pytest.raises(InvalidParameter, match="width must be a multiple of 16"):
        generate_locally(model(demo_model, ulysses_degree=2), wrong, steps.append)


def test_the_ranks_have_their_environment(demo_model: Path, tmp_path: Path) -> None:
    """Variables that are read while modules are imported, and a path to modules of one's own; this process has none."""
    (tmp_path / "own_plans.py").write_text(
        "import os\nfrom tests.support.out_of_tree import PLAN\nassert os.environ['FOR_RANKS'] == 'yes'\n"
    )
    given = {"plan": "own_plans:PLAN", "env": {"PYTHONPATH": str(tmp_path), "FOR_RANKS": "yes"}}
    before = dict(os.environ), list(sys.path)
    spec = model(demo_model)
    drawn = generate_locally(spec.model_copy(update=given), REQUEST, lambda _: None)
    assert drawn.outputs == generate_locally(spec, REQUEST, lambda _: None).outputs
    assert (dict(os.environ), list(sys.path)) == before
    with pytest.raises(GangLost, match="plan own_plans:PLAN cannot be imported"):
        generate_locally(spec.model_copy(update={"plan": given["plan"]}), REQUEST, print)


def test_a_rank_that_cannot_load_is_named(tmp_path: Path) -> None:
    with pytest.raises(GangLost, match=r"rank [01]: ValueError: no model at"):
        generate_locally(model(tmp_path, ulysses_degree=2), REQUEST, print)
