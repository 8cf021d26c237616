"""The encoders of a classic call: they run once, on one rank, and all ranks use their answers.

A pipeline comes in. Its methods `METHODS` and its VAE's `encode` are replaced: on one rank they record their answers in
order, on the others they return the recorded ones. A VAE returns a distribution, from which each call draws with its
own generator, so all ranks draw alike. Called by `workers.model.stepped_call`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution, EncoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput

from sp_core.stand_in import StandIn

DRAWN = "generate_prior_tokens"
"""The one of `METHODS` whose answer is random, drawn with the seed of the picture: only one rank may call it, once for
each picture."""

METHODS = (
    "encode_prompt",
    "encode_prompt_multiple_images",
    "encode_image",
    "encode_video",
    DRAWN,
    "_get_image_embeds",
)
"""Methods of pipelines that encode. They return only tensors."""


class TextEncoderElsewhere:
    """Replaces a text encoder of another rank, for pipelines that read its vision part.

    They only pass that part to an encoder that is not called here.
    """

    vision_tower = None


class SharedEncoders:
    """The answers of the encoders in one call, in the order of the calls.

    Args:
        made: the answers recorded on another rank, or in another call; None: the encoders run here.
        seed: for samples that a pipeline draws from a distribution without a generator.
        drawn: the answers of `DRAWN` in this call, by their places in `made`, where these are of another picture.
        draws: whether `DRAWN` runs here although the others have answered.

    Attributes:
        made: the answers.
        drawn: those that are of this call alone.
        here: whether any of the encoders run here.
    """

    def __init__(
        self, made: list[Any] | None, seed: int, drawn: dict[int, Any] | None = None, draws: bool = False
    ) -> None:
        self.made: list[Any] = [] if made is None else made
        self.drawn: dict[int, Any] = drawn or {}
        self.here = made is None or draws
        self._records, self._draws = made is None, draws
        self._seed = seed
        self._read = 0
        self._inside = False

    def __call__(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The answer of an encoder. Calls of one encoder by another are part of the outer answer."""
        if self._inside:
            return method(*args, **kwargs)
        place = self._read
        self._read += 1
        if self._records:
            self.made.append(self._answer(method, *args, **kwargs))
        elif place == len(self.made):
            raise RuntimeError("the pipeline encodes more on this rank than on the one that has encoders")
        elif self._draws and _name_of(method) == DRAWN:
            self.drawn[place] = self._answer(method, *args, **kwargs)
        return self.drawn.get(place, self.made[place])

    def _answer(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._inside = True
        try:
            return method(*args, **kwargs)
        finally:
            self._inside = False

    def reading(self, vae: Any) -> "ReadingVAE":
        """A VAE whose `encode` is one of these encoders."""
        return ReadingVAE(vae, self, self._seed)


def _name_of(method: Callable[..., Any]) -> str:
    """The name of a method of a pipeline that may be bound by partials."""
    while isinstance(method, functools.partial):
        method = method.func
    return getattr(method, "__name__", "")


class ReadingVAE(StandIn):
    """A VAE whose `encode` goes through `SharedEncoders`. Everything else is the VAE's own."""

    def __init__(self, vae: Any, encoders: SharedEncoders, seed: int) -> None:
        super().__init__(vae)
        self._vae, self._encoders, self._seed = vae, encoders, seed

    def encode(self, *args: Any, **kwargs: Any) -> AutoencoderKLOutput | EncoderOutput:
        """The result of the VAE's own `encode`.

        Raises:
            TypeError: it returns something else than a Gaussian distribution or latents.
        """
        made = self._encoders(functools.partial(_packed, self._vae.encode), *args, **kwargs)
        if "latent" in made:
            return EncoderOutput(latent=made["latent"])
        return AutoencoderKLOutput(latent_dist=_Distribution(made["parameters"], self._seed))


class _Distribution(DiagonalGaussianDistribution):  # type: ignore[misc]
    """Draws the same on all ranks if the pipeline names no generator; torch would use its global one."""

    def __init__(self, parameters: torch.Tensor, seed: int) -> None:
        super().__init__(parameters)
        self._seed = seed

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        drawn: torch.Tensor = super().sample(generator or torch.Generator().manual_seed(self._seed))
        return drawn


def _packed(encode: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    found = encode(*args, **kwargs)
    if isinstance(getattr(found, "latent_dist", None), DiagonalGaussianDistribution):
        return {"parameters": found.latent_dist.parameters}
    if isinstance(getattr(found, "latent", None), torch.Tensor):
        return {"latent": found.latent}
    raise TypeError(f"the VAE encodes to a {type(found).__name__} that has neither a Gaussian latent_dist nor a latent")
