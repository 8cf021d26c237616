"""The denoising of one request through the classic call of a diffusers pipeline, stopped after each step.

`begin` makes the `Denoising` of a request, for `workers.gang.rank`. Checks, scheduler, seeds, adapters, tiles and step
times are those of `workers.model.denoising`.

Some calls make their frames in windows: one loop for each, and a decode after each. Here all loops count as one. Rank 0
decodes alone between them, and the other ranks ask for latents. Rank 0 also decodes alone if the VAE knows only tiles
of one size. A pipeline without a VAE denoises pixels, from which rank 0 only has to make a picture.

The rank that decodes goes on after the last step; the others end their call there. Several pictures of a prompt share
one call. If they begin with a picture, each has a call of its own and all calls take their steps together: pipelines
disagree on what several pictures in one call mean, and so each is the same as with its seed alone. Rank 0 decodes all
pictures, one at a time. Groups of ranks do not divide branches or pictures, because for a call both are one batch.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline, SCMScheduler

from sp_core.stand_in import StandIn
from sp_core.tile_parallel import TileParallelVAE, TilesHandedOver
from workers.messages import GenerationRequest
from workers.model.adapters.classic import ClassicAdapter
from workers.model.denoising import Denoising
from workers.model.fixed_tiles import fixed_tiles
from workers.model.loader import LoadedModel
from workers.model.prompts import cut_prompts
from workers.model.shared_encoders import DRAWN, SharedEncoders
from workers.model.stepped_call import SteppedCall


def begin(loaded: LoadedModel, request: GenerationRequest, encoded: bytes | None = None) -> Denoising:
    """The `Denoising` of a request, of the class for its model's pipeline; it has the same arguments.

    Raises:
        InvalidParameter: the model cannot do what was asked for.
    """
    kind = ClassicDenoising if isinstance(loaded.pipeline, DiffusionPipeline) else Denoising
    return kind(loaded, request, encoded)


class ClassicDenoising(Denoising):
    """One request in progress. Arguments and methods are those of `Denoising`."""

    def _set_up(self) -> None:
        assert isinstance(self._adapter, ClassicAdapter)
        self._shares_decoding = False
        self._loops = self._adapter.loops(self._pipeline, self.request)
        by_tiles = self._tiles or fixed_tiles(self._vae) is not None
        if self._loops > 1 or fixed_tiles(self._vae):
            self._decodes = self._mesh.axis("gang").rank == 0
            self._pipeline.vae = TileParallelVAE(self._vae, None) if by_tiles else self._vae
        elif self._vae is not None and not self._tiles:
            self._pipeline.vae = _OneByOne(self._vae)
        self._pipeline.set_progress_bar_config(disable=True)
        self._latents = torch.empty(0)  # from the first step on
        self._made_by_encoders: list[Any] | None = None  # on another rank, if the encoders run there
        self._drawn: list[dict[int, Any]] = []  # likewise, for each call
        self._encoders: list[SharedEncoders] = []  # one for each call
        self._calls: list[SteppedCall] = []  # as soon as all their arguments are here
        self._schedulers: list[Any] = []  # one for each call, like the next
        self._vaes: list[Any] = []

    @property
    def guidance(self) -> str:
        """See `Denoising.guidance`. The pipeline decides."""
        if not self._guided:
            return ""
        together = self._adapter.family.batches_branches
        return "one forward" if together else "two forwards: the pipeline evaluates one after the other"

    @property
    def latents(self) -> torch.Tensor:
        """See `Denoising.latents`; empty before the first step."""
        return self._latents

    @torch.no_grad()
    def encode(self) -> None:
        """Check the inputs, encode prompts and pictures, make the initial latents; on the ranks that encode."""
        if self._encodes:
            self._warnings += cut_prompts(self._adapter.family.pipeline, self._pipeline, self.request)
            self._begin()
            for call in self._calls:  # the first; and others for what is drawn for each picture
                call.encode()

    def _what_was_encoded(self) -> Any:
        pictures = [torch.frombuffer(bytearray(each.data), dtype=torch.uint8) for each in self.request.inputs]
        return self._encoders[0].made, [each.drawn for each in self._encoders], pictures

    def _receive(self, encoded: Any) -> None:
        self._made_by_encoders, self._drawn, pictures = encoded
        inputs = zip(self.request.inputs, pictures, strict=True)
        data = (replace(each, data=picture.cpu().numpy().tobytes()) for each, picture in inputs)
        self.request = replace(self.request, inputs=tuple(data))
        self._begin()

    @torch.no_grad()
    def prepare(self) -> None:
        """See `Denoising.prepare`."""
        for call in self._calls:
            call.prepare()
        timesteps = self._schedulers[0].timesteps.tolist()
        if isinstance(self._schedulers[0], SCMScheduler):
            timesteps = timesteps[:-1]  # the last one is the end of the last step
        total, order = self._calls[0].total, self._schedulers[0].order
        if self.request.inputs and self._adapter.family.takes_strength and total:
            timesteps = timesteps[-(total * order - order + 1) :]  # the last of them, to keep something of the input
        self._timesteps = timesteps * self._loops

    def _advance(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        self._latents = _joined([call.step() for call in self._calls])
        samples, predictions = zip(*(call.noise for call in self._calls), strict=True)
        return _joined(samples), _joined(predictions)

    def _made(self) -> list[Any]:
        if not self._decodes:
            for call in self._calls:
                call.close()
            return []
        made: list[Any] = []
        failure: Exception | None = None
        for call, vae in zip(self._calls, self._vaes, strict=True):
            try:
                made += call.finish()[0]
            except TilesHandedOver:
                continue
            except Exception as error:
                failure = failure or error
                if call is self._calls[-1] or not getattr(vae, "handed_over", False):
                    break
                # The others have gone on to share the tiles of the next call, and would wait for this rank.
        if failure:
            raise failure
        return made

    def _begin(self) -> None:
        """Make the calls. Encoders run for the first at most; the others take its answers, except what it draws."""
        assert isinstance(self._adapter, ClassicAdapter)
        generators = self._generators
        one_by_one = bool(self.request.inputs) or self._adapter.makes_one
        apart = [[each] for each in generators] if one_by_one else [generators]
        for drawn_by, seed in zip(apart, self.request.all_seeds, strict=False):  # all pictures in one call: the first
            pipeline = copy.copy(self._pipeline)
            pipeline.scheduler = self._scheduler_of(drawn_by)
            if self._tiles:
                pipeline.vae = self._pipeline.vae.for_another_call()
            for name, part in self._adapter.parts(pipeline, self.request).items():
                setattr(pipeline, name, part)
            told = self._adapter.unsaid(pipeline) | self._inputs() | {self._adapter.count_input: len(drawn_by)}
            told["generator"] = drawn_by[0] if self._adapter.one_generator else drawn_by
            if self._loops > 1 and not self._decodes:
                told["output_type"] = "latent"
            untold = {""} if self._adapter.takes_size else {"", "width", "height"}
            arguments = {name: value for name, value in told.items() if name not in untold}  # not all can count
            self._encoders.append(self._encoders_of_call(len(self._calls), seed))
            self._calls.append(SteppedCall(pipeline, arguments, self._encoders[-1], self._adapter.refuse))
            self._schedulers.append(pipeline.scheduler)
            self._vaes.append(getattr(pipeline, "vae", None))

    def _encoders_of_call(self, i: int, seed: int) -> SharedEncoders:
        if self._made_by_encoders is not None:
            return SharedEncoders(self._made_by_encoders, seed, self._drawn[i])
        if i == 0:
            return SharedEncoders(None, seed)
        return SharedEncoders(self._encoders[0].made, seed, draws=hasattr(self._pipeline, DRAWN))


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class _OneByOne(StandIn):
    """A VAE that decodes the pictures of a batch one by one, if it can, because that takes the least memory.

    Args:
        original: a VAE of diffusers.
    """

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """The VAE's own `decode`."""
        one_by_one = copy.copy(self._original)
        one_by_one.use_slicing = True
        return one_by_one.decode(*args, **kwargs)
