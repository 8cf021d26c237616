"""Law 1 on diffusers' transformers of every family, with plans of ours and with diffusers' own read as a plan."""

import functools
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel, ZImageTransformer2DModel
from torch import nn

from sp_core.degrees import ParallelDegrees
from sp_core.hooks import apply_sequence_parallel
from sp_core.mesh import ParallelMesh
from sp_core.parallelize import FAMILIES, parallelize
from sp_core.sp_plan import plan_from_diffusers
from tests import qwen
from tests.ranks import RankPool
from tests.test_same_answer import BAR, LAYOUTS, error


def amplify(model: nn.Module, **gains: float) -> nn.Module:
    """Random norm weights, and gains on some others, so that attention shows in the output."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.ndim == 1:
                parameter.copy_(torch.rand_like(parameter) + 1)
            for part, gain in gains.items():
                if part in name:
                    parameter.mul_(gain)
    return model.eval()


@functools.cache
def wan() -> nn.Module:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=12, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=64, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    return amplify(model, to_out=4, scale_shift_table=4)


@functools.cache
def z_image() -> nn.Module:
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(
        in_channels=4, dim=96, n_layers=2, n_refiner_layers=2, n_heads=6, n_kv_heads=6, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[256, 64, 64],
    )  # fmt: skip
    with torch.no_grad():
        model.x_pad_token.normal_()
        model.cap_pad_token.normal_()
    return amplify(model)


@functools.cache
def flux() -> nn.Module:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=12,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return amplify(model, **{"norm1.linear": 3, "norm.linear": 3})


def randn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wan_inputs(frames: int, height: int, width: int, per_token: bool = False) -> dict[str, Any]:
    tokens = frames * height * width
    timestep = torch.linspace(0, 900, tokens).view(1, tokens) if per_token else torch.tensor([500.0])
    return {
        "hidden_states": randn(1, 4, frames, 2 * height, 2 * width),
        "timestep": timestep,
        "encoder_hidden_states": randn(1, 7, 16, seed=2),
    }


def z_inputs(height: int, width: int, *captions: int) -> dict[str, Any]:
    return {
        "x": [randn(4, 1, height, width, seed=i) for i, _ in enumerate(captions)],
        "t": torch.full((len(captions),), 0.5),
        "cap_feats": [randn(length, 16, seed=length) for length in captions],
    }


def flux_inputs(image: int, text: int, batch: int = 1) -> dict[str, Any]:
    positions = torch.arange(3.0 * image).view(image, 3)
    return {
        "hidden_states": randn(batch, image, 8),
        "encoder_hidden_states": randn(batch, text, 16, seed=2),
        "pooled_projections": randn(batch, 8, seed=3),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": positions,
        "txt_ids": torch.zeros(text, 3),
    }


MODELS = {"wan": wan, "z-image": z_image, "flux": flux}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "wan even": ("wan", wan_inputs(2, 3, 4)),
    "wan uneven": ("wan", wan_inputs(1, 5, 3)),
    "wan timestep per token, uneven": ("wan", wan_inputs(2, 3, 3, per_token=True)),
    "wan shorter than the world": ("wan", wan_inputs(1, 1, 1)),
    "z-image": ("z-image", z_inputs(10, 12, 20)),
    "z-image ragged batch": ("z-image", z_inputs(10, 12, 5, 40)),
    "flux even": ("flux", flux_inputs(12, 12)),
    "flux uneven, batch": ("flux", flux_inputs(13, 5, batch=2)),
    "flux text shorter than the world": ("flux", flux_inputs(7, 1)),
}


def forward(mesh: ParallelMesh | None, case: str, across_ranks: bool = True) -> list[torch.Tensor]:
    """The model's output, one tensor per sample; without a mesh, the plain model's."""
    name, inputs = CASES[case]
    model = MODELS[name]()
    handle = None
    if mesh is not None and across_ranks:
        handle = parallelize(model, mesh)
    elif mesh is not None:
        (plan,) = (f.sp_plan for f in FAMILIES if type(model).__name__ in f.transformer_classes)
        _, handle = apply_sequence_parallel(model, plan, mesh)
    with torch.no_grad():
        output = model(**inputs, return_dict=False)[0]
    if handle is not None:
        handle.remove()
    return list(output)


def worst(outputs: list[torch.Tensor], references: list[torch.Tensor]) -> float:
    return max(error(output, reference) for output, reference in zip(outputs, references, strict=True))


def suits(case: str, degrees: ParallelDegrees) -> bool:
    return not (CASES[case][0] == "z-image" and 6 % degrees.ulysses_degree)


CELLS = [(case, layout) for case in CASES for layout in LAYOUTS if suits(case, LAYOUTS[layout])]


@pytest.mark.parametrize(("case", "layout"), CELLS)
def test_every_layout_gives_the_answer_of_one_process(ranks: RankPool, case: str, layout: str) -> None:
    reference = forward(None, case)
    for outputs in ranks.run(LAYOUTS[layout], forward, case):
        assert worst(outputs, reference) <= BAR


@pytest.mark.parametrize("case", [case for case in CASES if case != "wan shorter than the world"])
def test_local_attention_would_be_seen(ranks: RankPool, case: str) -> None:
    """One token attends only to itself wherever it lies, so a single-token video cannot show the difference."""
    reference = forward(None, case)
    outputs = ranks.run(ParallelDegrees(ulysses_degree=3), forward, case, False)
    assert max(worst(output, reference) for output in outputs) > 100 * BAR


def two_in_turn(mesh: ParallelMesh) -> float:
    """Two transformers that take turns, at different lengths, as Wan 2.2's do."""
    first, second = wan(), wan.__wrapped__()
    long, short = CASES["wan even"][1], CASES["wan uneven"][1]
    turns = [(first, long), (second, short), (first, short), (second, long)]
    with torch.no_grad():
        references = [model(**inputs, return_dict=False)[0] for model, inputs in turns]
        handles = [parallelize(model, mesh) for model in (first, second)]
        outputs = [model(**inputs, return_dict=False)[0] for model, inputs in turns]
    for handle in handles:
        handle.remove()
    return worst(outputs, references)


def test_two_models_alternate(ranks: RankPool) -> None:
    assert max(ranks.run(ParallelDegrees(ulysses_degree=2), two_in_turn)) <= BAR


def by_diffusers_plan(mesh: ParallelMesh) -> tuple[float, str]:
    """Qwen-Image by the `_cp_plan` that diffusers ships, as any class without a family of ours."""
    model = qwen.transformer()
    stranger = type("Stranger", (type(model),), {})
    model.__class__ = stranger
    inputs = qwen.inputs(height=5, width=3, text=7)
    with torch.no_grad():
        reference = model(**inputs, return_dict=False)[0]
        parallelize(model, mesh)
        output = model(**inputs, return_dict=False)[0]
        with pytest.raises(ValueError, match="does not say in which order") as refused:
            model(**qwen.inputs(height=5, width=3, text=1))
    return error(output, reference), str(refused.value)


def test_a_plan_of_diffusers_is_enough(ranks: RankPool) -> None:
    for difference, said in ranks.run(ParallelDegrees(ring_degree=2), by_diffusers_plan):
        assert difference <= BAR
        assert "pass plan= with the streams in that order" in said


def test_diffusers_plans_that_are_none() -> None:
    for plan in ({"a": {"x": 1}}, {"a": 1}, {"a": [1]}):
        with pytest.raises(ValueError, match="expected ContextParallel"):
            plan_from_diffusers(plan)
