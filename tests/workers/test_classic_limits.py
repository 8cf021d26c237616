"""What classic pipelines cannot make is refused before a step, where it would cost the gang."""

import io
import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from diffusers.configuration_utils import FrozenDict
from PIL import Image

from deploy.families.classic import classic_family, proved_pipelines
from deploy.families.pipeline_source import classic_call
from tests.workers.test_picture_inputs import IMAGE
from workers.demo_models.pipelines import demo_module, demo_of, served
from workers.errors import InvalidParameter
from workers.messages import GenerationRequest, MediaInput
from workers.model.adapters.classic import ClassicAdapter
from workers.model.extra_ranges import check_extra_ranges
from workers.model.picture_inputs import read
from workers.model.positions import check_positions
from workers.model.prompts import check_length
from workers.model.step_counts import check_steps

REQUEST = GenerationRequest("a", "demo", "a cup", 64, 48, 2, seed=3)
VIDEO: dict[str, Any] = {"num_frames": 7, "output_format": "mp4"}


def adapter(pipeline: str) -> ClassicAdapter:
    return ClassicAdapter(classic_family(pipeline))


@pytest.mark.parametrize("learned", ["learnable", None])
@pytest.mark.parametrize(
    ("width", "height", "frames", "said"),
    [(256, 256, 9, ""), (272, 256, 9, "width"), (256, 272, 9, "height"), (256, 256, 129, "num_frames")],
)
def test_positions_end_somewhere(learned: str | None, width: int, height: int, frames: int, said: str) -> None:
    """16 tokens of 2 x 2 latents of 8 x 8 pixels in a row; computed ones reach as far in all three directions."""
    config = {"max_size": (2, 32, 32), "patch_size": (1, 2, 2), "extra_pos_embed_type": learned}
    pipeline = SimpleNamespace(transformer=SimpleNamespace(config=config))
    request = replace(REQUEST, width=width, height=height, num_frames=frames)
    most = 256 if said != "num_frames" else 9 if learned else 121
    with pytest.raises(InvalidParameter, match=f"{said} must be at most {most}, got") if said else nullcontext():
        check_positions(pipeline, request, 8, 8)
    check_positions(SimpleNamespace(transformer=SimpleNamespace(config={})), request, 8, 8)


def test_a_picture_that_is_scaled_to_cover_a_shape_is_not_a_line() -> None:
    pipeline = SimpleNamespace(transformer=SimpleNamespace(config={}))
    for size, said in (((64, 4), ""), ((4, 65), "edges of 65 and 4 pixels, at most 16 to 1")):
        Image.new("RGB", size).save(buffer := io.BytesIO(), "png")
        request = replace(REQUEST, inputs=(MediaInput("image", buffer.getvalue()),))
        with pytest.raises(InvalidParameter, match=said) if said else nullcontext():
            adapter("JoyImageEditPlusPipeline").check_pictures(pipeline, request)
        adapter("JoyImageEditPlusPipeline").check_pictures(pipeline, request.without_data())  # as other ranks have it


@pytest.mark.parametrize(
    ("pipeline", "changes", "said"),
    [
        ("Cosmos2TextToImagePipeline", {"width": 1024}, "width must be at most"),
        ("Cosmos2TextToImagePipeline", {}, ""),
        ("MochiPipeline", VIDEO | {"num_inference_steps": 1}, "at least 2 steps, got 1"),
        ("MochiPipeline", VIDEO, ""),
        ("LattePipeline", VIDEO | {"num_frames": 4, "num_inference_steps": 1}, ""),
    ],
)
def test_what_would_fail_in_a_step_is_refused(pipeline: str, changes: dict[str, Any], said: str) -> None:
    demo = demo_module(served()[pipeline])
    model = demo.demo_pipeline(pipeline) if pipeline.startswith("Cosmos") else demo.demo_pipeline()
    with pytest.raises(InvalidParameter, match=said) if said else nullcontext():
        adapter(pipeline).check(model, replace(REQUEST, **changes))


@pytest.mark.parametrize(("letters", "refused"), [(900, False), (1100, True)])
def test_a_prompt_that_would_cut_off_the_mark_of_the_picture_is_refused(letters: int, refused: bool) -> None:
    name = "Kandinsky5I2IPipeline"
    demo = demo_of("kandinsky_5", name)
    request = replace(REQUEST, prompt="x" * letters, inputs=(IMAGE,))
    said = r"prompt has \d+ tokens together with the picture's, this model reads at most 1024; shorten it"
    with pytest.raises(InvalidParameter, match=said) if refused else nullcontext():
        check_length(name, demo, request)
    check_length(name, demo, request.without_data())  # as other ranks have it
    told = {"prompt": [request.prompt], "image": read(IMAGE)}
    with pytest.raises(ValueError, match="image") if refused else nullcontext():  # what it would do
        demo._encode_prompt_qwen(**told, max_sequence_length=1024)


def test_callers_do_not_make_the_timesteps() -> None:
    assert not {"mu", "std"} & set(adapter("Ideogram4Pipeline").extra_kinds)


def limited(transformer: Any, width: int, height: int) -> None:
    request = GenerationRequest("a", "demo", "", width, height, 2, seed=0)
    check_positions(SimpleNamespace(transformer=transformer), request, 8, 4)


@pytest.mark.parametrize("family", ["aura_flow", "stable_diffusion_3"])
def test_sizes_beyond_a_table_of_positions_are_refused(family: str) -> None:
    """Of AuraFlow the number is that of all places, of Stable Diffusion 3 that of an edge."""
    transformer = demo_of(family).transformer
    table = transformer.config["pos_embed_max_size"]
    edge = (math.isqrt(table) if family == "aura_flow" else table) * transformer.config["patch_size"] * 8
    limited(transformer, edge, edge)
    for size in ((edge + 16, 64), (64, edge + 16)):
        with pytest.raises(InvalidParameter, match=f"must be at most {edge}, got {edge + 16}"):
            limited(transformer, *size)


def test_learned_positions_are_of_one_size() -> None:
    config = FrozenDict(use_learned_positional_embeddings=True, sample_height=60, sample_width=90)
    transformer = SimpleNamespace(config=config)
    limited(transformer, 720, 480)
    with pytest.raises(InvalidParameter, match="this model makes 720x480, got 144x112"):
        limited(transformer, 144, 112)
    adapter = ClassicAdapter(classic_family("CogVideoXImageToVideoPipeline"))
    pipeline = SimpleNamespace(transformer=transformer, vae_scale_factor_spatial=8)
    assert adapter.small_size(pipeline, (5, 112, 144)) == (5, 480, 720)
    for frames, refused in ((49, False), (25, True)):  # for 25 it would compute positions instead
        config = FrozenDict(config, sample_frames=49)
        pipeline = SimpleNamespace(transformer=SimpleNamespace(config=config), vae=None)
        with pytest.raises(InvalidParameter, match="makes 49 frames, got") if refused else nullcontext():
            adapter.check_frames(pipeline, replace(REQUEST, **VIDEO | {"num_frames": frames}))


@pytest.mark.parametrize(
    ("pipeline", "extra", "said"),
    [
        ("StableDiffusion3Pipeline", {"clip_skip": 0}, ""),
        ("StableDiffusion3Pipeline", {"clip_skip": 99}, "clip_skip must be from 0 to"),
        ("StableDiffusion3Pipeline", {"clip_skip": -3}, "clip_skip must be from 0 to"),
        ("LTXConditionPipeline", {"frame_index": 6}, ""),
        ("LTXConditionPipeline", {"frame_index": 7}, "frame_index must be from 0 to 6 for this request, got 7"),
        ("LTXConditionPipeline", {"frame_index": -1}, "frame_index must be from 0 to 6"),
    ],
)
def test_extra_values_that_fail_inside_a_call_are_refused(pipeline: str, extra: dict[str, Any], said: str) -> None:
    demo: Any = demo_of(served()[pipeline].replace("-", "_"), pipeline)
    request = replace(REQUEST, num_frames=7, extra_params=extra)
    with pytest.raises(InvalidParameter, match=said) if said else nullcontext():
        check_extra_ranges(demo, request)
    demo.text_encoder = demo.text_encoder_2 = None  # another rank encodes, and checks
    if "clip_skip" in extra:
        check_extra_ranges(demo, request)


def test_callers_give_no_embeddings_nor_a_second_seed() -> None:
    given = {name for pipeline in proved_pipelines() for name in adapter(pipeline).extra_kinds}
    assert not {"negative_prompt_embeds", "seed", "image_embed_interleave"} & given
    assert {"clip_skip", "frame_index"} <= given


@pytest.mark.parametrize(
    ("pipeline", "steps", "strength", "refused"),
    [
        ("CogVideoXVideoToVideoPipeline", 4, 0.24, True),
        ("CogVideoXVideoToVideoPipeline", 4, 0.25, False),
        ("WanVideoToVideoPipeline", 4, 0.24, True),
        ("WanVideoToVideoPipeline", 1, None, True),  # by default it does 80 % of the steps
        ("WanVideoToVideoPipeline", 2, None, False),
        ("FluxImg2ImgPipeline", 4, 0.01, False),  # it does one
    ],
)
def test_a_strength_that_leaves_no_step_is_refused(
    pipeline: str, steps: int, strength: float | None, refused: bool
) -> None:
    given, call = (MediaInput("image", b""),), classic_call(pipeline)
    assert call is not None
    request = replace(REQUEST, num_inference_steps=steps, strength=strength, inputs=given)
    with pytest.raises(InvalidParameter, match=rf"leaves none of {steps} steps") if refused else nullcontext():
        check_steps(pipeline, call, request)
    check_steps(pipeline, call, replace(request, inputs=()))
