"""What a ControlNet takes of the transformer's, and which kinds of control it may be told."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from sp_core.torch_private import has_hooks
from tests.workers.test_adapters import PICTURES
from workers.demo_models.parts import controlnet
from workers.errors import InvalidParameter
from workers.model.controlnets import check_control_mode, control_modes, run_whole


class Borrowing(nn.Module):
    """A ControlNet of this transformer."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.refiner, self.embedder = transformer.refiner, transformer.embedder
        self.own = nn.ModuleList([nn.Linear(2, 2)])
        self.rope_embedder = transformer.rope_embedder


def parts() -> tuple[Any, Any]:
    transformer = nn.Module()
    transformer.refiner, transformer.embedder = nn.ModuleList([nn.Linear(2, 2)]), nn.Linear(2, 2)
    transformer.rope_embedder = lambda positions: torch.view_as_real(torch.polar(torch.ones(2), positions))  # type: ignore[assignment]
    transformer.refiner[0].register_forward_pre_hook(lambda *_: (torch.zeros(1, 2),))
    return transformer, Borrowing(transformer)


def test_borrowed_layers_are_not_split() -> None:
    transformer, controlnet = parts()
    own = controlnet.own
    run_whole(SimpleNamespace(transformer=transformer, controlnet=controlnet))
    assert has_hooks(transformer.refiner[0]) and not has_hooks(controlnet.refiner[0])
    assert controlnet.refiner[0].weight is transformer.refiner[0].weight
    assert controlnet.embedder is transformer.embedder and controlnet.own is own
    assert not torch.equal(controlnet.refiner[0](torch.ones(1, 2)), transformer.refiner[0](torch.ones(1, 2)))
    assert controlnet.rope_embedder(torch.ones(2)).is_complex()


def test_a_pipeline_without_a_controlnet_is_left_alone() -> None:
    run_whole(SimpleNamespace(transformer=nn.Linear(2, 2)))
    run_whole(SimpleNamespace(transformer=nn.Linear(2, 2), controlnet=None))


@pytest.mark.parametrize(
    ("kinds", "mode", "said"),
    [
        (3, 3, "control_mode must be from 0 to 2, got 3"),
        (3, -1, "control_mode must be from 0 to 2, got -1"),
        (None, 0, "control_mode is not for this ControlNet, which has one kind of control, got 0; leave it out"),
    ],
)
def test_a_kind_of_control_must_be_there(kinds: int | None, mode: int, said: str) -> None:
    pipeline = SimpleNamespace(controlnet=SimpleNamespace(config=SimpleNamespace(num_mode=kinds)))
    with pytest.raises(InvalidParameter, match=said) as refused:
        check_control_mode(pipeline, replace(PICTURES, extra_params={"control_mode": mode}))
    assert refused.value.param == "extra_params.control_mode"
    assert control_modes(pipeline) == (kinds or 0)
    check_control_mode(pipeline, PICTURES)


class Config(dict[str, Any]):
    """A config of diffusers: its settings are keys, and attributes as well."""

    __getattr__ = dict.__getitem__


def test_a_demo_controlnet_adds_something() -> None:
    config = Config(in_channels=4, num_attention_heads=2, attention_head_dim=6, joint_attention_dim=8, num_layers=9)
    kind = diffusers.QwenImageControlNetModel
    made = controlnet(kind, SimpleNamespace(config=config), num_layers=1, axes_dims_rope=(2, 2, 2))
    assert all(parameter.any() for parameter in made.parameters())
    assert (made.config.in_channels, made.config.num_layers) == (4, 1)
