"""The denoising of one request over a classic pipeline of diffusers: its call, stopped after each step.

`begin` makes the `Denoising` of a request, for `workers.gang.rank`. What a request is checked for, its scheduler,
seeds, adapters, tiles and step times are those of `workers.model.denoising`.

The rank that decodes goes on after the last step; the others end their call there. Several pictures are decoded by rank
0, one at a time. Groups of ranks do not divide branches or pictures: to the call, both are one batch.
"""

import copy
from typing import Any

import torch
from diffusers import DiffusionPipeline

from sp_core.tile_parallel import TilesHandedOver
from workers.messages import GenerationRequest
from workers.model.adapters.classic import ClassicAdapter
from workers.model.denoising import Denoising
from workers.model.loader import LoadedModel
from workers.model.stepped_call import SteppedCall


def begin(loaded: LoadedModel, request: GenerationRequest) -> Denoising:
    """The denoising of a request, by the kind of its model's pipeline.

    Raises:
        InvalidParameter: the model cannot do what was asked for.
    """
    kind = ClassicDenoising if isinstance(loaded.pipeline, DiffusionPipeline) else Denoising
    return kind(loaded, request)


class ClassicDenoising(Denoising):
    """One request in progress. Arguments and methods are those of `Denoising`."""

    def _set_up(self) -> None:
        self._shares_decoding = False
        if not self._tiles:
            self._pipeline.vae = _OneByOne(self._pipeline.vae)
        self._pipeline.set_progress_bar_config(disable=True)
        self._latents = torch.empty(0)  # from the first step on
        assert isinstance(self._adapter, ClassicAdapter)
        arguments = {name: value for name, value in self._inputs().items() if name}  # not all can count
        self._call = SteppedCall(self._pipeline, arguments, self._encodes, self._adapter.refuse)

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
        """Check the inputs and encode the prompts. On ranks with encoders the initial latents are made as well."""
        self._call.encode()

    def _what_was_encoded(self) -> Any:
        return self._call.encoded

    def _receive(self, encoded: Any) -> None:
        self._call.encoded[:] = encoded

    @torch.no_grad()
    def prepare(self) -> None:
        """See `Denoising.prepare`."""
        self._call.prepare()
        self._timesteps = self._pipeline.scheduler.timesteps.tolist()

    def _advance(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        self._latents = self._call.step()
        return self._call.noise

    def _made(self) -> list[Any]:
        if not self._decodes:
            self._call.close()
            return []
        try:
            outputs: list[Any] = self._call.finish()[0]
        except TilesHandedOver:
            return []
        return outputs


class _OneByOne:
    """A VAE that decodes the pictures of a batch one by one, if it can: that takes the least memory.

    Args:
        vae: a VAE of diffusers.
    """

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """The VAE's own `decode`."""
        one_by_one = copy.copy(self._vae)
        one_by_one.use_slicing = True
        return one_by_one.decode(*args, **kwargs)
