"""Ranks compile into a folder that later ranks find, and a damaged folder costs compiling, never a start."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import clear_caches

from deploy.model_sections import WarmupShape
from deploy.model_spec import ModelSpec
from sp_core.compiled_blocks import IN_ORDER
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.parallelize import parallelize
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.sp_core.test_compile import Own
from tests.support.deployments import model
from tests.support.programs import needs_compiler
from workers.gang.rank import Rank
from workers.messages import GenerationRequest
from workers.model import compiler as compiler_module
from workers.model.compile_cache import cache_folder
from workers.model.compiler import Compiler
from workers.model.loader import GRAPHS, load_model
from workers.model.torch_internals import VARIABLE, graphs

ULYSSES = ParallelDegrees(ulysses_degree=2)

TWO_GUIDED_STEPS = GenerationRequest(
    "a", "demo", "a cup", negative_prompt="", width=64, height=48, num_inference_steps=2, seed=1, guidance_scale=4.0
)

COUNTING = """#!/bin/sh
case " $* " in *" -shared "*) echo "$@" >> {calls};; esac
exec g++ "$@"
"""


def spec(folder: Path, degrees: ParallelDegrees = ULYSSES) -> ModelSpec:
    shapes = (WarmupShape(width=64, height=48),)
    return model(folder).model_copy(update={"compile": True, "warmup_shapes": shapes, "parallel": degrees})


def start(mesh: ParallelMesh, folder: Path, root: Path, work: Callable[[Path], None]) -> list[tuple[float, int, int]]:
    """Compile small blocks as a rank does, each time as if in a new process: cold, warm, damaged, warm again.

    Returns:
        Each time, the difference to blocks that are not compiled; graphs that were found, and that were compiled.
    """
    block, joint, found = Own(), torch.ones(1, 3, 8), []
    tokens = torch.randn(1, 9, 8, generator=torch.Generator().manual_seed(1))
    reference = block(tokens, joint)
    parallelize(block, mesh)  # once: a second model of a process would be another to the compiler
    for time in range(4):
        torch._dynamo.reset()
        clear_caches()
        counters.clear()
        if time == 2 and mesh.axis("gang").rank == 0:
            work(root)
        os.environ.pop(VARIABLE, None)
        mesh.agree(0)
        compiler = Compiler(spec(folder, mesh.degrees), str(root), mesh.device)
        for each in block.blocks:
            each.compile(fullgraph=True)
        with torch.no_grad(), compiler.warming("start"):
            difference = error(block(tokens, joint), reference)
        found.append((difference, *graphs()))
        mesh.agree(0)  # while one computes, its folder is in use
        assert compiler._cache is not None
        compiler._cache._in_use.close()
        mesh.agree(0)
    return found


def damage(root: Path) -> None:
    """Cut all libraries short, and flip the first byte of a file of each other kind that is loaded."""
    files = [file for file in sorted(cache_folder(str(root)).rglob("*")) if file.is_file()]
    others = [next(f for f in files if f.match(kind)) for kind in ("*.py", "fxgraph/*/*/*", "aotautograd/*/*")]
    for file in [*others, *(file for file in files if file.suffix == ".so")]:
        content = file.read_bytes()
        file.unlink()  # this process still has the whole one
        file.write_bytes(content[:1000] if file.suffix == ".so" else b"\0" + content[1:])
    note(root)


def note(root: Path) -> None:
    """How often the C++ compiler was called to make a library until now."""
    calls = root / "calls"
    with (root / "notes").open("a") as file:
        file.write(f"{len(calls.read_text().splitlines()) if calls.exists() else 0}\n")


@needs_compiler
@pytest.mark.soak  # `test_warm_up.py` proves it of a rank that serves
def test_a_second_start_compiles_nothing(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "counting"
    compiler.write_text(COUNTING.format(calls=tmp_path / "calls"))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "0")  # costs more than it saves four libraries
    pool = RankPool(2)
    try:
        answers = pool.run(ULYSSES, start, demo_model, tmp_path, damage)
    finally:
        pool.stop()
    assert max(difference for times in answers for difference, *_ in times) <= BAR
    cold, warm, damaged, again = ([times[i][1:] for times in answers] for i in range(4))
    graphs_of_one = sum(cold[0])
    assert sum(compiled for _, compiled in cold) > 0
    assert warm == again == [(graphs_of_one, 0)] * 2
    assert sum(compiled for _, compiled in damaged) > 0
    (before,) = (int(line) for line in (tmp_path / "notes").read_text().split())
    assert before > 0
    assert len((tmp_path / "calls").read_text().splitlines()) > before


def test_graphs_are_asked_for_and_told_where_a_forward_begins(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, object]] = []
    begun: list[bool] = []
    torch.compile(torch.sin, options=GRAPHS)  # torch refuses options that it does not have

    def compiled(function: Callable[..., object], **options: object) -> Callable[..., object]:
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(True))
    mesh = ParallelMesh.create(ParallelDegrees(), device_type="cpu", timeout_s=60)
    for recorded, options, times in ((False, {}, 0), (True, {"triton.cudagraphs": True}, 4)):
        asked.clear()
        ours = spec(demo_model, ParallelDegrees()).model_copy(update={"cuda_graphs": recorded})
        rank = Rank(0, ours)
        rank._use(load_model(ours, mesh))
        assert len(asked) == len(rank._loaded.pipeline.transformer.transformer_blocks)
        assert asked[0] == asked[-1] == {"fullgraph": True, "options": IN_ORDER | options}
        list(rank._denoise(rank._begin(TWO_GUIDED_STEPS)[0]))
        assert len(begun) == times


def test_a_folder_that_cannot_be_used_costs_only_what_it_would_save(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    (tmp_path / "file").write_text("not a folder")
    compiler = Compiler(spec(demo_model), str(tmp_path / "file"), torch.device("cpu"))
    with compiler.warming("start"):
        own = Path(os.environ[VARIABLE])
        assert own.stat().st_mode & 0o077 == 0
    assert "compiled blocks are not kept: " in caplog.text


def test_the_operators_own_folder_wins(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv(VARIABLE, "/theirs")
    with Compiler(spec(demo_model), str(tmp_path), torch.device("cpu")).warming("start"):
        assert os.environ[VARIABLE] == "/theirs"
    assert not caplog.messages


@pytest.mark.parametrize(("recorded", "told"), [(True, True), (False, False)])
def test_graphs_that_are_not_recorded_are_told(
    demo_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, recorded: bool, told: bool
) -> None:
    seen = iter((5, 7))
    monkeypatch.setattr(compiler_module, "recordings_refused", lambda: next(seen))
    with Compiler(model(demo_model).model_copy(update={"cuda_graphs": recorded}), None, torch.device("cpu")).warming(
        ""
    ):
        pass
    assert ("2 graphs run without being recorded as CUDA graphs" in caplog.text) == told


def test_without_compile_nothing_is_kept(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "/as it is")
    with Compiler(model(demo_model), str(tmp_path / "root"), torch.device("cpu")).warming("start"):
        assert os.environ[VARIABLE] == "/as it is"
    assert not (tmp_path / "root").exists()
