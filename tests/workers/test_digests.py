"""A model is its files' content: another file under the same path is noticed, and nothing is read twice."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deploy.model_sections import LoRA
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from tests.conftest import COMMIT, OTHER
from tests.support.deployments import model
from workers.model import digests
from workers.model.digests import file_digest, folder_digest, settle_loras
from workers.model.files import fetch, settle_files
from workers.model.loader import load_model


@pytest.fixture(autouse=True)
def _own_temporaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


@pytest.fixture
def folder(demo_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(demo_model, tmp_path / "model")


def change(file: Path) -> None:
    """Another element of the last tensor, by somebody who rewrites the file in place."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_digest_follows_content_and_reads_each_file_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counted(file: Path) -> str:
        read.append(file.name)
        return file_digest(file)

    monkeypatch.setattr(digests, "file_digest", counted)
    notes = tmp_path / "notes"
    first = folder_digest(folder, notes)
    assert len(read) == len([file for file in folder.rglob("*") if file.is_file()])
    read.clear()
    (folder / "vae" / "._config.json").write_text("of a file manager")
    (folder / "README.md").write_text("not loaded")
    os.utime(folder / "vae")
    assert (folder_digest(folder, notes), read) == (first, [])
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    change(weights)
    assert folder_digest(folder, notes) != first
    assert read == [weights.name]
    change(weights)  # back
    assert folder_digest(folder, notes) == first
    shutil.copytree(folder, tmp_path / "elsewhere")
    notes.write_text("damaged")
    assert folder_digest(tmp_path / "elsewhere", notes) == first


def test_files_that_changed_since_they_were_deployed_are_refused(folder: Path) -> None:
    deployed = settle_files(model(folder), None)
    assert fetch(deployed, None) == folder
    change(folder / "text_encoder" / "model.safetensors")
    with pytest.raises(ValueError, match=r"demo: .*/model does not hold the files that were deployed: .*spray deploy"):
        fetch(deployed, None)
    assert settle_files(model(folder), None).digest != deployed.digest


def test_a_hub_models_digest_is_its_commit(hub: Path) -> None:
    spec = model(hub).model_copy(update={"source": "acme/demo"})
    deployed = settle_files(spec, str(hub))
    assert deployed.digest == COMMIT
    (hub / "models--acme--demo" / "refs" / "main").write_text(OTHER)
    assert fetch(spec, str(hub)).name == OTHER
    assert fetch(deployed, str(hub)).name == COMMIT  # as all other gangs of the deployment


def test_an_adapter_that_was_overwritten(demo_model: Path, ink: LoRA, tmp_path: Path) -> None:
    mine = ink.model_copy(update={"source": str(shutil.copy(ink.source, tmp_path / "ink.safetensors"))})
    deployed = settle_loras(model(demo_model).model_copy(update={"loras": (mine,)}))
    mesh = ParallelMesh.create(ParallelDegrees(), device_type="cpu", timeout_s=60)
    loaded = load_model(deployed, mesh)
    save_file({name: tensor * 2 for name, tensor in load_file(mine.source).items()}, mine.source)
    with pytest.raises(
        ValueError, match=r"ink\.safetensors is not the file that was deployed: its SHA-256 is .*spray d"
    ):
        load_model(deployed, mesh)  # as ranks do that take the place of lost ones
    assert loaded.with_loras(deployed.loras).shares == loaded.shares  # in memory: it is the old one, and stays it
    again = settle_loras(model(demo_model).model_copy(update={"loras": (mine,)}))
    assert again.loras != deployed.loras
    (before,), (after,) = (part.shares.values() for part in (loaded, loaded.with_loras(again.loras)))
    for layer, weights in after["transformer"].items():
        assert torch.allclose(
            weights.b @ weights.a, 4 * before["transformer"][layer].b @ before["transformer"][layer].a
        )
