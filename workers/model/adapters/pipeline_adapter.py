"""How a diffusers pipeline is run step by step: inputs, guidance, sizes.

diffusers' modular pipelines differ in names from one another, and from its classic pipelines in when and how strongly
they guide. An adapter gives the classic pipeline's answer. `workers.model.denoising` calls the adapter of the model's
family, a subclass of the one here, which fits pipelines of pictures.
"""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import diffusers
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines import InputParam

from deploy.families.family import PipelineFamily
from deploy.model_spec import Task
from deploy.tasks import tasks_of
from workers.errors import InvalidParameter
from workers.messages import GenerationRequest
from workers.model.picture_inputs import EncodePictures, SamplePictures, read, with_pictures

EXTRA_TYPES: Mapping[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
LARGEST_EXTRA = 10_000
LONGEST_EXTRA = 32_000
"""Characters of a text parameter, as many as a prompt may have."""


class PipelineAdapter:
    """How a pipeline of pictures is run.

    Args:
        family: the facts about it that need no torch.

    Attributes:
        count_input: the name of the input for the number of pictures or videos.
        output: the name of the last block's output.
        most_tokens: by the component that makes them, how many tokens of a prompt with its template the pipeline
            passes on, where it cuts them itself.
        extra_kinds: the parameters of this pipeline alone that a request may set, each with its Python type.
        has_previews: whether its latents are cells of a picture, or packed like Qwen-Image's.
        vae_of_videos: whether its VAE takes pictures as videos of one frame.
        rounds_timestep: whether the modular pipeline rounds the timestep to the weights' dtype; the classic one does
            not.
    """

    count_input = "num_images_per_prompt"
    output = "images"
    most_tokens: Mapping[str, int] = MappingProxyType({})
    extra_kinds: Mapping[str, str] = MappingProxyType({})
    has_previews = True
    vae_of_videos = False
    rounds_timestep = False

    def __init__(self, family: PipelineFamily) -> None:
        self.family = family

    def guided(self, request: GenerationRequest) -> bool:
        """Whether the request is evaluated both with and without its prompt."""
        return self.family.branches(request.guidance_scale, request.negative_prompt) > 1

    def guiders(self, request: GenerationRequest) -> dict[str, Any]:
        """The guiders by component name."""
        return {"guider": self.guider(request, request.guidance_scale)}

    def guiders_to_encode(self, request: GenerationRequest) -> dict[str, Any]:
        """The guiders that the text encoder asks whether to encode a second branch."""
        return self.guiders(request)

    def inputs(self, request: GenerationRequest) -> dict[str, Any]:
        """Inputs of the pipeline that not all pipelines have."""
        return {"negative_prompt": request.negative_prompt}

    def pictures(self, request: GenerationRequest, here: bool) -> dict[str, Any]:
        """Inputs of the pipeline that are pictures, by their names in the pipeline.

        Args:
            request: the request that brings them.
            here: whether this rank reads them; on others they only decide which blocks run.
        """
        return {self.family.begins_with[each.role]: read(each) if here else True for each in request.inputs}

    def blocks(self, blocks: dict[str, Any], request: GenerationRequest) -> list[Any]:
        """The blocks that run for a request, from those of the modular pipeline.

        Args:
            blocks: by name, in order.
            request: the request.
        """
        if not request.inputs:
            return list(blocks.values())
        dtype = torch.float32 if self.rounds_timestep else None
        return with_pictures(blocks, EncodePictures(self.vae_of_videos), SamplePictures(self.pack, dtype))

    def pack(self, pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
        """Latents `(B, C, h, w)`, or `(B, C, 1, h, w)` from a VAE of videos, in the form that the transformer takes."""
        return latents

    def defaults(self, request: GenerationRequest, inputs: Iterable[InputParam]) -> dict[str, Any]:
        """Defaults of the pipeline's inputs: those of the classic pipeline, if it has them.

        The modular pipeline has others: Qwen-Image's reads 1024 tokens of a prompt, not 512.
        """
        name = self.family.with_pictures.get(task_of(request, self.family), self.family.pipeline)
        classic = inspect.signature(getattr(diffusers, name).__call__).parameters
        return {p.name: classic[p.name].default if p.name in classic else p.default for p in inputs if p.name}

    def settled(self, pipeline: Any, request: GenerationRequest) -> GenerationRequest:
        """The request with a number of frames that the model makes: a lower one, if the caller did not choose it.

        All ranks find the same.

        Args:
            pipeline: the model's pipeline, which knows the reduction of frames.
            request: as it was accepted, by a gateway that does not know the model.
        """
        if not request.frames_chosen:
            return request
        fewer = (replace(request, num_frames=count) for count in range(request.num_frames, 0, -1))
        return next((each for each in fewer if self._makes_frames(pipeline, each)), request)

    def _makes_frames(self, pipeline: Any, request: GenerationRequest) -> bool:
        try:
            self.check_frames(pipeline, request)
        except InvalidParameter:
            return False
        return True

    def check(self, pipeline: Any, request: GenerationRequest) -> None:
        """Reject a request that the model cannot run.

        Raises:
            InvalidParameter: names the parameter.
        """
        multiple = self.size_multiple(pipeline)
        for param, value in (("width", request.width), ("height", request.height)):
            if value % multiple:
                raise InvalidParameter("size", f"{param} must be a multiple of {multiple}, got {value}", "invalid_size")
        self.check_frames(pipeline, request)
        self.check_pictures(pipeline, request)
        if request.true_cfg and self.family.guided_above is None:
            raise InvalidParameter(
                "true_cfg_scale",
                f"{request.model!r} evaluates one branch, so it has no true_cfg_scale; its own is guidance_scale",
            )
        for name, value in request.extra_params.items():
            _check_extra(name, value, self.extra_kinds, request.model)
        if request.previews and not self.has_previews:
            raise InvalidParameter("partial_images", f"{request.model!r} has no previews; ask for none")
        if (request.output_format == "mp4") != (self.output == "videos"):
            allowed = "mp4" if self.output == "videos" else "png, jpeg, webp"
            raise InvalidParameter(
                "output_format", f"this model makes {self.output} ({allowed}), got {request.output_format!r}"
            )

    def check_frames(self, pipeline: Any, request: GenerationRequest) -> None:
        """See `check`."""
        if request.num_frames != 1:
            raise InvalidParameter("num_frames", f"this model makes pictures, got num_frames={request.num_frames}")

    def check_pictures(self, pipeline: Any, request: GenerationRequest) -> None:
        """See `check`."""
        self._check_roles(request)
        if request.inputs and not hasattr(pipeline.scheduler, "scale_noise"):
            kind = type(pipeline.scheduler).__name__
            raise InvalidParameter(
                "image", f"{request.model!r} begins with noise alone: its {kind} adds none to a picture"
            )

    def _check_roles(self, request: GenerationRequest) -> None:
        """Reject inputs that the model does not take, and requests without an input that it needs."""
        family, roles = self.family, [each.role for each in request.inputs]
        task, lacking = task_of(request, family), [role for role in family.needs if role not in roles]
        surplus = [role for role in roles if role not in family.begins_with]
        if task not in family.tasks:
            able = ", ".join(family.tasks)
            raise InvalidParameter(
                (lacking or roles[-1:])[0], f"{request.model!r} is not for {task}; it is for {able}", "wrong_task"
            )
        for role in lacking + surplus:
            takes = ", ".join(n if n in family.needs else f"{n} (or none)" for n in family.begins_with)
            raise InvalidParameter(role, f"{request.model!r} takes {takes}; got {', '.join(roles)}")
        if roles.count("image") > 1 and not family.takes_several:
            raise InvalidParameter("image", f"{request.model!r} takes one image, got {roles.count('image')}")
        if request.strength is not None and not family.takes_strength:
            raise InvalidParameter("strength", f"{request.model!r} always does all steps; leave strength out")

    def guider(self, request: GenerationRequest, scale: float, **options: Any) -> ClassifierFreeGuidance:
        """Classifier-free guidance, turned off if the classic pipeline evaluates only one branch."""
        return ClassifierFreeGuidance(guidance_scale=scale, enabled=self.guided(request), **options)

    def small_size(self, pipeline: Any, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """A size that the model can make, for its self-test.

        Args:
            pipeline: the model's pipeline.
            size: the preferred frames, height and width.
        """
        return size

    def size_multiple(self, pipeline: Any) -> int:
        """The number of pixels that must divide width and height: the VAE's reduction times the transformer's patch."""
        multiple: int = 2 * pipeline.vae_scale_factor
        return multiple


def _check_extra(name: str, value: Any, kinds: Mapping[str, str], model: str) -> None:
    """Reject a parameter that a pipeline does not have, or a value of another type."""
    if name not in kinds:
        has = f"only these extra parameters: {', '.join(kinds)}" if kinds else "no extra parameters"
        raise InvalidParameter(f"extra_params.{name}", f"{model!r} has {has}; leave out {name!r}")
    if not isinstance(value, EXTRA_TYPES[kinds[name]]) or (isinstance(value, bool) and kinds[name] != "bool"):
        raise InvalidParameter(f"extra_params.{name}", f"{name} must be a {kinds[name]}, got {value!r:.80}")
    if isinstance(value, int | float) and not abs(value) <= LARGEST_EXTRA:
        raise InvalidParameter(
            f"extra_params.{name}", f"{name} must be a number up to {LARGEST_EXTRA}, got {value!r:.80}"
        )
    if isinstance(value, str) and len(value) > LONGEST_EXTRA:
        raise InvalidParameter(f"extra_params.{name}", f"{name} has {len(value)} characters; at most {LONGEST_EXTRA}")


def task_of(request: GenerationRequest, family: PipelineFamily) -> Task:
    """The task of a request, by its inputs."""
    able = tasks_of([each.role for each in request.inputs], family.makes == "video")
    return next((task for task in able if task in family.tasks), able[0])


def keep_timestep_exact(transformer: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast the transformer's inputs to its weights' dtype, except the timestep, and its outputs to float32.

    In bfloat16 a timestep of 999 becomes 1000, which is visible. Modular pipelines that round the timestep run in
    float32, and this hook casts the other inputs. The guider then combines branches in float32.
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
