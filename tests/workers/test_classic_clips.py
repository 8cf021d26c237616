"""Pipelines without an adapter that make videos: what their calls do with clips and frames, and windows of frames."""

import io
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from deploy.families.classic import classic_family
from deploy.families.pipeline_source import ClassicCall, classic_call
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.verify.divergence import error
from sp_core.verify.verify import BAR
from tests.workers.test_adapters import alone
from tests.workers.test_classic import Pipeline, refuse
from workers.demo_models.pipelines import requests_of
from workers.demo_models.writer import write_demo_model
from workers.errors import InvalidParameter
from workers.messages import GenerationRequest, MediaInput
from workers.model.adapters.classic import ClassicAdapter
from workers.model.shared_encoders import SharedEncoders
from workers.model.stepped_call import SteppedCall
from workers.pipeline_proof import answer, classic_answer

REQUEST = GenerationRequest("a", "demo", "", 64, 48, 2, seed=0, num_frames=9, output_format="mp4")


def call_of(pipeline: str) -> ClassicCall:
    call = classic_call(pipeline)
    assert call is not None
    return call


def adapter(pipeline: str) -> ClassicAdapter:
    return ClassicAdapter(classic_family(pipeline))


def clip(frames: int) -> MediaInput:
    pictures = [Image.new("RGB", (64, 48), (10 * i, 0, 255)) for i in range(frames)]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "PNG", save_all=True, append_images=pictures[1:])
    return MediaInput("video", buffer.getvalue())


def test_what_a_call_does_with_frames_is_read_from_its_source() -> None:
    assert call_of("ChronoEditPipeline").fixed_frames == 5
    assert call_of("HunyuanVideoFramepackPipeline").latent_window == 9
    assert (call_of("WanPipeline").fixed_frames, call_of("WanPipeline").latent_window) == (0, 0)
    assert call_of("WanVACEPipeline").one_generator and not call_of("CogVideoXPipeline").one_generator
    one = {each for each in ("WanVACEPipeline", "CogVideoXPipeline", "WanPipeline") if call_of(each).makes_one}
    assert one == {"WanVACEPipeline", "CogVideoXPipeline"}
    assert call_of("LTXConditionPipeline").counts_frames and not call_of("LucyEditPipeline").counts_frames


def test_what_a_method_can_do_without_is_not_needed() -> None:
    family = classic_family("WanVACEPipeline")
    assert family.tasks == ("text-to-video", "image-to-video", "video-to-video")
    assert family.begins_with == {"image": "reference_images", "video": "video"}  # its mask is a clip
    assert classic_family("QwenImageEditPlusPipeline").needs == ("image",)  # it reads the picture's size


def test_a_clip_to_follow_comes_as_any_clip() -> None:
    assert classic_family("CogVideoXFunControlPipeline").begins_with == {"video": "control_video"}
    assert classic_family("CogVideoXFunControlPipeline").tasks == ("video-to-video",)
    assert "CogVideoXDDIMScheduler" in classic_family("CogVideoXFunControlPipeline").schedulers


def test_a_pipeline_that_makes_so_many_frames_says_so() -> None:
    pipeline = SimpleNamespace(vae_scale_factor_temporal=4, vae=SimpleNamespace())
    adapter("ChronoEditPipeline").check_frames(pipeline, replace(REQUEST, num_frames=5))
    with pytest.raises(InvalidParameter, match="this model makes 5 frames, got num_frames=9"):
        adapter("ChronoEditPipeline").check_frames(pipeline, REQUEST)
    assert "enable_temporal_reasoning" not in adapter("ChronoEditPipeline").extra_kinds  # it would make others


@pytest.mark.parametrize("pipeline", ["LucyEditPipeline", "CogVideoXFunControlPipeline"])
def test_a_clip_that_says_how_many_frames_there_are_must_have_them(pipeline: str) -> None:
    with pytest.raises(InvalidParameter, match="the clip has 5 frames, num_frames asks for 9"):
        adapter(pipeline).pictures(replace(REQUEST, inputs=(clip(5),)), here=True)
    assert adapter("AnyFlowPipeline").pictures(replace(REQUEST, inputs=(clip(5),)), here=True)["video"][4]


@pytest.mark.parametrize(("config", "said"), [({"image_dim": 32}, "look at one picture"), ({}, "")])
def test_a_model_that_looks_at_one_picture_takes_no_last_one(config: dict[str, Any], said: str) -> None:
    pipeline = SimpleNamespace(transformer=SimpleNamespace(config=config))
    still = MediaInput("image", clip(1).data)
    request = replace(REQUEST, inputs=(still, replace(still, role="last_image")))
    with pytest.raises(InvalidParameter, match=said) if said else nullcontext():
        adapter("WanImageToVideoPipeline").check_pictures(pipeline, request)


@pytest.mark.parametrize(("frames", "loops"), [(5, 1), (33, 1), (37, 2), (129, 4)])
def test_frames_are_made_in_windows(frames: int, loops: int) -> None:
    pipeline, request = SimpleNamespace(vae_scale_factor_temporal=4), replace(REQUEST, num_frames=frames)
    assert adapter("HunyuanVideoFramepackPipeline").loops(pipeline, request) == loops
    assert adapter("WanPipeline").loops(pipeline, request) == 1


class Windows(Pipeline):
    """It goes through its steps twice."""

    @torch.no_grad()
    def __call__(self, prompts: list[str], callback_on_step_end: Any) -> Any:
        made = [super(Windows, self).__call__(prompts, callback_on_step_end)[0] for _ in range(2)]
        return (torch.cat(made),)


def test_the_loops_of_a_call_are_one() -> None:
    told = {"prompts": ["ab"]}
    whole = Windows()(["ab"], lambda *_: {})[0]
    encoders = SharedEncoders(None, seed=0)
    call = SteppedCall(Windows(), told, encoders, refuse)
    call.encode()
    call.prepare()
    latents = [call.step() for _ in range(6)]
    assert torch.equal(latents[2], whole[:1]) and torch.equal(latents[5], whole[1:])
    assert torch.equal(call.finish()[0], whole)


ALLEGRO = SimpleNamespace(
    vae=SimpleNamespace(kernel=(24, 320, 320), stride=(16, 200, 240)), vae_scale_factor_temporal=4
)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((88, 720, 1280), ""),
        ((24, 320, 320), ""),
        ((49, 720, 1280), "num_frames must be 24 plus a multiple of 16, got 49"),
        ((88, 640, 1280), "height must be 320 plus a multiple of 200, got 640"),
        ((88, 720, 160), "width must be 320 plus a multiple of 240, got 160"),
    ],
)
def test_what_tiles_do_not_cover_is_refused(size: tuple[int, int, int], said: str) -> None:
    frames, height, width = size
    request = replace(REQUEST, num_frames=frames, height=height, width=width)
    with pytest.raises(InvalidParameter, match=said) if said else nullcontext():
        adapter("AllegroPipeline").check_frames(ALLEGRO, request)
    assert adapter("AllegroPipeline").small_size(ALLEGRO, size) == (24, 320, 320)  # for the self-test


def test_several_are_made_one_by_one_where_a_call_makes_one(demo_models: dict[str, Path]) -> None:
    folder, request = demo_models["cog-video-x"], replace(REQUEST, n=2, prompt="a cup of coffee", guidance_scale=2.0)
    latents, made = alone(folder, request)
    second, _ = alone(folder, replace(request, n=1, seed=1))
    assert len(latents) == len(made) == 2
    assert error(latents[1:], second) <= BAR


def test_a_call_that_draws_by_one_generator_makes_what_it_makes(tmp_path: Path) -> None:
    (request, *_) = requests_of("WanVACEPipeline")
    write_demo_model(tmp_path / "demo", "wan", "WanVACEPipeline")
    mesh = ParallelMesh.create(ParallelDegrees(), device_type="cpu", timeout_s=60)
    (latents, made), (reference, expected) = (
        answer(mesh, tmp_path / "demo", request),
        classic_answer(mesh, "WanVACEPipeline", tmp_path / "demo", request),
    )
    assert error(latents, reference) <= BAR
    assert [len(frames) for frames in made] == [len(frames) for frames in expected] == [9]
