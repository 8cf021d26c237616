"""Pictures that a request starts from: encoded once by the VAE on the first rank, sampled alike on all.

Two steps stand in for blocks of diffusers' modular pipelines, which encode without the classic pipelines' randomness.
Each picture of a request is sampled with its own generator before its noise is drawn, as the classic pipeline does for
a request of one picture; so a seed draws the same picture whatever `n` is. Used by `workers.model.denoising`.
"""

import io
from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageSequence

from workers.clip_decoder import CUT
from workers.messages import MediaInput

Pack = Callable[[Any, torch.Tensor], torch.Tensor]
"""A pipeline and latents `(B, C, h, w)` or `(B, C, 1, h, w)` -> the transformer's tokens, or the same."""

ENCODER, SAMPLER = "vae_encoder", "additional_inputs"
"""Parts of the names of diffusers' blocks: a prefix for those that `EncodePictures` replaces, a suffix for
`SamplePictures`."""


def read(given: MediaInput) -> Image.Image:
    """The picture of an input, a PNG that the gateway has written."""
    with Image.open(io.BytesIO(given.data), formats=("PNG",)) as picture:
        picture.load()
        return picture


def read_clip(given: MediaInput) -> list[Image.Image]:
    """The frames of an input."""
    with Image.open(io.BytesIO(given.data), formats=("PNG",)) as clip:
        return [frame.convert("RGB") for frame in ImageSequence.Iterator(clip)]


def frames_of(given: MediaInput) -> int:
    """The number of frames of an input."""
    with Image.open(io.BytesIO(given.data), formats=("PNG",)) as clip:
        return int(getattr(clip, "n_frames", 1))


def is_cut(given: MediaInput) -> bool:
    """Whether the caller's clip has more frames than were read."""
    with Image.open(io.BytesIO(given.data), formats=("PNG",)) as clip:
        return CUT in clip.info


class EncodePictures:
    """Encodes the image of a request to `image_mean` and `image_std` of its latents, its mask to
    `processed_mask_image`.

    A block like those of diffusers, for the ranks that encode.

    Args:
        of_videos: whether the VAE is one of videos, which takes a picture as a video of one frame.
    """

    def __init__(self, of_videos: bool) -> None:
        self._of_videos = of_videos

    def __call__(self, pipeline: Any, state: Any) -> tuple[Any, Any]:
        """Called in the order of the blocks."""
        vae, size = pipeline.vae, {"height": state.get("height"), "width": state.get("width")}
        mask = state.get("mask_image")
        if mask is None:
            image = pipeline.image_processor.preprocess(image=state.get("image"), **size)
        else:
            image, mask, _ = pipeline.image_mask_processor.preprocess(image=state.get("image"), mask=mask, **size)
            state.set("processed_mask_image", mask)
        image = image.to(device=pipeline.device, dtype=vae.dtype)
        found = vae.encode(image.unsqueeze(2) if self._of_videos else image).latent_dist
        state.set("image_mean", _scaled(vae, found.mean, True))
        state.set("image_std", _scaled(vae, found.std, False))
        return pipeline, state


class SamplePictures:
    """Samples `image_latents` from `image_mean` and `image_std`, one for each generator. A block for all ranks.

    Args:
        pack: turns latents into tokens.
        dtype: of the result; None: that of the prompt's embeddings.
    """

    def __init__(self, pack: Pack, dtype: torch.dtype | None) -> None:
        self._pack, self._dtype = pack, dtype

    def __call__(self, pipeline: Any, state: Any) -> tuple[Any, Any]:
        """Called in the order of the blocks."""
        mean, std = state.get("image_mean"), state.get("image_std")
        drawn = [randn_tensor(mean.shape, each, mean.device, mean.dtype) for each in state.get("generator")]
        latents = torch.cat([mean + std * each for each in drawn]).to(self._dtype or state.get("dtype"))
        state.set("image_latents", self._pack(pipeline, latents))
        mask = state.get("processed_mask_image")
        if mask is not None:
            state.set("processed_mask_image", mask.expand(len(drawn), -1, -1, -1))
        return pipeline, state


def with_pictures(blocks: dict[str, Any], encode: EncodePictures, sample: SamplePictures) -> list[Any]:
    """The blocks of a request, with these two in the place of diffusers' own.

    Args:
        blocks: by name, in order.
        encode: replaces the blocks of the VAE encoder.
        sample: replaces the block that copies the encoded picture for each picture of the request.
    """
    encoders = [name for name in blocks if name.startswith(ENCODER)]
    (sampler,) = (name for name in blocks if name.endswith(SAMPLER))
    placed = {encoders[0]: encode, sampler: sample}
    return [placed.get(name, block) for name, block in blocks.items() if name in placed or name not in encoders]


def _scaled(vae: Any, latents: torch.Tensor, position: bool) -> torch.Tensor:
    """Latents in the transformer's scale: as a position, or as a distance (without the shift)."""
    if latents.ndim == 4:
        shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    else:
        shape = (1, -1, 1, 1, 1)
        shift = torch.tensor(vae.config.latents_mean).view(shape).to(latents)
        scale = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents)
    scaled: torch.Tensor = (latents - shift if position else latents) * scale
    return scaled
