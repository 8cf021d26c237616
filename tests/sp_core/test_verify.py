"""`spray verify`: the models of sp_core's README pass their proof, wrong ones are told where they go wrong."""

import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from service.cli.main import main
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import Unverifiable, find_proofs, verify

pytestmark = pytest.mark.processes

README = Path(__file__).resolve().parents[2] / "sp_core/README.md"

WRONG = '''
class Pool(nn.Module):
    def forward(self, hidden_states):
        return hidden_states - hidden_states.mean(1, keepdim=True)


class MixesTokens(Standard):
    """A module between split and gather that looks at other tokens without attention."""

    def __init__(self):
        super().__init__()
        self.pool = Pool()

    def forward(self, hidden_states):
        hidden_states = self.pool(self.blocks[0](hidden_states))
        return self.proj_out(self.blocks[1](hidden_states))


class ForgetsPositions(WithRope):
    _sp_plan = Standard._sp_plan


class Blind(Standard):
    def forward(self, hidden_states):
        return self.proj_out(self.blocks[0](hidden_states) * 0)


class FailsAlone(Standard):
    _sp_example = {"hidden_states": ["B", "S", 47]}


class NoNumber(Standard):
    def forward(self, hidden_states):
        output = super().forward(hidden_states)
        return output, output * float("nan")


class Silent(Standard):
    _sp_example = None


class NeedsWidth(Standard):
    def __init__(self, width):
        super().__init__()
'''


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The README's classes, and wrong ones, as the module `readme_models` in the working directory."""
    folder = tmp_path_factory.mktemp("readme")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    (source,) = [block for block in blocks if "class Standard" in block]
    front = re.findall(
        r"```python\n(class MyTransformer.*?)```", (README.parents[1] / "README.md").read_text(), flags=re.S
    )
    (folder / "readme_models.py").write_text(source + WRONG + front[0].replace("ModelMixin", "Silent"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", str(folder))
        yield folder


@pytest.fixture(scope="module")
def readers(models: Path) -> Iterator[RankPool]:
    """Ranks that can import `readme_models`: starting them takes longer than a proof."""
    pool = RankPool(3)
    yield pool
    pool.stop()


@pytest.fixture
def one_pool(readers: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proofs run on `readers`."""
    monkeypatch.setattr("sp_core.verify.verify.closing_pool", lambda size, device_type: nullcontext(readers))


@pytest.mark.usefixtures("one_pool")
def test_the_patterns_of_the_readme() -> None:
    """Also the class that the README of the project shows; its forward is Standard's."""
    for name in ("Standard", "WithRope", "Unified", "Intrusive", "MyTransformer"):
        lines = list(verify(f"readme_models:{name}", worlds=(3,)))
        assert [good for good, _ in lines] == [True] * 3
        assert all("same within" in line for _, line in lines[1:])


@pytest.mark.usefixtures("one_pool")
def test_models_that_go_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    for name, says in (
        ("MixesTokens", "first at 'pool', whose output (1, 12, 48) differs by"),
        ("ForgetsPositions", "failed: RuntimeError: The size of tensor a (12) must match"),
        ("NoNumber", "differs by inf"),
        ("Blind", "proves nothing (even): with attention kept local the answer differs by only 0.0e+00"),
    ):
        assert main(["verify", f"readme_models:{name}", "--world", "2"]) == 1
        said = capsys.readouterr()
        assert says in said.out
        assert "not every layout gives the answer of one process" in said.err


def test_classes_of_diffusers_need_no_description(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "diffusers:WanVACETransformer3DModel", "--world", "2"]) == 0
    assert capsys.readouterr().out.count("same within") == 2


def test_what_cannot_be_verified(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (models / "list.json").write_text("[]")
    (models / "typo.json").write_text('{"int": {}}')
    for arguments, says in (
        (["readme_models"], "expected package.module:Class, got 'readme_models'"),
        (["nowhere:Class"], "nowhere:Class cannot be imported: No module named 'nowhere'"),
        (["readme_models:Nothing"], "has no attribute 'Nothing'"),
        (["readme_models:SPLIT"], "has no attribute 'SPLIT'"),
        (["readme_models:sp_shard"], "is not a torch.nn.Module class"),
        (["readme_models:Silent"], "does not say what its forward takes"),
        (["readme_models:NeedsWidth"], "cannot be built with {}"),
        (["readme_models:FailsAlone"], "does not run on one process (even): RuntimeError: mat1 and mat2"),
        (["readme_models:Standard", "--config", "list.json"], "must be an object with init and inputs"),
        (["readme_models:Standard", "--config", "typo.json"], "the config has int; allowed: init, inputs"),
    ):
        assert main(["verify", *arguments, "--world", "2"]) == 2
        assert says in capsys.readouterr().err
    if torch.cuda.device_count() < 64:
        assert main(["verify", "readme_models:Standard", "--world", "64", "--device", "cuda"]) == 2
        assert "64 ranks need as many GPUs, this machine has" in capsys.readouterr().err
    for worlds in ("1", "2,x", ""):
        assert main(["verify", "readme_models:Standard", "--world", worlds]) == 2
        assert "expected comma-separated numbers of at least 2" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_classes_of_diffusers_on_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "diffusers:QwenImageTransformer2DModel", "--world", "2", "--device", "cuda"]) == 0


def test_a_config_file_says_how_to_build_and_call(models: Path) -> None:
    config = '{"init": {"width": 3}, "inputs": {"hidden_states": ["B", "S", 48]}}'
    (proof,) = find_proofs("readme_models:NeedsWidth", config).values()
    assert {case: tuple(given["hidden_states"].shape) for case, given in proof.inputs.items()} == {
        "even": (1, 24, 48),
        "uneven, batch of 2": (2, 17, 48),
        "short": (1, 3, 48),
    }
    proof.build()
    with pytest.raises(Unverifiable, match="cannot be built with"):
        find_proofs("readme_models:NeedsWidth", '{"_class_name": "x", "w": 1}')["NeedsWidth"].build()
