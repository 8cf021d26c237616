"""A request's own shift of the noise schedule: the model's scheduler, and what the request asks for, come in."""

from typing import Any

from workers.errors import InvalidParameter
from workers.messages import GenerationRequest


def shifted(shared: Any, request: GenerationRequest) -> Any:
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
