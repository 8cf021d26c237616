"""The examples of all families, built: tiny transformers with random weights, and the cells they are proved on.

A cell is a length, a mask and a batch. `python -m sp_core.verify.examples` prints which cells apply to which example,
and why others do not. Used by `sp_core.verify.verify`, by benchmarks and by the tests. The family's file in
`sp_core.models` defines its examples.

Lengths: "even" divides by 2, 3 and 4 in all streams, "uneven" by none of them, "short" has streams with fewer tokens
than ranks.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn

from sp_core.models.family import Example
from sp_core.models.lookup import families

HIDES_ALL = "whole stream"
MASKS = ("none", "suffix", "scattered", "per row", HIDES_ALL)
BATCHES = (1, 2)

SIZES = {"even": ((1, 3, 4), 12), "uneven": ((1, 5, 5), 7), "short": ((1, 1, 3), 1)}
"""Sizes by the name of a length: frames, height and width in tokens, and the length of the text."""

Cell = tuple[str, str, int]
"""Length, mask, batch."""


def randn(*shape: int, seed: int = 1) -> torch.Tensor:
    """Normal numbers, the same on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text_mask(kind: str, batch: int, text: int) -> torch.Tensor | None:
    """`(batch, text)`, boolean, True for tokens that take part; None for the kind "none"."""
    at = torch.arange(text)
    if kind == "none":
        return None
    rows: dict[str, Callable[[int], torch.Tensor]] = {
        "suffix": lambda row: at < max(1, text - 3),
        "scattered": lambda row: (at + row) % 3 != 1,
        "per row": lambda row: at < max(1, text - 4 * row),
        HIDES_ALL: lambda row: at < 0,
    }
    return torch.stack([rows[kind](row) for row in range(batch)])


@dataclass
class ExampleTokens:
    """See `sp_core.models.family.Tokens`."""

    frames: int
    height: int
    width: int
    text: int
    batch: int
    mask: str

    def normal(self, *shape: int, seed: int = 1) -> torch.Tensor:
        return randn(*shape, seed=seed)

    def full(self, value: float, *shape: int) -> torch.Tensor:
        return torch.full(shape, value)

    def ramp(self, last: float, *shape: int) -> torch.Tensor:
        return torch.linspace(0, last, math.prod(shape)).view(shape)

    def tensor(self, values: object) -> torch.Tensor:
        return torch.tensor(values)

    def text_mask(self, kind: str) -> torch.Tensor | None:
        return text_mask(kind, self.batch, self.text)


@dataclass(frozen=True)
class Tiny:
    """An example that can be built and run.

    Attributes:
        example: what the family's file says.
    """

    example: Example

    @functools.cached_property
    def model(self) -> nn.Module:
        """The transformer, built once per process."""
        return self.build()

    def build(self) -> nn.Module:
        """The transformer, with the same weights at every call. Norms and initial zeros are randomized too."""
        torch.manual_seed(0)
        model: nn.Module = getattr(diffusers, self.example.transformer_class)(**self.example.init).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name and parameter.ndim == 1 and name.endswith("weight"):
                    parameter.copy_(torch.rand_like(parameter) + 1)
                if "pad_token" in name or "image_embedder.pos_embed" in name:
                    nn.init.normal_(parameter)
                if parameter.ndim > 1 and not parameter.any():
                    nn.init.normal_(parameter, std=0.1)
                for part, gain in self.example.gains.items():
                    if part in name:
                        parameter.mul_(gain)
        return model

    def why_not(self, length: str, mask: str, batch: int) -> str | None:
        """Why a cell does not apply; None if it does."""
        example = self.example
        if length in example.no_length:
            return example.no_length[length]
        if mask == "none":
            return None
        if example.mask_input is None and mask not in example.own_masks:
            return example.no_mask
        if mask == "per row" and batch == 1:
            return "one row"
        if example.counts_mask and mask in ("scattered", HIDES_ALL):
            return "the model reads how many tokens the mask shows, not which"
        return None

    def inputs(self, length: str, mask: str, batch: int) -> dict[str, Any]:
        """The keyword arguments of one forward."""
        size, text = SIZES[length]
        return self._inputs(ExampleTokens(*size, text, batch, mask))

    def probes(self) -> dict[str, Mapping[str, Any]]:
        """Inputs, by the letter of the longer length: S of the image, T of the text, B the batch; empty: none."""
        mask = "none" if self.example.mask_input is None else "suffix"
        sizes = {"": (3, 7, 1), "S": (8, 7, 1), "T": (3, 38, 1), "B": (3, 7, 2)}
        return {
            letter: self._inputs(ExampleTokens(1, height, 5, text, batch, mask)) | {"return_dict": False}
            for letter, (height, text, batch) in sizes.items()
        }

    def _inputs(self, tokens: ExampleTokens) -> dict[str, Any]:
        arguments = self.example.inputs(tokens)
        if self.example.mask_input is not None:
            kind = tokens.text_mask(tokens.mask)
            if kind is None and self.example.counts_mask:
                kind = torch.ones(tokens.batch, tokens.text, dtype=torch.bool)
            arguments[self.example.mask_input] = kind
        return arguments


TINY: Mapping[str, Tiny] = {name: Tiny(example) for family in families() for name, example in family.examples.items()}
"""The examples, by the name of the variant."""


def inputs(name: str, length: str, mask: str, batch: int) -> dict[str, Any]:
    """The keyword arguments of one forward of an example."""
    return TINY[name].inputs(length, mask, batch)


def quiet_diffusers() -> None:
    """Silence diffusers' warnings in this process: some inputs are of a kind that it calls deprecated."""
    diffusers.logging.set_verbosity_error()


def cells(name: str) -> list[Cell]:
    """The cells that apply to an example."""
    return [cell for cell in itertools.product(SIZES, MASKS, BATCHES) if TINY[name].why_not(*cell) is None]


def main() -> None:
    """Print which cells apply."""
    product = list(itertools.product(SIZES, MASKS, BATCHES))
    for name, tiny in TINY.items():
        print(f"{name}: {len(cells(name))} of {len(product)} cells apply")
        reasons: dict[str, list[Cell]] = {}
        for cell in product:
            reason = tiny.why_not(*cell)
            if reason is not None:
                reasons.setdefault(reason, []).append(cell)
        for reason, without in reasons.items():
            sides = (dict.fromkeys(str(part) for part in side) for side in zip(*without, strict=True))
            print(f"  {len(without):>2} do not, because {reason}: {' x '.join('|'.join(side) for side in sides)}")


if __name__ == "__main__":
    main()
