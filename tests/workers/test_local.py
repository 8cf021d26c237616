"""`spray generate --local`: ranks of its own, without Ray and without a server."""

import io
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from service.cli.main import main
from tests.support.deployments import model
from workers.errors import GangLost, InvalidParameter
from workers.gang.local import generate_locally
from workers.messages import GenerationRequest, GenerationResult

pytestmark = pytest.mark.processes

REQUEST = GenerationRequest("a", "demo", "a cup", 64, 48, 3, seed=7, report_steps=True)


@pytest.fixture(scope="module")
def alone(demo_model: Path) -> GenerationResult:
    """What one rank draws."""
    return generate_locally(model(demo_model), REQUEST, lambda _: None)


def test_the_command_draws_on_two_ranks_what_one_draws(
    alone: GenerationResult, demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "a cup", "--local", "--model", str(demo_model), "--device", "cpu", "--seed", "7"]
    size = ["--width", "64", "--height", "48", "--num-inference-steps", "3"]
    assert main([*command, *size, "--ulysses-degree", "2", "--output", str(tmp_path / "2.png")]) == 0
    files = io.BytesIO(alone.outputs[0]), tmp_path / "2.png"
    pictures = [np.asarray(Image.open(file), dtype=np.int16) for file in files]
    assert pictures[0].shape == (48, 64, 3)
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert re.findall(r"step (\d)/3", capsys.readouterr().err) == ["1", "2", "3"]  # rank 0 alone tells them
    assert alone.seeds == (7,)


def test_mistakes_are_the_callers(demo_model: Path) -> None:
    wrong = replace(REQUEST, width=72)
    with pytest.raises(InvalidParameter, match="width must be a multiple of 16"):
        generate_locally(model(demo_model, ulysses_degree=2), wrong, print)


def test_the_ranks_have_their_environment(alone: GenerationResult, demo_model: Path, tmp_path: Path) -> None:
    """Variables that are read while modules are imported, and a path to modules of one's own; this process has none."""
    (tmp_path / "own_plans.py").write_text(
        "import os\nfrom tests.support.out_of_tree import PLAN\nassert os.environ['FOR_RANKS'] == 'yes'\n"
    )
    given = {"plan": "own_plans:PLAN", "env": {"PYTHONPATH": str(tmp_path), "FOR_RANKS": "yes"}}
    before = dict(os.environ), list(sys.path)
    spec = model(demo_model)
    drawn = generate_locally(spec.model_copy(update=given), REQUEST, lambda _: None)
    assert drawn.outputs == alone.outputs
    assert (dict(os.environ), list(sys.path)) == before
    with pytest.raises(GangLost, match="plan own_plans:PLAN cannot be imported"):
        generate_locally(spec.model_copy(update={"plan": given["plan"]}), REQUEST, print)


def test_a_rank_that_cannot_load_is_named(tmp_path: Path) -> None:
    with pytest.raises(GangLost, match=r"rank [01]: ValueError: no model at"):
        generate_locally(model(tmp_path, ulysses_degree=2), REQUEST, print)
