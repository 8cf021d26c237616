"""What the support matrix says is what its proofs show, and what spray says today of the pipelines that it refuses."""

from pathlib import Path

import pytest

from deploy.families.lookup import families
from deploy.families.pipeline_source import transformer_pipelines
from deploy.support import supported, why_refused
from sp_core.models.lookup import families as plans
from sp_core.models.lookup import find_family
from sp_core.verify.rank_pool import RankPool
from tests.support.families import proved
from workers import support_matrix
from workers.demo_models.pipelines import requests_of, served
from workers.pipeline_proof import Unproved, prove

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
    with pytest.raises(Unproved, match=r"last bits make the classic call differ by .*, which explains all or nothing"):
        prove("ChromaPipeline", demo_models["chroma"], request, ranks, tensor=False, rounds=True)
