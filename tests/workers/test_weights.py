"""Loading by share: what is read is what diffusers reads, and no rank holds more than its part."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.verify import examples
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.sp_core.test_families import worst
from workers.model import weights
from workers.model.weights import build, fill, load_transformer

FILE = "diffusion_pytorch_model.safetensors"
INDEX = f"{FILE}.index.json"
NAMES = ["qwen-image", "flux", "flux-2", "ltx", "wan image", "z-image"]
CELL = ("uneven", "none", 1)


def saved(folder: Path, name: str, **options: Any) -> Path:
    examples.TINY[name].model.save_pretrained(folder, **options)  # type: ignore[operator]
    return folder


def forward(model: Any, name: str) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(model(**examples.inputs(name, *CELL), return_dict=False)[0])


def load(mesh: ParallelMesh, folder: Path, name: str) -> tuple[float, int, list[str]]:
    """The difference to the model that was saved, the weights held, and the types they are of."""
    model = load_transformer(folder, mesh, torch.float32)
    held = sum(parameter.numel() for parameter in model.parameters())
    difference = worst(forward(model, name), forward(examples.TINY[name].model, name))
    return difference, held, sorted({parameter.device.type for parameter in model.parameters()})


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "200KB"}], ids=["one file", "an index"])
@pytest.mark.parametrize("name", NAMES)
def test_each_rank_reads_its_share(ranks: RankPool, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    folder = saved(tmp_path, name, **options)
    assert (folder / INDEX).exists() == bool(options)
    whole = sum(parameter.numel() for parameter in examples.TINY[name].model.parameters())
    for degrees in (ParallelDegrees(tensor_parallel_size=2), ParallelDegrees(ulysses_degree=2)):
        for difference, held, devices in ranks.run(degrees, load, folder, name):
            assert difference <= BAR
            assert (held < 0.8 * whole) == (degrees.tensor_parallel_size == 2)
            assert devices == ["cpu"]


def test_files_are_opened_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "READ_AT_ONCE", 1000)
    mesh = ParallelMesh.create(ParallelDegrees(), device_type="cpu", timeout_s=60)
    model = load_transformer(saved(tmp_path, "qwen-image"), mesh, torch.float32)
    reference = examples.TINY["qwen-image"].model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def test_several_files_at_once_are_the_same_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path, "qwen-image", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    model, seen = build(folder), []
    fill(model, folder, torch.device("cpu"), torch.bfloat16, seen.append, at_once=3)
    reference = examples.TINY["qwen-image"].model
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(torch.bfloat16))
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_the_weights_are_not_the_files_memory(tmp_path: Path) -> None:
    folder = saved(tmp_path, "qwen-image")
    model = build(folder)
    fill(model, folder, torch.device("cpu"), torch.float32)
    with (folder / FILE).open("r+b") as file:  # somebody overwrites it in place
        file.seek(-(size := file.seek(0, 2) // 2), 2)
        file.write(bytes(size))
    reference = examples.TINY["qwen-image"].model
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def test_types_are_those_of_diffusers(tmp_path: Path) -> None:
    """Wan keeps some modules in fp32, whatever the others are loaded as."""
    folder = saved(tmp_path, "wan")
    mesh = ParallelMesh.create(ParallelDegrees(), device_type="cpu", timeout_s=60)
    model = load_transformer(folder, mesh, torch.bfloat16)
    theirs = type(model).from_pretrained(folder, torch_dtype=torch.bfloat16)  # type: ignore[attr-defined]
    assert {n: p.dtype for n, p in model.named_parameters()} == {n: p.dtype for n, p in theirs.named_parameters()}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}


def test_files_that_are_not_the_models(tmp_path: Path) -> None:
    mesh = ParallelMesh.create(ParallelDegrees(), device_type="cpu", timeout_s=60)
    folder = saved(tmp_path / "a", "wan")
    fewer = json.loads((folder / "config.json").read_text()) | {"num_layers": 1}
    (folder / "config.json").write_text(json.dumps(fewer))
    with pytest.raises(ValueError, match=r"missing \[\], surplus \['blocks\.1\."):
        load_transformer(folder, mesh, torch.float32)
    (folder / "config.json").write_text(json.dumps(fewer | {"num_layers": 2, "ffn_dim": 32}))
    with pytest.raises(ValueError, match=r"blocks\.\d\.ffn\.net\..* is \(.*\), expected"):
        load_transformer(folder, mesh, torch.float32)
    (folder / FILE).rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="fetch the model again, as safetensors"):
        fill(torch.nn.Linear(1, 1), folder, torch.device("cpu"), torch.float32)
