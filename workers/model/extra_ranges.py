"""Extra parameters of which some values fail far inside a pipeline's call, where its own check has passed.

Called by the adapter of classic pipelines, which knows their names and types.
"""

from typing import Any

from workers.errors import InvalidParameter
from workers.messages import GenerationRequest

CLIPS = ("text_encoder", "text_encoder_2")
"""The encoders whose last layers `clip_skip` leaves out."""


def check_extra_ranges(pipeline: Any, request: GenerationRequest) -> None:
    """Reject such a value.

    Args:
        pipeline: a classic pipeline; without encoders, where other ranks encode, and check.
        request: its extra parameters and frames.

    Raises:
        InvalidParameter: names the parameter and what it may be.
    """
    asked = request.extra_params
    for name, below in (("clip_skip", _layers(pipeline)), ("frame_index", request.num_frames)):
        if name in asked and below is not None and not 0 <= asked[name] < below:
            raise InvalidParameter(
                f"extra_params.{name}", f"{name} must be from 0 to {below - 1} for this request, got {asked[name]}"
            )


def _layers(pipeline: Any) -> int | None:
    """Those of the smaller encoder; None: they are not here."""
    encoders = filter(None, (getattr(pipeline, name, None) for name in CLIPS))
    layers = [getattr(encoder.config, "num_hidden_layers", None) for encoder in encoders]
    return min(filter(None, layers), default=None)
