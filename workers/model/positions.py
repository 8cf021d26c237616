"""Refuses sizes for which a transformer has no positions. Cosmos would fail with them in the first step.

A pipeline and a request come in; nothing goes out, or an `InvalidParameter`. Called by
`workers.model.adapters.classic`.
"""

from typing import Any

from workers.errors import InvalidParameter
from workers.messages import GenerationRequest


def check_positions(pipeline: Any, request: GenerationRequest, pixels: int, frames: int) -> None:
    """Refuse sizes above the transformer's `max_size`, if it has one: frames, rows and columns of latents.

    Args:
        pipeline: its transformer's config says what there is.
        request: its width, height and frames.
        pixels: the VAE's reduction of rows and columns.
        frames: the VAE's reduction of frames.

    Raises:
        InvalidParameter: names the size.
    """
    config = pipeline.transformer.config
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
