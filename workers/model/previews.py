"""Previews of one request while it is denoised: what the picture will be, as far as the model can tell after a step.

The latents before a step, and what the model has predicted from them, come in; small RGB pictures go out. A preview
shows the *predicted clean* latents, not the noisy ones: `sample - sigma x prediction`, as all flow-matching schedulers
say. Made by `workers.model.denoising` on rank 0; encoded by `workers.gang.preview_files`.

A preview is queued behind its step, before the mark of the step's end, so waiting for that end also waits for the
preview. Only `decoder: vae` makes the host wait longer, for a whole decode.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from workers.errors import InvalidParameter
from workers.messages import GenerationRequest
from workers.model.latent_colors import LatentColors
from workers.model.out_of_memory import is_device_failure

logger = logging.getLogger(__name__)

FLOWS = frozenset(
    {
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "FlowMapEulerDiscreteScheduler",
    }
)
"""Schedulers whose models predict a flow."""

SOLVERS = frozenset(
    {
        "UniPCMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "DEISMultistepScheduler",
    }
)
"""Schedulers whose `prediction_type` says whether their models predict a flow."""

Pixels = torch.Tensor | Image.Image
"""A preview: bytes `(h, w, 3)` on the host, or a picture."""

Decode = Callable[[torch.Tensor], Any]


def check_predicts_clean(scheduler: Any, request: GenerationRequest) -> None:
    """Reject previews if the clean latents do not follow from sample, prediction and sigma.

    Raises:
        InvalidParameter: names the scheduler.
    """
    name, config = type(scheduler).__name__, scheduler.config
    flow = name in FLOWS or (name in SOLVERS and config.get("prediction_type") == "flow_prediction")
    if not flow or config.get("invert_sigmas"):
        raise InvalidParameter(
            "partial_images",
            f"{request.model!r} has no previews: its {name} does not predict a flow; ask for none",
        )


def clean(sample: torch.Tensor, prediction: torch.Tensor, scheduler: Any, step: int) -> torch.Tensor:
    """The clean latents that a prediction stands for.

    Args:
        sample: latents before the step, of any shape.
        prediction: of the model, both branches combined.
        scheduler: has a sigma per step. A second-order scheduler's second forward is a step of its own, at its sigma.
        step: 1 for the first that is done: a request that begins with a picture leaves out the steps before.
    """
    sigma: torch.Tensor = scheduler.sigmas[
        (scheduler.begin_index or 0) + step - 1
    ]  # maybe on a GPU: its number is not read
    return sample.to(torch.float32) - sigma.to(torch.float32) * prediction.to(torch.float32)


def middle(frames: int) -> int:
    """The latent frame of a video that previews show."""
    return frames // 2


def cells_of(latents: torch.Tensor, request: GenerationRequest) -> torch.Tensor:
    """The latents of the first picture, or of the middle frame of the first video: `(C, h, w)`.

    Args:
        latents: `(B, C, h, w)`, `(B, C, F, h, w)`, or `(B, S, 4 C)`, where a token has the four cells of a square.
        request: whose size tells the height and width of packed ones.
    """
    first = latents[0]
    if first.ndim == 4:
        return first[:, middle(first.shape[1])]
    if first.ndim == 3:
        return first
    tokens, channels = first.shape
    rows = round((tokens * request.height / request.width) ** 0.5)
    squares = first.reshape(rows, tokens // rows, channels // 4, 2, 2)
    return squares.permute(2, 0, 3, 1, 4).reshape(channels // 4, 2 * rows, -1)


def example(latents: torch.Tensor, made: Any, request: GenerationRequest) -> tuple[torch.Tensor, Image.Image]:
    """The arguments of `LatentColors.learn`: the cells that a preview shows, and their decoded picture.

    Args:
        latents: of the request, all of them.
        made: the first picture, or the frames of the first video.
        request: that was drawn.
    """
    cells = cells_of(latents, request)
    if isinstance(made, Image.Image):
        return cells, made
    frames = latents.shape[2]
    index = middle(frames)
    each = (len(made) - 1) // max(1, frames - 1)  # the first of the latents is one frame of the video
    shown = made[(index - 1) * each + 1 : index * each + 1] if index else made[:1]
    mean = shown[0]
    for count, frame in enumerate(shown[1:], 2):
        mean = Image.blend(mean, frame, 1 / count)
    return cells, mean


class Previews:
    """The previews of one request, on rank 0.

    Args:
        request: which asks for them.
        scheduler: the request's own.
        colors: the model's map from latents to colors.
        warnings: the request's warnings, to which a failure of previews is added.
    """

    def __init__(
        self,
        request: GenerationRequest,
        scheduler: Any,
        colors: LatentColors,
        warnings: list[str],
    ) -> None:
        assert request.previews is not None
        self._request, self._options = request, request.previews
        self._scheduler, self._colors, self._warnings = scheduler, colors, warnings
        self._made: dict[int, tuple[int, Pixels]] = {}  # by step, until they are taken: number and preview
        self._failed = False

    def make(self, step: int, total_steps: int, sample: torch.Tensor, prediction: torch.Tensor, decode: Decode) -> None:
        """Make a preview, if one is due after this step. Call it before the step's end is marked.

        A preview that cannot be made costs the request its previews, and nothing else.

        Args:
            step: 1 for the first.
            total_steps: of the request.
            sample: latents before the step.
            prediction: of the model in it.
            decode: makes a picture of clean latents by the VAE, on this rank alone, and changes nothing else.

        Raises:
            RuntimeError: the device has failed.
        """
        due = self._options.steps(total_steps)
        if self._failed or step not in due:
            return
        try:
            self._made[step] = due.index(step), self._pixels(clean(sample, prediction, self._scheduler, step), decode)
        except Exception as error:
            if is_device_failure(error):
                raise
            self._failed = True
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            logger.warning("request %s has no more previews: %s", self._request.request_id, reason)
            self._warnings.append(f"previews: none from step {step} on; {reason}")

    def take(self, step: int) -> tuple[int, Pixels] | None:
        """The number and the preview of a step that has ended; None if it has none."""
        return self._made.pop(step, None)

    def _pixels(self, latents: torch.Tensor, decode: Decode) -> Pixels:
        if self._options.decoder == "vae":
            return _still(latents, decode)
        cells = cells_of(latents, self._request)
        if not self._colors.fitted:  # the model has had no warm-up
            self._colors.learn(cells, _still(latents, decode))
        return _on_host(self._colors.paint(cells))


def _still(latents: torch.Tensor, decode: Decode) -> Image.Image:
    """The first picture by the VAE, or the middle frame of the first video as a video of one frame."""
    if latents.ndim == 5:
        index = middle(latents.shape[2])
        latents = latents[:, :, index : index + 1]
    made = decode(latents[:1])
    picture: Image.Image = made if isinstance(made, Image.Image) else made[0]
    return picture


def _on_host(colors: torch.Tensor) -> torch.Tensor:
    """A copy that the host does not wait for; it is there when the step has ended."""
    if not colors.is_cuda:
        return colors
    host = torch.empty(colors.shape, dtype=torch.uint8, pin_memory=True)
    return host.copy_(colors, non_blocking=True)
