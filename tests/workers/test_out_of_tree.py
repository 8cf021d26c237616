"""Models that are not diffusers' own are served by the names of their class and plan; wrong names are said at once."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from diffusers import QwenImagePipeline

from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankFailed, RankPool
from sp_core.verify.verify import BAR
from tests.support.deployments import model
from tests.support.out_of_tree import Planned
from tests.workers.test_denoising import ALONE, REQUESTS, Generated, check, generate
from workers.model.loader import load_model
from workers.model.out_of_tree import sequence_plan, transformer_class

TWO = ParallelDegrees(ulysses_degree=2)
MINE = {"transformer_class": "tests.support.out_of_tree:Planned"}
BY_NAME = {"transformer_class": "tests.support.out_of_tree:Misplanned", "plan": "tests.support.out_of_tree:PLAN"}


def draw(mesh: ParallelMesh, folder: Path, options: dict[str, str], local: bool = False) -> Generated:
    return generate(mesh, folder, REQUESTS["even"], local, **options)


@pytest.mark.parametrize("options", [MINE, BY_NAME], ids=["the class's plan", "a plan by name"])
def test_a_class_of_ones_own_draws_the_same(ranks: RankPool, demo_model: Path, options: dict[str, str]) -> None:
    ((latents, pictures),) = ranks.run(ALONE, draw, demo_model, options)
    check(ranks.run(TWO, draw, demo_model, options), latents, pictures)
    assert error(ranks.run(TWO, draw, demo_model, options, True)[0][0], latents) > 100 * BAR


def test_the_plan_is_the_named_one(ranks: RankPool, demo_model: Path) -> None:
    with pytest.raises(RankFailed, match="'nowhere' is not a submodule of Misplanned"):
        ranks.run(TWO, draw, demo_model, {"transformer_class": BY_NAME["transformer_class"]})


def classes(mesh: ParallelMesh, folder: Path, kind: str) -> list[str]:
    spec = model(folder, **asdict(mesh.degrees)).model_copy(
        update={"transformer_class": f"tests.support.out_of_tree:{kind}"}
    )
    parts = load_model(spec, mesh).pipeline.components
    return [type(part).__name__ for name, part in parts.items() if name.startswith("transformer")]


def test_both_transformers_are_of_the_class(ranks: RankPool, demo_models: dict[str, Path]) -> None:
    assert ranks.run(TWO, classes, demo_models["wan"], "OtherWan") == [["OtherWan"] * 2] * 2


def test_a_folder_that_was_saved_with_the_class(ranks: RankPool, demo_model: Path, tmp_path: Path) -> None:
    """Its configs name a class that diffusers does not have; ours is imported before diffusers asks for it."""
    pipeline = QwenImagePipeline.from_pretrained(demo_model)
    pipeline.transformer = Planned.from_pretrained(demo_model / "transformer")
    folder = tmp_path / "mine"
    pipeline.register_modules(transformer=pipeline.transformer)
    pipeline.save_pretrained(folder)
    assert json.loads((folder / "model_index.json").read_text())["transformer"] == [
        "tests.support.out_of_tree",
        "Planned",
    ]
    assert ranks.run(ALONE, classes, folder, "Planned") == [["Planned"]]


def test_a_class_that_nobody_knows(ranks: RankPool, demo_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(demo_model, tmp_path / "mine")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "MyTransformer"}))
    with pytest.raises(RankFailed, match="is a MyTransformer, which diffusers does not have; set transformer_class"):
        ranks.run(ALONE, draw, folder, {})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"plan": "no_such_package.plans:PLAN"}, "No module named 'no_such_package'; install it where the ranks run"),
        ({"plan": "tests.no_such_module:PLAN"}, "ModuleNotFoundError: No module named 'tests.no_such_module'; install"),
        (
            {"plan": "tests.support.out_of_tree:NOTHING"},
            r"tests\.support\.out_of_tree \(.*out_of_tree\.py\) has no NOTHING",
        ),
        (
            {"plan": "tests.support.out_of_tree:Planned"},
            "plan tests.support.out_of_tree:Planned cannot be used: _sp_plan must be a dict",
        ),
        ({"plan": "tests.support.out_of_tree:NO_PLAN"}, "'pos_embed' has str"),
        (
            {"transformer_class": "tests.support.out_of_tree:PLAN"},
            "must be a subclass of diffusers.ModelMixin, got a dict",
        ),
        ({"transformer_class": "pathlib:Path"}, "must be a subclass of diffusers.ModelMixin, got Path"),
    ],
    ids=lambda each: "" if isinstance(each, str) else next(iter(each.values())),
)
def test_names_that_cannot_be_used(tmp_path: Path, options: dict[str, str], said: str) -> None:
    spec = model(tmp_path).model_copy(update=options)
    with pytest.raises(ValueError, match=said):
        transformer_class(spec)
        sequence_plan(spec)


def test_a_module_that_raises_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_plans.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"No module named 'no_such_dependency'$"):
        sequence_plan(model(tmp_path).model_copy(update={"plan": "broken_plans:PLAN"}))
