"""One guided step of a transformer, as the denoising loop makes it: a forward for each branch of this group, and with
several groups the exchange of their predictions."""

from typing import Any

import diffusers
import torch
from diffusers.guiders import ClassifierFreeGuidance
from torch import nn

from sp_core.cfg_parallel import ParallelGuider
from sp_core.mesh import MeshAxis

diffusers.logging.set_verbosity_error()  # each guider warns again that guiders are experimental


@torch.no_grad()
def guided_step(model: nn.Module, branches: tuple[dict[str, Any], dict[str, Any]], axis: MeshAxis) -> torch.Tensor:
    """The combined prediction, the same on every rank.

    Args:
        model: parallelized or not.
        branches: keyword arguments of a forward, with the prompt and without.
        axis: the groups.
    """
    plain = ClassifierFreeGuidance(guidance_scale=4.0)
    guider: Any = ParallelGuider(plain, axis) if axis.size > 1 else plain
    guider.set_state(step=0, num_inference_steps=1, timestep=torch.tensor(0))
    mine = guider.prepare_inputs({"inputs": branches})
    for branch in mine:
        guider.prepare_models(model)
        branch.noise_pred = model(**branch.inputs, return_dict=False)[0]
        guider.cleanup_models(model)
    prediction: torch.Tensor = guider(mine).pred
    return prediction
