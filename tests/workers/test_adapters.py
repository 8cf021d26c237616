"""Every pipeline, stepped, makes what diffusers' classic pipeline makes, and the same on every layout."""

import inspect
import io
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, ModularPipeline
from PIL import Image

from deploy.families.lookup import CLASSIC, families, family_name
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.support.deployments import model
from tests.workers.test_denoising import ALONE, Generated, begun, generate, pixels
from workers.errors import InvalidParameter
from workers.messages import GenerationRequest
from workers.model.adapters.lookup import find_adapter
from workers.model.adapters.wan import WanAdapter
from workers.model.denoising import Denoising
from workers.model.loader import load_model
from workers.model.media import encode

PICTURES = GenerationRequest(
    "a", "demo", "a cup of coffee", width=80, height=112, num_inference_steps=4, seed=3, n=2, guidance_scale=3.5
)
VIDEO = replace(
    PICTURES, width=64, height=48, num_frames=9, num_inference_steps=2, guidance_scale=2.0, output_format="mp4"
)

REQUESTS: dict[str, tuple[str, GenerationRequest, dict[str, Any]]] = {
    "z-image": ("z-image", replace(PICTURES, guidance_scale=2.0), {"guidance_scale": 2.0}),
    "z-image, unguided": ("z-image", replace(PICTURES, guidance_scale=0.0), {"guidance_scale": 0.0}),
    "wan": (
        "wan",
        replace(VIDEO, negative_prompt="blurry", guidance_scale_2=1.5),
        {"guidance_scale": 2.0, "guidance_scale_2": 1.5, "negative_prompt": "blurry", "num_frames": 9},
    ),
    "wan, unguided": ("wan", replace(VIDEO, guidance_scale=1.0), {"guidance_scale": 1.0, "num_frames": 9}),
    "flux": ("flux", PICTURES, {"guidance_scale": 3.5}),
}
"""For each a family, our request, and what the classic pipeline is told."""

LAYOUTS = {
    "ulysses 2": ParallelDegrees(ulysses_degree=2),
    "ring 3": ParallelDegrees(ring_degree=3),
    "tp 2 x ulysses 2": ParallelDegrees(tensor_parallel_size=2, ulysses_degree=2),
    "cfg 2 x ulysses 2": ParallelDegrees(cfg_parallel_size=2, ulysses_degree=2),
}


def alone(folder: Path, request: GenerationRequest) -> Generated:
    return generate(ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60), folder, request)


def differ(first: list[Any], second: list[Any]) -> int:
    """The largest difference of two lists of pictures or videos, in steps of 1/255."""
    return max(int(np.abs(a - b).max()) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", REQUESTS)
def test_one_rank_is_the_classic_pipeline(demo_models: dict[str, Path], name: str) -> None:
    family, request, told = REQUESTS[name]
    _, made = alone(demo_models[family], request)
    classic = DiffusionPipeline.from_pretrained(demo_models[family], local_files_only=True)
    assert differ(made, ask(classic, demo_models[family], request, told)) <= 1


def ask(classic: Any, folder: Path, request: GenerationRequest, told: dict[str, Any]) -> list[Any]:
    """The pictures or videos of the classic pipeline."""
    classic.set_progress_bar_config(disable=True)
    expected = classic(
        request.prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        generator=[torch.Generator().manual_seed(seed) for seed in request.all_seeds],
        output_type="np",
        **{find_adapter(folder).count_input: request.n},
        **told,
    )[0]
    return [(each * 255).round().astype(np.int16) for each in expected]


LONG = {
    "qwen-image": ({"negative_prompt": "blurry"}, {"true_cfg_scale": 2.0, "negative_prompt": "blurry"}, 34 + 512),
    "z-image": ({}, {"guidance_scale": 2.0}, 512),
    "wan": ({"num_frames": 5, "output_format": "mp4"}, {"guidance_scale": 2.0, "num_frames": 5}, 512),
    "flux": ({}, {"guidance_scale": 2.0}, 512),
}
"""For each family what our request and the classic pipeline are told, and the tokens kept, a template's too."""


@pytest.mark.parametrize("family", LONG)
def test_a_long_prompt_is_cut_as_by_the_classic_pipeline_and_reported(
    demo_models: dict[str, Path], family: str
) -> None:
    """Of Qwen-Image, the modular pipeline would read 1024 tokens."""
    ours, told, kept = LONG[family]
    words = "".join(random.Random(1).choices("abcdefghij ", k=719))
    request = replace(PICTURES, prompt=words, width=64, height=48, n=1, guidance_scale=2.0, **ours)
    mesh = ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60)
    loaded = load_model(model(demo_models[family]), mesh)
    denoising = begun(loaded, request)
    assert any(re.search(rf"reads {kept} of [67]\d\d tokens", warning) for warning in denoising.warnings)
    assert all(warning.startswith("prompt: text_encoder") for warning in denoising.warnings)
    _, made = alone(demo_models[family], request)
    classic = DiffusionPipeline.from_pretrained(demo_models[family], local_files_only=True)
    classic.set_progress_bar_config(disable=True)
    size = {"width": 64, "height": 48, "num_inference_steps": request.num_inference_steps, "output_type": "np"}
    expected = classic(words, generator=torch.Generator().manual_seed(request.seed), **size, **told)[0]
    assert differ(made, [(each * 255).round().astype(np.int16) for each in expected]) <= 1
    assert begun(loaded, replace(request, prompt="a short one")).warnings == ()


@pytest.mark.parametrize("family", LONG)
def test_all_defaults_are_those_of_the_classic_pipeline(demo_models: dict[str, Path], family: str) -> None:
    adapter = find_adapter(demo_models[family])
    blocks = ModularPipeline.from_pretrained(str(demo_models[family]), local_files_only=True).blocks
    defaults = adapter.defaults(PICTURES, blocks.get_execution_blocks(prompt="a", negative_prompt="b").inputs)
    classic = inspect.signature(getattr(diffusers, adapter.family.pipeline).__call__).parameters
    shared = defaults.keys() & classic.keys()
    assert {"max_sequence_length", "num_inference_steps", "height", "width", "sigmas"} & classic.keys() <= shared
    assert {name: defaults[name] for name in shared} == {name: classic[name].default for name in shared}


CASES = [(name, layout) for name in ("z-image", "wan", "flux") for layout in LAYOUTS]
CASES += [(name, "cfg 2 x ulysses 2") for name in ("z-image, unguided", "wan, unguided")]
CASES.remove(("flux", "cfg 2 x ulysses 2"))  # it has one branch


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_every_layout_makes_the_same(ranks: RankPool, demo_models: dict[str, Path], name: str, layout: str) -> None:
    family, request, _ = REQUESTS[name]
    ((latents, made),) = ranks.run(ALONE, generate, demo_models[family], request)
    for rank, (got, drawn) in enumerate(ranks.run(LAYOUTS[layout], generate, demo_models[family], request)):
        assert error(got, latents) <= BAR
        assert len(drawn) == (request.n if rank == 0 else 0)
        assert rank or differ(drawn, made) <= 1


@pytest.mark.soak
@pytest.mark.parametrize("name", REQUESTS)
def test_eight_ranks_on_three_axes(demo_models: dict[str, Path], name: str) -> None:
    family, request, _ = REQUESTS[name]
    cfg = 1 if family == "flux" else 2
    layout = ParallelDegrees(cfg_parallel_size=cfg, ulysses_degree=4 // cfg, tensor_parallel_size=2)
    pool = RankPool(layout.world_size)
    try:
        ((latents, made),) = pool.run(ALONE, generate, demo_models[family], request)
        found = pool.run(layout, generate, demo_models[family], request)
    finally:
        pool.stop()
    assert max(error(got, latents) for got, _ in found) <= BAR
    assert differ(found[0][1], made) <= 1


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_timesteps_are_not_rounded_in_bfloat16(demo_models: dict[str, Path], scale: float) -> None:
    request = replace(PICTURES, guidance_scale=scale)
    mesh = ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60)
    _, made = generate(mesh, demo_models["z-image"], request, dtype="bfloat16")
    classic = DiffusionPipeline.from_pretrained(demo_models["z-image"], torch_dtype=torch.bfloat16)
    classic.vae.enable_slicing()  # pictures one by one, as we do: in bfloat16 the pixels of a batch are a few steps off
    classic.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in request.all_seeds]
    size = {"width": request.width, "height": request.height, "num_inference_steps": request.num_inference_steps}
    expected = classic(
        request.prompt, guidance_scale=scale, generator=generators, num_images_per_prompt=request.n, **size
    ).images
    assert differ(made, [pixels(each) for each in expected]) <= 1


@pytest.mark.parametrize(("name", "given"), [("wan, unguided", None), ("z-image", "float32")])
def test_a_vae_decodes_in_its_own_dtype(demo_models: dict[str, Path], name: str, given: str | None) -> None:
    """Wan's authors decode in fp32; of others it can be asked."""
    family, request, told = REQUESTS[name]
    mesh = ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60)
    _, made = generate(mesh, demo_models[family], request, dtype="bfloat16", vae_dtype=given)
    classic = DiffusionPipeline.from_pretrained(demo_models[family], torch_dtype=torch.bfloat16)
    classic.vae = type(classic.vae).from_pretrained(demo_models[family] / "vae")
    expected = ask(classic, demo_models[family], request, told)
    assert differ(made, expected) <= 1
    _, in_half = generate(mesh, demo_models[family], request, dtype="bfloat16", vae_dtype="bfloat16")
    assert differ(in_half, expected) > 1  # else the test would show nothing


def test_a_vae_in_another_dtype_gets_latents_in_it(demo_models: dict[str, Path]) -> None:
    """diffusers' own Flux decoder does not convert them, and fails."""
    mesh = ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60)
    latents, made = generate(mesh, demo_models["flux"], PICTURES, dtype="bfloat16", vae_dtype="float32")
    same, in_half = generate(mesh, demo_models["flux"], PICTURES, dtype="bfloat16")
    assert torch.equal(latents, same)
    assert 0 < differ(made, in_half) < 16


SHIFTS = {"z-image": {"guidance_scale": 0.0}, "wan": {"guidance_scale": 1.0, "num_frames": 5}}


@pytest.mark.parametrize("family", SHIFTS)
def test_a_shift_of_the_request_is_that_of_the_classic_pipelines_scheduler(
    demo_models: dict[str, Path], family: str
) -> None:
    folder, told = demo_models[family], SHIFTS[family]
    plain = replace(PICTURES, width=64, height=48, seeds=(9, 4), **told)
    plain = replace(plain, output_format="mp4") if family == "wan" else plain
    classic = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    name = "flow_shift" if "flow_shift" in classic.scheduler.config else "shift"
    classic.scheduler = type(classic.scheduler).from_config(classic.scheduler.config, **{name: 9.0})
    _, made = alone(folder, replace(plain, flow_shift=9.0))
    assert differ(made, ask(classic, folder, plain, told)) <= 1
    _, unshifted = alone(folder, plain)
    assert differ(made, unshifted) > 5
    _, alone_again = alone(folder, replace(plain, seeds=(4, 9)))
    assert differ(unshifted, alone_again[::-1]) <= 1  # each picture is that of its own seed
    assert differ(unshifted, alone_again) > 5


REFUSALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "frames": ("wan", {"num_frames": 8}, r"multiple of 4, plus 1 \(such as 5 or 9\), got 8"),
    "frames of a picture": ("flux", {"num_frames": 5, "output_format": "png"}, "makes pictures, got num_frames=5"),
    "size": ("wan", {"width": 56}, "width must be a multiple of 16, got 56"),
    "format": ("wan", {"output_format": "png"}, r"makes videos \(mp4\), got 'png'"),
    "format of a picture": ("z-image", {"num_frames": 1}, r"makes images \(png, jpeg, webp\), got 'mp4'"),
    "negative prompt": (
        "flux", {"num_frames": 1, "output_format": "png", "negative_prompt": "x"}, "not guided by a negative prompt",
    ),
    "true guidance": (
        "flux", {"num_frames": 1, "output_format": "png", "true_cfg": True}, "'demo' evaluates one branch",
    ),
    "extra parameter": (
        "flux", {"num_frames": 1, "output_format": "png", "extra_params": {"tea": 1}},
        "'demo' has no extra parameters; leave out 'tea'",
    ),
    "shift by the size": (
        "flux", {"num_frames": 1, "output_format": "png", "flow_shift": 3.0}, "takes no flow_shift: its FlowMatch",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_a_model_cannot_do_is_the_callers_mistake(demo_models: dict[str, Path], name: str) -> None:
    family, changes, said = REFUSALS[name]
    mesh = ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60)
    loaded = load_model(model(demo_models[family]), mesh)
    with pytest.raises(InvalidParameter, match=said):
        Denoising(loaded, replace(VIDEO, **changes))


def test_every_family_has_a_demo_model(demo_models: dict[str, Path]) -> None:
    found = {family_name(demo_models[name.replace("_", "-")]) for name in (*families(), "chroma")}
    assert families().keys() | {CLASSIC} == found


def test_a_second_scale_needs_a_second_transformer() -> None:
    request = GenerationRequest(
        "a", "film", "a", 64, 64, 2, seed=1, num_frames=5, guidance_scale_2=3.0, output_format="mp4"
    )
    pipeline = SimpleNamespace(
        vae_scale_factor_temporal=4, vae_scale_factor_spatial=8, patch_size_spatial=2, transformer_2=object()
    )
    adapter = WanAdapter(families()["wan"])
    adapter.check(pipeline, request)
    pipeline.transformer_2 = None
    adapter.check(pipeline, replace(request, guidance_scale_2=None))
    with pytest.raises(InvalidParameter, match="'film' has one transformer; its scale is guidance_scale"):
        adapter.check(pipeline, request)


def test_a_video_file_has_the_frames() -> None:
    frames = [Image.new("RGB", (64, 48), (40 * i, 100, 200)) for i in range(5)]
    with av.open(io.BytesIO(encode(frames, replace(VIDEO, fps=8)))) as container:
        (stream,) = container.streams
        found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert stream.average_rate == 8
    assert [frame.shape for frame in found] == [(48, 64, 3)] * 5
    for i, frame in enumerate(found):
        assert np.abs(frame.mean(axis=(0, 1)) - [40 * i, 100, 200]).max() < 6
