"""Refuses sizes for which a transformer has no positions. Most would fail with them in the first step; AuraFlow would
take the positions of other places, or end its GPU.

A pipeline and a request come in; nothing goes out, or an `InvalidParameter`. Called by
`workers.model.adapters.classic`.
"""

import math
from collections.abc import Iterator
from typing import Any

from workers.errors import InvalidParameter
from workers.messages import GenerationRequest


def check_positions(pipeline: Any, request: GenerationRequest, pixels: int, frames: int) -> None:
    """Refuse sizes above the transformer's `max_size`, if it has one: frames, rows and columns of latents; those beyond
    its table of positions; and any but its own, if these were learned for one size.

    Args:
        pipeline: its transformer's config says what there is.
        request: its width, height and frames.
        pixels: the VAE's reduction of rows and columns.
        frames: the VAE's reduction of frames.

    Raises:
        InvalidParameter: names the size.
    """
    config = pipeline.transformer.config
    for name, value, most in _edges(pipeline.transformer, request, pixels):
        if value > most:
            raise InvalidParameter("size", f"{name} must be at most {most}, got {value}", "invalid_size")
    if (only := only_size(pipeline.transformer, pixels)) and (request.height, request.width) != only:
        asked = f"{request.width}x{request.height}"
        raise InvalidParameter("size", f"this model makes {only[1]}x{only[0]}, got {asked}", "invalid_size")
    if not config.get("max_size"):
        return
    patches = config["patch_size"]
    tokens = [size // patch for size, patch in zip(config["max_size"], patches, strict=True)]
    if config.get("extra_pos_embed_type") is None:  # only rotations, which are computed for the longest of the three
        tokens = [max(tokens)] * 3
    most_frames, most_height, most_width = (many * patch for many, patch in zip(tokens, patches, strict=True))
    for name, value, most in (
        ("height", request.height, most_height * pixels),
        ("width", request.width, most_width * pixels),
    ):
        if value > most:
            raise InvalidParameter("size", f"{name} must be at most {most}, got {value}", "invalid_size")
    most = (most_frames - 1) * frames + 1
    if request.num_frames > most:
        raise InvalidParameter("num_frames", f"num_frames must be at most {most}, got {request.num_frames}")


def only_size(transformer: Any, pixels: int) -> tuple[int, int] | None:
    """The one height and width for which a transformer has learned its positions; None: it takes others.

    Args:
        transformer: of diffusers.
        pixels: the VAE's reduction of rows and columns.
    """
    config: Any = getattr(transformer, "config", None)
    if not getattr(config, "use_learned_positional_embeddings", False):
        return None
    return config.sample_height * pixels, config.sample_width * pixels


def _edges(transformer: Any, request: GenerationRequest, pixels: int) -> Iterator[tuple[str, int, int]]:
    """The edges of a request, each with the most for which there is a table of positions."""
    for part in getattr(transformer, "children", tuple)():
        if table := getattr(part, "pos_embed_max_size", None):
            # Most tables name their edge. Those that are read by index name all their places.
            edge = math.isqrt(table) if hasattr(part, "pe_selection_index_based_on_dim") else table
            most = edge * part.patch_size * pixels
            yield "height", request.height, most
            yield "width", request.width, most
