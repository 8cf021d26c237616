"""What is peculiar to each pipeline when its modular twin is run step by step: inputs, guidance, sizes.

diffusers' modular pipelines differ from one another in names, and from its classic pipelines in when and how strongly
they guide; a recipe gives the classic pipeline's answer. `workers.model.denoising` asks `RECIPES`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.guiders import ClassifierFreeGuidance

from deploy.pipelines import PIPELINES, PipelineFamily
from workers.errors import InvalidParameter
from workers.messages import GenerationRequest


class PipelineAdapter:
    """How a pipeline of pictures is run; others change what they must.

    Attributes:
        count_input: name of the input that says how many pictures or videos.
        output: name of what the last block puts out.
        rounds_timestep: the modular pipeline rounds the timestep to the weights' dtype, the classic one does not.
    """

    count_input = "num_images_per_prompt"
    output = "images"
    rounds_timestep = False

    def __init__(self, kind: PipelineFamily) -> None:
        self.kind = kind

    def guided(self, request: GenerationRequest) -> bool:
        """Whether the request is evaluated with and without its prompt."""
        return self.kind.branches(request.guidance_scale, request.negative_prompt) > 1

    def guiders(self, request: GenerationRequest) -> dict[str, Any]:
        """The guiders by component name."""
        return {"guider": self._guider(request, request.guidance_scale)}

    def guiders_to_encode(self, request: GenerationRequest) -> dict[str, Any]:
        """Those that the text encoder asks whether to make a second branch."""
        return self.guiders(request)

    def inputs(self, request: GenerationRequest) -> dict[str, Any]:
        """Inputs of the pipeline that not all pipelines have."""
        return {"negative_prompt": request.negative_prompt}

    def check(self, pipeline: Any, request: GenerationRequest) -> None:
        """Whether the model can do what is asked.

        Raises:
            InvalidParameter: it cannot.
        """
        multiple = self.size_multiple(pipeline)
        for param, value in (("width", request.width), ("height", request.height)):
            if value % multiple:
                raise InvalidParameter("size", f"{param} must be a multiple of {multiple}, got {value}", "invalid_size")
        self.check_frames(pipeline, request)
        if (request.output_format == "mp4") != (self.output == "videos"):
            allowed = "mp4" if self.output == "videos" else "png, jpeg, webp"
            raise InvalidParameter(
                "output_format", f"this model makes {self.output} ({allowed}), got {request.output_format!r}"
            )

    def check_frames(self, pipeline: Any, request: GenerationRequest) -> None:
        """See `check`."""
        if request.num_frames != 1:
            raise InvalidParameter("num_frames", f"this model makes pictures, got num_frames={request.num_frames}")

    def _guider(self, request: GenerationRequest, scale: float, **options: Any) -> ClassifierFreeGuidance:
        return ClassifierFreeGuidance(guidance_scale=scale, enabled=self.guided(request), **options)

    def size_multiple(self, pipeline: Any) -> int:
        """Pixels of which width and height must be multiples: the VAE's reduction, times the transformer's patch."""
        multiple: int = 2 * pipeline.vae_scale_factor
        return multiple


class Flux(PipelineAdapter):
    """Guidance is distilled into the transformer, which takes the scale as a number: there is no second branch."""

    def guiders(self, request: GenerationRequest) -> dict[str, Any]:
        """None."""
        return {}

    def inputs(self, request: GenerationRequest) -> dict[str, Any]:
        """The scale."""
        return {"guidance_scale": request.guidance_scale}

    def check(self, pipeline: Any, request: GenerationRequest) -> None:
        """See `PipelineAdapter.check`."""
        super().check(pipeline, request)
        if request.negative_prompt:
            raise InvalidParameter("negative_prompt", "this model is not guided by a negative prompt; leave it out")


class Wan(PipelineAdapter):
    """Guided without a negative prompt as well; from version 2.2 on with two transformers, each with its scale."""

    count_input = "num_videos_per_prompt"
    output = "videos"
    rounds_timestep = True

    def guiders(self, request: GenerationRequest) -> dict[str, Any]:
        """One for each transformer."""
        second = request.guidance_scale if request.guidance_scale_2 is None else request.guidance_scale_2
        scales = {"guider": request.guidance_scale, "guider_2": second}
        return {name: self._guider(request, scale) for name, scale in scales.items()}

    def guiders_to_encode(self, request: GenerationRequest) -> dict[str, Any]:
        """A real one: the encoder fails without a second branch, which the loop then asks for but does not use."""
        return {"guider": ClassifierFreeGuidance()}

    def inputs(self, request: GenerationRequest) -> dict[str, Any]:
        """The number of frames."""
        return {"negative_prompt": request.negative_prompt, "num_frames": request.num_frames}

    def check_frames(self, pipeline: Any, request: GenerationRequest) -> None:
        """See `PipelineAdapter.check`."""
        multiple = pipeline.vae_scale_factor_temporal
        if (request.num_frames - 1) % multiple:
            below = (request.num_frames - 1) // multiple * multiple + 1
            raise InvalidParameter(
                "num_frames",
                f"num_frames must be a multiple of {multiple}, plus 1 (such as {below} or {below + multiple}), "
                f"got {request.num_frames}",
            )

    def size_multiple(self, pipeline: Any) -> int:
        """See `PipelineAdapter.size_multiple`."""
        multiple: int = pipeline.vae_scale_factor_spatial * pipeline.patch_size_spatial
        return multiple


class ZImage(PipelineAdapter):
    """Guided from a scale of 0 on, without a negative prompt as well: prompt + scale x (prompt - negative)."""

    rounds_timestep = True

    def guiders(self, request: GenerationRequest) -> dict[str, Any]:
        """The formula of the classic pipeline."""
        return {"guider": ClassifierFreeGuidance(guidance_scale=request.guidance_scale, use_original_formulation=True)}


PECULIAR: Mapping[str, type[PipelineAdapter]] = {"FluxPipeline": Flux, "WanPipeline": Wan, "ZImagePipeline": ZImage}

RECIPES = {name: PECULIAR.get(name, PipelineAdapter)(kind) for name, kind in PIPELINES.items()}
"""By the name in `deploy.pipelines.PIPELINES`."""


def keep_timestep_exact(transformer: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give the transformer inputs of its weights' dtype, but the timestep as it is, and put out float32.

    In bfloat16 a timestep of 999 becomes 1000, which is visible. The modular pipelines that round it are run in
    float32, and this hook rounds what must be rounded. The guider then combines branches in float32.
    """

    def cast(value: Any, to: torch.dtype) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(to) if value.is_floating_point() else value
        return [cast(item, to) for item in value] if isinstance(value, list) else value

    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {k: v if k in ("t", "timestep") else cast(v, dtype) for k, v in kwargs.items()}

    def after(_module: Any, _args: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(cast(value, torch.float32) for value in output)

    transformer.register_forward_pre_hook(before, with_kwargs=True)
    transformer.register_forward_hook(after)
