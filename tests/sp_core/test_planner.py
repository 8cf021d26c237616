"""`spray plan`: what it finds is what was written by hand, is proved on ranks, and can be read; or it says why not."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sp_core.sp_plan as words
from service.cli.main import main
from sp_core.models.lookup import families, find_family
from sp_core.planner.movement import CannotPlan, Movement
from sp_core.planner.planner import merged, plan_class
from sp_core.planner.proposals import proposals
from sp_core.planner.source import source_of
from sp_core.planner.trace import Trace
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import find_probes, find_proofs

README = Path(__file__).resolve().parents[2] / "sp_core/README.md"

UNPLANNED = '''
class Patterns(WithRope):
    """The second pattern without its plan."""

    _sp_plan = None


class MixesTokens(Patterns):
    def forward(self, hidden_states):
        cos, sin = self.rope(hidden_states)
        hidden_states = self.blocks[0](hidden_states, cos, sin)
        hidden_states = hidden_states - hidden_states.mean(1, keepdim=True)
        return self.proj_out(self.blocks[1](hidden_states, cos, sin))


class Blind(Patterns):
    def forward(self, hidden_states):
        return self.proj_out(super().forward(hidden_states) * 0)


class NoBlocks(nn.Module):
    _sp_example = {"hidden_states": ["B", "S", 48]}

    def __init__(self):
        super().__init__()
        self.proj_out = nn.Linear(48, 48)

    def forward(self, hidden_states):
        return self.proj_out(hidden_states)
'''

WAYS = {
    "Flux2Transformer2DModel": "split at the model",
    "FluxTransformer2DModel": "split at the model",
    "LTXVideoTransformer3DModel": "split at the model, rotations where they are made",
    "QwenImageTransformer2DModel": "split at the first block",
    "SD3Transformer2DModel": "split at the first block, the text last",
    "WanTransformer3DModel": "split at the first block, the timestep at the model",
}
"""How the calls of diffusers' classes are read, where the plan written by hand has the same entries."""


NOT_FOUND = {
    # They convolve over their tokens, which nothing finds by looking at forwards.
    "SanaTransformer2DModel", "SanaVideoTransformer3DModel",
    # Their plans have companions, more than one grid, streams by sample, or attention that the family declares.
    "AllegroTransformer3DModel", "AnyFlowTransformer3DModel", "ConsisIDTransformer3DModel",
    "ErnieImageTransformer2DModel",
    "HunyuanDiT2DModel", "HunyuanVideo15Transformer3DModel", "HunyuanVideoFramepackTransformer3DModel",
    "JoyImageEditPlusTransformer3DModel", "JoyImageEditTransformer3DModel", "LatteTransformer3DModel",
    "LuminaNextDiT2DModel", "MochiTransformer3DModel", "MotifVideoTransformer3DModel", "PRXTransformer2DModel",
    "SkyReelsV2Transformer3DModel",
}  # fmt: skip
"""Classes whose plans have what no proposal has. The planner says that it finds none."""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's classes, and some without a plan, as the module `plan_models` in the working directory."""
    (source,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
        if "class Standard" in block
    ]
    (tmp_path / "plan_models.py").write_text(source + UNPLANNED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def entries(plan: words.SequenceParallelModelPlan) -> set[tuple[str, str | int]]:
    return {
        (module, key)
        for module, entry in plan.items()
        for key in (entry if isinstance(entry, dict) else ("its output",))
    }


def examples_of(kind: str) -> list[str]:
    return list(find_proofs(f"diffusers:{kind}", None))


@pytest.mark.parametrize("kind", WAYS)
def test_it_finds_what_was_written_by_hand(kind: str) -> None:
    found = []
    for name in examples_of(kind):
        model, cases = find_probes(f"diffusers:{kind}", None, name)
        found.append(proposals(model, Movement(model, cases)))
    proposal = merged(found)[WAYS[kind]]
    family = find_family([kind])
    assert family is not None
    assert entries(proposal.sequence_plan()) == entries(family.sequence_plan({}))
    assert [len(found) for found in (proposal.local_attention, proposal.own_stream)] == [
        len(written) for written in (family.local_attention, family.own_stream)
    ]
    assert all(proposal.reasons[module, key] for module in proposal.plan for key in proposal.plan[module])


@pytest.mark.processes
def test_what_it_finds_is_proved(ranks: RankPool) -> None:
    """Blocks with a stream each, one after another, and with attention that sees one of two streams."""
    for kind, own in (
        ("ZImageTransformer2DModel", {}),
        ("SD3Transformer2DModel", {"transformer_blocks.*.attn2": "hidden_states"}),
    ):
        (found,) = plan_class(f"diffusers:{kind}", worlds=(2,), pool=ranks)
        assert found.variants == tuple(examples_of(kind))
        assert len(found.proofs) == 2 * len(found.variants)
        assert all("same within" in line for line in found.proofs)
        assert found.proposal.own_stream == own


@pytest.mark.soak
def test_all_that_were_written_by_hand_are_found(ranks: RankPool) -> None:
    kinds = {example.transformer_class for family in families() for example in family.examples.values()}
    for kind in sorted(kinds & NOT_FOUND):
        with pytest.raises(CannotPlan):
            plan_class(f"diffusers:{kind}", worlds=(2,), pool=ranks)
    kinds -= NOT_FOUND
    plans = {kind: plan_class(f"diffusers:{kind}", pool=ranks) for kind in sorted(kinds)}
    assert {kind: len(found) for kind, found in plans.items() if len(found) > 1} == {
        "CosmosTransformer3DModel": 2,
        "HunyuanVideoTransformer3DModel": 2,  # one of its variants counts tokens, the other has no such parameter
    }


@pytest.mark.processes
def test_the_plan_that_is_printed_is_one(models: None, ranks: RankPool, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's second pattern, found again."""
    assert main(["plan", "plan_models:Patterns", "--world", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("#   Patterns, ") == 2 == printed.count("same within")
    found: dict[str, Any] = dict(vars(words))
    exec(printed, found)
    import plan_models  # type: ignore[import-not-found]

    assert found["_sp_plan"] == plan_models.WithRope._sp_plan


@pytest.mark.processes
def test_it_says_why_there_is_no_plan(models: None, ranks: RankPool, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "plan_models:NoBlocks"]) == 1
    assert "no list of modules attends" in capsys.readouterr().err
    assert main(["plan", "plan_models:MixesTokens", "--world", "2"]) == 1
    said = capsys.readouterr().err
    assert "no proposal gives the same answer" in said
    assert "differs by" in said and "first at 'blocks.1" in said
    assert main(["plan", "plan_models:Blind", "--world", "2"]) == 1
    assert "proves nothing" in capsys.readouterr().err
    assert main(["plan", "plan_models:Nothing"]) == 2
    assert "has no attribute 'Nothing'" in capsys.readouterr().err


def test_what_moves_is_seen_by_letter() -> None:
    class Joins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, image: torch.Tensor, text: torch.Tensor, count: int) -> list[torch.Tensor]:
            return [self.linear(torch.cat([text, image], 1)), image]

    def inputs(batch: int, image: int, text: int) -> dict[str, Any]:
        return {"image": torch.ones(batch, image, 4), "text": torch.ones(batch, text, 4), "count": image}

    cases = {"": inputs(1, 3, 5), "S": inputs(1, 7, 5), "T": inputs(1, 3, 9), "B": inputs(2, 3, 5)}
    whole, linear = Movement(Joins(), cases).calls
    assert linear.arguments["input"].dims == (frozenset("B"), frozenset("ST"), frozenset())
    assert linear.arguments["input"].is_stream
    assert whole.numbers == {"count": frozenset("S")}
    assert whole.outputs["1"].seen.identity == whole.arguments["image"].seen.identity
    assert (
        whole.outputs["0"].seen.identity == linear.outputs["0"].seen.identity != linear.arguments["input"].seen.identity
    )

    class Depends(Joins):
        def forward(self, image: torch.Tensor, text: torch.Tensor, count: int) -> list[torch.Tensor]:
            return [self.linear(image)] if count == 3 else [image]

    with pytest.raises(CannotPlan, match="which modules are called depends on S: 'linear'"):
        Movement(Depends(), cases)


def test_a_trace_leaves_no_hooks() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Trace(model, {"input": torch.ones(1, 3)})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_source_leaves_out_what_is_usual() -> None:
    model, cases = find_probes("diffusers:WanVACETransformer3DModel", None, "wan vace")
    source = source_of(proposals(model, Movement(model, cases))["split at the first block"])
    assert '        "control_hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),' in source
    assert "    \"vace_blocks.*.attn2\",  # it only looks at 'encoder_hidden_states', which stays whole" in source
    assert "auto_pad" not in source
