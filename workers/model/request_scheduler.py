"""A request's own scheduler: the model's comes in, a copy for one request goes out.

Called by `workers.model.denoising`.
"""

import copy
import functools
import inspect
from typing import Any

import torch

from workers.errors import InvalidParameter
from workers.messages import GenerationRequest


def scheduler_of(shared: Any, request: GenerationRequest, generators: list[torch.Generator]) -> Any:
    """A scheduler of the request's own.

    It draws its noise from the generators, one per picture; pipelines use torch's global one, and ranks would differ.
    With one step, the stretch of the schedule to `shift_terminal` is turned off: the first sigma, 1, is also the last,
    and diffusers would divide 0 by 0.
    """
    scheduler = copy.deepcopy(shared) if request.flow_shift is None else _shifted(shared, request)
    if "generator" in inspect.signature(scheduler.step).parameters:
        scheduler.step = functools.partial(scheduler.step, generator=generators)
    if request.num_inference_steps == 1 and scheduler.config.get("shift_terminal"):
        scheduler.register_to_config(shift_terminal=None)
    return scheduler


def _shifted(shared: Any, request: GenerationRequest) -> Any:
    """A scheduler like the model's, with the request's `flow_shift`.

    Raises:
        InvalidParameter: the model's scheduler has no shift, or one that follows from the size.
    """
    config = shared.config
    name = next((name for name in ("flow_shift", "shift") if name in config), None)
    refusal = f"{request.model!r} takes no flow_shift: its {type(shared).__name__} "
    if name is None or (name == "flow_shift" and not config.get("use_flow_sigmas")):
        raise InvalidParameter("flow_shift", f"{refusal}has no such shift")
    if config.get("use_dynamic_shifting"):
        raise InvalidParameter("flow_shift", f"{refusal}shifts by the size")
    return type(shared).from_config({**config, name: request.flow_shift})
