"""For code of diffusers that draws noise with `torch.randn` itself, and not with diffusers' own `randn_tensor`.

Seeds are those of generators on the CPU, so that a request makes the same on every device. torch refuses to draw from
them onto a GPU. Inside this mode it draws on the CPU and moves what was drawn, as `randn_tensor` does. Used by
`workers.model.stepped_call`, but not in steps, where it would cost time in each call of torch, and by
`workers.model.decoder_noise`.
"""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

DRAWS = (torch.rand, torch.randint, torch.randn)


class DrawsWhereItsGeneratorIs(TorchFunctionMode):
    """Inside, what is drawn from a generator of another device than asked for is drawn on that device, and moved."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        generator, device = kwargs.get("generator"), kwargs.get("device")
        if function in DRAWS and generator is not None and device is not None:
            return function(*args, **kwargs | {"device": generator.device}).to(device)
        return function(*args, **kwargs)
