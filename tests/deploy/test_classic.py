"""What can be said of a pipeline without a file of its own is read from its source, and what is refused says why."""

import json
import shutil
from pathlib import Path

import pytest

from deploy.activations import Request, activation_bytes
from deploy.families.classic import classic_family, proved_pipelines
from deploy.families.lookup import CLASSIC, component_dtype, families, family_name, find_family, parts_in_fp32
from deploy.families.pipeline_source import classic_call, transformer_pipelines
from deploy.families.schedulers import FLOW_MATCH
from deploy.model_folder import is_transformer
from deploy.model_spec import ModelSpec
from tests.support.model_folders import edit, stub_model

SD3 = ["diffusers", "SD3Transformer2DModel"]


def folder_of(path: Path, pipeline: str, transformer: object) -> Path:
    """A folder that names a pipeline and the class of its transformer."""
    folder = stub_model(path)
    edit(folder / "model_index.json", {"_class_name": pipeline, "transformer": transformer})
    return folder


def test_a_call_is_read_from_its_source() -> None:
    call = classic_call("StableDiffusion3Pipeline")
    assert call is not None
    assert {"prompt", "prompt_3", "num_images_per_prompt", "callback_on_step_end"} <= set(call.parameters)
    assert call.required == ()
    assert {"text_encoder_3", "transformer"} <= set(call.components) and "image_encoder" not in call.components
    assert (call.guided_above, call.batches_branches, call.changes_attention) == (1.0, True, False)
    assert call.scalars["clip_skip"] == "int" and call.scalars["prompt_2"] == "str"
    assert not {"latents", "sigmas", "joint_attention_kwargs", "skip_guidance_layers"} & call.scalars.keys()
    assert classic_call("NoSuchPipeline") is None


def test_a_family_follows_from_the_call() -> None:
    found = {name: classic_family(name) for name in proved_pipelines()}
    assert len(found) >= 3
    assert {family.pipeline for family in found.values()}.isdisjoint(each.pipeline for each in families().values())
    told = {name: (each.makes, each.guided_above, each.batches_branches) for name, each in found.items()}
    assert told["StableDiffusion3Pipeline"] == ("image", 1.0, True)
    assert told["LTXPipeline"] == ("video", 1.0, True)
    assert told["HunyuanVideoPipeline"] == ("video", None, False)  # its scale is an input of the transformer
    assert classic_family("ChromaPipeline").batches_branches is False


def test_parts_that_the_authors_run_in_fp32_stay_so(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "WanImageToVideoPipeline", ["diffusers", "WanTransformer3DModel"])
    half = ModelSpec(name="a", source=str(folder), dtype="bfloat16")
    parts = ("vae", "image_encoder", "text_encoder", "transformer")
    assert [component_dtype(half, folder, part) for part in parts] == ["float32", "float32", "bfloat16", "bfloat16"]
    edit(folder / "model_index.json", {"_class_name": "WanVideoToVideoPipeline"})
    assert component_dtype(half, folder, "image_encoder") == "bfloat16"


def test_a_text_encoder_may_run_partly_in_fp32_and_a_vae_without_a_shift(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "BriaPipeline", ["diffusers", "BriaTransformer2DModel"])
    half = ModelSpec(name="a", source=str(folder), dtype="bfloat16")
    assert parts_in_fp32(folder, "text_encoder") == {"wo"} and not parts_in_fp32(folder, "vae")
    for shift, dtype in ((None, "float32"), (0, "float32"), (0.1, "bfloat16")):
        edit(folder / "vae" / "config.json", {"shift_factor": shift})
        assert component_dtype(half, folder, "vae") == dtype
    sana = {
        "_class_name": "SanaPipeline",
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    }
    edit(folder / "model_index.json", sana)
    assert component_dtype(half, folder, "vae") == "float32" and not parts_in_fp32(folder, "text_encoder")


def test_a_mask_is_of_an_image() -> None:
    assert classic_family("Flux2KleinInpaintPipeline").needs == ("image", "mask")
    assert classic_family("QwenImageControlNetInpaintPipeline").needs == ("mask", "control_image")
    assert classic_family("BriaFiboEditPipeline").needs == ()


def test_what_is_prepared_where_it_is_not_given_is_needed() -> None:
    """It asks `if image is not None and ...`, and prepares the image otherwise."""
    assert classic_family("HunyuanImageRefinerPipeline").needs == ("image",)


def test_some_pipelines_take_their_size_from_their_picture() -> None:
    sized = {
        "ZImageImg2ImgPipeline",
        "ZImageInpaintPipeline",
        "FluxKontextInpaintPipeline",
        "Flux2KleinInpaintPipeline",
        "QwenImageEditInpaintPipeline",  # the shape of it
        "LongCatImageEditPipeline",
    }
    assert {each for each in proved_pipelines() if classic_family(each).sized_by_image} == sized


def test_what_weighs_the_second_branch_is_on_by_default() -> None:
    scale = {"QwenImageControlNetInpaintPipeline": "true_cfg_scale", "FluxKontextInpaintPipeline": "guidance_scale"}
    for name, expected in scale.items():
        call = classic_call(name)
        assert call is not None and call.scale == expected


def test_a_control_image_is_for_one_controlnet(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", "FluxControlNetPipeline", ["diffusers", "FluxTransformer2DModel"])
    edit(folder / "model_index.json", {"controlnet": ["diffusers", "FluxControlNetModel"]})
    assert find_family(folder).needed_components({})[-1] == "controlnet"
    edit(folder / "model_index.json", {"controlnet": ["diffusers", "FluxMultiControlNetModel"]})
    with pytest.raises(ValueError, match="has a FluxMultiControlNetModel, but requests bring one control image"):
        find_family(folder)


def test_a_second_transformer_is_needed() -> None:
    assert "unconditional_transformer" in classic_family("Ideogram4Pipeline").needed_components({})
    names = ("transformer", "transformer_2", "unconditional_transformer", "text_encoder", "vae")
    assert [is_transformer(name) for name in names] == [True, True, True, False, False]


REFUSED = {
    "StableDiffusion3PAGPipeline": "its call exchanges attention processors",
    "ChromaInpaintPipeline": "nobody has proved this pipeline with it",
    "WanAnimatePipeline": "its call takes mask_video, which requests do not bring",
    "LTX2Pipeline": "it makes sound",
    "DiTPipeline": "its call has no prompt, height, width",
    "NoSuchPipeline": "diffusers has no such pipeline",
    "ChromaPipeline": "nobody has proved this pipeline with it",
}


@pytest.mark.parametrize("pipeline", REFUSED)
def test_what_is_not_served_says_why(tmp_path: Path, pipeline: str) -> None:
    folder = folder_of(tmp_path / "model", pipeline, SD3)
    with pytest.raises(
        ValueError, match=f"is for {pipeline}, which spray cannot run step by step: .*{REFUSED[pipeline]}"
    ):
        find_family(folder)


@pytest.mark.parametrize(
    ("transformer", "said"),
    [
        (["diffusers", "SanaWMTransformer3DModel"], "nothing says how its SanaWMTransformer3DModel is divided"),
        (["diffusers", "LTX2VideoTransformer3DModel"], "its cross-attention across ranks"),
        ([None, None], "it has no transformer"),
    ],
)
def test_a_transformer_needs_a_plan(tmp_path: Path, transformer: object, said: str) -> None:
    folder = folder_of(tmp_path / "model", "StableDiffusion3Pipeline", transformer)
    with pytest.raises(ValueError, match=said):
        find_family(folder)


@pytest.mark.parametrize(
    ("pipeline", "transformer", "config", "said"),
    [
        ("Kandinsky5T2VPipeline", "Kandinsky5Transformer3DModel", {"attention_type": "nabla"}, "sparse attention"),
        ("SkyReelsV2Pipeline", "SkyReelsV2Transformer3DModel", {"num_frame_per_block": 5}, "causal by blocks"),
    ],
)
def test_a_config_may_make_a_transformer_another(
    tmp_path: Path, pipeline: str, transformer: str, config: dict[str, object], said: str
) -> None:
    folder = folder_of(tmp_path / "model", pipeline, ["diffusers", transformer])
    named = find_scheduler(pipeline)
    edit(folder / "model_index.json", {"scheduler": ["diffusers", named]})
    edit(folder / "scheduler" / "scheduler_config.json", {"_class_name": named})
    assert find_family(folder).pipeline == pipeline
    edit(folder / "transformer" / "config.json", config)
    with pytest.raises(ValueError, match=said):
        find_family(folder)


def find_scheduler(pipeline: str) -> str:
    return next(iter(classic_family(pipeline).schedulers))


def test_pictures_that_are_kept_in_a_cache_are_not_taken() -> None:
    assert classic_family("GlmImagePipeline").tasks == ("text-to-image",)
    call = classic_call("GlmImagePipeline")
    assert call is not None and call.caches_pictures and call.patches == 2
    flux = classic_call("FluxPipeline")
    assert flux is not None and not flux.caches_pictures and flux.patches == 1


def test_a_transformer_from_elsewhere_is_its_authors_to_prove(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", "StableDiffusion3Pipeline", ["a_library", "ATransformer"])
    assert family_name(folder) == CLASSIC
    scheduler = json.loads((folder / "model_index.json").read_text())["scheduler"]
    edit(folder / "model_index.json", {"scheduler": [scheduler[0], "DDIMScheduler"]})
    with pytest.raises(
        ValueError, match="has the scheduler DDIMScheduler, with which spray cannot run StableDiffusion3"
    ):
        find_family(folder)


def test_a_picture_that_is_edited_needs_memory_beside_the_new_one(tmp_path: Path) -> None:
    needed = []
    for pipeline in ("FluxImg2ImgPipeline", "FluxKontextPipeline", "FluxKontextInpaintPipeline"):
        folder = folder_of(tmp_path / pipeline, pipeline, ["diffusers", "FluxTransformer2DModel"])
        edit(folder / "transformer" / "config.json", {"_class_name": "FluxTransformer2DModel"})
        edit(folder / "vae" / "config.json", {"_class_name": "AutoencoderKL", "block_out_channels": [8]})
        model = ModelSpec(name="a", source=str(folder))
        needed.append(activation_bytes(model, folder, Request(1024, 1024, 1, 1)) or 0)
    text = 512
    assert needed[1] / needed[0] == pytest.approx((8192 + text) / (4096 + text))
    assert needed[2] == needed[1]


def test_what_denoises_pixels_needs_no_vae(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", "PRXPixelPipeline", ["diffusers", "PRXTransformer2DModel"])
    named = find_scheduler("PRXPixelPipeline")
    edit(folder / "model_index.json", {"scheduler": ["diffusers", named]})
    edit(folder / "scheduler" / "scheduler_config.json", {"_class_name": named})
    shutil.rmtree(folder / "vae")
    assert "vae" not in find_family(folder).components
    assert activation_bytes(ModelSpec(name="a", source=str(folder)), folder, Request(1024, 1024, 1, 1)) is None


def test_schedulers_are_those_that_the_constructor_names() -> None:
    assert set(classic_family("StableDiffusion3Pipeline").schedulers) == set(FLOW_MATCH)
    assert set(classic_family("PixArtAlphaPipeline").schedulers) == {"DPMSolverMultistepScheduler"}
    assert set(classic_family("CogVideoXPipeline").schedulers) == {"CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"}
    assert "EulerAncestralDiscreteScheduler" in classic_family("PixArtSigmaPipeline").schedulers
    assert set(classic_family("BriaFiboPipeline").schedulers) == set(FLOW_MATCH)


def test_a_part_that_guides_has_two_branches() -> None:
    assert classic_family("HunyuanImagePipeline").guided_above == 1.0


def test_all_pipelines_with_a_transformer_are_found() -> None:
    found = transformer_pipelines()
    assert found["WanPipeline"] == "WanTransformer3DModel"
    assert found["FluxControlNetPipeline"] == "FluxTransformer2DModel"
    assert "StableDiffusionPipeline" not in found
    assert len(found) > 140
