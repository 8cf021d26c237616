"""Divides the pictures of a request among the ranks of a gang: each decodes every N-th, and rank 0 gets all.

Called by `workers.model.denoising` if every rank has the VAE and a request asks for several pictures or videos. The
finished pixels are sent over the hosts' group, because they have to be on the host for encoding anyway.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from sp_core import collectives
from sp_core.mesh import ParallelMesh
from sp_core.tile_parallel import HandOverFailed
from workers.errors import PeerFailed


def decode_shared(decode: Callable[[int], Any], count: int, mesh: ParallelMesh) -> list[Any]:
    """Decode pictures, each on one rank. A collective of all ranks.

    Args:
        decode: decodes picture `i`, `0 <= i < count`: an RGB picture, or the list of a video's frames.
        count: the number of pictures.
        mesh: the ranks, each of which has the whole latents.

    Returns:
        All of them on rank 0, in order; nothing on the others.

    Raises:
        PeerFailed: another rank could not decode its share. That one raises the reason.
        HandOverFailed: the ranks can no longer agree.
    """
    gang = mesh.axis("gang")
    failure: Exception | None = None
    try:
        made = [decode(i) for i in range(gang.rank, count, gang.size)]
        pixels = [_pixels(each) for each in made]
    except Exception as error:
        failure = error
    (failed,) = mesh.agree(failure is not None)
    if failure is not None:
        raise failure
    if failed:
        raise PeerFailed(f"rank {gang.rank} stopped because another rank could not decode its pictures")
    try:
        shares = collectives.gather(pixels, replace(gang, group=gang.host_group))
    except Exception as error:
        raise HandOverFailed(f"rank {gang.rank}: {type(error).__name__}: {error}") from error
    if gang.rank != 0:
        return []
    pictures = [made, *([_made(each) for each in share] for share in shares[1:])]
    return [pictures[i % gang.size][i // gang.size] for i in range(count)]


def _pixels(made: Any) -> torch.Tensor:
    """`(H, W, 3)` of a picture, `(F, H, W, 3)` of a video."""
    frames = made if isinstance(made, list) else [made]
    flat = torch.frombuffer(bytearray().join(frame.tobytes() for frame in frames), dtype=torch.uint8)
    pixels = flat.view(len(frames), frames[0].height, frames[0].width, 3)
    return pixels if isinstance(made, list) else pixels[0]


def _made(pixels: torch.Tensor) -> Any:
    if pixels.ndim == 4:
        return [_made(frame) for frame in pixels]
    height, width, _ = pixels.shape
    return Image.frombytes("RGB", (width, height), pixels.numpy().tobytes())
