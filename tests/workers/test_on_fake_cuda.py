"""Whole requests on pretended GPUs: the picture is that of the CPU, and the host waits only where it is known to.

`tests.support.fake_cuda` says what this can see of CUDA and what it cannot.
"""

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from deploy.model_spec import ModelSpec
from sp_core import collectives
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.verify.rank_pool import RankPool
from tests.support.deployments import model
from tests.support.fake_cuda.guard import needs_guard
from tests.support.fake_cuda.request import REQUESTS, Pictures, draw, draw_on_pretended_cuda
from tests.support.fake_cuda.seen import Seen
from workers.messages import GenerationRequest, PreviewDecoder, PreviewOptions
from workers.model.denoising import Denoising
from workers.model.step_ends import StepEnd, StepEnds

pytestmark = needs_guard

ALONE = ParallelDegrees()

LAYOUTS = {
    "u2": ParallelDegrees(ulysses_degree=2),
    "r2": ParallelDegrees(ring_degree=2),
    "t2": ParallelDegrees(tensor_parallel_size=2),
    "c2": ParallelDegrees(cfg_parallel_size=2),
}
"""Ulysses, ring, tensor, guidance."""

COPIED = "copies from cpu to cuda"
FETCHED = "copies from cuda to cpu"
READ = "reads a value (_local_scalar_dense)"
COUNTED = "counts a mask to index with it"

ONCE: Mapping[str, set[str]] = {
    # Tokens and masks go to the device; transformers looks whether a mask hides anything; diffusers cuts padding off.
    "encode": {
        f"transformers/tokenization_utils_base.py BatchEncoding.to: {COPIED}",
        f"diffusers/modular_pipelines/z_image/encoders.py get_qwen_prompt_embeds: {COPIED}",
        f"diffusers/modular_pipelines/wan/encoders.py get_t5_prompt_embeds: {COPIED}",
        f"diffusers/modular_pipelines/flux/encoders.py FluxTextEncoderStep._get_clip_prompt_embeds: {COPIED}",
        f"diffusers/modular_pipelines/flux/encoders.py FluxTextEncoderStep._get_t5_prompt_embeds: {COPIED}",
        f"transformers/masking_utils.py _ignore_causal_mask_sdpa: {READ}",
        f"transformers/masking_utils.py _ignore_bidirectional_mask_sdpa: {READ}",
        f"transformers/cache_utils.py DynamicLayer.lazy_initialization: {COPIED}",
        f"diffusers/modular_pipelines/qwenimage/encoders.py _extract_masked_hidden: {COUNTED}",
        f"diffusers/modular_pipelines/qwenimage/encoders.py _extract_masked_hidden: {FETCHED}",
        f"diffusers/modular_pipelines/z_image/encoders.py get_qwen_prompt_embeds: {COUNTED}",
    },
    # The embeddings go to the other ranks over the hosts.
    "share_encoded": {
        "workers/model/handover.py packed: copies from cuda to cpu to save",
        "workers/model/handover.py unpacked: copies from cpu to cuda to load",
    },
    # Noise is drawn on the CPU, so that it is the same everywhere; full masks are dropped.
    "prepare": {
        f"diffusers/utils/torch_utils.py randn_tensor: {COPIED}",
        "diffusers/schedulers/scheduling_flow_match_euler_discrete.py FlowMatchEulerDiscreteScheduler.set_timesteps: "
        + COPIED,
        f"diffusers/schedulers/scheduling_unipc_multistep.py UniPCMultistepScheduler.set_timesteps: {COPIED}",
        f"diffusers/modular_pipelines/flux/before_denoise.py FluxRoPEInputsStep.__call__: {COPIED}",
        f"diffusers/pipelines/flux/pipeline_flux.py FluxPipeline._prepare_latent_image_ids: {COPIED}",
        f"workers/model/denoising.py _drop_full_masks: {READ}",
        f"workers/model/denoising.py Denoising.prepare: {FETCHED}",
    },
    # Tables of rotations, besides what each step waits for.
    "first step": {
        f"diffusers/models/transformers/transformer_qwenimage.py QwenEmbedRope._get_device_freqs: {COPIED}",
        f"diffusers/models/transformers/transformer_z_image.py RopeEmbedder.__call__: {COPIED}",
    },
    # The VAE's scales; then the picture comes to the host.
    "finish": {
        f"diffusers/modular_pipelines/qwenimage/decoders.py QwenImageDecoderStep.__call__: {COPIED}",
        f"diffusers/modular_pipelines/wan/decoders.py WanVaeDecoderStep.__call__: {COPIED}",
        f"diffusers/image_processor.py VaeImageProcessor.pt_to_numpy: {FETCHED}",
    },
}
"""Where the host may wait outside the loop, by stage of a request."""

END_OF_STEP = "workers/model/step_ends.py StepEnds.wait: waits for an event"
"""The one wait of each step. It comes when the next step is queued, so there is none in the first."""

OF_WAN = {
    f"diffusers/modular_pipelines/wan/denoise.py Wan22LoopDenoiser.__call__: {READ}": 1,
    "diffusers/schedulers/scheduling_unipc_multistep.py UniPCMultistepScheduler.multistep_uni_p_bh_update: "
    + COPIED: 3,
    "diffusers/schedulers/scheduling_unipc_multistep.py UniPCMultistepScheduler.multistep_uni_c_bh_update: "
    + COPIED: 3,
}
"""Besides, in each step of Wan: which of two transformers is it; and coefficients of its scheduler."""


def unknown_waits(seen: Seen, family: str) -> dict[str, dict[str, int]]:
    """Waits that are not on the lists, by stage."""
    steps = REQUESTS[family].num_inference_steps
    in_step = OF_WAN if family == "wan" else {}
    found = {}
    for phase in sorted({phase for phase, _ in seen.waits}):
        known = dict.fromkeys(ONCE.get(phase, ()), 10**6)
        if phase in ("first step", "step"):
            known |= {line: count * (1 if phase == "first step" else steps - 1) for line, count in in_step.items()}
        if phase == "step":
            known[END_OF_STEP] = steps
        found[phase] = dict(Counter(seen.waits_in(phase)) - Counter(known))
    return {phase: waits for phase, waits in found.items() if waits}


def spec(folder: Path, degrees: ParallelDegrees, **options: Any) -> ModelSpec:
    return model(folder, **asdict(degrees)).model_copy(update=options)


def differ(first: Pictures, second: Pictures) -> int:
    """The largest difference, in steps of 1/255."""
    return max(int(np.abs(a - b).max()) for a, b in zip(first, second, strict=True))


def check(pool: RankPool, folder: Path, family: str, layout: str, **options: Any) -> list[Seen]:
    """The ranks' picture is that of the CPU, and nothing is wrong on the way."""
    degrees, request = LAYOUTS[layout], REQUESTS[family]
    if options:
        request = replace(request, width=320, height=288)
    (expected,) = pool.run(ALONE, draw, spec(folder, ALONE, **options), request)
    found = pool.run(degrees, draw_on_pretended_cuda, spec(folder, degrees, **options), request)
    assert differ(found[0][0], expected) <= 1
    for _, seen in found:
        assert not seen.faults
        assert unknown_waits(seen, family) == {}
        assert seen.waits_in("step")[END_OF_STEP] == request.num_inference_steps
    return [seen for _, seen in found]


@pytest.mark.parametrize("layout", ["u2", "r2"])
@pytest.mark.parametrize("family", REQUESTS)
def test_a_request_on_gpus_makes_the_picture_of_the_cpu(
    ranks: RankPool, demo_models: dict[str, Path], family: str, layout: str
) -> None:
    for seen in check(ranks, demo_models[family], family, layout):
        assert seen.exchanges["exchange" if layout == "u2" else "shift"] > 0


@pytest.mark.parametrize("layout", ["t2", "c2"])
def test_shared_weights_and_groups_for_guidance_on_gpus(ranks: RankPool, demo_model: Path, layout: str) -> None:
    for seen in check(ranks, demo_model, "qwen-image", layout):
        assert seen.exchanges["sum" if layout == "t2" else "gather"] > 0


def test_tiles_come_to_the_first_gpu(ranks: RankPool, demo_model: Path) -> None:
    first, second = check(ranks, demo_model, "qwen-image", "u2", vae_tiling_above=0)
    assert not first.exchanges["shift"]
    assert second.exchanges["shift"] > 0


def with_previews(
    mesh: ParallelMesh, model: ModelSpec, request: GenerationRequest, decoder: PreviewDecoder
) -> tuple[int, Seen]:
    """How many previews rank 0 has made, on a warm model, and what was seen of the request."""
    encode, take, made = Denoising.encode, Denoising.steps, []

    @functools.wraps(encode)  # its name is the phase
    def warm(denoising: Denoising) -> None:
        cells = torch.rand(4, 8, 12).to(denoising._mesh.device)
        with denoising._colors.warm_up():
            denoising._colors.learn(cells, Image.new("RGB", (96, 64)))
        encode(denoising)

    def steps(denoising: Denoising, ahead: int) -> Iterator[StepEnd]:
        for end in take(denoising, ahead):
            made.extend([preview] if (preview := denoising.preview(end.step)) else [])
            yield end

    asked = replace(request, previews=PreviewOptions(count=2, decoder=decoder))
    with mock.patch.object(Denoising, "encode", warm), mock.patch.object(Denoising, "steps", steps):
        _, seen = draw_on_pretended_cuda(mesh, model, asked)
    for _, pixels in made:
        assert np.asarray(pixels).shape[2] == 3
    return len(made), seen


@pytest.mark.parametrize("family", ["qwen-image", "wan"])
def test_the_host_does_not_wait_for_previews(ranks: RankPool, demo_models: dict[str, Path], family: str) -> None:
    """But for those of the VAE, which take a decode."""
    layout = LAYOUTS["u2"]
    run = functools.partial(ranks.run, layout, with_previews, spec(demo_models[family], layout), REQUESTS[family])
    (count, seen), (none, _) = run("linear")
    assert (count, none) == (2, 0)
    assert not seen.faults
    assert unknown_waits(seen, family).keys() <= {"encode"}  # where the test warms up
    (count, seen), _ = run("vae")
    assert count == 2
    assert not seen.faults
    assert unknown_waits(seen, family).keys() - {"encode"} == {"first step", "step"}


@contextmanager
def a_decision_on_a_value() -> Iterator[None]:
    exchange = collectives.all_to_all

    def decided(packed: torch.Tensor, *rest: Any) -> torch.Tensor:
        return exchange(packed if packed.isfinite().all() else packed.nan_to_num(), *rest)

    with mock.patch.object(collectives, "all_to_all", decided):
        yield


@contextmanager
def a_strided_exchange() -> Iterator[None]:
    exchange = collectives.all_to_all

    def strided(packed: torch.Tensor, *rest: Any) -> torch.Tensor:
        return exchange(torch.stack((packed, packed), dim=1)[:, 0], *rest)

    with mock.patch.object(collectives, "all_to_all", strided):
        yield


@contextmanager
def a_tensor_on_the_cpu() -> Iterator[None]:
    exchange = collectives.all_to_all

    def moved(packed: torch.Tensor, *rest: Any) -> torch.Tensor:
        return exchange(packed, *rest) + torch.zeros(1)

    with mock.patch.object(collectives, "all_to_all", moved):
        yield


@contextmanager
def a_flag_that_is_not_waited_for() -> Iterator[None]:
    def early(ends: StepEnds, step: int) -> StepEnd:
        return StepEnd(step, 0.0, bool(ends._finite[step - 1]))

    with mock.patch.object(StepEnds, "wait", early):
        yield


PLANTED = {
    each.__name__: each
    for each in (a_decision_on_a_value, a_strided_exchange, a_tensor_on_the_cpu, a_flag_that_is_not_waited_for)
}


def seen_with(mesh: ParallelMesh, model: ModelSpec, request: GenerationRequest, planted: str) -> tuple[Seen, str]:
    """What is seen of a request with a planted fault, and what it raises."""
    seen = Seen()
    with PLANTED[planted]():
        try:
            draw_on_pretended_cuda(mesh, model, request, seen)
        except (RuntimeError, ValueError) as error:  # the second is gloo's
            return seen, str(error)
    return seen, ""


ULYSSES = ("_trade_heads_for_tokens", "_trade_back")
"""The functions that call `all_to_all`."""


def with_planted(pool: RankPool, folder: Path, planted: str) -> tuple[Seen, str]:
    degrees = LAYOUTS["u2"]
    return pool.run(degrees, seen_with, spec(folder, degrees), REQUESTS["qwen-image"], planted)[0]


def test_a_decision_on_a_value_is_found(ranks: RankPool, demo_model: Path) -> None:
    seen, _ = with_planted(ranks, demo_model, "a_decision_on_a_value")
    found = unknown_waits(seen, "qwen-image")
    assert set(found) == {"first step", "step"}
    for waits in found.values():
        assert set(waits) == {f"sp_core/attention/ulysses.py {name}: {READ}" for name in ULYSSES}


def test_a_strided_exchange_is_found(ranks: RankPool, demo_model: Path) -> None:
    seen, _ = with_planted(ranks, demo_model, "a_strided_exchange")
    assert set(seen.faults) == {"sp_core/collectives.py all_to_all: alltoall_base_ of a tensor that is not contiguous"}


def test_a_tensor_on_the_cpu_is_found(ranks: RankPool, demo_model: Path) -> None:
    seen, said = with_planted(ranks, demo_model, "a_tensor_on_the_cpu")
    assert set(seen.faults) == {
        "sp_core/attention/ulysses.py _trade_heads_for_tokens: add of tensors on cuda and on the CPU"
    }
    assert "needs all tensors on one device" in said


def test_a_flag_that_is_not_waited_for_is_found(ranks: RankPool, demo_model: Path) -> None:
    _, said = with_planted(ranks, demo_model, "a_flag_that_is_not_waited_for")
    assert said == "the latents are not finite after step 1"
