"""Headers of weight files: what is read is what safetensors wrote, and damage of every kind is named."""

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deploy.model_folder import component_folders
from deploy.safetensors_headers import headers_by_file, read_header, read_headers, verify_checksums, verify_weights
from tests.support.families import tried

TENSORS = {
    "a": torch.zeros(2, 3, dtype=torch.bfloat16),
    "b": torch.zeros(4),
    "c": torch.zeros((), dtype=torch.int64),
    "d": torch.zeros(0, 5),
    "e": torch.zeros(3, dtype=torch.float8_e4m3fn),
}


def a_file(folder: Path) -> Path:
    file = folder / "model.safetensors"
    save_file(TENSORS, file, metadata={"format": "pt"})
    return file


def with_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write the file again with another header and the same data."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    changed = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + length :])


def test_headers_say_what_was_written(tmp_path: Path) -> None:
    found = read_header(a_file(tmp_path))
    assert {name: (info.shape, info.nbytes, info.is_floating) for name, info in found.items()} == {
        name: (tuple(t.shape), t.nbytes, t.is_floating_point()) for name, t in TENSORS.items()
    }
    assert found["a"].dtype == "BF16"
    assert found["a"].elements == 6


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda file: file.write_bytes(file.read_bytes()[:-1]),
            "incomplete metadata, file not fully covered",
        ),
        (lambda file: file.write_bytes(file.read_bytes() + b"x"), "incomplete metadata, file not fully covered"),
        (lambda file: file.write_bytes(file.read_bytes()[:60]), "(60 bytes) is not a whole safetensors file"),
        (lambda file: file.write_bytes(b"<html>"), "(6 bytes) is not a whole safetensors file"),
        (lambda file: file.write_bytes(b""), "(0 bytes) is not a whole"),
        (lambda file: file.write_bytes(struct.pack("<Q", 4) + b"null"), "is not a whole safetensors file"),
        (lambda file: file.write_bytes(struct.pack("<Q", 4) + b"{{{{"), "is not a whole safetensors file"),
        (lambda file: file.unlink(), "cannot be read: No such file"),
        (lambda file: with_header(file, lambda h: h["a"].update(shape=[2, 2])), "is not a whole safetensors file"),
        (lambda file: with_header(file, lambda h: h["a"].update(dtype="X9")), "is not a whole safetensors file"),
        (lambda file: with_header(file, lambda h: h["a"].pop("data_offsets")), "is not a whole safetensors file"),
        (lambda file: with_header(file, lambda h: h.pop("b")), "invalid offset"),
    ],
)
def test_damaged_files(tmp_path: Path, damage: Callable[[Path], object], says: str) -> None:
    file = a_file(tmp_path)
    damage(file)
    with pytest.raises(ValueError) as refused:
        read_header(file)
    assert says in str(refused.value)
    assert str(file) in str(refused.value)
    assert "fetch the file again" in str(refused.value)


def sharded(folder: Path) -> Path:
    """A component in two files."""
    folder.mkdir(parents=True)
    save_file({"a": torch.zeros(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "model-00002-of-00002.safetensors")
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text("{}")
    return folder


def test_an_index_names_files_that_are_there_and_hold_what_it_says(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "text_encoder")
    assert {name: info.nbytes for name, info in read_headers(folder).items()} == {"a": 8, "b": 12}
    save_file({"c": torch.zeros(3)}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(
        ValueError, match=r"00002-of-00002.safetensors does not contain b, but model.safetensors.index.json says"
    ):
        read_headers(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002.safetensors is missing, but .*index.json names it"):
        read_headers(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="has no weight_map"):
        read_headers(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"no model.safetensors, nor an index of several"):
        read_headers(folder)


def test_libraries_cannot_read_different_weights(tmp_path: Path) -> None:
    """transformers prefers the single file, diffusers the index."""
    folder = sharded(tmp_path / "text_encoder")
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"has both model.safetensors.index.json and model.safetensors, which may"):
        read_headers(folder)
    (folder / "model.safetensors").rename(folder / "diffusion_pytorch_model.safetensors")  # transformers ignores it
    assert set(read_headers(folder)) == {"a", "b"}
    (folder / "config.json").write_text('{"_class_name": "AModel"}')
    assert list(headers_by_file(folder)) == [folder / "diffusion_pytorch_model.safetensors"]
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no diffusion_pytorch_model.safetensors, nor an index of several"):
        read_headers(folder)


def test_a_file_holds_nothing_that_its_index_does_not_name(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "text_encoder")
    save_file({"b": torch.zeros(3), "c": torch.zeros(1)}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(
        ValueError, match=r"00002-of-00002.safetensors contains c, but model.safetensors.index.json does"
    ):
        read_headers(folder)


def test_every_component_of_a_model_is_verified(tmp_path: Path) -> None:
    sharded(tmp_path / "text_encoder")
    sharded(tmp_path / "vae")
    (tmp_path / "scheduler").mkdir()
    index = {
        "_class_name": "P",
        "text_encoder": ["t", "T"],
        "vae": ["d", "V"],
        "scheduler": ["d", "FlowMatchEulerDiscreteScheduler"],
        "x": [None] * 2,
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert list(component_folders(tmp_path)) == ["text_encoder", "vae"]
    verify_weights(tmp_path)
    for part in ("text_encoder", "vae"):
        file = tmp_path / part / "model-00001-of-00002.safetensors"
        file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError) as refused:
        verify_weights(tmp_path)
    assert [line.split(" (")[0] for line in str(refused.value).splitlines()] == [
        f"{tmp_path}/{part}/model-00001-of-00002.safetensors" for part in ("text_encoder", "vae")
    ]
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"transformer": ["d", "T"]}))
    with pytest.raises(ValueError, match=r"transformer is missing, but model_index\.json names it"):
        verify_weights(tmp_path)
    (tmp_path / "model_index.json").unlink()
    with pytest.raises(ValueError, match=r"no model at .*: model_index.json is missing"):
        verify_weights(tmp_path)


@pytest.mark.parametrize("family", tried())
def test_demo_models_are_whole(demo_models: dict[str, Path], family: str) -> None:
    verify_weights(demo_models[family])


def test_checksums(tmp_path: Path) -> None:
    assert verify_checksums(tmp_path) == 0
    file = a_file(tmp_path)
    right = hashlib.sha256(file.read_bytes()).hexdigest()
    (tmp_path / "SHA256SUMS").write_text(f"{right}  {file.name}\n\n{right.upper()} *{file.name}\n")
    assert verify_checksums(tmp_path) == 2
    (tmp_path / "SHA256SUMS").write_text(f"{right[::-1]}  {file.name}\n{right}  absent\nnonsense\n")
    with pytest.raises(ValueError) as refused:
        verify_checksums(tmp_path)
    wrong, absent, nonsense = str(refused.value).splitlines()
    assert f"has the checksum {right}, SHA256SUMS says {right[::-1]}" in wrong
    assert "absent is missing, but SHA256SUMS names it" in absent
    assert "a line that is not a checksum: 'nonsense'" in nonsense
