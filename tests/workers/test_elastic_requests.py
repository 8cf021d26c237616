"""A request changes its ranks after any step, pauses, and goes on: its picture is that of one process."""

from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy.model_sections import Elastic, LoRA
from sp_core.degrees import ParallelDegrees, smaller_layout, smaller_layouts, units
from sp_core.mesh import ParallelMesh
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.support.deployments import model
from tests.workers.test_adapters import PICTURES, VIDEO, differ
from tests.workers.test_denoising import ALONE, Generated, generate, pixels
from workers.gang.dealer import Block
from workers.messages import GenerationRequest
from workers.model import handover
from workers.model.denoising import Denoising
from workers.model.loader import load_model

STEPS = 5
LAYOUTS = {
    "ulysses 4": ParallelDegrees(ulysses_degree=4),
    "ulysses 2 x ring 2": ParallelDegrees(ulysses_degree=2, ring_degree=2),
    "ulysses 2 x cfg 2": ParallelDegrees(ulysses_degree=2, cfg_parallel_size=2),
    "tp 2 x ulysses 2": ParallelDegrees(ulysses_degree=2, tensor_parallel_size=2),
    "ulysses 2": ParallelDegrees(ulysses_degree=2),
}
REQUESTS = {
    "qwen-image": replace(PICTURES, num_inference_steps=STEPS, negative_prompt="blurry"),
    "z-image": replace(PICTURES, num_inference_steps=STEPS, guidance_scale=0.0),
    "flux": replace(PICTURES, num_inference_steps=STEPS, n=1),
    "wan": replace(VIDEO, num_inference_steps=STEPS, negative_prompt="blurry", guidance_scale_2=1.5, n=1),
}
"""By family. The scheduler of Wan is multistep: its history moves along."""

Round = dict[str, tuple[Block, int]]
"""Requests that take steps side by side: on which units, and how many steps."""

MOVES: list[Round] = [
    {"a": (Block(0, 1), 1), "b": (Block(1, 1), 2)},
    {"a": (Block(0, 2), 2)},
    {"b": (Block(0, 1), 1)},
    {"b": (Block(0, 2), 2), "a": (Block(2, 2), 2)},
]
"""Of four units; on two, blocks beyond them are moved back."""


def run(
    mesh: ParallelMesh,
    degrees: ParallelDegrees,
    folder: Path,
    requests: dict[str, GenerationRequest],
    rounds: list[Round],
    forgets: bool = False,
    loras: tuple[LoRA, ...] = (),
) -> dict[str, Generated]:
    """What this rank has decoded. Between two rounds, what a request has made travels as bytes.

    Args:
        forgets: leave the history of schedulers behind.
    """
    elastic = ParallelMesh.create(degrees, device_type="cpu", timeout_s=60, smaller=smaller_layouts(degrees, 1))
    spec = model(folder, **asdict(degrees)).model_copy(update={"elastic": Elastic(), "loras": loras})
    loaded = load_model(spec, elastic)
    rank, unit, made = mesh.axis("gang").rank, degrees.tensor_parallel_size, {}
    encoded, progress = {}, dict.fromkeys(requests, b"")
    for name, request in requests.items():
        first = Denoising(loaded, request)
        first.encode()
        encoded[name] = sent(first.encoded() if rank == 0 else b"", 0)
    for chosen in rounds:
        own = b""
        for name, (block, steps) in chosen.items():
            lead = block.first * unit
            if lead <= rank < lead + block.size * unit:
                guided = requests[name].guidance_scale > 1
                elastic.use(smaller_layout(degrees, block.size, guided))
                part = Denoising(loaded, requests[name], encoded[name])
                part.prepare()
                if progress[name]:
                    part.resume(progress[name])
                for _ in range(steps):
                    part.step()
                with mock.patch.object(handover, "_moves", lambda *_: False) if forgets else nullcontext():
                    own = part.progress()
                if part.done:
                    made[name] = part.latents, [pixels(each) for each in part.finish()]
        for name, (block, _) in chosen.items():
            progress[name] = sent(own, block.first * unit)
    return made


def sent(packed: bytes, source: int) -> bytes:
    """The bytes of one rank, on all ranks."""
    length = torch.tensor([len(packed)])
    dist.broadcast(length, src=source)
    carried = torch.empty(int(length), dtype=torch.uint8)
    if dist.get_rank() == source:
        carried = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    dist.broadcast(carried, src=source)
    return carried.numpy().tobytes()


def moves(degrees: ParallelDegrees) -> list[Round]:
    """`MOVES`; on two units one after the other."""
    if units(degrees) == 4:
        return MOVES
    apart = [(name, block, steps) for each in MOVES for name, (block, steps) in each.items()]
    return [{name: (Block(min(block.first, 2 - block.size), block.size), steps)} for name, block, steps in apart]


def pair(request: GenerationRequest) -> dict[str, GenerationRequest]:
    """The request, and another one beside it."""
    return {"a": request, "b": replace(request, request_id="b", prompt="a fox", seed=11, n=1)}


_alone: dict[tuple[Path, GenerationRequest], Generated] = {}


def alone(ranks: RankPool, folder: Path, request: GenerationRequest) -> Generated:
    if (folder, request) not in _alone:
        (_alone[folder, request],) = ranks.run(ALONE, generate, folder, request)
    return _alone[folder, request]


def worst(
    ranks: RankPool, folder: Path, found: list[dict[str, Generated]], name: str, request: GenerationRequest
) -> tuple[float, int]:
    """The largest error of latents on any rank that had them, and of pixels on the one that has drawn."""
    latents, pictures = alone(ranks, folder, request)
    got = [made[name] for made in found if name in made]
    (drawn,) = [each for _, each in got if each]
    return max(error(each, latents) for each, _ in got), differ(drawn, pictures)


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *((family, "ulysses 4") for family in REQUESTS),
        ("qwen-image", "ulysses 2 x ring 2"),
        ("qwen-image", "ulysses 2 x cfg 2"),
        ("z-image", "ulysses 2 x cfg 2"),
        ("flux", "tp 2 x ulysses 2"),
        ("wan", "ulysses 2"),
    ],
)
def test_two_requests_move_and_pause_side_by_side(
    ranks: RankPool, demo_models: dict[str, Path], family: str, layout: str
) -> None:
    folder, requests, degrees = demo_models[family], pair(REQUESTS[family]), LAYOUTS[layout]
    found = ranks.run(degrees, run, degrees, folder, requests, moves(degrees))
    for name, request in requests.items():
        latents, differs = worst(ranks, folder, found, name, request)
        assert latents <= BAR
        assert differs <= 1


def test_a_move_that_forgets_the_history_would_be_seen(ranks: RankPool, demo_models: dict[str, Path]) -> None:
    folder, degrees = demo_models["wan"], LAYOUTS["ulysses 2"]
    request = REQUESTS["wan"]
    rounds: list[Round] = [{"a": (Block(0, 1), 3)}, {"a": (Block(0, 2), 2)}]
    found = ranks.run(degrees, run, degrees, folder, {"a": request}, rounds, True)
    assert worst(ranks, folder, found, "a", request)[0] > 100 * BAR


@st.composite
def schedules(draw: st.DrawFn) -> list[Round]:
    """Rounds of two requests on four units, until both have done all steps."""
    left, rounds = {"a": STEPS, "b": STEPS}, []
    while any(left.values()):
        taken: set[int] = set()
        chosen: Round = {}
        for name in [name for name in left if left[name]]:
            size = draw(st.sampled_from([1, 2, 4]))
            block = Block(size * draw(st.integers(0, 4 // size - 1)), size)
            if taken.isdisjoint(block.ranks):
                chosen[name] = block, draw(st.integers(1, left[name]))
                left[name] -= chosen[name][1]
                taken.update(block.ranks)
        rounds.append(chosen)
    return rounds


@pytest.mark.parametrize("family", ["wan", "qwen-image"])
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=schedules(), layout=st.sampled_from([name for name, each in LAYOUTS.items() if units(each) == 4]))
def test_any_schedule_makes_the_same(
    ranks: RankPool, demo_models: dict[str, Path], family: str, rounds: list[Round], layout: str
) -> None:
    folder, requests, degrees = demo_models[family], pair(REQUESTS[family]), LAYOUTS[layout]
    found = ranks.run(degrees, run, degrees, folder, requests, rounds)
    for name, request in requests.items():
        assert max(worst(ranks, folder, found, name, request)) <= 1  # pixels
        assert worst(ranks, folder, found, name, request)[0] <= BAR
