"""Reads the clips that callers send, which may be hostile: an MP4 comes in, an animated PNG goes out.

The first bytes tell its kind. A separate process with little memory and time decodes it (`workers.clip_decoder`). If
that process fails, the clip counts as the caller's mistake. Called by `service.api.pictures`.
"""

import importlib.util
import subprocess
import sys

from workers.errors import InvalidParameter

SECONDS = 90
"""Seconds for decoding one clip."""

_found = importlib.util.find_spec("workers.clip_decoder")  # which needs nothing else of ours, and is not imported here
assert _found is not None and _found.origin is not None
DECODER = _found.origin

REFUSED = 3
"""The decoder's exit code for a clip that it refuses."""

ALLOWED = "a clip must be an MP4"


def decode_clip(param: str, data: bytes, most_frames: int, asked_frames: int | None = None) -> bytes:
    """An animated PNG of its first frames; blocks for as long as that takes.

    Args:
        param: the caller's name for it.
        data: the file.
        most_frames: the number of frames to read; later ones are not read.
        asked_frames: the number that must be readable, if the clip has them; None: all that are read.

    Raises:
        InvalidParameter: the clip cannot be decoded, or is of another kind.
    """
    if data[4:8] != b"ftyp":
        raise _invalid(param, f"{ALLOWED}; this file does not begin as one")
    command = [sys.executable, "-I", DECODER, str(most_frames), str(asked_frames or most_frames)]
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise _invalid(param, f"the clip cannot be decoded within {SECONDS} s; send a smaller one") from None
    if done.returncode == REFUSED:
        raise _invalid(param, done.stderr.decode(errors="replace").strip()[:300])
    if done.returncode != 0:
        raise _invalid(param, "the clip cannot be decoded")
    return done.stdout


def frames_of(data: bytes) -> int:
    """How many frames a PNG of `decode_clip` has."""
    place = 8
    while place < len(data):
        length, kind = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        if kind == b"acTL":
            return int.from_bytes(data[place + 8 : place + 12])
        if kind == b"IDAT":
            return 1
        place += 12 + length
    return 1


def _invalid(param: str, message: str) -> InvalidParameter:
    return InvalidParameter(param, message, "invalid_clip")
