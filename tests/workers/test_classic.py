"""Pipelines without an adapter: stepped, their classic call makes what it makes on one process, on every layout."""

import gc
import inspect
import weakref
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

from deploy.check import check_deployment
from deploy.families.classic import classic_family
from deploy.families.lookup import find_family
from deploy.model_sections import LoRA
from deploy.model_spec import ModelSpec
from deploy.spec import DeploymentSpec, SpecError
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.support.deployments import model
from tests.workers.test_adapters import PICTURES, VIDEO, alone, ask, differ
from tests.workers.test_denoising import ALONE, begun, check, generate, generate_with
from tests.workers.test_steps_ahead import started
from workers.demo_models import vocabulary
from workers.demo_models.pipelines import demo_of
from workers.demo_models.writer import write_demo_model
from workers.errors import InvalidParameter, RequestCancelled, RequestError
from workers.messages import Drawn, GenerationRequest, PreviewOptions, StepEvent
from workers.model.adapters.classic import ClassicAdapter
from workers.model.classic_denoising import ClassicDenoising, begin
from workers.model.denoising import Denoising
from workers.model.loader import load_model
from workers.model.prompts import IDEOGRAM_TOKENS, check_length, check_words
from workers.model.shared_encoders import SharedEncoders
from workers.model.stepped_call import SteppedCall

CLIP = replace(VIDEO, width=96, height=64, n=1)

REQUESTS: dict[str, tuple[str, GenerationRequest, dict[str, Any]]] = {
    "pictures": ("stable-diffusion-3", replace(PICTURES, negative_prompt="blurry"), {}),
    "pictures, unguided": ("stable-diffusion-3", replace(PICTURES, guidance_scale=1.0, seeds=(9, 4)), {}),
    "clip": ("ltx", CLIP, {"num_frames": 9, "frame_rate": 16}),
    "scale as an input": ("hunyuan-video", replace(VIDEO, num_frames=5, guidance_scale=6.0), {"num_frames": 5}),
    "extra parameters": (
        "stable-diffusion-3",
        replace(PICTURES, n=1, extra_params={"prompt_2": "a fox", "negative_prompt_3": "night"}),
        {"prompt_2": "a fox", "negative_prompt_3": "night"},
    ),
    "clips, fast": ("ltx", replace(CLIP, fps=40, n=2, negative_prompt="a"), {"num_frames": 9, "frame_rate": 40}),
}
"""For each a family, our request, and what the classic pipeline is told besides."""

LAYOUTS = {
    "ulysses 2": ParallelDegrees(ulysses_degree=2),
    "ring 2": ParallelDegrees(ring_degree=2),
    "ulysses 3": ParallelDegrees(ulysses_degree=3),
    "ulysses 2 x ring 2": ParallelDegrees(ulysses_degree=2, ring_degree=2),
    "tp 2 x ulysses 2": ParallelDegrees(tensor_parallel_size=2, ulysses_degree=2),
}
CASES = [(name, layout) for name in ("pictures", "clip", "scale as an input") for layout in list(LAYOUTS)[:4]]
CASES += [("clip", "tp 2 x ulysses 2")]


def mesh() -> ParallelMesh:
    return ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60)


def classic(folder: Path) -> Any:
    found = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    found.vae.enable_slicing()  # pictures one by one, as we do
    return found


def drawn(pipeline: Any, folder: Path, request: GenerationRequest, told: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    """The latents after the last step of the classic pipeline, and its pictures."""
    seen: list[torch.Tensor] = []

    def see(_pipeline: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(values["latents"])
        return {}

    made = ask(pipeline, folder, request, told | {"callback_on_step_end": see})
    return seen[-1], made


@pytest.mark.parametrize("name", REQUESTS)
def test_one_rank_is_the_classic_pipeline(demo_models: dict[str, Path], name: str) -> None:
    family, request, told = REQUESTS[name]
    told = {**told, "guidance_scale": request.guidance_scale, "negative_prompt": request.negative_prompt}
    reference, expected = drawn(classic(demo_models[family]), demo_models[family], request, told)
    latents, made = alone(demo_models[family], request)
    assert error(latents, reference) <= BAR
    assert differ(made, expected) <= 1


def test_ranks_share_what_has_no_vae(ranks: RankPool, tmp_path: Path) -> None:
    """The first rank makes pictures of pixels; that it alone has the VAE means nothing then."""
    write_demo_model(tmp_path / "pixels", "prx", "PRXPixelPipeline")
    as_asked = {"use_resolution_binning": False}
    request = replace(PICTURES, width=128, height=192, num_inference_steps=2, extra_params=as_asked)
    assert request.n == 2
    ((latents, made),) = ranks.run(ALONE, generate, tmp_path / "pixels", request)
    assert latents.shape == (2, 3, 192, 128) and len(made) == 2
    found = ranks.run(LAYOUTS["ulysses 2"], generate_with, tmp_path / "pixels", request, {"vae": "rank0"})
    check(found, latents, made)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_every_layout_makes_the_same(ranks: RankPool, demo_models: dict[str, Path], name: str, layout: str) -> None:
    family, request, _ = REQUESTS[name]
    ((latents, made),) = ranks.run(ALONE, generate, demo_models[family], request)
    check(ranks.run(LAYOUTS[layout], generate, demo_models[family], request), latents, made)


@pytest.mark.parametrize("options", [{"text_encoder": "replicate"}, {"vae": "rank0"}, {"vae_tiling_above": 1}], ids=str)
def test_whoever_encodes_and_decodes(ranks: RankPool, demo_models: dict[str, Path], options: dict[str, Any]) -> None:
    family, request, _ = REQUESTS["pictures"]
    request = replace(request, width=288, height=32)  # so wide that its VAE cuts it into tiles
    alike = {key: value for key, value in options.items() if key == "vae_tiling_above"}
    ((latents, made),) = ranks.run(ALONE, generate_with, demo_models[family], request, alike)
    found = ranks.run(LAYOUTS["ulysses 2"], generate_with, demo_models[family], request, options)
    check(found, latents, made)


@pytest.mark.parametrize("name", ["pictures", "clip", "scale as an input"])
def test_attention_kept_local_would_be_seen(ranks: RankPool, demo_models: dict[str, Path], name: str) -> None:
    family, request, _ = REQUESTS[name]
    ((latents, made),) = ranks.run(ALONE, generate, demo_models[family], request)
    got, drawn = ranks.run(LAYOUTS["ulysses 2"], generate, demo_models[family], request, True)[0]
    assert error(got, latents) > 100 * BAR
    assert differ(drawn, made) > 1


def test_an_extra_parameter_shows(demo_models: dict[str, Path]) -> None:
    latents, _ = alone(demo_models["ltx"], CLIP)
    rescaled, _ = alone(demo_models["ltx"], replace(CLIP, extra_params={"guidance_rescale": 0.7}))
    assert error(rescaled, latents) > 100 * BAR


def test_prompts_are_cleaned_where_that_is_asked() -> None:
    """Without Beautiful Soup, pipelines leave that out, and only log it."""
    pipeline = demo_of("pixart")
    clean, as_it_is = (pipeline.encode_prompt("a <b>cup</b>", clean_caption=asked)[0] for asked in (True, False))
    assert not torch.equal(clean, as_it_is)


def test_requests_in_turns_do_not_disturb_each_other(demo_models: dict[str, Path]) -> None:
    family, request, _ = REQUESTS["pictures"]
    other = replace(request, prompt="a fox", seed=8, num_inference_steps=5)
    loaded = load_model(model(demo_models[family]), mesh())
    expected = [alone(demo_models[family], each)[0] for each in (request, other)]
    both = [begun(loaded, each) for each in (request, other)]
    assert {each.guidance for each in both} == {"one forward"}
    while not all(each.done for each in both):
        for each in both:
            if not each.done:
                each.step()
    assert [error(each.latents, latents) <= BAR for each, latents in zip(both, expected, strict=True)] == [True] * 2
    assert torch.is_grad_enabled()


def drawn_with(mesh: ParallelMesh, folder: Path, request: GenerationRequest, lora: LoRA) -> list[torch.Tensor]:
    """The latents of a request with an adapter, and of the same without."""
    spec = model(folder, **asdict(mesh.degrees)).model_copy(update={"loras": (lora,)})
    loaded = load_model(spec, mesh)
    found = []
    for loras in ((("dye", 1.0),), ()):
        denoising = begun(loaded, replace(request, loras=loras))
        while not denoising.done:
            denoising.step()
        found.append(denoising.latents)
    return found


def test_an_adapter_works_on_every_layout(ranks: RankPool, demo_models: dict[str, Path], tmp_path: Path) -> None:
    family, request, _ = REQUESTS["pictures"]
    generator, tensors = torch.Generator().manual_seed(5), {}
    for i in range(2):
        for name in ("to_q", "to_v", "add_k_proj"):
            key = f"transformer.transformer_blocks.{i}.attn.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(4, 144, generator=generator) / 12
            tensors[f"{key}.lora_B.weight"] = torch.randn(144, 4, generator=generator) / 4
    save_file(tensors, tmp_path / "dye.safetensors")
    lora = LoRA(name="dye", source=str(tmp_path / "dye.safetensors"))
    expected = classic(demo_models[family])
    expected.load_lora_weights(tmp_path / "dye.safetensors")
    ((dyed, plain),) = ranks.run(ALONE, drawn_with, demo_models[family], request, lora)
    told = {"guidance_scale": request.guidance_scale, "negative_prompt": "blurry"}
    reference, _ = drawn(expected, demo_models[family], request, told)
    assert error(dyed, reference) <= BAR
    assert error(plain, dyed) > 100 * BAR
    for got, without in ranks.run(LAYOUTS["ulysses 2"], drawn_with, demo_models[family], request, lora):
        assert error(got, dyed) <= BAR and error(without, plain) <= BAR


def cancelled(mesh: ParallelMesh, folder: Path, ahead: int) -> tuple[int, int, int, list[int]]:
    """A request that one rank cancels in its second step: steps done, steps reported, calls left; then the next one."""
    rank, step, done = started(mesh, folder, ahead), Denoising.step, 0
    calls: list[weakref.ref[Any]] = []

    def count(denoising: Denoising) -> None:
        nonlocal done
        assert isinstance(denoising, ClassicDenoising)
        calls.append(weakref.ref(denoising._calls[0]))
        step(denoising)
        done += 1
        if done == 2 and mesh.axis("gang").rank == 0:
            rank.cancel("a")

    request = replace(PICTURES, num_inference_steps=5, report_steps=True, n=1)
    reported = 0
    with mock.patch.object(Denoising, "step", count), pytest.raises(RequestCancelled):
        for _ in rank.generate(request):
            reported += 1
    gc.collect()
    left = sum(call() is not None for call in calls)
    assert torch.is_grad_enabled()
    after = list(rank.generate(replace(request, request_id="next")))
    assert [type(each) for each in after[-1:]] == ([Drawn] if mesh.axis("gang").rank == 0 else [])
    return done, reported, left, [each.step for each in after if isinstance(each, StepEvent)]


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_cancellation_ends_the_call_at_a_step(ranks: RankPool, demo_models: dict[str, Path], ahead: int) -> None:
    found = ranks.run(LAYOUTS["ulysses 2"], cancelled, demo_models["stable-diffusion-3"], ahead)
    assert [done for done, *_ in found] == [2, 2]
    assert found[0][1] == 1 - ahead  # the boundary after the second step stops it; with one ahead, that after the first
    assert [left for _, _, left, _ in found] == [0, 0]
    assert found[0][3] == [1, 2, 3, 4, 5]


REFUSALS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "size": ("stable-diffusion-3", {"width": 72}, "size", "width must be a multiple of 16, got 72"),
    "frames": ("ltx", {"num_frames": 10}, "num_frames", r"a multiple of 8, plus 1 \(such as 9 or 17\), got 10"),
    "video size": ("ltx", {"height": 48}, "size", "height must be a multiple of 32, got 48"),
    "format": ("ltx", {"output_format": "png"}, "output_format", r"makes videos \(mp4\), got 'png'"),
    "no such parameter": (
        "ltx", {"extra_params": {"tea": 1}}, "extra_params.tea",
        "only these extra parameters: guidance_rescale, decode_timestep, decode_noise_scale; leave out 'tea'",
    ),
    "parameter of ours": ("ltx", {"extra_params": {"num_frames": 9}}, "extra_params.num_frames", "leave out 'num_fr"),
    "of a branch that there is not": (
        "hunyuan-video", {"num_frames": 5, "extra_params": {"negative_prompt_2": "x"}},
        "extra_params.negative_prompt_2", "only these extra parameters: prompt_2; leave out",
    ),
    "of a guidance that there is not": (
        "stable-diffusion-3", {"extra_params": {"skip_layer_guidance_scale": 2.0}},
        "extra_params.skip_layer_guidance_scale", "negative_prompt_3, clip_skip; leave out",
    ),
    "type": ("ltx", {"extra_params": {"guidance_rescale": "x"}}, "extra_params.guidance_rescale", "a float, got 'x'"),
    "truth": ("ltx", {"extra_params": {"guidance_rescale": True}}, "extra_params.guidance_rescale", "got True"),
    "no number": (
        "ltx", {"extra_params": {"guidance_rescale": float("nan")}}, "extra_params.guidance_rescale", "got nan",
    ),
    "negative prompt": (
        "hunyuan-video", {"num_frames": 5, "negative_prompt": "x"}, "negative_prompt", "is not guided by a negative",
    ),
    "second scale": ("ltx", {"guidance_scale_2": 2.0}, "guidance_scale_2", "LTXPipeline has one scale"),
    "previews": ("ltx", {"previews": PreviewOptions(1)}, "partial_images", "'demo' has no previews"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_a_pipeline_cannot_do_is_the_callers_mistake(demo_models: dict[str, Path], name: str) -> None:
    family, changes, param, said = REFUSALS[name]
    loaded = load_model(model(demo_models[family]), mesh())
    with pytest.raises(InvalidParameter, match=said) as refused:
        begin(loaded, replace(PICTURES if family == "stable-diffusion-3" else CLIP, **changes))
    assert refused.value.param == param


def test_a_size_that_the_pipeline_would_exchange_is_refused() -> None:
    pipeline = demo_of("kandinsky_5", "Kandinsky5T2IPipeline")
    adapter, request = ClassicAdapter(classic_family("Kandinsky5T2IPipeline")), replace(PICTURES, n=1)
    adapter.check(pipeline, replace(request, width=640, height=1408))
    with pytest.raises(InvalidParameter, match=r"this model makes 1024x1024, .*; got 640x1024") as refused:
        adapter.check(pipeline, replace(request, width=640, height=1024))
    assert refused.value.param == "size"
    assert adapter.small_size(pipeline, (1, 80, 112)) == (1, 1408, 640)  # for the self-test


def test_words_by_which_a_processor_marks_pictures_are_refused() -> None:
    pipeline, adapter = demo_of("glm_image"), ClassicAdapter(classic_family("GlmImagePipeline"))
    request = replace(PICTURES, width=96, height=128)
    adapter.check(pipeline, request)
    with pytest.raises(ValueError, match="tokens in the text but no images were passed"):  # what it would do
        pipeline("a <|image|>", height=128, width=96, num_inference_steps=1)
    with pytest.raises(InvalidParameter, match=r"prompt holds <\|image\|>, a word of the model's own") as refused:
        adapter.check(pipeline, replace(request, prompt="a <|image|>"))
    assert refused.value.param == "prompt"


@pytest.mark.parametrize(
    ("family", "name", "word", "said"),
    [
        ("longcat_image", "LongCatImageEditPipeline", "<|image_pad|>", r"<\|image_pad\|>"),
        ("kandinsky_5", "Kandinsky5T2IPipeline", "<|image_pad|>", r"<\|image_pad\|>"),
        ("joy_image_edit", "JoyImageEditPipeline", "<image>\n", r"<image>\\n,"),
        ("joy_image_edit_plus", "JoyImageEditPlusPipeline", "<image>\n", r"<image>\\n,"),
    ],
)
def test_so_are_those_of_other_processors(family: str, name: str, word: str, said: str) -> None:
    request, pipeline = replace(PICTURES, prompt=f"a {word}b"), demo_of(family, name)
    with pytest.raises(InvalidParameter, match=f"prompt holds {said}"):
        check_words(name, pipeline, request)
    check_words(name, pipeline, replace(request, prompt="a <image> b"))
    check_words("QwenImagePipeline", SimpleNamespace(tokenizer=vocabulary.qwen2()), request)  # it sees no pictures


def test_a_prompt_that_fails_in_the_pipelines_own_warning_is_refused() -> None:
    name = "LongCatImageEditPipeline"
    pipeline = demo_of("longcat_image", name)
    length = pipeline.tokenizer_max_length
    fits = "x" * length
    assert len(pipeline.tokenizer(fits, add_special_tokens=False)["input_ids"]) == length
    check_length(name, pipeline, replace(PICTURES, prompt=fits))
    long = replace(PICTURES, prompt=fits + ' "x"')  # what is quoted is read by its letters
    with pytest.raises(
        InvalidParameter, match=rf"prompt has {length + 4} tokens, this model reads at most {length}; shorten it"
    ):
        check_length(name, pipeline, long)
    check_length("LongCatImagePipeline", pipeline, long)
    with pytest.raises(TypeError, match="has no len"):  # once diffusers has mended it, such prompts may be cut
        pipeline._encode_prompt([long.prompt], Image.new("RGB", (64, 64)))


def test_a_prompt_that_ideogram_does_not_read_is_refused() -> None:
    name, pipeline = "Ideogram4Pipeline", demo_of("ideogram_4")
    assert inspect.signature(type(pipeline).__call__).parameters["max_sequence_length"].default == IDEOGRAM_TOKENS

    def read(letters: int) -> Any:
        return pipeline.encode_prompt("x" * letters, 1, 1, IDEOGRAM_TOKENS, torch.device("cpu"))

    of_chat = int((read(1)[3] == 3).sum()) - 1  # tokens that have the role of text
    fits = IDEOGRAM_TOKENS - of_chat
    check_length(name, pipeline, replace(PICTURES, prompt="x" * fits))
    assert int((read(fits)[3] == 3).sum()) == IDEOGRAM_TOKENS
    with pytest.raises(InvalidParameter, match=rf"prompt has {IDEOGRAM_TOKENS + 1} tokens, .* {IDEOGRAM_TOKENS}; "):
        check_length(name, pipeline, replace(PICTURES, prompt="x" * (fits + 1)))
    with pytest.raises(ValueError, match="exceeds max_sequence_length"):  # what it would do
        read(fits + 1)


def tokens_of(mesh: ParallelMesh, folder: Path) -> dict[str, int]:
    """How many tokens this rank gives the first block of each transformer."""
    loaded = load_model(ModelSpec(name="a", source=str(folder), device="cpu", parallel=mesh.degrees), mesh)
    seen: dict[str, int] = {}
    for name in loaded.adapters:
        attention = getattr(loaded.pipeline, name).layers[0].attention
        attention.to_q.register_forward_pre_hook(lambda _, args, n=name: seen.update({n: args[0].shape[1]}))
    begun(loaded, replace(PICTURES, width=80, height=112, n=1)).step()
    return seen


def test_ranks_divide_the_transformer_of_the_branch_without_a_prompt(ranks: RankPool, tmp_path: Path) -> None:
    write_demo_model(tmp_path / "demo", "ideogram_4")
    shares = ranks.run(LAYOUTS["ulysses 2"], tokens_of, tmp_path / "demo")
    image = 35
    whole = {"transformer": IDEOGRAM_TOKENS + image, "unconditional_transformer": image}
    assert {name: sum(each[name] for each in shares) for name in whole} == whole
    assert all(abs(shares[0][name] - shares[1][name]) <= 1 for name in whole)


def test_a_scale_takes_the_place_of_a_schedule() -> None:
    told = ClassicAdapter(classic_family("Ideogram4Pipeline")).inputs(PICTURES)
    assert told["guidance_schedule"] is None and told["guidance_scale"] == PICTURES.guidance_scale
    assert "guidance_schedule" not in ClassicAdapter(classic_family("StableDiffusion3Pipeline")).inputs(PICTURES)


def who_encodes(mesh: ParallelMesh, folder: Path) -> tuple[bool, bool]:
    spec = ModelSpec(name="a", source=str(folder), device="cpu", parallel=mesh.degrees, text_encoder="replicate")
    denoising = begin(load_model(spec, mesh), replace(PICTURES, width=96, height=128, n=1))
    return denoising._encodes, denoising._shares_encoded


def test_what_an_encoder_draws_is_drawn_by_one_rank(
    ranks: RankPool, demo_models: dict[str, Path], tmp_path: Path
) -> None:
    write_demo_model(tmp_path / "demo", "glm_image", "GlmImagePipeline")
    two = LAYOUTS["ulysses 2"]
    assert ranks.run(two, who_encodes, tmp_path / "demo") == [(True, True), (False, True)]
    assert ranks.run(two, who_encodes, demo_models["stable-diffusion-3"]) == [(True, False)] * 2


def test_what_the_pipeline_itself_refuses_is_the_callers_mistake(demo_models: dict[str, Path]) -> None:
    loaded = load_model(model(demo_models["ltx"]), mesh())
    with mock.patch.object(type(begin(loaded, CLIP)._adapter), "size_multiple", return_value=8):
        denoising = begin(loaded, replace(CLIP, height=48))
    with pytest.raises(InvalidParameter, match="`height` and `width` have to be divisible by 32") as refused:
        denoising.encode()
    assert isinstance(refused.value, RequestError) and refused.value.param == "size"


@pytest.mark.parametrize(
    ("name", "one_batch"), [("stable-diffusion-3", True), ("cog-view", False)], ids=["one batch", "two forwards"]
)
def test_groups_do_not_divide_the_branches_of_a_call(demo_models: dict[str, Path], name: str, one_batch: bool) -> None:
    folder = demo_models[name]
    family = find_family(folder)
    assert (family.makes, family.guided_above, family.batches_branches) == ("image", 1.0, one_batch)
    spec = ModelSpec(name="a", source=str(folder), device="cpu", parallel=ParallelDegrees(cfg_parallel_size=2))
    with pytest.raises(SpecError, match=f"the call of {family.pipeline} evaluates both branches itself"):
        check_deployment(DeploymentSpec(models=(spec,)), {"cpu": 4.0})


class Scheduler:
    """Three timesteps."""

    def step(self, model_output: torch.Tensor, timestep: int, sample: torch.Tensor) -> tuple[torch.Tensor]:
        return (sample - model_output,)


class Pipeline:
    """The least that a call is made of."""

    def __init__(self, steps: int = 3) -> None:
        self.scheduler, self.steps = Scheduler(), steps

    def encode_prompt(self, prompt: str) -> list[int]:
        return [ord(each) for each in prompt]

    def progress_bar(self) -> Any:
        return nullcontext()

    @torch.no_grad()
    def __call__(self, prompts: list[str], callback_on_step_end: Any) -> Any:
        latents = torch.tensor([self.encode_prompt(prompt) for prompt in prompts], dtype=torch.float32)
        with self.progress_bar():
            for t in range(self.steps):
                (latents,) = self.scheduler.step(0.5 * latents, t, latents)
                latents = callback_on_step_end(self, t, t, {"latents": latents}).pop("latents", latents)
        return (latents,)


class Silent(Pipeline):
    """It does not tell when a step ends."""

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Any:
        return super().__call__(prompts, lambda *_: {})


def refuse(error: ValueError) -> None:
    raise error


def test_a_call_that_tells_no_steps_ends_them_where_its_scheduler_does() -> None:
    (whole,) = Silent()(["ab", "cd"])
    for made in (None, [[97, 98], [99, 100]]):
        call = SteppedCall(Silent(), {"prompts": ["ab", "cd"]}, SharedEncoders(made, seed=0), refuse)
        call.encode()
        call.prepare()
        latents = [call.step() for _ in range(3)]
        assert torch.equal(call.noise[0], latents[1]) and torch.equal(latents[-1], whole)
        assert torch.equal(call.finish()[0], whole)


def test_a_call_goes_on_where_it_stood() -> None:
    told = {"prompts": ["ab", "cd"]}
    whole = Pipeline()(["ab", "cd"], lambda *_: {})[0]
    encoders = SharedEncoders(None, seed=0)
    one = SteppedCall(Pipeline(), told, encoders, refuse)
    one.encode()
    assert encoders.made == [[97, 98], [99, 100]]
    other = SteppedCall(Pipeline(), told, SharedEncoders([[97, 98], [99, 100]], seed=0), refuse)
    other.encode()
    for call in (one, other):
        call.prepare()
        halves = [call.step() for _ in range(3)]
        assert torch.equal(call.noise[0], halves[1]) and torch.equal(call.noise[1], 0.5 * halves[1])
        assert torch.equal(call.finish()[0], whole) and torch.equal(halves[-1], whole)
    assert torch.is_grad_enabled()


def test_encoders_that_are_asked_more_than_elsewhere_are_a_mistake() -> None:
    call = SteppedCall(Pipeline(), {"prompts": ["ab", "cd"]}, SharedEncoders([[97, 98]], seed=0), refuse)
    with pytest.raises(RuntimeError, match="encodes more on this rank"):
        call.prepare()


def test_a_call_that_is_dropped_leaves_nothing() -> None:
    gc.collect()
    gc.disable()
    try:
        pipeline = Pipeline()
        there = weakref.ref(pipeline)
        call = SteppedCall(pipeline, {"prompts": ["ab"]}, SharedEncoders(None, seed=0), refuse)
        del pipeline
        call.encode()
        call.step()
        assert there() is not None and torch.is_grad_enabled()
        del call
        assert there() is None and torch.is_grad_enabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(("steps", "said"), [(2, "fewer steps"), (4, "more steps")])
def test_a_loop_of_another_length_is_seen(steps: int, said: str) -> None:
    call = SteppedCall(Pipeline(steps), {"prompts": ["ab"]}, SharedEncoders(None, seed=0), refuse)
    call.encode()
    with pytest.raises(RuntimeError, match=said):
        for _ in range(3):
            call.step()
        call.finish()
