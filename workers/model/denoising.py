"""The denoising of one request, step by step, over diffusers' modular pipelines.

A `Denoising` is one request in progress on one rank; `workers.gang.rank` calls its stages on all ranks alike. For
pipelines without a modular form, `workers.model.classic_denoising` has a subclass. A modular pipeline is a list of
blocks that read and write one state: text encoder, latents, timesteps, the denoising loop, decoder. We run the blocks
before the loop, then the loop's body once per `step`, then the blocks after it.

Two things hold between steps, so that a request can be moved, paused or resumed there: every rank has its whole
latents, and all state of a request is in its `Denoising`.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.modular_pipelines import BlockState, PipelineState

from sp_core import collectives
from sp_core.shared_modulation import same_timestep
from sp_core.tile_parallel import TileParallelVAE, TilesHandedOver, can_share, can_tile
from sp_core.traffic import is_sampled
from workers.errors import UNKNOWN_LORA, InvalidParameter
from workers.messages import GenerationRequest
from workers.model.adapters.lookup import find_adapter
from workers.model.diffusers_internals import drop_kept_features
from workers.model.guidance import Guidance
from workers.model.handover import packed, state_of, unpacked
from workers.model.loader import LoadedModel, encodes_here
from workers.model.media import what_differs
from workers.model.picture_shares import decode_shared
from workers.model.previews import Pixels, Previews, check_predicts_clean, example
from workers.model.request_scheduler import scheduler_of
from workers.model.shared_encoders import DRAWN
from workers.model.step_ends import StepEnd, StepEnds
from workers.model.truncation import watch_tokenizers
from workers.model.workflow import Workflow


class Denoising:
    """One request in progress: `encode`, `share_encoded`, `prepare`, all `steps`, `join_pictures`, `finish`.

    It owns its scheduler and guiders: a pipeline has one of each, and two requests on one scheduler break each other.
    If groups of ranks compute the branches of guidance, they divide the pictures of a request without guidance instead.
    On one group the branches share a forward, if the deployment and the prompts allow it.

    Args:
        loaded: the model, shared by all requests.
        request: what to draw.
        encoded: the result of `encoded` for the request on a rank that encodes; replaces `encode` and `share_encoded`.
            None: the ranks encode it together.

    Attributes:
        request: what to draw, with the number of frames that the model makes.

    Raises:
        InvalidParameter: the model cannot do what was asked for.
    """

    def __init__(self, loaded: LoadedModel, request: GenerationRequest, encoded: bytes | None = None) -> None:
        pipeline, mesh, model = loaded.pipeline, loaded.mesh, loaded.spec
        self._vae = getattr(pipeline, "vae", None)  # None if the model denoises pixels
        self._colors = loaded.colors
        self._accepted = request
        self._adapter = find_adapter(Path(model.source))
        self.request = request = self._adapter.settled(pipeline, request)
        self._loras = loaded.adapters
        self._check_loras()
        self._adapter.check(pipeline, request)
        self._mesh, self._cfg = mesh, mesh.axis("cfg")
        self._pipeline = copy.copy(pipeline)
        self._guided = self._adapter.guided(request)
        transformers = [part for name, part in pipeline.components.items() if name in loaded.adapters]
        self._guidance = Guidance(model, request, transformers, mesh, self._guided)
        self._set_guiders(self._adapter.guiders_to_encode(request))
        self._splits_pictures = not self._guided and self._cfg.size > 1
        self._generators = [torch.Generator().manual_seed(seed) for seed in self._seeds()]  # on CPU: alike everywhere
        self._shared_scheduler = pipeline.scheduler
        self._pipeline.scheduler = self._scheduler_of(self._generators)
        # Not all ranks have the VAE that reads pictures, and samples without a seed differ between ranks.
        alone = model.text_encoder == "rank0" or bool(request.inputs) or hasattr(pipeline, DRAWN)
        self._encodes = encoded is None and encodes_here(model, mesh) and (mesh.axis("gang").rank == 0 or not alone)
        self._warnings: list[str] = []
        self._tokenizers = watch_tokenizers(self._pipeline, self._adapter.most_tokens, self._warnings)
        self._read_elsewhere = 0
        self._shares_encoded = alone and mesh.degrees.world_size > 1
        self._decodes = mesh.axis("gang").rank == 0
        size = request.width * request.height * request.num_frames
        # In an elastic gang a rank does not wait for the other ranks of its request to decode: it has other requests.
        together = model.vae == "all" and mesh.degrees.world_size > 1 and model.elastic is None
        self._tiles = size > model.vae_tiling_above and can_tile(self._vae)
        self._shares_decoding = together and request.n > 1 and not self._tiles
        self._previews: Previews | None = None
        if request.previews:
            check_predicts_clean(pipeline.scheduler, request)
            if mesh.axis("gang").rank == 0:
                self._previews = Previews(request, self._pipeline.scheduler, loaded.colors, self._warnings)
        if self._tiles:
            shared = together and can_share(self._vae)
            self._pipeline.vae = TileParallelVAE(self._vae, mesh if shared else None)
            self._decodes = self._decodes or shared
        self._timesteps: list[float] = []  # from `prepare` on
        self._steps_done = 0
        self._held = False
        self.prediction: torch.Tensor  # of the latest step, all branches combined
        self._ends: StepEnds | None = None  # from the first step here
        self._set_up()
        if encoded is not None:
            values, warnings, self._read_elsewhere = unpacked(encoded, self._mesh.device)
            self._receive(values)
            self._warnings += warnings

    def _set_up(self) -> None:
        """Split the blocks at the loop, and make their state."""
        pipeline, given = self._pipeline, self._inputs()
        blocks = pipeline.blocks.get_execution_blocks(**given)
        self._workflow = Workflow.split(tuple(self._adapter.blocks(blocks.sub_blocks, self.request)))
        self._state = PipelineState()  # what the blocks read and write
        for name, value in (self._adapter.defaults(self.request, blocks.inputs) | given).items():
            self._state.set(name, value)
        self._encoded: dict[str, Any] = {}  # what `encode` added to the state
        self._loop_state = BlockState()  # what the loop's body reads and writes, latents included; from `prepare` on

    @property
    def guidance(self) -> str:
        """How the steps so far evaluated their branches, and why; empty: the request has one branch."""
        return str(self._guidance)

    @property
    def total_steps(self) -> int:
        """Steps from noise to picture."""
        return len(self._timesteps)

    @property
    def steps_done(self) -> int:
        """Steps that were begun, here or elsewhere."""
        return self._steps_done

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self._steps_done == self.total_steps

    @property
    def latents(self) -> torch.Tensor:
        """The latents after the latest step: `(pictures of this rank, ...)`, packed if the model packs them."""
        latents: torch.Tensor = self._loop_state.latents
        return latents

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings for the caller, on ranks that encode: which prompts were cut."""
        return tuple(dict.fromkeys(self._warnings))

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts that the text encoders of this rank have read."""
        return self._read_elsewhere + sum(each.tokens_read for each in self._tokenizers)

    @torch.no_grad()
    def encode(self) -> None:
        """Encode the prompts, on ranks that have the encoders."""
        if self._encodes:
            before = dict(self._state.values)
            self._run(self._workflow.encode)
            self._encoded = {n: v for n, v in self._state.values.items() if before.get(n) is not v}

    def share_encoded(self) -> None:
        """Send rank 0's embeddings to the ranks without encoders. A collective of all ranks, if there are any."""
        if not self._shares_encoded:
            return
        received = self._mesh.broadcast(packed(self._what_was_encoded()) if self._encodes else None)
        if not self._encodes:
            self._receive(unpacked(received, self._mesh.device))

    def encoded(self) -> bytes:
        """The results and warnings of `encode` here, for a `Denoising` of the request on any ranks."""
        return packed((self._what_was_encoded(), list(self._warnings), self.prompt_tokens))

    def _what_was_encoded(self) -> Any:
        return self._encoded, self._state.kwargs_mapping

    def _receive(self, encoded: Any) -> None:
        values, mapping = encoded
        self._state.values.update(values)
        self._state.kwargs_mapping.update(mapping)

    def progress(self) -> bytes:
        """The state that the steps have changed so far, for `resume` on any ranks. Waits for the device."""
        generators = [generator.get_state() for generator in self._generators]
        return packed((self._steps_done, self.latents.cpu(), state_of(self._pipeline.scheduler), generators))

    def resume(self, progress: bytes) -> None:
        """Continue where other ranks, or these, have stopped. Call it after `prepare`, before the first step here.

        Args:
            progress: the result of `progress` there.
        """
        device = self._mesh.device
        self._steps_done, latents, scheduler, generators = unpacked(progress, device, keep_on_host=True)
        vars(self._pipeline.scheduler).update(scheduler)
        for generator, state in zip(self._generators, generators, strict=True):
            generator.set_state(state)
        self._loop_state.latents = latents.to(device)
        self._ends = None

    @torch.no_grad()
    def prepare(self) -> None:
        """Draw the initial latents, set the timesteps."""
        self._set_guiders(self._adapter.guiders(self.request))
        self._run(self._workflow.prepare)
        if not self.request.inputs:  # else the blocks have set where the steps begin
            # Like classic pipelines; without it the scheduler looks up the step by its timestep.
            self._pipeline.scheduler.set_begin_index(0)
        _drop_full_masks(self._state)
        loop_state = self._workflow.loop.get_block_state(self._state)
        loop_state.additional_cond_kwargs = {}  # the loop's own call, which we bypass, would set this and the next
        loop_state.num_warmup_steps = 0
        loop_state.num_inference_steps = len(loop_state.timesteps)  # guiders count these; a scheduler may add some
        if self._adapter.rounds_timestep:
            loop_state.dtype = torch.float32  # see `workers.model.adapters.pipeline_adapter.keep_timestep_exact`
        self._timesteps = loop_state.timesteps.tolist()  # for the host, once: a step must not wait for its own
        self._loop_state = loop_state

    def guide_here(self) -> None:
        """From now on, evaluate each branch of guidance on this rank, in a forward of its own."""
        for name, guider in self._adapter.guiders(self.request).items():
            setattr(self._pipeline, name, guider)

    @torch.no_grad()
    def step(self) -> None:
        """Do one denoising step, which a GPU only queues; see `steps`. A collective of all ranks."""
        self._activate_loras()  # in each step: requests with other adapters may take steps in between
        if self._ends is None:  # not earlier: until now this rank may have waited for others
            self._ends = StepEnds(self._mesh.device, self.total_steps, self._steps_done)
        asked = self.request.profile or self.request.traceparent != ""
        timed = asked or is_sampled(self.request.request_id, self._steps_done)
        with self._mesh.traffic.step(timed) as in_collectives:
            sample, self.prediction = self._advance(self._steps_done)
        self._steps_done += 1
        if self._previews:
            self._previews.make(self._steps_done, self.total_steps, sample, self.prediction, self._decode_alone)
        self._ends.mark(self.latents, in_collectives)

    def _advance(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Do step `i`, 0 for the first; return the latents before it, and the prediction of all branches."""
        before, sample = self._loop_state, self.latents
        with same_timestep(None if self.request.loras else self._timesteps[i]):
            _, self._loop_state = self._workflow.loop.loop_step(self._pipeline, before, i=i, t=before.timesteps[i])
        return sample, self._loop_state.noise_pred

    def steps(self, ahead: int) -> Iterator[StepEnd]:
        """Do all steps, and yield the end of each. A collective of all ranks.

        Args:
            ahead: how many further steps are queued before the host waits for the end of one, so that a GPU never waits
                for the host in between. An error of the device is raised with the step that is waited for.
        """
        for step in range(self._steps_done + 1, self.total_steps + 1):
            while not self.done and not self._held and self._steps_done < step + ahead:
                self.step()
            if step > self._steps_done:
                return
            assert self._ends is not None
            yield self._ends.wait(step)

    def hold(self) -> None:
        """Begin no further step: `steps` ends after those that are queued."""
        self._held = True

    def preview(self, step: int) -> tuple[int, Pixels] | None:
        """The number and the preview of a step that `steps` has yielded; None if it has none. On rank 0."""
        return self._previews.take(step) if self._previews else None

    def join_pictures(self) -> None:
        """Give all ranks the latents of all pictures. A collective, if the groups have divided the pictures."""
        if self._splits_pictures:
            parts = collectives.all_gather_equal(self.latents, self._cfg)
            self._loop_state.latents = torch.cat(parts)[: self.request.n]

    @torch.no_grad()
    def finish(self) -> list[Any]:
        """Decode the latents. A collective, if the ranks share tiles or pictures.

        Pictures without tiles are decoded one by one: that takes the least memory, and the pixels do not depend on
        which rank decodes them.

        Returns:
            On rank 0 the pictures, or a list of frames for each video; nothing on the others.

        Raises:
            PeerTileFailed, PeerFailed: another rank could not decode its tiles, or its pictures.
        """
        made = self._made()
        self._warnings += what_differs(made[0], self._accepted) if made else ()
        if made and self._colors.warming and self._adapter.has_previews:
            self._colors.learn(*example(self.latents, made[0], self.request))
        return made

    def _made(self) -> list[Any]:
        self._workflow.loop.set_block_state(self._state, self._loop_state)
        if self._shares_decoding:
            return decode_shared(self._decode_one, self.request.n, self._mesh)
        if not self._decodes:
            return []
        if not self._tiles:
            return [self._decode_one(i) for i in range(self.request.n)]
        try:
            return self._decode(self.latents)
        except TilesHandedOver:
            return []

    def _decode_one(self, i: int) -> Any:
        (made,) = self._decode(self.latents[i : i + 1])
        return made

    def _decode(self, latents: torch.Tensor) -> list[Any]:
        self._state.set("latents", latents.to(self._pipeline.vae.dtype))  # not all decoders do it
        self._run(self._workflow.decode)
        outputs: list[Any] = self._state.get(self._adapter.output)
        return outputs

    def _decode_alone(self, latents: torch.Tensor) -> Any:
        """Decode latents on this rank alone, and leave the request as it is."""
        beside = copy.copy(self)
        beside._state = PipelineState(dict(self._state.values), dict(self._state.kwargs_mapping))
        beside._pipeline = copy.copy(self._pipeline)
        beside._pipeline.vae = TileParallelVAE(self._vae, None) if self._tiles else self._vae
        try:
            (made,) = beside._decode(latents)
        except Exception:
            drop_kept_features(self._vae)
            raise
        return made

    def _check_loras(self) -> None:
        known = sorted({name for adapters in self._loras.values() for name in adapters.names})
        for name, _ in self.request.loras:
            if name not in known:
                raise InvalidParameter(
                    "loras", f"the model has no adapter {name!r}; it has: {', '.join(known) or 'none'}", UNKNOWN_LORA
                )

    def _activate_loras(self) -> None:
        """Activate exactly the adapters of this request. Costs nothing if they are still active from the last step."""
        for adapters in self._loras.values():
            adapters.activate({name: scale for name, scale in self.request.loras if name in adapters.names})

    def _set_guiders(self, guiders: dict[str, Any]) -> None:
        for name, guider in guiders.items():
            setattr(self._pipeline, name, self._guidance.arranged(guider))

    def _inputs(self) -> dict[str, Any]:
        """The inputs of the pipeline; they decide which blocks run."""
        request = self.request
        return {
            "prompt": request.prompt,
            "width": request.width,
            "height": request.height,
            "num_inference_steps": request.num_inference_steps,
            self._adapter.count_input: len(self._generators),
            "generator": self._generators,
            "output_type": "pil",
            **self._adapter.inputs(request),
            **self._adapter.pictures(request, self._encodes),
            **({} if request.strength is None else {"strength": request.strength}),
        }

    def _seeds(self) -> list[int]:
        """The seeds of this rank's pictures: all, or its group's share.

        Shares are equal, so that all groups enter the same collectives; the last may repeat a picture.
        """
        request = self.request
        if not self._splits_pictures:
            return list(request.all_seeds)
        each = -(-request.n // self._cfg.size)
        first = self._cfg.rank * each
        return [request.all_seeds[min(first + i, request.n - 1)] for i in range(each)]

    def _scheduler_of(self, generators: list[torch.Generator]) -> Any:
        return scheduler_of(self._shared_scheduler, self.request, generators)

    def _run(self, blocks: tuple[Any, ...]) -> None:
        for block in blocks:
            _, self._state = block(self._pipeline, self._state)


def _drop_full_masks(state: PipelineState) -> None:
    """Drop masks that mask nothing: attention is faster without one. The classic pipeline does the same."""
    for name in ("prompt_embeds_mask", "negative_prompt_embeds_mask"):
        mask = state.get(name)
        if mask is not None and bool(mask.all()):
            state.set(name, None)
