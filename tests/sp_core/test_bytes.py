"""Every layout sends what arithmetic on the model's shape says, byte for byte, on every rank and in every kind."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sp_core import kernels
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.parallelize import parallelize
from sp_core.traffic import Op
from sp_core.verify import examples
from sp_core.verify.rank_pool import RankPool
from tests.support import qwen
from tests.support.guided import guided_step
from tests.support.traffic import Bytes, Meter, Shape, of_qwen_image, of_wan, predicted

LAYOUTS = {
    "ulysses 2": ParallelDegrees(ulysses_degree=2),
    "ulysses 3": ParallelDegrees(ulysses_degree=3),
    "ring 2": ParallelDegrees(ring_degree=2),
    "tp 2": ParallelDegrees(tensor_parallel_size=2),
    "cfg 2": ParallelDegrees(cfg_parallel_size=2),
    "ulysses 2 x ring 2": ParallelDegrees(ulysses_degree=2, ring_degree=2),
    "tp 2 x ulysses 2": ParallelDegrees(tensor_parallel_size=2, ulysses_degree=2),
    "cfg 2 x ulysses 2": ParallelDegrees(cfg_parallel_size=2, ulysses_degree=2),
}
CASES: dict[str, tuple[str, str, int]] = {
    "even": ("even", "none", 1),
    "uneven": ("uneven", "none", 2),
    "padded": ("short", "none", 1),
    "masked": ("uneven", "per row", 2),
}
"""Length, mask and batch, as `examples` names them."""

KINDS: dict[Op, str] = {"all_to_all": "exchange", "ring": "shift", "all_reduce": "sum", "gather": "gather"}
"""The meter's names of what `sp_core.traffic` counts."""


def the_model(name: str, heads: int) -> Any:
    return qwen.transformer(heads=heads) if heads != 12 else copy.deepcopy(examples.TINY[name].model)


def shape_of(name: str, case: str, heads: int = 12, dtype: torch.dtype = torch.float32) -> Shape:
    length, mask, batch = CASES[case]
    (frames, height, width), text = examples.SIZES[length]
    config = the_model(name, heads).config
    rest = {"batch": batch, "itemsize": dtype.itemsize, "masked": mask != "none"}
    of_family = of_wan if name == "wan" else of_qwen_image
    return of_family(config, text, frames * height * width, **rest)


def measure(
    mesh: ParallelMesh, name: str, cases: list[str], heads: int = 12, dtype: torch.dtype = torch.float32
) -> dict[str, list[Bytes]]:
    """Of each case what this rank sends in two guided steps, one after the other."""
    found: dict[str, list[Bytes]] = {}
    for case in cases:
        model = the_model(name, heads).to(dtype)
        parallelize(model, mesh)
        given = examples.inputs(name, *CASES[case])
        given |= {k: v.to(dtype) for k, v in given.items() if torch.is_tensor(v) and v.is_floating_point()}
        found[case] = []
        for _ in range(2):
            mesh.traffic.take_sent()
            with Meter() as meter:
                guided_step(model, (given, given), mesh.axis("cfg"))
            found[case].append(meter.sent)
            check_traffic(mesh, meter.sent)
    return found


def check_traffic(mesh: ParallelMesh, sent: Bytes) -> None:
    """What this rank counts of itself is what the meter saw it send, but for integers."""
    counted = {KINDS[op]: size for op, size in mesh.traffic.take_sent().items()}
    expected = {kind: float(size) for kind, size in sent.items() if size and kind != "integers"}
    assert counted == pytest.approx(expected, rel=1e-12)


def check(pool: RankPool, layout: str, name: str, cases: list[str], *options: Any) -> None:
    for rank, found in enumerate(pool.run(LAYOUTS[layout], measure, name, cases, *options)):
        for case, (first, second) in found.items():
            shape = shape_of(name, case, *options)
            assert first == predicted(shape, LAYOUTS[layout], rank, first=True), (rank, case)
            assert second == predicted(shape, LAYOUTS[layout], rank), (rank, case)
            assert sum(second.values()) > 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["qwen-image", "wan"])
def test_bytes_are_those_of_the_formula(ranks: RankPool, name: str, layout: str) -> None:
    check(ranks, layout, name, [case for case in CASES if name != "wan" or case != "masked"])


def measure_compiled(mesh: ParallelMesh, name: str) -> list[tuple[dict[str, float], set[Op]]]:
    """What this rank counts of two guided steps with compiled blocks, and the kinds that took time."""
    torch._dynamo.reset()
    model, given, found = the_model(name, 12), examples.inputs(name, *CASES["uneven"]), []
    parallelize(model, mesh)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        mesh.traffic.take_sent()
        with mesh.traffic.step(timed=True) as spent:
            guided_step(model, (given, given), mesh.axis("cfg"))
        counted = {KINDS[op]: size for op, size in mesh.traffic.take_sent().items()}
        assert spent is not None
        found.append((counted, {op for op, seconds in spent.seconds().items() if seconds > 0}))
    return found


@pytest.mark.parametrize(("name", "layout"), [("qwen-image", "tp 2"), ("wan", "tp 2 x ulysses 2")])
def test_bytes_of_compiled_blocks_are_those_of_the_formula(ranks: RankPool, name: str, layout: str) -> None:
    shape = shape_of(name, "uneven")
    for rank, found in enumerate(ranks.run(LAYOUTS[layout], measure_compiled, name)):
        expected = {kind: float(size) for kind, size in predicted(shape, LAYOUTS[layout], rank).items() if size}
        for counted, timed in found:
            assert counted == pytest.approx(expected, rel=1e-12)
            assert {KINDS[op] for op in timed} == set(expected) >= {"sum"}


@pytest.mark.parametrize("layout", ["ulysses 3", "ulysses 2 x ring 2"])
def test_bytes_of_heads_that_the_ranks_do_not_divide(ranks: RankPool, layout: str) -> None:
    check(ranks, layout, "qwen-image", ["uneven", "masked"], 5)


@pytest.mark.parametrize(("name", "layout"), [("wan", "tp 2"), ("qwen-image", "ulysses 2 x ring 2")])
def test_bytes_in_half_precision(ranks: RankPool, name: str, layout: str) -> None:
    check(ranks, layout, name, ["uneven"], 12, torch.bfloat16)


def test_padding_of_a_short_text_travels_nowhere(ranks: RankPool) -> None:
    """Nor does a mask that hides it, which would cost every layer the fast kernel."""
    for found in ranks.run(LAYOUTS["ulysses 2"], kernels_without_mask, 1):
        assert found == {"masks": 0, "calls": 2}
    for found in ranks.run(LAYOUTS["ulysses 3"], kernels_without_mask, 2):
        assert found == {"masks": 0, "calls": 2}


def kernels_without_mask(mesh: ParallelMesh, text: int) -> dict[str, int]:
    """How many attentions a forward with a text of so few tokens has, and how many have a mask."""
    model = the_model("qwen-image", 12)
    parallelize(model, mesh)
    given = qwen.inputs(height=5, width=5, text=text)
    found = {"masks": 0, "calls": 0}
    attend = kernels.attention

    def counted(query: Any, key: Any, value: Any, mask: Any = None, scale: Any = None) -> torch.Tensor:
        found["calls"] += 1
        found["masks"] += mask is not None
        return attend(query, key, value, mask, scale)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(kernels, "attention", counted)
        model(**given)
    return found


def test_formulas_of_the_literature() -> None:
    """Even shares of one long stream, elements of 2 bytes: the formulas as they are known, for one layer of a forward.
    For tensor parallelism they count two row-wise layers."""
    tokens, width, layers = 4096, 3072, 60
    shape = Shape(layers, 24, 128, out=0, split=(tokens,), row_layers=2, itemsize=2)
    for size in (2, 4, 8):
        everything = tokens * width * (size - 1)
        for kind, degrees, expected in (
            ("exchange", ParallelDegrees(ulysses_degree=size), 8 * everything / size**2),
            ("shift", ParallelDegrees(ring_degree=size), 4 * everything / size),
            ("sum", ParallelDegrees(tensor_parallel_size=size), 8 * everything / size),
        ):
            assert predicted(shape, degrees, 0)[kind] == 2 * layers * expected
    both = predicted(shape, ParallelDegrees(ulysses_degree=4, ring_degree=2), 0)
    assert both["exchange"] == 2 * layers * 8 * tokens * width / 8 * 3 / 4
    assert both["shift"] == 2 * layers * 4 * tokens * width / 8


def uncounted(mesh: ParallelMesh) -> None:
    with Meter():
        dist.broadcast(torch.ones(1), 0)


def test_a_call_that_is_not_counted_is_an_error(ranks: RankPool) -> None:
    with pytest.raises(RuntimeError, match="the traffic of broadcast_ is not counted"):
        ranks.run(LAYOUTS["tp 2"], uncounted)
