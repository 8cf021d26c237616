"""Fixtures that several test modules share."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import service.local  # noqa: F401  # before any other import of Ray: it keeps clusters on loopback

# isort: split
import pytest

from sp_core.rank_pool import RankPool
from workers.demo_model import FAMILIES, write_demo_model


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
    subprocess.run([sys.executable, "-m", "workers.demo_model", str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def demo_models(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the demo models of all families, written once."""
    folders = {family: tmp_path_factory.mktemp("models") / family for family in FAMILIES if family != "qwen-image"}
    for family, folder in folders.items():
        write_demo_model(folder, family)
    return {"qwen-image": demo_model, **folders}
