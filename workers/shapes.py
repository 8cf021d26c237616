"""The `shape` of a request as a label: at most 16 values a model, whatever callers ask for.

Sizes that the deployment names (`warmup_shapes`, the default) have a value of their own. All others are put together by
the pixels of a picture, or of all frames of a video. So the values are the same in every process and after each start.
Called by `workers.gang.rank_telemetry`.
"""

from deploy.model_spec import ModelSpec
from workers.messages import GenerationRequest

MOST_NAMED = 9
SIZES = {"256K": 2**18, "1M": 2**20, "4M": 2**22, "16M": 2**24, "64M": 2**26, "256M": 2**28}
OTHER = "other"


class Shapes:
    """Those of one model."""

    def __init__(self, model: ModelSpec) -> None:
        size = model.defaults.width, model.defaults.height
        warm = [(shape.width, shape.height, shape.num_frames) for shape in model.warmup_shapes]
        named = dict.fromkeys([*warm, (*size, 1), (*size, model.defaults.num_frames)])
        self._named = set(list(named)[:MOST_NAMED])

    def label(self, request: GenerationRequest) -> str:
        """`1024x1024`, `1280x720x81`; `1M` for others of at most 2^20 pixels, ...; `other` above all."""
        width, height, frames = request.width, request.height, request.num_frames
        if (width, height, frames) in self._named:
            return f"{width}x{height}" if frames == 1 else f"{width}x{height}x{frames}"
        pixels = width * height * frames
        return next((name for name, limit in SIZES.items() if pixels <= limit), OTHER)
