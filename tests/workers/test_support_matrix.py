"""What the support matrix says is what its proofs show, and what spray says today of the pipelines that it refuses."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.families.lookup import families
from deploy.families.pipeline_source import transformer_pipelines
from deploy.support import Row, supported, why_refused
from sp_core.degrees import ParallelDegrees
from sp_core.models.lookup import families as plans
from sp_core.models.lookup import find_family
from sp_core.verify.rank_pool import RankPool
from tests.support.families import proved
from workers import pipeline_proof, support_matrix
from workers.demo_models.pipelines import requests_of, served
from workers.pipeline_proof import Made, Proof, Unproved, answer, prove

ROWS = {row["pipeline"]: row for row in supported()}


def test_every_pipeline_of_diffusers_with_a_transformer_has_a_row() -> None:
    assert {name: row["transformer"] for name, row in ROWS.items()} == transformer_pipelines()


def test_what_is_served_was_proved() -> None:
    good = {name for name, row in ROWS.items() if row["status"] == "served"}
    assert good == set(served())
    assert good == {family.pipeline for family in families().values()} | {p for plan in plans() for p in plan.pipelines}
    for name in good:
        plan = find_family([ROWS[name]["transformer"]])
        assert plan is not None and not plan.refused
        assert ROWS[name]["layouts"] == ["1", "u2", "r2", *(["t2"] if plan.tensor_plan({}) else [])]
        assert ROWS[name]["date"] and ROWS[name]["tasks"] and not ROWS[name]["reason"]


def test_what_is_refused_says_why() -> None:
    said = {name: row["reason"] for name, row in ROWS.items() if row["status"] == "refused"}
    assert said == {name: why_refused(name, ROWS[name]["transformer"]) for name in said}
    assert all(said.values())


def test_the_page_is_the_file() -> None:
    page = Path(support_matrix.__file__).parents[1] / "sp_core" / "SUPPORT.md"
    assert page.read_text() == support_matrix.markdown(ROWS.values())


TRANSFORMERS = {
    "Qwen-Image": "QwenImage",
    "Z-Image": "ZImage",
    "Wan": "Wan",
    "Flux.1": "FluxTransformer",
    "LTX-Video": "LTX",
    "Stable Diffusion 3": "SD3",
    "HunyuanVideo": "HunyuanVideoTransformer",
}
"""What README.md names in or beside the column `tensor`, and how the class names of its transformers begin."""


def test_the_readme_says_which_have_tensor_ranks() -> None:
    page = (Path(support_matrix.__file__).parents[1] / "README.md").read_text()
    table = page.partition("## What works")[2].partition("\nThe models of")[0]
    cells = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    tensor = {kind: said for kind, _, said, *_ in cells}
    having = [row for row in ROWS.values() if "t2" in row["layouts"]]
    controlled = [row for row in having if "ControlNet" in row["pipeline"]]
    begun = [row for row in having if row not in controlled and {*row["tasks"]} - {"text-to-image", "text-to-video"}]

    def names(rows: list[Row]) -> set[str]:
        return {name for name, start in TRANSFORMERS.items() for row in rows if row["transformer"].startswith(start)}

    for name in TRANSFORMERS:
        (said,) = (said for kind, said in tensor.items() if name in kind)
        assert (said == "yes") == (name in names(having))
    assert {*tensor["from a picture or a clip"].split(", ")} == names(begun)
    assert {*tensor["with a ControlNet, which every rank runs whole"].split(", ")} == names(controlled)


@pytest.mark.parametrize("pipeline", proved())
def test_a_proof_of_each_pipeline_holds(ranks: RankPool, pipeline: str) -> None:
    assert support_matrix.proved(pipeline, transformer_pipelines()[pipeline], ranks).layouts == tuple(
        ROWS[pipeline]["layouts"]
    )


def test_a_proof_that_shows_nothing_is_none(ranks: RankPool, demo_models: dict[str, Path]) -> None:
    (request, *_) = requests_of("ChromaPipeline")
    with pytest.raises(Unproved, match="the classic call fails: "):
        prove("ChromaPipeline", demo_models["bria"] / "nowhere", request, ranks, tensor=False)
    with pytest.raises(Unproved, match=r"t2 fails: .*tensor"):
        prove("ChromaPipeline", demo_models["chroma"], request, ranks, tensor=True)


@pytest.mark.parametrize(
    ("moved", "differs", "said"),
    [
        (1e-9, 0.0, "last bits make the classic call differ by 1.0e-09, which explains all or nothing"),
        (0.1, 0.0, "which explains all or nothing"),
        (1e-4, 1.5e-4, ""),
        (1e-4, 3e-4, "one rank differs: latents by 3.0e-04"),
    ],
)
def test_rounding_explains_what_last_bits_do(
    monkeypatch: pytest.MonkeyPatch, moved: float, differs: float, said: str
) -> None:
    def run(pool: RankPool, degrees: ParallelDegrees, what: str, fn: Any, *args: Any) -> list[Made]:
        by = differs if fn is answer else moved if len(args) > 4 else 0.0  # with a seed of last bits
        return [(torch.tensor([by], dtype=torch.float64), [])]

    monkeypatch.setattr(pipeline_proof, "_run", run)
    proof = Proof(("1",), latents=0.0, pixels=0, blind=0.5)
    (request, *_), layouts = requests_of("ChromaPipeline"), {"one rank": pipeline_proof.ALONE}
    with pytest.raises(Unproved, match=said) if said else nullcontext():
        found = pipeline_proof._proved_as_shipped(proof, "ChromaPipeline", Path(), request, RankPool(1), layouts)
        assert found == replace(proof, shipped=pytest.approx(differs), explained=pytest.approx(moved))
