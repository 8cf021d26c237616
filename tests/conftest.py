"""Fixtures that several test modules share."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import save_file

from deploy.spec import LoRA
from service.rollout.environment import use_private_cluster
from sp_core.verify.rank_pool import RankPool
from workers.demo_models.__main__ import FAMILIES, write_demo_model


def pytest_configure() -> None:
    """Called by pytest before it imports tests, and so before Ray."""
    use_private_cluster()


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Gloo ranks, shared by the whole session."""
    pool = RankPool()
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's folder, written once."""
    folder = tmp_path_factory.mktemp("models") / "demo"
    subprocess.run([sys.executable, "-m", "workers.demo_models.__main__", str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def demo_models(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the demo models of all families, written once."""
    folders = {family: tmp_path_factory.mktemp("models") / family for family in FAMILIES if family != "qwen-image"}
    for family, folder in folders.items():
        write_demo_model(folder, family)
    return {"qwen-image": demo_model, **folders}


@pytest.fixture(scope="session")
def ink(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> LoRA:
    """An adapter for every linear layer of the demo model's blocks."""
    transformer = QwenImageTransformer2DModel.from_pretrained(demo_model / "transformer")
    generator, tensors = torch.Generator().manual_seed(5), {}
    for name, module in transformer.transformer_blocks.named_modules(prefix="transformer.transformer_blocks"):
        if isinstance(module, torch.nn.Linear):
            out, into = module.weight.shape
            tensors[f"{name}.lora_A.weight"] = torch.randn(4, into, generator=generator) / into**0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, 4, generator=generator) / 8
    file = tmp_path_factory.mktemp("loras") / "ink.safetensors"
    save_file(tensors, file)
    return LoRA(name="ink", source=str(file))


COMMIT, OTHER = "a" * 40, "b" * 40
"""Of the model in the `hub`: main, and the tag v1."""


@pytest.fixture
def hub(demo_model: Path, tmp_path: Path) -> Path:
    """The cache of somebody who has fetched acme/demo: main, and a tag of another commit."""
    repo = tmp_path / "hub" / "models--acme--demo"
    for commit, ref in ((COMMIT, "main"), (OTHER, "v1")):
        (repo / "refs").mkdir(parents=True, exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
        for file in demo_model.rglob("*"):
            if file.is_file():
                place = repo / "snapshots" / commit / file.relative_to(demo_model)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(file)
    return repo.parent
