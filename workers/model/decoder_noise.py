"""Decoders that add noise to what they decode, as LTX-Video's from 0.9.1 on, draw it by themselves.

diffusers gives their blocks no generator, so the same seed would make another video each time, and each rank would draw
its own noise for the tiles that it decodes. Here each block starts anew with the same numbers at each call: the noise
depends on the size and dtype of what is decoded, and on nothing else, not even the device. Called by
`workers.model.loader`.
"""

import inspect
from contextlib import ExitStack
from typing import Any

import torch

from workers.model.own_draws import DrawsWhereItsGeneratorIs

TAKES = "generator"


def fix_noise(vae: Any) -> None:
    """Give the blocks of a VAE's decoder that take a generator one of their own."""
    decoder = getattr(vae, "decoder", None)
    blocks = [each for each in decoder.modules() if _takes_generator(each)] if decoder is not None else []
    for number, block in enumerate(blocks):
        generator = _Generator(block, number)
        block.register_forward_pre_hook(generator.begin, with_kwargs=True)
        block.register_forward_hook(generator.end, always_call=True)


def _takes_generator(module: torch.nn.Module) -> bool:
    return TAKES in inspect.signature(module.forward).parameters


class _Generator:
    """Hooks that add a generator to the arguments of a block's forward.

    Args:
        block: a module whose `forward` takes a generator.
        number: of the block in its decoder.
    """

    def __init__(self, block: torch.nn.Module, number: int) -> None:
        self._signature, self._seed = inspect.signature(block.forward), number
        self._drawing: list[ExitStack] = []

    def begin(self, _block: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the block's forward."""
        told = self._signature.bind(*args, **kwargs)
        if told.arguments.get(TAKES) is None:
            told.arguments[TAKES] = torch.Generator().manual_seed(self._seed)
        self._drawing.append(ExitStack())
        self._drawing[-1].enter_context(DrawsWhereItsGeneratorIs())
        return told.args, told.kwargs

    def end(self, *_: object) -> None:
        """After it, even if it fails."""
        self._drawing.pop().close()
