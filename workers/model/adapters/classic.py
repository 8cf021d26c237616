"""The adapter of all pipelines without one of their own: the arguments of the classic call, and the requests it
refuses.

`workers.model.classic_denoising` runs the call. `deploy.families.pipeline_source` reads the parameters of the call from
its source.
"""

import math
import re
from typing import Any

from PIL import Image

from deploy.families.family import PipelineFamily
from deploy.families.pipeline_source import ClassicCall, classic_call
from workers.errors import InvalidParameter
from workers.messages import GenerationRequest
from workers.model.adapters.pipeline_adapter import PipelineAdapter
from workers.model.clip_inputs import OVERLAP, check_goes_on, clip_for
from workers.model.controlnets import check_control_mode, control_modes
from workers.model.extra_ranges import check_extra_ranges
from workers.model.fixed_tiles import check_covered, fixed_tiles
from workers.model.picture_inputs import read
from workers.model.positions import check_positions, only_size
from workers.model.prompts import JOY_IMAGE, TEMPLATE, check_length, check_words
from workers.model.step_counts import check_steps

COUNT_INPUTS = ("num_images_per_prompt", "num_videos_per_prompt")

REDUCTIONS = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor")
"""Names of a pipeline's attribute for the VAE's reduction of sizes."""

REWRITES = (
    "use_pe",
    "enable_prompt_rewrite",
    "expand_prompts",
    "prompt_upsampling",
    "prompt_upsampling_temperature",
    "caption_upsample_temperature",
)
"""Parameters by which a language model of the pipeline rewrites the prompt. They are turned off: its text is random,
and a request that runs again must give the same answer."""

SCHEDULES = ("guidance_schedule",)
"""Parameters with a scale for each step and a default. They are set to None: a request has one scale for all steps."""

GUIDERS = ("guider", "ocr_guider")
"""Names of the components that guide; their scale is not a parameter of the call."""

OWN = re.compile(
    "^(prompt|negative_prompt|output_type|return_dict|frames|frame_rate|guidance_scale|guidance_scale_2|true_cfg_scale|eta)$"
    "|num_|steps|length|height|width|size|^(?!use_).*resolution|strength|max_area|mask_crop|^enable_temporal_reasoning$"
    "|^fps$|^ar_step$|^addnoise_condition$|^mu$|^std$|^seed$|_embeds$|^image_embed_interleave$|^skip_layer_guidance_"
)
"""Parameters that a request may not set as extra ones: those with a field of their own, those that decide how much is
computed, one that draws noise without a seed, those that make the timesteps or embeddings, where wrong values fail in a
step, one that belongs to the model, and those of a guidance that needs a list, `skip_guidance_layers`."""

MOST_TOKENS = {
    **{name: {"processor": TEMPLATE + 4096} for name in JOY_IMAGE},
    "QwenImageImg2ImgPipeline": {"tokenizer": TEMPLATE + 512},
    "QwenImageInpaintPipeline": {"tokenizer": TEMPLATE + 512},
    "QwenImageControlNetPipeline": {"tokenizer": TEMPLATE + 512},
    "QwenImageControlNetInpaintPipeline": {"tokenizer": TEMPLATE + 512},
}
"""See `PipelineAdapter.most_tokens`."""

MOST_OBLONG = 16
"""The longer edge of a picture, in shorter ones, where the call scales each picture until it covers a usual shape."""

USUAL_OVERLAP = 17
"""As diffusers recommends."""

PLACE = "frame_index"
"""The parameter for the frame at which a clip begins."""

BETWEEN, TWO_STEPS = "intermediate_timesteps", 2
"""Sana Sprint's parameter for the beginning of the second of two steps. With any other number of steps it must be None,
and the steps are spaced evenly."""

FRAME_REDUCTIONS = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")
"""Names of a pipeline's attribute for the VAE's reduction of frames."""


class ClassicAdapter(PipelineAdapter):
    """Turns a request into the arguments of a classic pipeline's call.

    Args:
        family: the family of the pipeline.
    """

    has_previews = False

    def __init__(self, family: PipelineFamily) -> None:
        super().__init__(family)
        call = classic_call(family.pipeline)
        assert call is not None, "the family was made from it"
        self._call: ClassicCall = call
        self.count_input = next((name for name in COUNT_INPUTS if name in call.parameters), "")
        kinds = {n: k for n, k in call.scalars.items() if not OWN.search(n) and n not in REWRITES}
        if family.guided_above is None:  # no branch reads further negative prompts
            kinds = {n: k for n, k in kinds.items() if not n.startswith("negative_prompt")}
        self.extra_kinds = kinds
        self.most_tokens = MOST_TOKENS.get(family.pipeline, {})
        self.takes_size = {"height", "width"} <= set(call.parameters)
        self.one_generator = call.one_generator
        self.makes_one = call.makes_one
        self.output = "videos" if family.makes == "video" else "images"

    def guiders(self, request: GenerationRequest) -> dict[str, Any]:
        """No guiders: the call itself guides, or a component of the pipeline."""
        return {}

    def inputs(self, request: GenerationRequest) -> dict[str, Any]:
        """Scale, negative prompt and frames, as far as the call takes them; and its extra parameters."""
        negative_prompt = request.negative_prompt
        if negative_prompt is None and self._call.needs_negative_prompt:
            negative_prompt = ""
        told: dict[str, Any] = {
            self._call.scale: request.guidance_scale,
            "guidance_scale_2": request.guidance_scale_2,
            "distilled_guidance_scale": request.guidance_scale,
            "negative_prompt": negative_prompt,
            "num_frames": request.num_frames,
            "frames": request.num_frames,
            "video_length": request.num_frames,
            "frame_rate": request.fps,
            "fps": request.fps,
            OVERLAP: self._overlap(request),
            "max_area": request.width * request.height,
            "_auto_resize": False if self.family.sized_by_image else None,
        }
        taken = {name: value for name, value in told.items() if name in self._call.parameters and value is not None}
        if request.num_inference_steps != TWO_STEPS and BETWEEN in self._call.parameters:
            taken[BETWEEN] = None
        unused = dict.fromkeys(REWRITES, False) | dict.fromkeys(SCHEDULES)
        taken |= {name: value for name, value in unused.items() if name in self._call.parameters}
        return taken | dict(request.extra_params)

    def unsaid(self, pipeline: Any) -> dict[str, Any]:
        """Arguments that the model's components require and no request sets."""
        return {"control_mode": 0} if control_modes(pipeline) else {}

    def parts(self, pipeline: Any, request: GenerationRequest) -> dict[str, Any]:
        """The guiding components of the pipeline, made for this request: they keep state from step to step."""
        there = {name: getattr(pipeline, name, None) for name in GUIDERS}
        return {name: part.new(guidance_scale=request.guidance_scale) for name, part in there.items() if part}

    def pictures(self, request: GenerationRequest, here: bool) -> dict[str, Any]:
        """See `PipelineAdapter.pictures`. All ranks read them: pipelines look at them beside their encoders."""
        found: dict[str, Any] = {}
        for role, name in self.family.begins_with.items():
            given = [each for each in request.inputs if each.role == role]
            if role == "video" and given:
                found[name] = clip_for(self._call, given[0], request, self._overlap(request))
            elif given:
                several = role == "image" and self.family.takes_several
                pictures = [read(each) for each in given]
                if (role == "image" and self.family.sized_by_image) or not (self.takes_size or several):
                    size = request.width, request.height  # of what is made: the pipeline takes it from the picture
                    pictures = [each.resize(size, Image.Resampling.LANCZOS) for each in pictures]
                found[name] = pictures if several else pictures[0]
        return found

    def loops(self, pipeline: Any, request: GenerationRequest) -> int:
        """How often its call does all steps: once, or once for each window of frames."""
        if self._call.frame_window:
            return self._windows(pipeline, request)
        if not self._call.latent_window:
            return 1
        frames = (self._call.latent_window - 1) * _first(pipeline, FRAME_REDUCTIONS, 1) + 1
        return max(1, -(-request.num_frames // frames))

    def _windows(self, pipeline: Any, request: GenerationRequest) -> int:
        """The number of windows. Each after the first begins with the last frames of the one before."""
        overlap = self._overlap(request)
        if overlap is None:
            return 1
        reduction = _first(pipeline, FRAME_REDUCTIONS, 1)
        frames, window, kept = (
            (n - 1) // reduction + 1 for n in (request.num_frames, self._call.frame_window, overlap)
        )
        return max(1, -(-(frames - kept) // (window - kept)))

    def _overlap(self, request: GenerationRequest) -> int | None:
        """The frames that each window shares with the one before; None if one window has all frames."""
        window, extends = self._call.frame_window, "video" in self.family.needs
        if not window or (request.num_frames <= window and not extends):
            return None
        given = request.extra_params.get(OVERLAP)
        return int(given) if given is not None else min(USUAL_OVERLAP, (request.num_frames - 2) // 4 * 4 + 1)

    def check_pictures(self, pipeline: Any, request: GenerationRequest) -> None:
        """See `PipelineAdapter.check`."""
        self._check_roles(request)
        if self.family.begins_with.get("image") == "images":
            for each in (given for given in request.inputs if given.data):  # only the first rank has it
                shorter, longer = sorted(read(each).size)
                if longer > MOST_OBLONG * shorter:
                    raise InvalidParameter(
                        "image",
                        f"a picture has edges of {longer} and {shorter} pixels, at most {MOST_OBLONG} to 1 is allowed; "
                        "crop it",
                        "invalid_picture",
                    )
        clip = request.input("video")
        if clip and self._call.keeps_clip and not request.extra_params.get(PLACE):  # else something comes before it
            check_goes_on(clip, request, _first(pipeline, FRAME_REDUCTIONS, 1))
        window = self._call.frame_window
        if window and request.num_frames > window and any(each.role == "last_image" for each in request.inputs):
            raise InvalidParameter(
                "last_image", f"last_image goes with at most {window} frames, got num_frames={request.num_frames}"
            )
        config = pipeline.transformer.config
        looks_at_one = config.get("image_dim") and not config.get("pos_embed_seq_len")
        if looks_at_one and any(each.role == "last_image" for each in request.inputs):
            raise InvalidParameter(
                "last_image", f"{request.model!r} was trained to look at one picture; leave last_image out"
            )

    def check(self, pipeline: Any, request: GenerationRequest) -> None:
        """See `PipelineAdapter.check`."""
        super().check(pipeline, request)
        check_extra_ranges(pipeline, request)
        check_control_mode(pipeline, request)
        check_words(self.family.pipeline, pipeline, request)
        check_length(self.family.pipeline, pipeline, request)
        self._check_size(pipeline, request)
        check_positions(pipeline, request, _first(pipeline, REDUCTIONS, 8), _first(pipeline, FRAME_REDUCTIONS, 1))
        self._check_overlap(request)
        check_steps(self.family.pipeline, self._call, request)
        if request.negative_prompt and self.family.guided_above is None:
            raise InvalidParameter("negative_prompt", "this model is not guided by a negative prompt; leave it out")
        if request.negative_prompt and "guider" in self._call.parts and pipeline.guider is None:
            raise InvalidParameter("negative_prompt", "this model has no part that guides; leave it out")
        self._check_negative_extras(request)
        if request.n > 1 and not self.count_input and not request.inputs:
            raise InvalidParameter("n", f"{self.family.pipeline} makes one at a time, got n={request.n}")
        if request.guidance_scale_2 is not None and "guidance_scale_2" not in self._call.parameters:
            raise InvalidParameter("guidance_scale_2", f"{self.family.pipeline} has one scale, which is guidance_scale")

    def _check_negative_extras(self, request: GenerationRequest) -> None:
        """Reject further negative prompts where only the first one turns guidance on."""
        further = [name for name in request.extra_params if name.startswith("negative_prompt")]
        if further and self.family.guided_by_negative_prompt and request.negative_prompt is None:
            raise InvalidParameter(
                f"extra_params.{further[0]}", f"{further[0]} has no effect without negative_prompt; send both"
            )

    def _check_size(self, pipeline: Any, request: GenerationRequest) -> None:
        """Reject a size that the pipeline would replace by another."""
        sizes = getattr(pipeline, "resolutions", [])
        if sizes and (request.width, request.height) not in sizes:
            known = ", ".join(f"{width}x{height}" for width, height in sizes)
            raise InvalidParameter(
                "size", f"this model makes {known}; got {request.width}x{request.height}", "invalid_size"
            )

    def _check_overlap(self, request: GenerationRequest) -> None:
        """Reject an overlap that leaves a window without new frames, or cuts a latent frame."""
        overlap = self._overlap(request)
        if overlap is None:
            return
        most = min(self._call.frame_window, request.num_frames) - 4
        if most < 1:
            raise InvalidParameter("num_frames", f"num_frames must be at least 5, got {request.num_frames}")
        if not 1 <= overlap <= most or overlap % 4 != 1:
            raise InvalidParameter(
                f"extra_params.{OVERLAP}",
                f"{OVERLAP} must be a multiple of 4, plus 1, up to {most} with num_frames={request.num_frames}; "
                f"got {overlap}",
            )

    def check_frames(self, pipeline: Any, request: GenerationRequest) -> None:
        """See `PipelineAdapter.check`."""
        if self.family.makes == "image":
            super().check_frames(pipeline, request)
            return
        fixed = self._fixed_frames(pipeline)
        if fixed not in (0, request.num_frames):
            raise InvalidParameter(
                "num_frames", f"this model makes {fixed} frames, got num_frames={request.num_frames}"
            )
        multiple = _first(pipeline, FRAME_REDUCTIONS, 1)
        least = (self._call.least_latents - 1) * multiple + 1
        if request.num_frames < least:
            raise InvalidParameter("num_frames", f"num_frames must be at least {least}, got {request.num_frames}")
        if (tiles := fixed_tiles(pipeline.vae)) is not None:
            check_covered(tiles, request)
        elif (request.num_frames - 1) % multiple:
            below = (request.num_frames - 1) // multiple * multiple + 1
            raise InvalidParameter(
                "num_frames",
                f"num_frames must be a multiple of {multiple}, plus 1 (such as {below} or {below + multiple}), "
                f"got {request.num_frames}",
            )

    def small_size(self, pipeline: Any, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """See `PipelineAdapter.small_size`."""
        tiles = fixed_tiles(getattr(pipeline, "vae", None))
        if sizes := getattr(pipeline, "resolutions", []):
            width, height = min(sizes, key=math.prod)
            return size[0], height, width
        frames = self._fixed_frames(pipeline) or size[0]
        if only := only_size(getattr(pipeline, "transformer", None), _first(pipeline, REDUCTIONS, 8)):
            return frames, *only
        return tiles.size if tiles else (frames, *size[1:])

    def _fixed_frames(self, pipeline: Any) -> int:
        """The number of frames that its call, or the positions of its transformer, fix; 0: as requested."""
        config = getattr(getattr(pipeline, "transformer", None), "config", None)
        learned = getattr(config, "use_learned_positional_embeddings", False)  # it has others for other frames
        return self._call.fixed_frames or getattr(config, "sample_frames" if learned else "video_length", 0)

    def size_multiple(self, pipeline: Any) -> int:
        """See `PipelineAdapter.size_multiple`: the multiple to which the pipeline would round sizes.

        If it is too small, the pipeline's own check refuses the request.
        """
        patch = getattr(pipeline.transformer.config, "patch_size", None)
        side = patch[-1] if isinstance(patch, list | tuple) else patch
        processor = getattr(pipeline, "image_processor", None) or getattr(pipeline, "video_processor", None)
        rounds = getattr(getattr(processor, "config", None), "vae_scale_factor", 1)
        side = side if isinstance(side, int) else 1
        return math.lcm(rounds, _first(pipeline, REDUCTIONS, 8) * side * self._call.patches, self._call.pixels)

    def refuse(self, error: ValueError) -> None:
        """Turn an error of the pipeline's own check of its inputs into one for the caller.

        Raises:
            InvalidParameter: always; it names the parameter if the error does.
        """
        said = str(error)
        if "height" in said and "width" in said:
            raise InvalidParameter("size", said, "invalid_size") from error
        named = next(
            (name for name in ("negative_prompt", "prompt", "num_frames", "guidance_scale_2") if name in said), None
        )
        raise InvalidParameter(named, said) from error


ADAPTER = ClassicAdapter


def _first(pipeline: Any, names: tuple[str, ...], otherwise: int) -> int:
    return next((int(getattr(pipeline, name)) for name in names if hasattr(pipeline, name)), otherwise)
