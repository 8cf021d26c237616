"""Pipelines without an adapter that make videos: what their calls do with clips and frames, and windows of frames."""

import copy
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
from tests.workers.test_clip_decoder import mp4, painted
from workers.clip_decoder import decode
from workers.demo_models.pipelines import demo_of, requests_of
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
    one = {"WanVACEPipeline", "CogVideoXPipeline", "PRXPipeline", "PRXPixelPipeline", "LTXPipeline"}
    assert {each for each in (*one, "WanPipeline") if call_of(each).makes_one} == one
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


def test_a_transformer_with_positions_for_so_many_frames_makes_these() -> None:
    transformer = SimpleNamespace(config=SimpleNamespace(video_length=16))
    pipeline = SimpleNamespace(transformer=transformer, vae=SimpleNamespace())
    adapter("LattePipeline").check_frames(pipeline, replace(REQUEST, num_frames=16))
    with pytest.raises(InvalidParameter, match="this model makes 16 frames, got num_frames=9"):
        adapter("LattePipeline").check_frames(pipeline, REQUEST)
    assert adapter("LattePipeline").small_size(pipeline, (5, 32, 48)) == (16, 32, 48)


def test_a_pipeline_that_needs_so_many_frames_says_so() -> None:
    pipeline = SimpleNamespace(vae_scale_factor_temporal=4, vae=SimpleNamespace())
    adapter("Kandinsky5I2VPipeline").check_frames(pipeline, replace(REQUEST, num_frames=17))
    with pytest.raises(InvalidParameter, match="num_frames must be at least 17, got 13"):
        adapter("Kandinsky5I2VPipeline").check_frames(pipeline, replace(REQUEST, num_frames=13))


@pytest.mark.parametrize("pipeline", ["LucyEditPipeline", "CogVideoXFunControlPipeline", "WanVACEPipeline"])
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


class Counting:
    """A scheduler that remembers how far it is, as those of several orders do."""

    def __init__(self) -> None:
        self.done = 0

    def step(self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor) -> tuple[torch.Tensor]:
        self.done += 1
        return (sample - self.done * model_output,)


class Frames(Pipeline):
    """It steps each frame by a scheduler of its own, the second only in the last two of three steps."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Counting()  # type: ignore[assignment]

    @torch.no_grad()
    def __call__(self, prompts: list[str], callback_on_step_end: Any) -> Any:
        latents = torch.tensor([[float(n)] for n in self.encode_prompt(prompts[0])])
        own = [copy.deepcopy(self.scheduler) for _ in latents]
        with self.progress_bar():
            for t in range(self.steps):
                for i in range(len(own) if t else 1):
                    (latents[i],) = own[i].step(0.5 * latents[i], t, latents[i])
                callback_on_step_end(self, t, t, {"latents": latents.clone()})
        return (latents,)


def test_each_frame_may_have_a_scheduler_of_its_own() -> None:
    (whole,) = Frames()(["ab"], lambda *_: {})
    call = SteppedCall(Frames(), {"prompts": ["ab"]}, SharedEncoders(None, seed=0), refuse)
    call.encode()
    call.prepare()
    latents = [call.step()]
    assert call.noise[1].tolist() == [0.5 * 97]  # the first frame alone
    latents.append(call.step())
    assert torch.equal(call.noise[1], 0.5 * latents[0].flatten())
    latents.append(call.step())
    assert torch.equal(latents[-1], whole) and torch.equal(call.finish()[0], whole)


FORCING = "SkyReelsV2DiffusionForcing{}Pipeline"


def forced(frames: int, overlap: int | None = None, frames_of_clip: int = 0) -> GenerationRequest:
    extra = {} if overlap is None else {"overlap_history": overlap}
    inputs = (clip(frames_of_clip),) if frames_of_clip else ()
    return replace(REQUEST, num_frames=frames, extra_params=extra, inputs=inputs)


@pytest.mark.parametrize(
    ("request_", "loops", "told"),
    [
        (forced(97), 1, None),
        (forced(97, 17), 1, None),
        (forced(101), 2, 17),
        (forced(257, 37), 4, 37),
        (forced(9, None, 9), 1, 5),
        (forced(121, None, 33), 2, 17),
    ],
)
def test_windows_begin_with_the_last_frames_before_them(
    request_: GenerationRequest, loops: int, told: int | None
) -> None:
    found = adapter(FORCING.format("VideoToVideo" if request_.inputs else ""))
    assert found.loops(SimpleNamespace(vae_scale_factor_temporal=4), request_) == loops
    assert found.inputs(request_).get("overlap_history") == (told or request_.extra_params.get("overlap_history"))
    assert len(found.pictures(request_, here=True).get("video", [])) == {9: 9, 121: 33}.get(request_.num_frames, 0)


@pytest.mark.parametrize(
    ("request_", "param", "said"),
    [
        (forced(101, 0), "extra_params.overlap_history", "a multiple of 4, plus 1, up to 93 .*; got 0"),
        (forced(101, -3), "extra_params.overlap_history", "got -3"),
        (forced(101, 18), "extra_params.overlap_history", "got 18"),
        (forced(101, 97), "extra_params.overlap_history", "got 97"),
        (forced(9, 9, 9), "extra_params.overlap_history", "up to 5 with num_frames=9; got 9"),
        (forced(1, None, 9), "num_frames", "at least 5, got 1"),
        (forced(101, 17, 9), "extra_params.overlap_history", "the clip has 9 frames, overlap_history asks for 17"),
        (replace(REQUEST, extra_params={"ar_step": 5}), "extra_params.ar_step", "leave out 'ar_step'"),
        (replace(REQUEST, extra_params={"addnoise_condition": 20.0}), "extra_params.addnoise_condition", "leave out"),
        (replace(REQUEST, extra_params={"causal_block_size": 5}), "extra_params.causal_block_size", "leave out"),
    ],
)
def test_windows_that_cannot_be_made_are_refused(request_: GenerationRequest, param: str, said: str) -> None:
    name = FORCING.format("VideoToVideo" if request_.inputs else "")
    pipeline = demo_of("skyreels_v2", name)
    with pytest.raises(InvalidParameter, match=said) as refused:
        adapter(name).check(pipeline, request_)
        adapter(name).pictures(request_, here=True)
    assert refused.value.param == param


def test_a_clip_that_is_not_read_to_its_end_cannot_be_gone_on_from() -> None:
    cut = MediaInput("video", decode(mp4(painted(19, 64, 48)), 17))
    request = replace(REQUEST, num_frames=21, inputs=(cut,))
    with pytest.raises(InvalidParameter, match="only the first 17 frames of the clip can be read") as refused:
        adapter(FORCING.format("VideoToVideo")).pictures(request, here=True)
    assert refused.value.param == "video"
    whole = replace(request, inputs=(MediaInput("video", decode(mp4(painted(19, 64, 48)), 19)),))
    assert len(adapter(FORCING.format("VideoToVideo")).pictures(whole, here=True)["video"]) == 19
    begun = adapter("WanVideoToVideoPipeline").pictures(replace(request, num_frames=9), here=True)
    assert len(begun["video"]) == 9  # all that it takes is there


@pytest.mark.parametrize(
    ("frames", "said"), [(101, "last_image goes with at most 97 frames, got num_frames=101"), (97, "")]
)
def test_windows_do_not_end_with_a_picture(frames: int, said: str) -> None:
    pipeline = SimpleNamespace(transformer=SimpleNamespace(config={}))
    still = MediaInput("image", clip(1).data)
    request = replace(REQUEST, num_frames=frames, inputs=(still, replace(still, role="last_image")))
    with pytest.raises(InvalidParameter, match=said) if said else nullcontext():
        adapter(FORCING.format("ImageToVideo")).check_pictures(pipeline, request)


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


def test_each_seed_draws_its_own_first_frame(tmp_path: Path) -> None:
    name = "MotifVideoImage2VideoPipeline"
    (request, *_) = requests_of(name)
    write_demo_model(tmp_path / "demo", "motif_video", name)
    latents, _ = alone(tmp_path / "demo", replace(request, n=2))
    second, _ = alone(tmp_path / "demo", replace(request, seed=request.seed + 1))
    assert len(latents) == 2 and error(latents[1:], second) <= BAR


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
