"""How few steps a classic pipeline can take. Called by its adapter."""

from deploy.families.pipeline_source import ClassicCall
from workers.errors import InvalidParameter
from workers.messages import GenerationRequest

LEAST_STEPS = {"MochiPipeline": 2}
"""The least number of steps, for pipelines that cannot compute a schedule of fewer."""


def check_steps(pipeline: str, call: ClassicCall, request: GenerationRequest) -> None:
    """Reject a request of too few steps.

    Args:
        pipeline: the class name of the pipeline.
        call: its call.
        request: its steps and strength.

    Raises:
        InvalidParameter: names the parameter.
    """
    least = LEAST_STEPS.get(pipeline, 1)
    if request.num_inference_steps < least:
        raise InvalidParameter(
            "num_inference_steps", f"this model takes at least {least} steps, got {request.num_inference_steps}"
        )
    if not (call.takes_strength and call.rounds_steps_down and request.inputs):
        return
    strength = call.usual_strength if request.strength is None else request.strength
    if int(request.num_inference_steps * strength) < 1:
        raise InvalidParameter(
            "strength",
            f"a strength of {strength:g} leaves none of {request.num_inference_steps} steps; raise either, so that "
            "their product is at least 1",
        )
