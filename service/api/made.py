"""The real size of what was made: some pipelines choose sizes by themselves. For the answers of REST and gRPC.

Ranks tell it by warnings, see `workers.model.media.what_differs`, which stay with a job and with a kept answer.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from workers.messages import GenerationRequest

SIZE = re.compile(r"size: the model made (\d+)x(\d+), not ")
FRAMES = re.compile(r"num_frames: the model made (\d+), not ")


class Made(NamedTuple):
    """A picture or a video."""

    width: int
    height: int
    num_frames: int


def made_size(width: int, height: int, num_frames: int, warnings: Iterable[str]) -> Made:
    """What was made of a request for this size, by the warnings of its result."""
    made = Made(width, height, num_frames)
    for text in warnings:
        if found := SIZE.match(text):
            made = made._replace(width=int(found[1]), height=int(found[2]))
        elif found := FRAMES.match(text):
            made = made._replace(num_frames=int(found[1]))
    return made


def frames_again(request: GenerationRequest, warnings: Iterable[str]) -> int:
    """The number of frames that asks for the same again: that which was made, if the caller had named none."""
    if not request.frames_chosen:
        return request.num_frames
    return made_size(request.width, request.height, request.num_frames, warnings).num_frames
