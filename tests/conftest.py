"""Fixtures that several test modules share."""

import functools
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
# Each new folder of compiled code would begin with ten seconds of trying which vector instructions g++ can write.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import save_file

from deploy.model_sections import LoRA
from service.rollout.environment import use_private_cluster
from sp_core.verify.rank_pool import RankPool
from workers.demo_models.writer import write_demo_model


def pytest_configure() -> None:
    """Called by pytest before it imports tests, and so before Ray."""
    # Each of thousands of calls by httpx outside a client would read all certificates, for 20 ms.
    ssl.create_default_context = functools.cache(ssl.create_default_context)
    os.environ.pop("SPRAY_OUTPUTS_DIR", None)  # tests share no folder
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
    command = [sys.executable, "-m", "workers.demo_models", str(folder), "--family", "qwen-image"]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def demo_models(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the demo models of all families, each written when it is first asked for."""
    return DemoModels(tmp_path_factory.mktemp("models"), demo_model)


class DemoModels(dict[str, Path]):
    """By the name of a family."""

    def __init__(self, place: Path, first: Path) -> None:
        super().__init__({"qwen-image": first})
        self._place = place

    def __missing__(self, family: str) -> Path:
        write_demo_model(self._place / family, family)
        self[family] = self._place / family
        return self[family]


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


ONE_PER_MECHANISM = {
    "ulysses": "sp_core/test_same_answer.py::test_every_layout_gives_the_answer_of_one_process[uneven-ulysses 2]",
    "ring": "sp_core/test_same_answer.py::test_every_layout_gives_the_answer_of_one_process[uneven-ring 2]",
    "control": "sp_core/test_same_answer.py::test_local_attention_would_be_seen[uneven-2]",
    "hooks": "sp_core/test_hooks.py::test_a_model_may_shard_itself",
    "tensor": "sp_core/test_tensor_parallel.py::test_shared_weights_give_the_answer_of_one_process[wan-tp 2]",
    "guidance": "sp_core/test_cfg_parallel.py::test_every_guider_combines_the_same[plain-2]",
    "tiles": "sp_core/test_tile_parallel.py::test_shared_tiles_are_the_tiles_of_one_process[qwen-image-2]",
    "adapters": "sp_core/test_lora.py::test_any_layout_is_peft_on_one_process[flux-tp 2]",
    "compile": "sp_core/test_compile.py::test_operators_are_what_is_traced",
    "request": "workers/test_denoising.py::test_every_degree_draws_the_same[uneven, guided-2]",
}
"""What `make check` runs of the tests that start ranks."""

TESTS = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what the quick loop leaves out, by what it uses: ranks, or a live cluster."""
    found = {item.nodeid.removeprefix("tests/"): item for item in items}
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()) or item.path.is_relative_to(TESTS / "live"):
            item.add_marker(pytest.mark.processes)
        if item.get_closest_marker("fault") and not item.path.is_relative_to(TESTS / "live"):
            raise pytest.UsageError(f"{item.nodeid} is not in tests/live, where `make fault` looks")
    for mechanism, name in ONE_PER_MECHANISM.items():
        if name in found:
            found[name].add_marker(pytest.mark.mechanism)
        elif "mechanism" in config.getoption("markexpr"):
            raise pytest.UsageError(
                f"no test is called {name}, the quick case of {mechanism}; correct tests/conftest.py"
            )
