"""What a rank of an elastic gang needs: at each degree as much as a gang of that layout, and its groups on top."""

import re
from pathlib import Path

import pytest

from deploy.check import check_deployment
from deploy.families.family import DecodeBytes
from deploy.memory import GROUP_BYTES, PEER_BYTES, memory_by_degree, rank_memory, what_fits
from deploy.model_sections import Elastic
from deploy.model_spec import ModelSpec
from deploy.spec import DeploymentSpec, SpecError
from tests.deploy.test_memory import a_model, spec_of

CUDA = {"device": "cuda", "batch_guidance": False}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of real width, by its configs. Its weights are taken for a gigabyte, its decode for nothing."""
    monkeypatch.setattr("deploy.memory.weight_bytes", lambda model, folder: 2**30)
    monkeypatch.setattr("deploy.activations.decode_bytes", lambda kind: DecodeBytes(96, 0, 0, 0, 0))
    return a_model(tmp_path)


def elastic(spec: ModelSpec, least: int = 1) -> ModelSpec:
    return spec.model_copy(update={"elastic": Elastic(min_degree=least), **CUDA})


def test_a_degree_needs_what_a_gang_of_so_many_ranks_needs(folder: Path) -> None:
    found = memory_by_degree(elastic(spec_of(folder, ulysses_degree=8)), folder)
    assert list(found) == [8, 4, 2, 1]
    for degree, needed in found.items():
        fixed = rank_memory(spec_of(folder, ulysses_degree=degree).model_copy(update=CUDA), folder)
        assert (needed.weights, needed.activations) == (fixed.weights, fixed.activations)
        assert needed.total == fixed.total + needed.groups
    assert found[1].activations > found[8].activations  # type: ignore[operator]
    assert rank_memory(elastic(spec_of(folder, ulysses_degree=8)), folder) == found[1]


@pytest.mark.parametrize(
    ("degrees", "least", "peers"),
    [
        ({"ulysses_degree": 8}, 1, [3, 1]),
        ({"ulysses_degree": 8}, 4, [3]),
        ({"ulysses_degree": 8}, 8, []),
        ({"ulysses_degree": 2, "cfg_parallel_size": 2}, 1, []),  # the gang's own groups, in other roles
        ({"ulysses_degree": 4, "tensor_parallel_size": 2}, 1, [3, 1]),  # a block of both axes, and Ulysses across it
    ],
)
def test_groups_that_a_gang_has_beside_its_own(
    folder: Path, degrees: dict[str, int], least: int, peers: list[int]
) -> None:
    needed = rank_memory(elastic(spec_of(folder, **degrees), least), folder)
    assert needed.groups == sum(GROUP_BYTES + PEER_BYTES * each for each in peers)
    assert ("for the groups of smaller degrees" in str(needed)) == bool(peers)
    on_cpu = elastic(spec_of(folder, **degrees), least).model_copy(update={"device": "cpu"})
    assert rank_memory(on_cpu, folder).groups == 0


def test_the_lowest_degree_that_fits_is_proposed(folder: Path) -> None:
    spec = elastic(spec_of(folder, ulysses_degree=8))
    limit = rank_memory(elastic(spec_of(folder, ulysses_degree=8), 4), folder).total
    assert what_fits(spec, folder, limit, None, None)[0].startswith("elastic.min_degree 4 (")


def test_the_check_says_which_degrees_fit(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.activations.decode_bytes", lambda kind: DecodeBytes(96, 0, 0, 0, 0))
    spec = elastic(spec_of(demo_model, ulysses_degree=4)).model_copy(update={"dtype": "float32"})
    needs = {degree: needed.total for degree, needed in memory_by_degree(spec, demo_model).items()}
    devices = {"cpu": 8.0, "cuda": 4.0}

    def lines(memory: int) -> str:
        return "\n".join(check_deployment(DeploymentSpec(models=(spec,)), devices, memory))

    assert re.search(r"largest rank, at degree 1: .*; degree 1 fits \(.*\), 2 fits \(.*\), 4 fits", lines(2**40))
    with pytest.raises(SpecError, match=r"degree 1 does not fit .*, 2 fits .*; what fits: elastic.min_degree 2"):
        lines(needs[1] - 1)
