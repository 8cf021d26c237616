"""Sample pictures and clips, for the self-test and the warm-up of models that need inputs.

A request without inputs comes in; one with the inputs that its family needs goes out. Called by
`workers.gang.self_test` and `workers.gang.warm_up`.
"""

import io
from dataclasses import replace

from PIL import Image

from deploy.families.family import PipelineFamily
from workers.messages import GenerationRequest, MediaInput, MediaRole

ROLES: tuple[MediaRole, ...] = ("image", "mask", "last_image", "control_image", "video")


def with_needed_inputs(request: GenerationRequest, family: PipelineFamily) -> GenerationRequest:
    """The same request, with a picture or a clip of its size for each role that the family needs."""
    inputs = tuple(_sample(role, request) for role in ROLES if role in family.needs)
    return replace(request, inputs=inputs)


def _sample(role: MediaRole, request: GenerationRequest) -> MediaInput:
    size = request.width, request.height
    shades = Image.linear_gradient("L").resize(size)
    turned = shades.transpose(Image.Transpose.ROTATE_180)
    picture = shades if role == "mask" else Image.merge("RGB", (shades, turned, shades.point(lambda level: level // 2)))
    frames = [picture.rotate(15 * i) for i in range(request.num_frames)] if role == "video" else [picture]
    buffer = io.BytesIO()
    frames[0].save(buffer, "PNG", save_all=len(frames) > 1, append_images=frames[1:])
    return MediaInput(role, buffer.getvalue())
