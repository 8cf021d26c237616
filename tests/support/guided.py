"""One guided step of a transformer, as the denoising loop makes it: a forward for each branch of this group, or one for
all, and with several groups the exchange of their predictions."""

from typing import Any

import diffusers
import torch
from diffusers.guiders import ClassifierFreeGuidance
from torch import nn

from sp_core.batched_guidance import BatchedGuider, guidance_batch
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
        branch.noise_pred = _one_tensor(model(**branch.inputs, return_dict=False)[0])
        guider.cleanup_models(model)
    prediction: torch.Tensor = guider(mine).pred
    return prediction


@torch.no_grad()
def batched_step(model: nn.Module, branches: tuple[dict[str, Any], dict[str, Any]]) -> tuple[torch.Tensor, str]:
    """The combined prediction of one forward, or of two, and why two.

    Args:
        model: of a family that says how branches become a batch.
        branches: keyword arguments of a forward, with the prompt and without.
    """
    batch = guidance_batch(model)
    assert batch is not None
    guider: Any = BatchedGuider(ClassifierFreeGuidance(guidance_scale=4.0), batch)
    guider.set_state(step=0, num_inference_steps=1, timestep=torch.tensor(0))
    own = {name for name in branches[0] if name == batch.prompt or branches[0][name] is not branches[1][name]}
    made = guider.prepare_inputs({name: tuple(each[name] for each in branches) for name in own})
    for branch in made:
        guider.prepare_models(model)
        given = branches[0] | {name: getattr(branch, name) for name in own}
        branch.noise_pred = _one_tensor(model(**given, return_dict=False)[0])
        guider.cleanup_models(model)
    prediction: torch.Tensor = guider(made).pred
    return prediction, guider.apart


def _one_tensor(predicted: Any) -> torch.Tensor:
    """Some models predict a list of samples."""
    return torch.stack(predicted) if isinstance(predicted, list) else predicted
