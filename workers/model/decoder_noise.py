"""Decoders that add noise to what they decode, as LTX-Video's from 0.9.1 on, draw it by themselves.

diffusers gives their blocks no generator, so the same seed would make another video each time, and each rank would draw
its own noise for the tiles that it decodes. Here each block starts anew with the same numbers at each call: the noise
depends on the size of what is decoded, and on nothing else. Called by `workers.model.loader`.
"""

import inspect
from typing import Any

import torch

TAKES = "generator"


def fix_noise(vae: Any) -> None:
    """Give the blocks of a VAE's decoder that take a generator one of their own."""
    decoder = getattr(vae, "decoder", None)
    blocks = [each for each in decoder.modules() if _takes_generator(each)] if decoder is not None else []
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(_Generator(block, number), with_kwargs=True)


def _takes_generator(module: torch.nn.Module) -> bool:
    return TAKES in inspect.signature(module.forward).parameters


class _Generator:
    """A hook that adds the generator to the arguments of a block's forward.

    Args:
        block: a module whose `forward` takes a generator.
        number: of the block in its decoder.
    """

    def __init__(self, block: torch.nn.Module, number: int) -> None:
        self._signature, self._seed = inspect.signature(block.forward), number

    def __call__(self, block: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        told = self._signature.bind(*args, **kwargs)
        if told.arguments.get(TAKES) is None:
            tensor = next(each for each in told.arguments.values() if isinstance(each, torch.Tensor))
            told.arguments[TAKES] = torch.Generator(tensor.device).manual_seed(self._seed)
        return told.args, told.kwargs
