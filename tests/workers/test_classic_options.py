"""Half precision, adapters and compiled blocks, for pipelines that run through their classic call."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from deploy.model_sections import LoRA
from sp_core.mesh import ParallelMesh
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.support.deployments import model
from tests.workers.test_adapters import PICTURES
from tests.workers.test_classic import drawn_with
from tests.workers.test_classic_pictures import CASES, LAYOUTS, alone, asked, folder_of, made
from tests.workers.test_denoising import ALONE, begun, generate
from workers.messages import GenerationRequest
from workers.model.loader import load_model
from workers.small_pictures import small_pictures

__all__ = ["folder_of"]

NAMES = ["kontext", pytest.param("img2img", marks=pytest.mark.soak), "image to video", "first and last"]


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_that_of_the_classic_pipeline(folder_of: Callable[[str], Path], name: str) -> None:
    _, _, request, told = CASES[name]
    request, folder = replace(request, n=1), folder_of(name)
    reference, _ = asked(folder, request, told, torch.bfloat16)
    exact, _ = alone(folder, request)
    with small_pictures(folder):
        mesh = ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60)
        latents, _ = generate(mesh, folder, request, dtype="bfloat16", vae_dtype="bfloat16")
    assert error(latents.float(), reference.float()) <= BAR
    assert error(exact, reference.float()) > 100 * BAR


def test_a_vae_of_which_its_authors_say_so_runs_in_fp32(folder_of: Callable[[str], Path]) -> None:
    """Wan's, whatever pipeline has it."""
    _, pipeline, request, told = CASES["first and last"]
    assert pipeline == "WanImageToVideoPipeline"
    request, folder = replace(request, n=1), folder_of("first and last")
    reference, _ = asked(folder, request, told, torch.bfloat16, vae_in_fp32=True)
    in_half, _ = asked(folder, request, told, torch.bfloat16)
    with small_pictures(folder):
        mesh = ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60)
        latents, made = generate(mesh, folder, request, dtype="bfloat16")
    assert made
    assert error(latents.float(), reference.float()) <= BAR
    assert error(in_half.float(), reference.float()) > 100 * BAR


def test_half_precision_is_that_of_the_authors_who_keep_a_part_in_fp32(demo_models: dict[str, Path]) -> None:
    folder, request = demo_models["bria"], replace(PICTURES, width=96, height=128, n=1)
    loaded = load_model(
        model(folder).model_copy(update={"dtype": "bfloat16"}),
        ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60),
    )
    theirs: Any = diffusers.BriaPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, local_files_only=True)
    whole = theirs.encode_prompt(request.prompt)[0]
    for block in theirs.text_encoder.encoder.block:  # as in the example of the pipeline
        block.layer[-1].DenseReluDense.wo.to(dtype=torch.float32)
    reference = theirs.encode_prompt(request.prompt)[0]
    found = loaded.pipeline.encode_prompt(request.prompt)[0]
    assert torch.equal(found, reference)
    assert not torch.equal(whole, reference)
    denoising = begun(loaded, request)
    while not denoising.done:
        denoising.step()
    assert len(denoising.finish()) == 1


LAYERS = {
    "control": ("transformer_blocks", ("attn.to_q", "attn.to_v", "attn.add_k_proj")),
    "image to video": ("transformer_blocks", ("attn1.to_q", "attn2.to_v")),
    "first and last": ("blocks", ("attn1.to_q", "attn1.to_v", "attn2.to_k")),
}
"""Where an adapter of each is, in the names of diffusers."""


@pytest.mark.parametrize("name", ["control", pytest.param("first and last", marks=pytest.mark.soak), "image to video"])
def test_an_adapter_works_where_pictures_come_first(
    ranks: RankPool, folder_of: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    _, _, request, told = CASES[name]
    request, folder = replace(request, n=1), folder_of(name)
    blocks, layers = LAYERS[name]
    transformer = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True).transformer
    generator, tensors = torch.Generator().manual_seed(5), {}
    for layer in layers:
        out, into = transformer.get_submodule(f"{blocks}.0.{layer}").weight.shape
        key = f"transformer.{blocks}.0.{layer}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(4, into, generator=generator) / 12
        tensors[f"{key}.lora_B.weight"] = torch.randn(out, 4, generator=generator) / 4
    save_file(tensors, tmp_path / "dye.safetensors")
    lora = LoRA(name="dye", source=str(tmp_path / "dye.safetensors"))
    reference, _ = asked(folder, request, told, lora=tmp_path / "dye.safetensors")
    dyed, plain = drawn_with(ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60), folder, request, lora)
    assert error(dyed, reference) <= BAR
    assert error(plain, dyed) > 100 * BAR
    for got, without in ranks.run(LAYOUTS["ulysses 2"], drawn_with, folder, request, lora):
        assert error(got, dyed) <= BAR and error(without, plain) <= BAR


def compiled(mesh: ParallelMesh, folder: Path, request: GenerationRequest) -> torch.Tensor:
    """The latents of compiled blocks, with all that a compiler does but the kernels: whole graphs, without a break."""
    graphs: list[Any] = []

    def kept(graph: Any, _: Any, options: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch, small_pictures(folder):
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend=kept))
        latents, _ = generate(mesh, folder, request, compile=True)
    torch._dynamo.reset()
    assert graphs
    return latents


@pytest.mark.parametrize(
    "name", ["control", *[pytest.param(n, marks=pytest.mark.soak) for n in CASES if n != "control"]]
)
def test_compiled_blocks_make_the_same(ranks: RankPool, folder_of: Callable[[str], Path], name: str) -> None:
    _, _, request, _ = CASES[name]
    request, folder = replace(request, n=1), folder_of(name)
    ((latents, _),) = ranks.run(ALONE, made, folder, request)
    for got in ranks.run(LAYOUTS["ulysses 2"], compiled, folder, request):
        assert error(got, latents) <= BAR
