"""The denoising of one request, step by step, over diffusers' modular pipelines.

`load_pipeline` reads an ordinary diffusers folder. A `Denoising` is one request in progress: `step()` until it is
done, then `finish()`. Called by `workers.rank`, on every rank alike.

A modular pipeline is a list of blocks that read and write one state: text encoder, latents, timesteps, the denoising
loop, decoder. We run the blocks before the loop, then the loop's body once per `step`, then the blocks behind it.
"""

import copy
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModularPipeline
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines import LoopSequentialPipelineBlocks, PipelineState
from PIL import Image

from deploy.check import MODULAR_PIPELINES, pipeline_class
from deploy.spec import ModelSpec
from sp_core.cfg_parallel import ParallelGuider
from sp_core.mesh import ParallelMesh
from workers.errors import InvalidParameter
from workers.messages import GenerationRequest
from workers.weights import load_transformer


def load_pipeline(model: ModelSpec, mesh: ParallelMesh) -> ModularPipeline:
    """Load a model folder onto this rank's device, its transformer parallelised over `mesh`.

    Raises:
        ValueError: the layout does not fit the model, or the folder's pipeline cannot be run step by step.
        OSError: the folder lacks a file.
    """
    kind = getattr(diffusers, MODULAR_PIPELINES[pipeline_class(Path(model.source))])
    pipeline: ModularPipeline = kind(pretrained_model_name_or_path=model.source)
    dtype = getattr(torch, model.torch_dtype)
    pipeline.register_components(transformer=load_transformer(Path(model.source) / "transformer", mesh, dtype))
    pipeline.load_components(dtype=dtype, use_safetensors=True, local_files_only=True)  # all that is not there yet
    pipeline.to(mesh.device)
    return pipeline


class Denoising:
    """One request in progress on this rank. Construction encodes the prompt and draws the initial latents.

    It owns its scheduler and guider: pipelines share theirs, and two requests on one scheduler break each other.

    Args:
        pipeline: the loaded model, shared by all requests.
        request: what to draw.
        mesh: the ranks; groups of its `cfg` axis share the branches of guidance.

    Raises:
        InvalidParameter: the model cannot do the size that was asked for.
    """

    @torch.no_grad()
    def __init__(self, pipeline: ModularPipeline, request: GenerationRequest, mesh: ParallelMesh) -> None:
        self.request = request
        guided = request.negative_prompt is not None and request.guidance_scale > 1  # as the classic pipeline decides
        self._pipeline = copy.copy(pipeline)
        self._pipeline.scheduler = copy.deepcopy(pipeline.scheduler)
        guider = ClassifierFreeGuidance(guidance_scale=request.guidance_scale, enabled=guided)
        cfg = mesh.axis("cfg")
        self._pipeline.guider = ParallelGuider(guider, cfg) if cfg.size > 1 else guider

        blocks, inputs = _plan_blocks(pipeline, request)
        self._state = PipelineState()
        for name, value in inputs.items():
            self._state.set(name, value)
        loop_at = next(i for i, block in enumerate(blocks) if isinstance(block, LoopSequentialPipelineBlocks))
        self._loop, self._behind = blocks[loop_at], blocks[loop_at + 1 :]
        for block in blocks[:loop_at]:
            self._run(block)
        _forget_full_masks(self._state)
        self._body = self._loop.get_block_state(self._state)
        self._body.additional_cond_kwargs = {}
        self._body.num_warmup_steps = 0
        self._steps_done = 0

    @property
    def total_steps(self) -> int:
        """Steps from noise to picture."""
        return len(self._body.timesteps)

    @property
    def done(self) -> bool:
        """Whether all steps are done and `finish` may follow."""
        return self._steps_done == self.total_steps

    @property
    def latents(self) -> torch.Tensor:
        """The latents as they stand, packed: `(n, tokens, channels)`."""
        latents: torch.Tensor = self._body.latents
        return latents

    @torch.no_grad()
    def step(self) -> None:
        """One denoising step: a collective of all ranks."""
        i = self._steps_done
        _, self._body = self._loop.loop_step(self._pipeline, self._body, i=i, t=self._body.timesteps[i])
        self._steps_done += 1
        if self.latents.is_cuda:
            torch.cuda.synchronize()  # a step is over when the device says so

    @torch.no_grad()
    def finish(self) -> list[Image.Image]:
        """Decode the latents. No collective: the rank that reports does it alone."""
        self._loop.set_block_state(self._state, self._body)
        for block in self._behind:
            self._run(block)
        images: list[Image.Image] = self._state.get("images")
        return images

    def _run(self, block: Any) -> None:
        _, self._state = block(self._pipeline, self._state)


def _plan_blocks(pipeline: ModularPipeline, request: GenerationRequest) -> tuple[list[Any], dict[str, Any]]:
    """The blocks that this request runs through, in order, and the values they start from."""
    given = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.num_inference_steps,
        "num_images_per_prompt": request.n,
        "generator": [torch.Generator().manual_seed(request.seed + i) for i in range(request.n)],
        "output_type": "pil",
    }
    _check_size(pipeline, request)
    workflow = pipeline.blocks.get_execution_blocks(**given)
    inputs = {parameter.name: parameter.default for parameter in workflow.inputs if parameter.name}
    return list(workflow.sub_blocks.values()), inputs | given


def _check_size(pipeline: ModularPipeline, request: GenerationRequest) -> None:
    multiple = pipeline.vae_scale_factor * 2  # the VAE's reduction, times the transformer's patch of 2
    for param, value in (("width", request.width), ("height", request.height)):
        if value % multiple:
            raise InvalidParameter("size", f"{param} must be a multiple of {multiple}, got {value}", "invalid_size")


def _forget_full_masks(state: PipelineState) -> None:
    """Prompts without padding need no mask; attention is faster without one. The classic pipeline does the same."""
    for name in ("prompt_embeds_mask", "negative_prompt_embeds_mask"):
        mask = state.get(name)
        if mask is not None and bool(mask.all()):
            state.set(name, None)
