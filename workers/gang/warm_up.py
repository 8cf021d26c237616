"""The requests that a rank runs at its start, so that no caller waits for what a first run prepares."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from deploy.families.lookup import find_family
from deploy.spec import ModelSpec
from workers.messages import GenerationRequest

STEPS = 4
"""So many that a model with two transformers gets to the second."""

PROMPTS = ("warm", "warm up " * 8)
"""Of two lengths: torch compiles for any length after the second."""


def warm_up_requests(model: ModelSpec, loras: tuple[tuple[str, float], ...] = ()) -> Iterator[GenerationRequest]:
    """Each of the model's `warmup_shapes` with each of the prompts.

    Args:
        model: whose `source` is a folder of this node.
        loras: adapters by name, each with its scale.
    """
    kind = find_family(Path(model.source))
    for shape, prompt in itertools.product(model.warmup_shapes, PROMPTS):
        yield GenerationRequest(
            request_id="warm-up",
            model=model.name,
            prompt=prompt,
            width=shape.width,
            height=shape.height,
            num_frames=shape.num_frames,
            num_inference_steps=STEPS,
            guidance_scale=model.defaults.guidance_scale,
            loras=loras,
            seed=0,
            output_format="mp4" if kind.makes == "video" else "png",
        )
