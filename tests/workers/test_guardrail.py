"""Cosmos runs with its guardrail or not at all. The package here is the test's, with the methods of the real one."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deploy.check import check_deployment
from deploy.families.lookup import family_of
from deploy.spec import DeploymentSpec, SpecError
from service.api.errors import answer
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.verify.rank_pool import RankFailed, RankPool
from tests.support.deployments import model
from tests.workers.test_steps_ahead import started
from workers.demo_models.writer import write_demo_model
from workers.errors import InvalidParameter, PeerFailed
from workers.messages import Drawn, GenerationRequest
from workers.model.guardrail import CheckedElsewhere

PIPELINE = "Cosmos2TextToImagePipeline"
REQUEST = GenerationRequest("a", "demo", "a cup", 64, 48, 2, seed=3, guidance_scale=2.0)
UNSAFE = "an unsafe thing"
PACKAGE = f"""
import os, pathlib

import torch

class CosmosSafetyChecker(torch.nn.Module):
    device, dtype = torch.device("cpu"), torch.float32  # pipelines ask for both

    def __init__(self):
        super().__init__()
        pathlib.Path(os.environ["CHECKERS"], str(os.getpid())).touch()

    def check_text_safety(self, prompt):
        self.dark = "dark" in prompt
        return prompt != {UNSAFE!r}

    def check_video_safety(self, frames):
        assert frames.dtype == "uint8" and frames.shape[-1] == 3
        return None if self.dark else frames * 0
"""
"""It refuses one prompt, and what is made of another; and it changes the pictures that it lets pass."""

U2 = ParallelDegrees(ulysses_degree=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("models") / "cosmos"
    write_demo_model(found, "cosmos", PIPELINE)
    return found


def ask(mesh: ParallelMesh, folder: Path, prompts: tuple[str, ...]) -> list[Any]:
    """What one rank answers to each: an error, its type on a rank without the reason; or the files."""
    rank = started(mesh, folder, 0)
    told: list[Any] = []
    for prompt in prompts:
        try:
            drawn = [each for each in rank.generate(replace(REQUEST, prompt=prompt)) if isinstance(each, Drawn)]
            told.append([rank.answer(each.request_id).outputs for each in drawn])
        except InvalidParameter as error:
            told.append((*answer(error)[:1], error.param, error.code, str(error)))
        except PeerFailed:
            told.append("peer failed")
    return [os.getpid(), *told]


def test_only_rank_0_checks_and_what_it_refuses_is_the_callers_mistake(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cosmos_guardrail.py").write_text(PACKAGE)
    known = tmp_path / "cosmos_guardrail-1.0.dist-info"  # diffusers asks for the version of what is installed
    known.mkdir()
    (known / "METADATA").write_text("Metadata-Version: 2.1\nName: cosmos_guardrail\nVersion: 1.0\n")
    made = tmp_path / "checkers"
    made.mkdir()
    monkeypatch.setenv("CHECKERS", str(made))
    monkeypatch.syspath_prepend(str(tmp_path))  # spawned ranks copy it
    check_deployment(DeploymentSpec(models=[model(folder)]), {"cpu": 4.0})
    pool = RankPool(2)
    try:
        first, second = pool.run(U2, ask, folder, (UNSAFE, "a cup", "a dark cup", "a cup"))
    finally:
        pool.stop()
    prompt_refused, drawn, picture_refused, again = first[1:]
    assert prompt_refused[:3] == picture_refused[:3] == (400, "prompt", "content_policy_violation")
    assert "refuses this prompt" in prompt_refused[3] and "refuses what was made" in picture_refused[3]
    assert drawn == again and len(drawn) == 1  # the gang goes on
    assert second[1:] == ["peer failed", [], [], []]
    assert [each.name for each in made.iterdir()] == [str(first[0])]


def test_without_the_package_nothing_runs(folder: Path, ranks: RankPool) -> None:
    assert family_of(PIPELINE).packages == ("cosmos_guardrail",) and family_of("HunyuanDiTPipeline").packages == ()
    with pytest.raises(SpecError, match=r"Cosmos2TextToImagePipeline asks .* pip install cosmos_guardrail"):
        check_deployment(DeploymentSpec(models=[model(folder)]), {"cpu": 4.0})
    with pytest.raises(RankFailed, match=r"Cosmos2TextToImagePipeline asks .* pip install cosmos_guardrail"):
        ranks.run(ParallelDegrees(), ask, folder, ("a cup",))


def test_no_picture_leaves_a_rank_without_a_guardrail() -> None:
    assert CheckedElsewhere().to("cpu").check_text_safety("a cup")
    with pytest.raises(RuntimeError, match="this rank has no guardrail"):
        CheckedElsewhere().check_video_safety([])
