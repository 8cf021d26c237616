"""Both branches of guidance in one forward give the answer of two, on every layout; what cannot be one batch is two."""

from typing import Any

import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance, SkipLayerGuidance
from torch import nn
from torch._dynamo.utils import counters

from sp_core.attention.region_attention import attention_kept_local
from sp_core.batched_guidance import BatchedGuider, _Repeat, guidance_batch
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.models.family import GuidanceBatch
from sp_core.parallelize import parallelize
from sp_core.shared_modulation import same_timestep
from sp_core.verify import examples
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.sp_core.test_replacements import compiled, one_rank, state_of
from tests.support import qwen
from tests.support.guided import batched_step, guided_step
from tests.support.traffic import Meter

FAMILIES = ["qwen-image", "z-image", "wan"]
LAYOUTS = {
    "ulysses 2": ParallelDegrees(ulysses_degree=2),
    "ring 3": ParallelDegrees(ring_degree=3),
    "tp 2": ParallelDegrees(tensor_parallel_size=2),
    "ulysses 2 x ring 2": ParallelDegrees(ulysses_degree=2, ring_degree=2),
    "tp 2 x ulysses 2": ParallelDegrees(tensor_parallel_size=2, ulysses_degree=2),
}


def branches(name: str, batch: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs of two forwards whose prompts are of one length."""
    inputs = examples.inputs(name, "uneven", "none", batch)
    text = "cap_feats" if name == "z-image" else "encoder_hidden_states"
    prompt = inputs[text]
    other = [each.flip(0) * 0.5 for each in prompt] if isinstance(prompt, list) else prompt.flip(1) * 0.5
    return inputs, inputs | {text: other}


def two_forwards(model: nn.Module, given: tuple[dict[str, Any], dict[str, Any]]) -> torch.Tensor:
    """By the formula of guidance."""
    with torch.no_grad():
        made = [model(**inputs, return_dict=False)[0] for inputs in given]
    first, second = (torch.stack(each) if isinstance(each, list) else each for each in made)
    return second + 4.0 * (first - second)


def count_forwards(model: nn.Module) -> list[int]:
    """One more entry for each forward from now on, the batch of its timestep."""
    calls: list[int] = []

    def count(_model: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        calls.append(len(kwargs["timestep" if "timestep" in kwargs else "t"]))

    model.register_forward_pre_hook(count, with_kwargs=True)
    return calls


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_one_forward_is_two(name: str, batch: int) -> None:
    model, given = examples.TINY[name].build(), branches(name, batch)
    expected = two_forwards(model, given)
    parallelize(model, one_rank())
    before, calls = state_of(model), count_forwards(model)
    found, apart = batched_step(model, given)
    assert error(found, expected) <= BAR
    assert (calls, apart) == ([2 * batch], "")
    swapped = two_forwards(model, given[::-1])  # type: ignore[arg-type]
    assert error(found, swapped) > 100 * BAR
    model._forward_pre_hooks.popitem()
    assert state_of(model) == before


Sent = tuple[dict[str, Any], int]


def on_ranks(mesh: ParallelMesh, name: str, local: bool) -> tuple[torch.Tensor, Sent, Sent]:
    """The prediction of one forward; bytes and calls of two forwards, and of one."""
    model, given = examples.TINY[name].build(), branches(name, 2)
    parallelize(model, mesh)
    found: list[Sent] = []
    for step in (guided_step, batched_step):
        arguments = (model, given, mesh.axis("cfg")) if step is guided_step else (model, given)
        for _ in range(2):  # in a first forward ranks agree on lengths
            with Meter() as meter:
                made = step(*arguments)  # type: ignore[operator]
        found.append((dict(meter.sent), meter.calls))
    if local:
        with attention_kept_local():
            made = batched_step(model, given)
    return made[0], *found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_layout_gives_the_answer_of_one_process(ranks: RankPool, name: str, layout: str) -> None:
    """And sends as many bytes in half as many calls."""
    expected = two_forwards(examples.TINY[name].build(), branches(name, 2))
    for found, (two, of_two), (one, of_one) in ranks.run(LAYOUTS[layout], on_ranks, name, False):
        assert error(found, expected) <= BAR
        assert of_two == 2 * of_one > 0
        assert two == one


@pytest.mark.parametrize("name", FAMILIES)
def test_local_attention_would_be_seen(ranks: RankPool, name: str) -> None:
    expected = two_forwards(examples.TINY[name].build(), branches(name, 2))
    for found, *_ in ranks.run(LAYOUTS["ulysses 2"], on_ranks, name, True):
        assert error(found, expected) > 100 * BAR


@pytest.mark.parametrize("name", FAMILIES)
def test_no_mask_appears(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions of 20 and 31 tokens are 32 for Z-Image; its learned padding takes part."""
    first, second = branches(name)
    if name == "z-image":
        second = second | {"cap_feats": [torch.randn(31, 16, generator=torch.Generator().manual_seed(2))]}
    model = examples.TINY[name].build()
    expected = two_forwards(model, (first, second))
    masks: list[Any] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        masks.append(kwargs.get("attn_mask"))
        return attend(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    found, apart = batched_step(model, (first, second))
    assert error(found, expected) <= BAR
    assert apart == ""
    assert masks and not any(mask is not None for mask in masks)


UNEQUAL: dict[str, tuple[str, dict[str, Any], str]] = {
    "lengths": ("qwen-image", {"encoder_hidden_states": torch.ones(1, 3, 16)}, "the prompts have 7 and 3 tokens"),
    "a mask": (
        "qwen-image", {"encoder_hidden_states_mask": torch.ones(1, 7, dtype=torch.bool)},
        "each branch has encoder_hidden_states_mask besides its prompt",
    ),
    "captions": (
        "z-image", {"cap_feats": [torch.ones(33, 16)]}, "the prompts have 20 and 33 tokens, padded to 32 and 64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNEQUAL)
def test_what_cannot_be_one_batch_takes_two_forwards_and_says_why(case: str) -> None:
    name, changes, said = UNEQUAL[case]
    first, second = branches(name)
    second |= changes
    if case == "a mask":
        first |= {"encoder_hidden_states_mask": None}
    model = examples.TINY[name].build()
    expected = two_forwards(model, (first, second))
    calls = count_forwards(model)
    found, apart = batched_step(model, (first, second))
    assert error(found, expected) <= BAR
    assert (calls, apart) == ([1, 1], said)


def test_a_guider_that_changes_the_model_is_left_as_it_is() -> None:
    guider: Any = BatchedGuider(
        SkipLayerGuidance(skip_layer_config={"indices": [0], "fqn": "transformer_blocks"}), GuidanceBatch("text", ())
    )
    guider.set_state(step=1, num_inference_steps=4, timestep=torch.tensor(0))
    made = guider.prepare_inputs({"text": (torch.ones(1, 2, 3), torch.ones(1, 2, 3))})
    assert len(made) > 1
    assert guider.apart == "SkipLayerGuidance changes the model for each branch"


def test_a_step_without_guidance_has_one_branch() -> None:
    """Of an interval of guidance: the first half of four steps."""
    batch = GuidanceBatch("text", ())
    guider: Any = BatchedGuider(ClassifierFreeGuidance(guidance_scale=4.0, stop=0.5), batch)
    found = []
    for step in range(4):
        guider.set_state(step=step, num_inference_steps=4, timestep=torch.tensor(step))
        (made,) = guider.prepare_inputs({"text": (torch.ones(1, 2, 3), torch.zeros(1, 2, 3))})
        found.append((len(made.text), guider.num_conditions, guider.apart))
    assert found == [(2, 2, ""), (2, 2, ""), (1, 1, ""), (1, 1, "")]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_that_fails_before_its_forward_leaves_later_ones_alone(name: str) -> None:
    """As when memory ends between the two. The next forward is of another request, guided or not."""
    model, given = examples.TINY[name].build(), branches(name)
    expected = two_forwards(model, given)
    parallelize(model, one_rank())
    batch = guidance_batch(model)
    assert batch is not None
    _Repeat(model, batch, 2)
    assert error(two_forwards(model, given), expected) == 0
    _Repeat(model, batch, 2)
    found, apart = batched_step(model, given)
    assert error(found, expected) <= BAR and apart == ""


def test_an_input_that_the_family_does_not_name_is_refused() -> None:
    """It would be given to the first branch only. The hook goes with the forward that it was for."""
    model, (first, second) = examples.TINY["qwen-image"].build(), branches("qwen-image")
    residual = [torch.ones(1, first["hidden_states"].shape[1], 144)]
    given = first | {"controlnet_block_samples": residual}, second | {"controlnet_block_samples": residual}
    with pytest.raises(ValueError, match="QwenImageTransformer2DModel is given controlnet_block_samples, and"):
        batched_step(model, given)
    assert not model._forward_pre_hooks


def test_compiled_blocks_need_one_batch_of_any_length_to_be_warm() -> None:
    """After two lengths of one branch: what `workers.gang.warm_up` relies on."""
    model = qwen.transformer()
    parallelize(model, one_rank())
    compiled(model)
    counters.clear()
    found = []
    for batch, text in ((1, 9), (1, 45), (2, 45), (2, 12), (1, 17), (2, 9)):
        with torch.no_grad(), same_timestep(0.5):
            model(**qwen.inputs(3, 4, text, batch=batch))
        found.append(counters["stats"]["unique_graphs"])
    assert found[1] < found[2] == found[3] == found[4] == found[5]


def test_only_a_familys_own_class_is_batched() -> None:
    model: Any = examples.TINY["wan"].build()
    assert guidance_batch(model) is not None
    kind = type("Changed", (type(model),), {})
    model.__class__ = kind
    assert guidance_batch(model) is None
    assert guidance_batch(examples.TINY["flux"].build()) is None  # its guidance is distilled: one branch
