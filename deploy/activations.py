"""What a request needs besides the weights, in bytes on the rank with most: by measured constants.

A `ModelSpec` and its folder's configs come in; `deploy.memory` adds what comes out to the weights. The constants are
those of `python -m tests.benchmarks.activation_memory`, at the widths of the real models in bfloat16; other widths are
taken in proportion, float32 as twice as much.

The phases of a request follow one another, so the largest counts: a forward of the transformer, or the VAE's decode.
Text encoders see some hundred tokens and stay below both. A forward evaluates one branch of guidance at a time,
whether or not groups of ranks share out the branches, so `cfg_parallel_size` changes nothing here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.pipelines import PIPELINES, pipeline_name, read_config
from deploy.spec import ModelSpec

TOKEN_SIDE = 16
"""Pixels: all of these models make one token of 16 x 16 pixels (the VAE's 8, twice)."""

TOKEN_FRAMES = 4
"""Frames that the video VAEs make one of, but for the first."""


@dataclass(frozen=True)
class Request:
    """The size of a request: pixels, frames, and how many pictures or videos."""

    width: int
    height: int
    frames: int
    n: int

    @property
    def pixels(self) -> int:
        """Of one frame."""
        return self.width * self.height

    def __str__(self) -> str:
        frames = f"x{self.frames} frames" if self.frames > 1 else ""
        return f"{self.width}x{self.height}{frames}" + (f", n={self.n}" if self.n > 1 else "")


@dataclass(frozen=True)
class Forward:
    """Bytes by each token that a rank has, in a forward of a transformer.

    Attributes:
        width: features of a token, at which it was measured.
        alone: on one rank.
        ulysses: with Ulysses ranks.
        ring: with ring ranks.
        shared: of these, what tensor-parallel ranks share out.
        text: tokens of the longest text that join the picture's in the sequence.
    """

    width: int
    alone: int
    ulysses: int
    ring: int
    shared: int
    text: int


@dataclass(frozen=True)
class Decode:
    """Bytes by each pixel of a frame, in a decode of a VAE.

    Attributes:
        width: base channels, at which it was measured.
        picture: of one frame.
        video: of the first five frames together, or `picture` where it makes no video.
        frame: of each frame more.
        tiles: by each frame of the output, what is held of all tiles while one of them is decoded.
    """

    width: int
    picture: int
    video: int
    frame: int
    tiles: int


FORWARDS = {
    "FluxTransformer2DModel": Forward(3072, alone=105_484, ulysses=105_484, ring=136_780, shared=86_016, text=512),
    "QwenImageTransformer2DModel": Forward(3072, alone=93_184, ulysses=100_352, ring=137_792, shared=49_152, text=1024),
    "WanTransformer3DModel": Forward(5120, alone=113_668, ulysses=124_932, ring=187_328, shared=0, text=0),
    "ZImageTransformer2DModel": Forward(3840, alone=121_357, ulysses=137_754, ring=156_394, shared=81_920, text=512),
}

DECODES = {
    "AutoencoderKL": Decode(128, picture=1536, video=1536, frame=0, tiles=10),
    "AutoencoderKLQwenImage": Decode(96, picture=3465, video=3465, frame=0, tiles=10),
    "AutoencoderKLWan": Decode(96, picture=3465, video=9744, frame=108, tiles=10),
}


def largest_request(model: ModelSpec, folder: Path) -> Request:
    """The request within the model's limits that needs most. `max_work` is taken as with a single step.

    Raises:
        ValueError: the folder is none that spray can run.
    """
    limits = model.limits
    frames = limits.max_num_frames if PIPELINES[pipeline_name(folder)].makes == "video" else 1
    request = Request(limits.max_width, limits.max_height, frames, limits.max_n)
    if limits.max_work is None:
        return request
    n = max(1, min(request.n, limits.max_work // (request.pixels * frames)))
    return Request(request.width, request.height, max(1, min(frames, limits.max_work // (request.pixels * n))), n)


def activation_bytes(model: ModelSpec, folder: Path, request: Request) -> int | None:
    """Bytes of the largest phase of a request on the first rank; None where a class of the model was not measured.

    Args:
        model: the model, with its layout.
        folder: its files, of which the configs of the transformer and the VAE are read.
        request: its size.
    """
    transformer = read_config(folder / "transformer" / "config.json")
    vae = read_config(folder / "vae" / "config.json")
    forward, decode = FORWARDS.get(str(transformer.get("_class_name"))), DECODES.get(str(vae.get("_class_name")))
    if forward is None or decode is None:
        return None
    per_element = 2 if model.torch_dtype == "float32" else 1
    phases = (_forward_bytes(forward, model, transformer, request), _decode_bytes(decode, model, vae, request))
    return math.ceil(per_element * max(phases))


def _forward_bytes(measured: Forward, model: ModelSpec, config: Mapping[str, Any], request: Request) -> float:
    degrees = model.parallel
    latent_frames = 1 + math.ceil((request.frames - 1) / TOKEN_FRAMES)
    picture = math.ceil(request.width / TOKEN_SIDE) * math.ceil(request.height / TOKEN_SIDE) * latent_frames
    tokens = request.n * math.ceil((picture + measured.text) / degrees.sequence_parallel_size)
    per_token = measured.alone
    if degrees.ulysses_degree > 1:
        per_token = max(per_token, measured.ulysses)
    if degrees.ring_degree > 1:
        per_token = max(per_token, measured.ring)
    kept = per_token - measured.shared * (1 - 1 / degrees.tensor_parallel_size)
    width = config.get("dim") or config["num_attention_heads"] * config["attention_head_dim"]
    return float(tokens * kept * width / measured.width)


def _decode_bytes(measured: Decode, model: ModelSpec, config: Mapping[str, Any], request: Request) -> float:
    """Of the largest output, in tiles if it is above the model's bound for them, and of the largest that is not."""
    width = config.get("base_dim") or config["block_out_channels"][0]
    above = model.vae_tiling_above
    if request.pixels * request.frames <= above:
        most = request.pixels * _per_pixel(measured, request.frames)
    else:
        side = config.get("sample_size", 256)
        tile = min(request.pixels, math.prod(side) if isinstance(side, list) else side * side)
        in_tiles = tile * _per_pixel(measured, request.frames) + request.pixels * request.frames * measured.tiles
        most = max(in_tiles, min(request.pixels, above) * _per_pixel(measured, 1))
    return float(request.n * most * width / measured.width)


def _per_pixel(measured: Decode, frames: int) -> float:
    return measured.picture if frames == 1 else measured.video + measured.frame * max(0, frames - 5)
