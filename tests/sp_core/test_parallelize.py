"""A model becomes parallel and plain again; what would attend only locally is refused; collectives are counted."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers.models.attention_dispatch import attention_backend
from torch import nn

from sp_core.attention.layer import SequenceParallelAttention
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.parallelize import parallelize
from sp_core.sp_plan import SequenceParallelInput, SequenceParallelOutput
from sp_core.sp_sharding import sp_active, sp_gather, sp_shard
from sp_core.verify import examples
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.support import qwen
from tests.support.toys import SPLIT, TWO, Intrusive, Toy, ToyBlock


def bypass(mesh: ParallelMesh) -> list[str]:
    said = []
    model, inputs = qwen.transformer(), qwen.inputs(height=4, width=3, text=5)
    parallelize(model, mesh)
    with pytest.raises(ValueError, match="is parallelized already") as refused:
        parallelize(model, mesh)
    said.append(str(refused.value))
    with attention_backend("_native_math"), pytest.raises(RuntimeError) as bypassed, torch.no_grad():
        model(**inputs)
    said.append(str(bypassed.value))
    own = qwen.transformer()
    own.set_attention_backend("_native_math")
    with pytest.raises(ValueError) as own_backend:
        parallelize(own, mesh)
    said.append(str(own_backend.value))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in own.modules())
    return said


def test_attention_cannot_bypass_the_backend(ranks: RankPool) -> None:
    for said in ranks.run(TWO, bypass):
        assert "remove() that first" in said[0]
        assert "no attention of this forward went across ranks" in said[1]
        assert "has its own attention backend" in said[2]


def cut_twice(mesh: ParallelMesh) -> list[str]:
    """A model whose weights are cut already, on a mesh that would cut them again, and on one that would not."""
    said = []
    model = qwen.transformer()
    parallelize(model, mesh)
    for degrees in (mesh.degrees, ParallelDegrees(ulysses_degree=2)):
        again = ParallelMesh.create(degrees, device_type="cpu", timeout_s=60)
        with pytest.raises(ValueError) as refused:
            parallelize(model, again)
        said.append(str(refused.value))
    return said


def test_weights_are_cut_once(ranks: RankPool) -> None:
    said = "QwenImageTransformer2DModel holds only a part of its weights already; load it again"
    assert ranks.run(ParallelDegrees(tensor_parallel_size=2), cut_twice) == [[said] * 2] * 2


def remove_and_return(mesh: ParallelMesh) -> tuple[bool, bool]:
    model = qwen.transformer()
    inputs = qwen.inputs(height=4, width=3, text=5)
    with torch.no_grad():
        before = model(**inputs, return_dict=False)[0]
        for _ in range(2):  # and again after removal
            handle = parallelize(model, mesh)
            across = model(**inputs, return_dict=False)[0]
            handle.remove()
        after = model(**inputs, return_dict=False)[0]
    return torch.equal(before, after), bool((across - before).abs().max() < 1e-4)


def test_the_plain_model_comes_back_bit_for_bit(ranks: RankPool) -> None:
    assert ranks.run(TWO, remove_and_return) == [(True, True)] * 2


def test_models_that_nobody_knows_are_refused_by_name(ranks: RankPool) -> None:
    for said in ranks.run(TWO, parallelize_strangers):
        assert "Toy has no sequence-parallel plan" in said[0]
        assert "it has neither attention processors of diffusers nor a SequenceParallelAttention" in said[1]
        assert "blocks.0 (ToyBlock)" in said[2]


def parallelize_strangers(mesh: ParallelMesh) -> list[str]:
    said = []
    deaf = Toy()
    deaf.blocks[0].processor = ToyBlock()
    plan = {"blocks.0": {"x": SPLIT}, "outputs.main": SequenceParallelOutput(1)}
    cases: list[tuple[nn.Module, Any]] = [(Toy(), None), (Toy(), plan), (deaf, plan)]
    for model, plan in cases:
        with pytest.raises(ValueError) as refused:
            parallelize(model, mesh, plan)
        said.append(str(refused.value))
    return said


def test_a_mismatch_in_attention_is_an_error_and_not_a_picture(ranks: RankPool) -> None:
    for said in ranks.run(TWO, forget_a_split):
        assert "a split is missing from the plan" in said


def forget_a_split(mesh: ParallelMesh) -> str:
    model = qwen.transformer()
    plan: dict[str, Any] = {
        "pos_embed": {0: SequenceParallelInput(split_dim=0, split_output=True)},
        "transformer_blocks.0": {"hidden_states": SPLIT},
        "proj_out": SequenceParallelOutput(1),
    }
    parallelize(model, mesh, plan)
    with pytest.raises(ValueError) as refused, torch.no_grad():
        model(**qwen.inputs(height=4, width=3, text=5))
    return str(refused.value)


def test_other_models_keep_their_attention(ranks: RankPool) -> None:
    assert all(ranks.run(TWO, run_a_bystander))


def run_a_bystander(mesh: ParallelMesh) -> bool:
    bystander, inputs = qwen.transformer(seed=5), qwen.inputs(height=4, width=3, text=5)
    with torch.no_grad():
        before = bystander(**inputs, return_dict=False)[0]
        parallelize(qwen.transformer(), mesh)
        return torch.equal(before, bystander(**inputs, return_dict=False)[0])


def count_collectives(mesh: ParallelMesh, masked: bool) -> dict[str, int]:
    """How often one forward of two layers enters each collective."""
    counts = {"all_to_all_single": 0, "batch_isend_irecv": 0, "all_gather_single": 0, "all_reduce": 0}
    originals = {name: getattr(dist, name) for name in counts}

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return originals[name](*args, **kwargs)

        return call

    model = qwen.transformer(layers=2)
    parallelize(model, mesh)
    inputs = qwen.inputs(height=5, width=3, text=8, mask=[[True] * 6 + [False] * 2] if masked else None)
    with torch.no_grad():
        model(**inputs)  # at the first call of an attention or a gather the ranks agree that it fits
    for name in counts:
        setattr(dist, name, counted(name))
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return counts


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("degrees", "exchanges", "shifts"),
    [
        (ParallelDegrees(ulysses_degree=3), 2, 0),
        (ParallelDegrees(ring_degree=3), 0, 2),
        (ParallelDegrees(ulysses_degree=2, ring_degree=2), 2, 1),
    ],
    ids=str,
)
def test_collectives_per_layer(
    ranks: RankPool, degrees: ParallelDegrees, exchanges: int, shifts: int, masked: bool
) -> None:
    """Ulysses: two exchanges a layer, with a mask too; ring: P - 1 shifts; one gather after the layers, and one for the
    modulation before them."""
    expected = {
        "all_to_all_single": 2 * exchanges,
        "batch_isend_irecv": 2 * shifts,
        "all_gather_single": 2,
        "all_reduce": 0,
    }
    assert ranks.run(degrees, count_collectives, masked) == [expected] * degrees.world_size


def parallelize_the_self_sharding(mesh: ParallelMesh) -> bool:
    model = Intrusive()
    model._sp_plan = {}  # type: ignore[assignment]
    handle = parallelize(model, mesh)
    x = torch.arange(10.0).view(1, 5, 2)
    whole, local = model(x)
    handle.remove()
    return torch.equal(whole, x + 1) and local < 5


def test_an_empty_plan_says_that_a_class_shards_itself(ranks: RankPool) -> None:
    assert all(ranks.run(TWO, parallelize_the_self_sharding))


def test_an_empty_plan_that_is_passed_on_one_rank() -> None:
    """The same code runs with one rank and with many."""
    x = torch.arange(10.0).view(1, 5, 2)
    mesh, model = ParallelMesh.create(ParallelDegrees(), device_type="cpu", timeout_s=60), Intrusive()
    handle = parallelize(model, mesh, {})
    assert torch.equal(model(x)[0], x + 1)
    handle.remove()


def refused_processors(mesh: ParallelMesh) -> list[str]:
    said = []
    flux = examples.TINY["flux"].build()
    flux.transformer_blocks[1].attn.processor = type("FluxIPAdapterAttnProcessor", (), {"_parallel_config": None})()
    sd3 = examples.TINY["sd3"].build()
    sd3.transformer_blocks[0].attn.processor = type("FusedJointAttnProcessor2_0", (), {})()
    helios = type("HeliosTransformer3DModel", (nn.Module,), {})()
    for model in (flux, sd3, helios):
        with pytest.raises(ValueError) as refused:
            parallelize(model, mesh)
        said.append(str(refused.value))
    return said


def test_processors_that_would_be_wrong(ranks: RankPool) -> None:
    for said in ranks.run(TWO, refused_processors):
        assert "cannot be parallelized with FluxIPAdapterAttnProcessor (transformer_blocks.1.attn)" in said[0]
        assert "transformer_blocks.0.attn (FusedJointAttnProcessor2_0)" in said[1]
        assert "HeliosTransformer3DModel is not supported yet" in said[2]


def capture_and_release(mesh: ParallelMesh) -> list[str]:
    """SD3's processors, which two modules share, are the same objects afterwards."""
    model = examples.TINY["sd3.5"].build()
    before = [module.processor for module in model.modules() if hasattr(module, "processor")]
    handle = parallelize(model, mesh)
    with pytest.raises(ValueError, match="is parallelized already"):
        parallelize(model, mesh)
    during = [type(module.processor).__name__ for module in model.modules() if hasattr(module, "processor")]
    handle.remove()
    after = [module.processor for module in model.modules() if hasattr(module, "processor")]
    assert all(a is b for a, b in zip(after, before, strict=True))
    return during


def test_captured_processors_come_back(ranks: RankPool) -> None:
    assert ranks.run(TWO, capture_and_release) == [["CapturedJointAttnProcessor2_0"] * 3] * 2


class TwoStages(nn.Module):
    """Attention, a gather on the way, attention again on the share or on the whole."""

    def __init__(self, closes: bool) -> None:
        super().__init__()
        self._sp_plan: dict[str, Any] = {}
        self.closes = closes
        self.first, self.second = SequenceParallelAttention(), SequenceParallelAttention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = sp_shard(x, 1) if sp_active() else x
        share = self._attend(self.first, share)
        whole = sp_gather(share, 1, closes=self.closes) if sp_active() else share
        share = self._attend(self.second, share + whole.mean(1, keepdim=True))
        return sp_gather(share, 1) if sp_active() else share

    def _attend(self, attention: nn.Module, x: torch.Tensor) -> torch.Tensor:
        heads = x.unflatten(2, (2, 4))
        return x + attention(heads * 2, heads, heads).flatten(2)  # type: ignore[no-any-return]


def attend_after_a_gather(mesh: ParallelMesh, closes: bool) -> Any:
    model, x = TwoStages(closes), torch.randn(1, 7, 8, generator=torch.Generator().manual_seed(0))
    reference = model(x)
    parallelize(model, mesh)
    if not closes:
        return error(model(x), reference)
    with pytest.raises(ValueError) as refused:
        model(x)
    return str(refused.value)


def test_attention_after_a_gather_is_not_silently_local(ranks: RankPool) -> None:
    assert max(ranks.run(TWO, attend_after_a_gather, False)) <= BAR
    assert all("has been gathered already" in said for said in ranks.run(TWO, attend_after_a_gather, True))


class OtherOrder(nn.Module):
    """The forward makes the image first, attention joins [text, image]."""

    def __init__(self) -> None:
        super().__init__()
        self.text_in, self.image_in, self.out = nn.Identity(), nn.Identity(), nn.Identity()
        self.attention = SequenceParallelAttention()
        split = {0: SequenceParallelInput(1, split_output=True)}
        self._sp_plan: dict[str, Any] = {
            "text_in": split, "image_in": split, "out": SequenceParallelOutput(1, stream="image_in")
        }  # fmt: skip

    def forward(self, text: torch.Tensor, image: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        image, text = self.image_in(image), self.text_in(text)
        heads = torch.cat((text, image), 1).unflatten(2, (2, 4))
        return self.out(self.attention(heads * 2, heads, heads, mask).flatten(2)[:, text.shape[1] :])  # type: ignore


def run_other_order(mesh: ParallelMesh, text: int, masked: bool) -> float:
    model, generator = OtherOrder(), torch.Generator().manual_seed(0)
    tokens = [torch.randn(1, n, 8, generator=generator) for n in (text, 6)]
    mask = torch.rand(1, text + 6, generator=generator) > 0.5 if masked else None
    reference = model(*tokens, mask)
    model._sp_plan["out"] = SequenceParallelOutput(1)
    parallelize(model, mesh)
    return error(model(*tokens, mask), reference)


def test_streams_are_joined_in_the_order_of_the_plan(ranks: RankPool) -> None:
    for text, masked in ((5, True), (1, False), (1, True)):
        assert max(ranks.run(TWO, run_other_order, text, masked)) <= BAR


def meddle(mesh: ParallelMesh) -> list[str]:
    said = []
    model = copy.deepcopy(examples.TINY["flux"].model)
    arguments = examples.inputs("flux", "uneven", "none", 1)
    parallelize(model, mesh)
    model.transformer_blocks[1].attn.set_processor(type(model.transformer_blocks[1].attn.processor).__mro__[0]())
    for attempt in (lambda: model(**arguments), lambda: parallelize(model, mesh)):
        with pytest.raises((RuntimeError, ValueError)) as refused:
            attempt()
        said.append(str(refused.value))
    never = Toy()
    never._sp_plan = {"blocks.0": {"x": SPLIT}}  # type: ignore[assignment]
    with pytest.raises(ValueError) as refused_plan:
        parallelize(never, mesh)
    said.append(str(refused_plan.value))
    return said


def test_what_is_changed_afterwards_or_never_gathered(ranks: RankPool) -> None:
    for said in ranks.run(TWO, meddle):
        assert "the attention processor of transformer_blocks.1.attn in FluxTransformer2DModel" in said[0]
        assert "is parallelized already" in said[1]
        assert "splits but gathers nothing" in said[2]


def shared_processor(mesh: ParallelMesh) -> float:
    """diffusers' set_attn_processor gives one object to all modules, those that stay local too."""
    model = copy.deepcopy(examples.TINY["ltx"].model)
    model.set_attn_processor(type(next(iter(model.attn_processors.values())))())
    arguments = examples.inputs("ltx", "uneven", "none", 1)
    with torch.no_grad():
        reference = model(**arguments, return_dict=False)[0]
        parallelize(model, mesh)
        return error(model(**arguments, return_dict=False)[0], reference)


def test_modules_may_share_a_processor(ranks: RankPool) -> None:
    assert max(ranks.run(TWO, shared_processor)) <= BAR


def misfit_on_one(mesh: ParallelMesh) -> str:
    """Whole keys, as many as rank 0's share by chance: all ranks must hear of it, none may wait."""
    model = TwoStages(closes=False)
    parallelize(model, mesh)
    attend = model._attend
    x = torch.randn(1, 5, 8)
    model._attend = lambda attention, share: attend(attention, x[:, :3])  # type: ignore[method-assign]
    with pytest.raises(ValueError) as refused:
        model(x)
    return str(refused.value)


def test_a_misfit_on_one_rank_is_told_to_all(ranks: RankPool) -> None:
    first, second = ranks.run(TWO, misfit_on_one)
    assert "does not fit the plan on another rank" in first
    assert "has 3 queries and 3 keys on sequence rank 1" in second
