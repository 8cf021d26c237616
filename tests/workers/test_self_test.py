"""A gang whose layout gives another answer than one rank does not serve, and says which module is the first to differ.

Sound layouts of every family pass, in fp32 and in half precision.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from sp_core import collectives
from sp_core.attention.region_attention import attention_kept_local
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.tensor_parallel import ColumnParallelLinear
from sp_core.verify.alone import alone, in_fp32
from sp_core.verify.divergence import error, spread
from sp_core.verify.rank_pool import RankFailed, RankPool
from tests.support.deployments import model
from tests.support.families import tried
from tests.workers.test_denoising import ALONE, begun
from workers.gang import self_test as tested
from workers.gang.rank import Rank
from workers.gang.self_test import BAR, WrongAnswer, self_test, small_request
from workers.model.loader import LoadedModel, load_model

pytestmark = pytest.mark.processes

ULYSSES, RING = ParallelDegrees(ulysses_degree=2), ParallelDegrees(ring_degree=2)
TENSOR, GUIDANCE = ParallelDegrees(tensor_parallel_size=2), ParallelDegrees(cfg_parallel_size=2)
LAYOUTS = (ULYSSES, RING, TENSOR, GUIDANCE, ParallelDegrees(ulysses_degree=3), replace(TENSOR, ulysses_degree=2))


class Seen(NamedTuple):
    """What a self-test has measured, and what it has said."""

    errors: list[float]
    spreads: list[float]
    said: str


def loaded_with(mesh: ParallelMesh, folder: Path, **options: Any) -> LoadedModel:
    return load_model(model(folder, **asdict(mesh.degrees)).model_copy(update=options), mesh)


def tries(loaded: LoadedModel) -> Seen:
    errors, spreads, said = [], [], ""

    def noted(measure: Callable[..., float], notes: list[float]) -> Callable[..., float]:
        return lambda *tensors: (notes.append(measure(*tensors)), notes[-1])[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tested, "error", noted(error, errors))
        patch.setattr(tested, "spread", noted(spread, spreads))
        try:
            self_test(loaded, lambda request: begun(loaded, request))
        except WrongAnswer as wrong:
            said = str(wrong)
    return Seen(errors, spreads, said)


def sound(mesh: ParallelMesh, folder: Path, dtype: str) -> Seen:
    return tries(loaded_with(mesh, folder, dtype=dtype))


@pytest.mark.parametrize("degrees", LAYOUTS, ids=str)
@pytest.mark.parametrize("family", ["qwen-image", "flux", "wan", "z-image"])
def test_sound_layouts_pass(
    ranks: RankPool, demo_models: dict[str, Path], family: str, degrees: ParallelDegrees
) -> None:
    for seen in ranks.run(degrees, sound, demo_models[family], "float32"):
        assert not seen.said
        assert seen.errors and max(seen.errors) <= BAR


@pytest.mark.parametrize("degrees", [RING, TENSOR], ids=str)
@pytest.mark.parametrize("family", ["qwen-image", "wan"])
def test_in_half_precision_the_bar_is_the_error_of_one_rank(
    ranks: RankPool, demo_models: dict[str, Path], family: str, degrees: ParallelDegrees
) -> None:
    for seen in ranks.run(degrees, sound, demo_models[family], "bfloat16"):
        assert not seen.said
        together, apart = seen.spreads[::2], seen.spreads[1::2]
        assert all(1e-3 < one < 0.1 for one in apart)
        assert all(gang < 1.5 * one for gang, one in zip(together, apart, strict=True))


Fault = Callable[[ParallelMesh, pytest.MonkeyPatch], None]


def scaled(name: str, rank: int) -> Fault:
    """A collective that spoils what it gives one rank."""

    def spoil(mesh: ParallelMesh, patch: pytest.MonkeyPatch) -> None:
        right = getattr(collectives, name)
        if mesh.axis("gang").rank == rank:
            patch.setattr(collectives, name, lambda *args: right(*args) * (1.3 if args[-1].size > 1 else 1))

    return spoil


def louder_chunks(mesh: ParallelMesh, patch: pytest.MonkeyPatch) -> None:
    """A ring that spoils what it gives one rank."""
    wait = collectives.RingShift.wait
    if mesh.axis("gang").rank == 0:
        patch.setattr(collectives.RingShift, "wait", lambda shift: wait(shift) * 1.3)


def other_weights(mesh: ParallelMesh, patch: pytest.MonkeyPatch) -> None:
    """A rank that adds something to its features."""
    forward = ColumnParallelLinear.forward
    if mesh.axis("gang").rank == 1:
        patch.setattr(ColumnParallelLinear, "forward", lambda layer, input: forward(layer, input) + 0.3)


def branches_exchanged(mesh: ParallelMesh, patch: pytest.MonkeyPatch) -> None:
    """Groups that take each other's branch of guidance for their own."""
    gathered = collectives.all_gather_equal
    patch.setattr(collectives, "all_gather_equal", lambda *args: gathered(*args)[::-1])


FIRST = "differs at transformer.transformer_blocks.0.attn."
FAULTS: dict[str, tuple[ParallelDegrees, Fault, str]] = {
    "all-to-all": (ULYSSES, scaled("all_to_all", 1), f"{FIRST}to_out.0,"),
    "gather": (ULYSSES, scaled("all_gather", 1), "rank 1 first differs at transformer.proj_out,"),
    "shift": (RING, louder_chunks, f"rank 0 first {FIRST}to_out.0,"),
    "all-reduce": (TENSOR, scaled("all_reduce", 1), f"rank 1 first {FIRST}to_out.0,"),
    "columns": (TENSOR, other_weights, f"rank 1 first {FIRST}to_q,"),
    "guidance": (GUIDANCE, branches_exchanged, "no module of a transformer differs, but how the branches"),
}


def spoiled(mesh: ParallelMesh, folder: Path, fault: str, dtype: str) -> str:
    loaded = loaded_with(mesh, folder, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        FAULTS[fault][1](mesh, patch)
        return tries(loaded).said


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_collective_that_is_wrong(ranks: RankPool, demo_model: Path, fault: str, dtype: str) -> None:
    degrees, _, told = FAULTS[fault]
    first, second = ranks.run(degrees, spoiled, demo_model, fault, dtype)
    assert first == second
    assert told in first


def kept_local(mesh: ParallelMesh, folder: Path) -> Seen:
    loaded = loaded_with(mesh, folder)
    with attention_kept_local():
        return tries(loaded)


@pytest.mark.parametrize("family", tried())
def test_attention_that_stays_on_its_rank(ranks: RankPool, demo_models: dict[str, Path], family: str) -> None:
    """The control: what passes does so because tokens of all ranks took part."""
    for seen in ranks.run(ULYSSES, kept_local, demo_models[family]):
        assert max(seen.errors or seen.spreads) > 100 * BAR  # spreads of those that round by themselves
        assert "att" in seen.said


def started(mesh: ParallelMesh, folder: Path, options: dict[str, Any], replaces: bool) -> list[str]:
    """A rank's start, after it has met the others: the phases that it tells of."""
    spec = model(folder, **asdict(mesh.degrees)).model_copy(update={**options, "self_test": not replaces})
    rank = Rank(mesh.axis("gang").rank, spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workers.gang.rank.form_mesh", lambda *_: mesh)
        patch.setattr("workers.gang.rank.find_store", lambda *_: None)
        return [phase for phase, _ in rank.join("", 0).start]


CENTERS = {"transformer_class": "tests.support.out_of_tree:CentersTokens"}


def test_a_model_whose_plan_misses_something_does_not_start(ranks: RankPool, demo_model: Path) -> None:
    with pytest.raises(RankFailed, match=r"WrongAnswer.*differs at transformer\.transformer_blocks\.1\.img_norm2,"):
        ranks.run(ULYSSES, started, demo_model, CENTERS, False)
    assert ranks.run(ALONE, started, demo_model, CENTERS, False) == [["rendezvous", "load", "warm_up"]]


def test_the_start_tells_of_its_self_test(ranks: RankPool, demo_model: Path) -> None:
    tested, untested = ["rendezvous", "load", "self_test", "warm_up"], ["rendezvous", "load", "warm_up"]
    assert ranks.run(ULYSSES, started, demo_model, {}, False) == [tested] * 2
    assert ranks.run(ULYSSES, started, demo_model, {}, True) == [untested] * 2


def left(mesh: ParallelMesh, folder: Path) -> tuple[set[str], float]:
    """What a self-test leaves behind in the modules, and how far an answer is from that before it."""
    loaded = loaded_with(mesh, folder)
    modules = [module for part in loaded.adapters for module in loaded.pipeline.components[part].modules()]
    request = small_request(loaded)

    def state() -> list[tuple[Any, ...]]:
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]
        return [(vars(m).get("forward"), vars(m).get("heads"), each) for m, each in zip(modules, hooks, strict=True)]

    def answer() -> torch.Tensor:
        denoising = begun(loaded, request)
        denoising.step()
        return denoising.latents

    before, first = state(), answer()
    assert not tries(loaded).said
    changed = {type(m).__name__ for m, old, new in zip(modules, before, state(), strict=True) if old != new}
    return changed, error(answer(), first)


@pytest.mark.parametrize("degrees", [ULYSSES, TENSOR], ids=str)
def test_nothing_stays_of_it(ranks: RankPool, demo_models: dict[str, Path], degrees: ParallelDegrees) -> None:
    assert ranks.run(degrees, left, demo_models["wan"]) == [(set(), 0.0)] * 2


def test_in_fp32_whatever_the_code_says() -> None:
    half = torch.ones(3, dtype=torch.bfloat16)
    with in_fp32():
        found = [
            half + half,
            half.to(torch.bfloat16),
            torch.zeros(2, dtype=torch.float16),
            half.float().half(),
            torch.cat([half, half]),
            half.float().type_as(half),
            torch.nn.functional.linear(half.float(), half.expand(2, 3)),
        ]
        assert {each.dtype for each in found} == {half.dtype} == {torch.float32}
        half.mul_(2)  # written in place, it keeps its type
    assert half.dtype == torch.bfloat16 and half.sum() == 6


def test_alone_gives_the_mesh_back(ranks: RankPool) -> None:
    assert ranks.run(ULYSSES, sizes) == [(2, 1, True, 2, False)] * 2


def sizes(mesh: ParallelMesh) -> tuple[int, int, bool, int, bool]:
    before = mesh.axis("sequence").size
    with pytest.raises(KeyError), alone([], mesh):
        inside, is_alone = mesh.axis("sequence").size, mesh.is_alone
        raise KeyError
    return before, inside, is_alone, mesh.axis("sequence").size, mesh.is_alone
