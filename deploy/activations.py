"""The bytes that a request needs besides the weights, on the rank that needs most.

A `ModelSpec` and its folder's configs come in; `deploy.memory` adds the result to the weights. The constants are in
`deploy.families`, measured at the widths of the real models in bfloat16; other widths scale in proportion, and float32
takes twice as much.

The phases of a request follow one another, so the largest counts: a forward of the transformer, or the VAE's decode.
Text encoders see some hundred tokens and stay below both. A forward evaluates one branch of guidance at a time, even if
groups of ranks divide the branches, so `cfg_parallel_size` changes nothing here. `batch_guidance` puts both branches
into one
forward: always, or if that takes no more memory than the largest request takes anyway.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deploy.families.family import DecodeBytes, ForwardBytes
from deploy.families.lookup import component_dtype, decode_bytes, find_family, forward_bytes
from deploy.model_folder import read_config
from deploy.model_spec import ModelSpec

TOKEN_SIDE = 16
"""Pixels along the edge of a token, in all measured models: the VAE reduces by 8, the patch by 2."""

TOKEN_FRAMES = 4
"""Frames per latent frame of the video VAEs, except for the first frame, which has a latent frame of its own."""


PICTURE_TOKENS = 4096
"""Pixels of a picture that is edited or gives the size, besides those of the output: pipelines scale it to a megapixel.
One picture is counted; a model that takes several may need more."""

BATCHED_TOKENS = 512
"""`batch_guidance: auto` puts both branches into one forward if all latents of a request have at most this many tokens
on a rank. On a CPU that saves 2 % of a step at this number, more below it, and costs 7 % at twice the number. A GPU
spends longer reading weights than computing up to about half the number; it was not measured there."""

LESS = 0.9
"""The formula may underestimate a request that did not fit; one that needs at most this share of it is smaller."""


@dataclass(frozen=True)
class Request:
    """The size of a request."""

    width: int
    height: int
    frames: int
    n: int

    @property
    def pixels(self) -> int:
        """Pixels of one frame."""
        return self.width * self.height

    def __str__(self) -> str:
        frames = f"x{self.frames} frames" if self.frames > 1 else ""
        return f"{self.width}x{self.height}{frames}" + (f", n={self.n}" if self.n > 1 else "")


def largest_request(model: ModelSpec, folder: Path) -> Request:
    """The request within the model's limits that needs most memory. `max_work` counts as for a single step.

    Raises:
        ValueError: spray cannot run the folder's pipeline.
    """
    limits = model.limits
    frames = limits.max_num_frames if find_family(folder).makes == "video" else 1
    request = Request(limits.max_width, limits.max_height, frames, limits.max_n)
    if limits.max_work is None:
        return request
    n = max(1, min(request.n, limits.max_work // (request.pixels * frames)))
    return Request(request.width, request.height, max(1, min(frames, limits.max_work // (request.pixels * n))), n)


def activation_bytes(model: ModelSpec, folder: Path, request: Request) -> int | None:
    """Bytes of the largest phase of a request on the first rank; None if a class of the model was not measured.

    Args:
        model: the model, with its layout.
        folder: its files; only the configs of the transformer and the VAE are read.
        request: its size.
    """
    phases = _phases(model, folder, request)
    if phases is None:
        return None
    forward, decode = phases
    return math.ceil(max(forward if why_two_forwards(model, folder, request) else 2 * forward, decode))


def why_two_forwards(model: ModelSpec, folder: Path, request: Request) -> str:
    """Why the branches of guidance of a request of this size take a forward each; empty: they share one.

    Whether they can share one also depends on their prompts. The answer is the same on all ranks of a model.
    """
    if model.parallel.cfg_parallel_size > 1:
        return "each branch has ranks of its own"
    if find_family(folder).guided_above is None:
        return "the model evaluates one branch"
    if model.batch_guidance != "auto":
        return "" if model.batch_guidance else "batch_guidance is false"
    tokens = request.n * _latent_tokens(model, request)
    if tokens > BATCHED_TOKENS:
        return f"a rank has {tokens} tokens, above {BATCHED_TOKENS}"
    own, largest = (_phases(model, folder, each) for each in (request, largest_request(model, folder)))
    if own is None or largest is None:
        return "nobody has measured what both would need at once"
    if 2 * own[0] > max(largest):
        return "both at once would need more memory than the largest request that the limits allow"
    return ""


def _phases(model: ModelSpec, folder: Path, request: Request) -> tuple[float, float] | None:
    """Bytes of the forward of one branch, and of the decode; None if a class of the model was not measured."""
    transformer = read_config(folder / "transformer" / "config.json")
    family = find_family(folder)
    if "vae" not in family.components:
        return None  # what it denoises are the pixels
    vae = read_config(folder / "vae" / "config.json")
    beside = PICTURE_TOKENS if "edit" in family.tasks or family.sized_by_image else 0
    forward, decode = forward_bytes(str(transformer.get("_class_name"))), decode_bytes(str(vae.get("_class_name")))
    if forward is None or decode is None:
        return None
    return (
        _width_of(model.torch_dtype) * _forward_bytes(forward, model, transformer, request, beside),
        _width_of(component_dtype(model, folder, "vae")) * _decode_bytes(decode, model, vae, request),
    )


def _width_of(dtype: str) -> int:
    """Bytes of an element, relative to the measured type."""
    return 2 if dtype == "float32" else 1


def largest_fitting(model: ModelSpec, folder: Path, request: Request, available: int) -> Request | None:
    """The next smaller request that needs at most `available` bytes, and clearly less than this one, which did not fit.

    Fewer pictures come first, then fewer frames, then smaller ones, in tenths; of these as many pictures as fit. None:
    nothing fits, or a class of the model was not measured.
    """
    needed = activation_bytes(model, folder, request)
    if needed is None:
        return None
    bound = min(available, int(LESS * needed))

    def fits(less: Request) -> bool:
        return (activation_bytes(model, folder, less) or 0) <= bound

    found = next(filter(fits, _smaller(request, model)), None)
    if found is None or found.n > 1:
        return found
    return next(filter(fits, (replace(found, n=n) for n in range(request.n, 0, -1))))


def _smaller(request: Request, model: ModelSpec) -> Iterator[Request]:
    for n in range(request.n - 1, 0, -1):
        yield replace(request, n=n)
    one = replace(request, n=1)
    for tenths in range(9, 1, -1):
        frames = 1 + (request.frames - 1) * tenths // 10 // TOKEN_FRAMES * TOKEN_FRAMES
        if frames < one.frames:
            yield replace(one, frames=frames)
    multiple = model.limits.size_multiple
    for tenths in range(9, 1, -1):
        width, height = (side * tenths // 10 // multiple * multiple for side in (request.width, request.height))
        if width and height:
            yield replace(one, width=width, height=height)


def _forward_bytes(
    measured: ForwardBytes, model: ModelSpec, config: Mapping[str, Any], request: Request, beside: int
) -> float:
    degrees = model.parallel
    tokens = request.n * _latent_tokens(model, request, measured.text + beside)
    per_token = measured.alone
    if degrees.ulysses_degree > 1:
        per_token = max(per_token, measured.ulysses)
    if degrees.ring_degree > 1:
        per_token = max(per_token, measured.ring)
    kept = per_token - measured.shared * (1 - 1 / degrees.tensor_parallel_size)
    heads, features = config.get("num_attention_heads"), config.get("attention_head_dim")
    width = config.get("dim") or (heads * features if heads and features else measured.width)
    return float(tokens * kept * width / measured.width)


def _latent_tokens(model: ModelSpec, request: Request, text: int = 0) -> int:
    """A rank's share of the tokens of one picture or video, and of `text` tokens of text."""
    latent_frames = 1 + math.ceil((request.frames - 1) / TOKEN_FRAMES)
    picture = math.ceil(request.width / TOKEN_SIDE) * math.ceil(request.height / TOKEN_SIDE) * latent_frames
    return math.ceil((picture + text) / model.parallel.sequence_parallel_size)


def _decode_bytes(measured: DecodeBytes, model: ModelSpec, config: Mapping[str, Any], request: Request) -> float:
    """The largest output decodes in tiles above the model's bound, all outputs of a request together. The largest one
    below it decodes whole, one output after the other."""
    width = config.get("base_dim") or (config.get("block_out_channels") or [measured.width])[0]
    above = model.vae_tiling_above
    if request.pixels * request.frames <= above:
        most: float = request.pixels * _per_pixel(measured, request.frames)
    else:
        side = config.get("sample_size", 256)
        tile = min(request.pixels, math.prod(side) if isinstance(side, list) else side * side)
        in_tiles = tile * _per_pixel(measured, request.frames) + request.pixels * request.frames * measured.tiles
        most = max(request.n * in_tiles, min(request.pixels, above) * _per_pixel(measured, 1))
    return float(most * width / measured.width)


def _per_pixel(measured: DecodeBytes, frames: int) -> float:
    return measured.picture if frames == 1 else measured.video + measured.frame * max(0, frames - 5)
