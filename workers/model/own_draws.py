"""For code of diffusers that draws noise with torch's own functions, and not with diffusers' `randn_tensor`.

All generators are on the CPU, so that a seed makes the same picture on every device. torch refuses to draw from them
onto a GPU. Inside this mode such a call draws on the CPU, and its result is moved, as `randn_tensor` does. Used by
`workers.model.decoder_noise`, and by `workers.model.stepped_call` outside of steps, since it slows each call of torch.
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
