"""The requests that a rank runs at its start, so that no caller waits for what a first run prepares."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from deploy.activations import Request, why_two_forwards
from deploy.families.lookup import find_family
from deploy.model_spec import ModelSpec
from workers.messages import GenerationRequest
from workers.model.sample_inputs import with_needed_inputs

STEPS = 4
"""So many that a model with two transformers gets to the second."""

PROMPTS = ("warm", "warm up " * 8)
"""Of two lengths: torch compiles for any length after the second."""


def warm_up_requests(model: ModelSpec, loras: tuple[tuple[str, float], ...] = ()) -> Iterator[GenerationRequest]:
    """Each of the model's `warmup_shapes` with each of the prompts.

    Where both branches of guidance may share a forward, there is one branch in these, and a last one has both: to a
    compiler, another shape. By then it compiles for any length at once.

    Args:
        model: whose `source` is a folder of this node.
        loras: adapters by name, each with its scale.
    """
    kind = find_family(Path(model.source))
    for shape in model.warmup_shapes:
        requests = [
            GenerationRequest(
                request_id="warm-up",
                model=model.name,
                prompt=kind.prompt_form % prompt,
                width=shape.width,
                height=shape.height,
                num_frames=shape.num_frames,
                num_inference_steps=STEPS,
                guidance_scale=model.defaults.guidance_scale,
                loras=loras,
                seed=0,
                output_format="mp4" if kind.makes == "video" else "png",
            )
            for prompt in PROMPTS
        ]
        size = Request(shape.width, shape.height, shape.num_frames, requests[-1].n)
        if kind.guided_above is None or why_two_forwards(model, Path(model.source), size):
            yield from (with_needed_inputs(request, kind) for request in requests)
            continue
        for request in requests:
            yield with_needed_inputs(replace(request, guidance_scale=kind.guided_above), kind)
        last = with_needed_inputs(requests[-1], kind)
        yield replace(last, guidance_scale=kind.guided_above + 1.0, negative_prompt=PROMPTS[-1])
