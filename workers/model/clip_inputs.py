"""The clip that a request begins with, as the frames that a classic pipeline's call takes.

A `ClassicCall`, a clip and its request come in; frames go out, or an `InvalidParameter`. Called by
`workers.model.adapters.classic`.
"""

from typing import Any

from PIL import Image

from deploy.families.pipeline_source import ClassicCall
from workers.errors import InvalidParameter
from workers.messages import GenerationRequest, MediaInput
from workers.model.picture_inputs import frames_of, is_cut, read_clip

OVERLAP = "overlap_history"
"""The parameter for the number of frames that a window shares with the one before, in calls that make windows."""


def clip_for(call: ClassicCall, given: MediaInput, request: GenerationRequest, overlap: int | None) -> list[Any]:
    """The clip's frames, as many as the request has; fewer only if the call makes as many as it is told. All of them if
    the call continues from the end of the clip.

    Args:
        call: what the pipeline does with a clip.
        given: the clip.
        request: its number of frames, and their size.
        overlap: how many frames the first window shares with the clip; None: the call does not go on from its end.

    Raises:
        InvalidParameter: the clip has too few frames, or more than can be read.
    """
    frames = read_clip(given)
    if overlap is not None:
        _check_end(given, len(frames), overlap)
        return frames
    frames = frames[: request.num_frames]
    if len(frames) < request.num_frames and (call.sized_by_clip or not call.counts_frames):
        raise InvalidParameter(
            "num_frames", f"the clip has {len(frames)} frames, num_frames asks for {request.num_frames}"
        )
    if call.sized_by_clip:  # else each frame would control places of another size
        size = request.width, request.height
        frames = [each.resize(size, Image.Resampling.LANCZOS) for each in frames]
    return [frames] if call.takes_clips else frames


def check_goes_on(given: MediaInput, request: GenerationRequest, reduction: int) -> None:
    """Reject a clip after which there is nothing to make, for a call that keeps the clip as it is.

    Args:
        given: the clip; its data are empty on ranks that do not read it, which then check nothing.
        request: its number of frames.
        reduction: frames of a latent frame.

    Raises:
        InvalidParameter: the clip fills all latent frames, so that the answer would be the clip.
    """
    if not given.data:
        return
    frames = frames_of(given)
    least = (frames - 1) // reduction * reduction + 1 + reduction
    if request.num_frames < least:
        asked = "none was given, and the clip" if request.frames_chosen else f"got {request.num_frames}, and the clip"
        raise InvalidParameter(
            "num_frames",
            f"this model keeps the clip and goes on from it, so num_frames must be at least {least}; {asked} has "
            f"{frames} frames; raise num_frames, or send a shorter clip",
        )


def _check_end(given: MediaInput, frames: int, overlap: int) -> None:
    """Reject a clip whose last frames are too few, or not there."""
    if frames < overlap:
        raise InvalidParameter(f"extra_params.{OVERLAP}", f"the clip has {frames} frames, {OVERLAP} asks for {overlap}")
    if is_cut(given):
        raise InvalidParameter(
            "video",
            f"only the first {frames} frames of the clip can be read, and this model goes on from its end; send a "
            "shorter clip",
        )
