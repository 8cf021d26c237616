"""The denoising of one request, step by step, over diffusers' modular pipelines.

A `Denoising` is one request in progress on one rank; `workers.gang.rank` calls its stages on all ranks alike. A modular
pipeline is a list of blocks that read and write one state: text encoder, latents, timesteps, the denoising loop,
decoder. We run the blocks before the loop, then the loop's body once per `step`, then the blocks behind it.
"""

import copy
import io
from pathlib import Path
from typing import Any

import torch
from diffusers import ModularPipeline
from diffusers.modular_pipelines import LoopSequentialPipelineBlocks, PipelineState

from sp_core import collectives
from sp_core.cfg_parallel import ParallelGuider
from sp_core.tile_parallel import TileParallelVAE, TilesHandedOver
from workers.errors import InvalidParameter
from workers.messages import GenerationRequest
from workers.model.adapters.lookup import find_adapter
from workers.model.loader import LoadedModel, encodes_here, is_encoder


class Denoising:
    """One request in progress: `encode`, `share_encoded`, `prepare`, `step` until `done`, `join_pictures`, `finish`.

    It owns its scheduler and guider: pipelines share theirs, and two requests on one scheduler break each other.
    With several groups of ranks for the branches of guidance, a request without guidance has its pictures shared out
    over the groups instead.

    Args:
        loaded: the model, shared by all requests.
        request: what to draw.

    Raises:
        InvalidParameter: the model cannot do what was asked for.
    """

    def __init__(self, loaded: LoadedModel, request: GenerationRequest) -> None:
        pipeline, mesh, model = loaded.pipeline, loaded.mesh, loaded.spec
        self.request = request
        self._adapters = loaded.adapters
        self._check_adapters()
        self._adapter = find_adapter(Path(model.source))
        self._adapter.check(pipeline, request)
        self._mesh, self._cfg = mesh, mesh.axis("cfg")
        self._pipeline = copy.copy(pipeline)
        self._pipeline.scheduler = copy.deepcopy(pipeline.scheduler)
        self._guided = self._adapter.guided(request)
        self._set_guiders(self._adapter.guiders_to_encode(request))
        self._splits_pictures = not self._guided and self._cfg.size > 1
        self._encodes = encodes_here(model, mesh)
        self._shares_encoded = model.text_encoder == "rank0" and mesh.degrees.world_size > 1
        self._decodes = mesh.axis("gang").rank == 0
        size = request.width * request.height * request.num_frames
        if size > model.vae_tiling_above and hasattr(pipeline.vae, "use_tiling"):
            together = model.vae == "all"
            self._pipeline.vae = TileParallelVAE(pipeline.vae, mesh if together else None)
            self._decodes = self._decodes or together
        self._plan(pipeline)
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
        """The latents as they stand: `(pictures of this rank, ...)`, packed or not as the model has them."""
        latents: torch.Tensor = self._body.latents
        return latents

    @torch.no_grad()
    def encode(self) -> None:
        """Encode the prompts, where the encoders are."""
        self._encoded: dict[str, Any] = {}
        if self._encodes:
            before = dict(self._state.values)
            for block in self._encoders:
                self._run(block)
            self._encoded = {n: v for n, v in self._state.values.items() if before.get(n) is not v}

    def share_encoded(self) -> None:
        """Give what rank 0 has encoded to the ranks without encoders. A collective of all ranks."""
        if not self._shares_encoded:
            return
        packed = io.BytesIO()
        if self._encodes:
            torch.save((self._encoded, self._state.kwargs_mapping), packed)
        received = self._mesh.broadcast(packed.getvalue() if self._encodes else None)
        if not self._encodes:
            values, mapping = torch.load(io.BytesIO(received), map_location=self._mesh.device, weights_only=False)
            self._state.values.update(values)
            self._state.kwargs_mapping.update(mapping)

    @torch.no_grad()
    def prepare(self) -> None:
        """Draw the initial latents, set the timesteps."""
        self._set_guiders(self._adapter.guiders(self.request))
        for block in self._ahead:
            self._run(block)
        _forget_full_masks(self._state)
        self._body = self._loop.get_block_state(self._state)
        self._body.additional_cond_kwargs = {}
        self._body.num_warmup_steps = 0
        if self._adapter.rounds_timestep:
            self._body.dtype = torch.float32  # see `workers.model.adapters.pipeline_adapter.keep_timestep_exact`

    @torch.no_grad()
    def step(self) -> None:
        """One denoising step: a collective of all ranks."""
        self._activate_adapters()
        i = self._steps_done
        _, self._body = self._loop.loop_step(self._pipeline, self._body, i=i, t=self._body.timesteps[i])
        self._steps_done += 1
        if self.latents.is_cuda:
            torch.cuda.synchronize()  # a step is over when the device says so

    def join_pictures(self) -> None:
        """Bring the latents of all pictures to all ranks, where groups have shared them out. A collective then."""
        if self._splits_pictures:
            parts = collectives.all_gather_equal(self.latents, self._cfg)
            self._body.latents = torch.cat(parts)[: self.request.n]

    @torch.no_grad()
    def finish(self) -> list[Any]:
        """Decode the latents: on rank 0 pictures, or lists of frames for videos; nothing on the others.

        A collective if tiles are shared.

        Raises:
            PeerTileFailed: another rank could not decode its tiles.
        """
        self._loop.set_block_state(self._state, self._body)
        if not self._decodes:
            return []
        try:
            for block in self._behind:
                self._run(block)
        except TilesHandedOver:
            return []
        outputs: list[Any] = self._state.get(self._adapter.output)
        return outputs

    def _check_adapters(self) -> None:
        known = sorted({name for adapters in self._adapters.values() for name in adapters.names})
        for name, _ in self.request.loras:
            if name not in known:
                raise InvalidParameter(
                    "loras", f"the model has no adapter {name!r}; it has: {', '.join(known) or 'none'}", "unknown_lora"
                )

    def _activate_adapters(self) -> None:
        """Those of this request and no others; nothing to do if they are active from the step before."""
        for adapters in self._adapters.values():
            adapters.activate({name: scale for name, scale in self.request.loras if name in adapters.names})

    def _set_guiders(self, guiders: dict[str, Any]) -> None:
        for name, guider in guiders.items():
            parallel = self._guided and self._cfg.size > 1
            setattr(self._pipeline, name, ParallelGuider(guider, self._cfg) if parallel else guider)

    def _plan(self, pipeline: ModularPipeline) -> None:
        """The blocks that this request runs through, in order, and the values they start from."""
        request, seeds = self.request, self._seeds()
        given = {
            "prompt": request.prompt,
            "width": request.width,
            "height": request.height,
            "num_inference_steps": request.num_inference_steps,
            self._adapter.count_input: len(seeds),
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "output_type": "pil",
            **self._adapter.inputs(request),
        }
        workflow = pipeline.blocks.get_execution_blocks(**given)
        self._state = PipelineState()
        for name, value in ({p.name: p.default for p in workflow.inputs if p.name} | given).items():
            self._state.set(name, value)
        blocks = list(workflow.sub_blocks.values())
        loop_at = next(i for i, block in enumerate(blocks) if isinstance(block, LoopSequentialPipelineBlocks))
        encoded_at = 1 + max(i for i, block in enumerate(blocks[:loop_at]) if _encodes(block))
        self._encoders, self._ahead = blocks[:encoded_at], blocks[encoded_at:loop_at]
        self._loop, self._behind = blocks[loop_at], blocks[loop_at + 1 :]

    def _seeds(self) -> list[int]:
        """Of this rank's pictures: all, or those of its group. Groups have equally many; the last may repeat some."""
        request = self.request
        if not self._splits_pictures:
            return [request.seed + i for i in range(request.n)]
        each = -(-request.n // self._cfg.size)
        first = self._cfg.rank * each
        return [request.seed + min(first + i, request.n - 1) for i in range(each)]

    def _run(self, block: Any) -> None:
        _, self._state = block(self._pipeline, self._state)


def _encodes(block: Any) -> bool:
    return any(is_encoder(component.name) for component in block.expected_components)


def _forget_full_masks(state: PipelineState) -> None:
    """Prompts without padding need no mask; attention is faster without one. The classic pipeline does the same."""
    for name in ("prompt_embeds_mask", "negative_prompt_embeds_mask"):
        mask = state.get(name)
        if mask is not None and bool(mask.all()):
            state.set(name, None)
