"""What `workers.model.diffusers_internals` relies on inside diffusers."""

from typing import ClassVar

import diffusers
import pytest
import torch
from torch import nn

from workers.model.diffusers_internals import lora_components, stays_fp32


class Norms(nn.Module):
    _keep_in_fp32_modules: ClassVar[list[str]] = ["norm1", "table"]


class OneNorm(nn.Module):
    _keep_in_fp32_modules = "norm1"


@pytest.mark.parametrize(
    ("kind", "tensor", "stays"),
    [
        (Norms, "blocks.0.norm1.weight", True),
        (Norms, "blocks.0.norm10.weight", False),  # a component of the name, not a part of one
        (Norms, "blocks.0.my_norm1.weight", False),
        (Norms, "table", True),
        (Norms, "blocks.0.scale_table", False),
        (OneNorm, "norm1.weight", True),
        (OneNorm, "norm.weight", False),
        (nn.Linear, "weight", False),
        (diffusers.WanTransformer3DModel, "condition_embedder.time_embedder.linear_1.weight", True),
        (diffusers.QwenImageTransformer2DModel, "transformer_blocks.0.norm1.weight", False),
    ],
)
def test_what_stays_fp32(kind: type[nn.Module], tensor: str, stays: bool) -> None:
    assert stays_fp32(kind, tensor) is stays


class Model(diffusers.ModelMixin, diffusers.ConfigMixin):  # type: ignore[misc]
    config_name = "config.json"
    _keep_in_fp32_modules: ClassVar[list[str]] = ["norm1"]

    @diffusers.configuration_utils.register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm10 = nn.LayerNorm(2), nn.LayerNorm(2)


def test_the_rule_is_that_of_diffusers_loader(tmp_path: object) -> None:
    Model().save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    kinds = {name: parameter.dtype == torch.float32 for name, parameter in loaded.named_parameters()}
    assert kinds == {name: stays_fp32(Model, name) for name in kinds}
    assert set(kinds.values()) == {True, False}


@pytest.mark.parametrize(
    ("pipeline", "components"),
    [
        (diffusers.QwenImagePipeline, ["transformer"]),
        (diffusers.WanPipeline, ["transformer", "transformer_2"]),
        (diffusers.FluxPipeline, ["transformer", "text_encoder"]),
        (diffusers.DDPMPipeline, []),
    ],
)
def test_components_that_take_lora(pipeline: type, components: list[str]) -> None:
    assert [name for name in lora_components(pipeline) if name in ("transformer", "transformer_2", "text_encoder")] == (
        components
    )
