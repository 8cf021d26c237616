"""The colors of latents by a linear map, which is fitted to the pictures that the model's VAE decodes.

While the model warms up, latents and decoded pictures come in and make the map. Afterwards latents come in and small
pictures go out, one pixel for each cell. Nothing here depends on a particular model. For `workers.model.previews`; each
`workers.model.loader.LoadedModel` holds one.
"""

import contextlib
from collections.abc import Iterator

import torch
from PIL import Image

LEAST = 1e-9
"""The map leaves out directions in which latents vary by less than this share of their largest variation."""


class LatentColors:
    """The map of one model: `rgb = latents @ factors + offset`, by least squares over all cells that it has learned.

    Shapes: `cells` is `(C, h, w)`, the latents of one picture or of one frame.

    Attributes:
        warming: whether the model warms up and each picture is learned. Afterwards the map stays as it is, so that
            equal requests have equal previews.
    """

    def __init__(self) -> None:
        self.warming = False
        self._gram: torch.Tensor | None = None  # (C + 1, C + 1): sums over cells; the last is the constant 1
        self._cross: torch.Tensor | None = None  # (C + 1, 3)
        self._factors: torch.Tensor | None = None  # (C + 1, 3), where the latents are
        self._device = torch.device("cpu")

    @property
    def fitted(self) -> bool:
        """Whether there is a map."""
        return self._gram is not None

    @contextlib.contextmanager
    def warm_up(self) -> Iterator[None]:
        """While the model warms up."""
        self.warming = True
        try:
            yield
        finally:
            self.warming = False
        if self.fitted:
            self._solved()

    def learn(self, cells: torch.Tensor, picture: Image.Image) -> None:
        """Take a picture into account.

        Args:
            cells: the latents.
            picture: the picture that the VAE decodes from them, RGB of any size.
        """
        channels, height, width = cells.shape
        small = picture.resize((width, height), Image.Resampling.BOX).tobytes()
        colors = torch.frombuffer(bytearray(small), dtype=torch.uint8).to(torch.float64).reshape(-1, 3) / 255
        known = _with_one(cells.detach().to("cpu", torch.float64).reshape(channels, -1).T)
        gram, cross = known.T @ known, known.T @ colors
        self._gram = gram if self._gram is None else self._gram + gram
        self._cross = cross if self._cross is None else self._cross + cross
        self._factors, self._device = None, cells.device

    def paint(self, cells: torch.Tensor) -> torch.Tensor:
        """The colors of latents: bytes `(h, w, 3)` on the latents' device, which the host does not wait for."""
        channels, height, width = cells.shape
        factors = self._solved()
        colors = torch.addmm(factors[channels], cells.to(torch.float32).reshape(channels, -1).T, factors[:channels])
        return colors.clamp_(0, 1).mul_(255).round_().to(torch.uint8).reshape(height, width, 3)

    def _solved(self) -> torch.Tensor:
        if self._factors is None:
            assert self._gram is not None and self._cross is not None, "it learns before it paints"
            # Not the inverse: with fewer cells than channels, or channels that hold nothing, the least solution counts.
            solved = torch.linalg.pinv(self._gram, rtol=LEAST, hermitian=True) @ self._cross
            self._factors = solved.to(self._device, torch.float32)
        return self._factors


def _with_one(known: torch.Tensor) -> torch.Tensor:
    return torch.cat((known, torch.ones_like(known[:, :1])), dim=1)
