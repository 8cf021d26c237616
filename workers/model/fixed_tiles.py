"""VAEs that decode only tiles of one size, such as Allegro's. Areas that their tiles do not cover would stay black.

A VAE comes in; its tiles go out. Used by the adapter of classic pipelines and by
`workers.model.classic_denoising`.
"""

from typing import Any, NamedTuple

from workers.errors import InvalidParameter
from workers.messages import GenerationRequest


class Tiles(NamedTuple):
    """The tiles of a VAE, each number as frames, height and width.

    Attributes:
        size: the size of a tile, in frames and pixels.
        apart: the distance between the beginnings of two neighboring tiles.
    """

    size: tuple[int, int, int]
    apart: tuple[int, int, int]


def fixed_tiles(vae: Any) -> Tiles | None:
    """The tiles of a VAE of diffusers; None: it decodes latents of any size."""
    size, apart = getattr(vae, "kernel", None), getattr(vae, "stride", None)
    return Tiles(size, apart) if isinstance(size, tuple) and isinstance(apart, tuple) else None


def check_covered(tiles: Tiles, request: GenerationRequest) -> None:
    """Reject a size that the tiles do not cover to its edges.

    Raises:
        InvalidParameter: names the parameter.
    """
    asked = {"num_frames": request.num_frames, "height": request.height, "width": request.width}
    for (name, value), size, apart in zip(asked.items(), tiles.size, tiles.apart, strict=True):
        if value < size or (value - size) % apart:
            told = name if name == "num_frames" else "size"
            raise InvalidParameter(told, f"{name} must be {size} plus a multiple of {apart}, got {value}")
