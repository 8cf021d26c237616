"""Compiled code on the disk: who takes it, who may write it, how much there is of it, and what damage costs."""

import fcntl
import gc
import json
import logging
import shutil
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.model_spec import ModelSpec
from sp_core.degrees import ParallelDegrees
from tests.support.deployments import model
from workers.model import compile_cache
from workers.model.compile_cache import CompileCache, Warmed, cache_folder, what_decides
from workers.private_folder import open_own

COMPILED, FOUND = Warmed("start", 0, 3, 90.0), Warmed("start", 3, 0, 20.0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return cache_folder(str(tmp_path))


def written(cache: CompileCache, **files: str) -> None:
    for name, text in files.items():
        place = cache.folder / "fxgraph" / name
        place.parent.mkdir(exist_ok=True)
        place.write_text(text)


def held(cache: CompileCache) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(cache.folder.rglob("*")) if path.is_file()}


def left(cache: CompileCache) -> None:
    """As if its process had ended."""
    cache._in_use.close()


def test_the_next_process_finds_what_was_kept(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first = CompileCache(root, {"a": 1})
    written(first, a="1", b="2")
    first.keep(COMPILED)
    left(first)
    second = CompileCache(root, {"a": 1})
    assert second.folder == first.folder
    assert held(second) == {"a": "1", "b": "2"}
    second.keep(FOUND)
    assert "the start took 90 s; it compiled 3 graphs and found 0 in" in caplog.messages[0]
    assert "the start took 20 s; it found all 3 graphs, which saved 70 s, in" in caplog.messages[1]
    other = CompileCache(root, {"a": 2})
    assert held(other) == {}
    assert json.loads((root / f"{first.folder.name}.json").read_text())["decides"] == {"a": 1}


def test_what_is_damaged_or_unfinished_is_not_used(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = CompileCache(root, {})
    written(first, whole="1", flipped="2", cut="345", link="6")
    first.keep(COMPILED)
    written(first, unfinished="the rank was killed while it wrote")
    left(first)
    written(first, flipped="X", cut="3")
    (first.folder / "fxgraph" / "link").unlink()
    (first.folder / "fxgraph" / "link").symlink_to(root / f"{first.folder.name}.json")
    assert held(CompileCache(root, {})) == {"whole": "1"}
    assert "3 files in" in caplog.text


def test_damaged_notes_cost_all_of_it(root: Path) -> None:
    first = CompileCache(root, {})
    written(first, a="1")
    first.keep(COMPILED)
    left(first)
    for damaged in ("", "{", "[]", '{"files": {"fxgraph/a": 1}, "seconds": {}}', "\0\0"):
        (root / f"{first.folder.name}.json").write_text(damaged)
        cache = CompileCache(root, {})
        assert held(cache) == {}
        written(cache, a="1")
        cache.keep(COMPILED)
        left(cache)


def test_nobody_removes_what_others_are_writing(root: Path) -> None:
    first, second = CompileCache(root, {}), CompileCache(root, {})
    written(first, a="1")
    written(second, b="2")
    first.keep(COMPILED)
    written(second, c="3")
    third = CompileCache(root, {})
    assert held(third) == {"a": "1", "b": "2", "c": "3"}
    second.keep(FOUND)  # it compiled nothing, and notes nothing
    for cache in (first, second, third):
        left(cache)
    assert held(CompileCache(root, {})) == {"a": "1", "b": "2"}


def test_those_that_were_not_used_for_long_make_room(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = [CompileCache(root, {"number": number}) for number in range(4)]
    for cache in caches:
        written(cache, a="x" * 1000)
    for cache in caches[1:3]:
        left(cache)
    monkeypatch.setattr(compile_cache, "MOST_BYTES", 3500)
    caches[3].keep(COMPILED)  # the oldest is in use; the next one goes, and that is enough
    assert [cache.folder.exists() for cache in caches] == [True, False, True, True]
    left(caches[3])
    monkeypatch.setattr(compile_cache, "MOST_BYTES", 500)
    assert held(CompileCache(root, {"number": 3})) == {}  # one that is too large by itself begins anew


def test_only_its_user_may_write_there(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o777)  # a volume that all users share
    cache = CompileCache(root, {})
    folders = (root.parent, root, cache.folder)
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in folders] == [0o700] * 3
    assert stat.S_IMODE((root / f"{cache.folder.name}.json").stat().st_mode) == 0o600
    left(cache)
    shutil.move(cache.folder, tmp_path / "theirs")
    cache.folder.symlink_to(tmp_path / "theirs")
    with pytest.raises(PermissionError, match="belongs to somebody else"):
        CompileCache(root, {})
    monkeypatch.setattr("os.getuid", lambda: root.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="belongs to somebody else"):
        CompileCache(root, {})


def test_a_link_to_a_folder_is_removed(demo_model: Path, root: Path, tmp_path: Path) -> None:
    decides = what_decides(model(demo_model), "gpu")
    cache = CompileCache(root, decides)
    (tmp_path / "elsewhere").mkdir()
    (link := cache.folder / "code").symlink_to(tmp_path / "elsewhere")
    CompileCache(root, decides)
    assert not link.is_symlink()


def test_whoever_comes_while_another_verifies_waits(demo_model: Path, root: Path) -> None:
    decides = what_decides(model(demo_model), "gpu")
    folder = CompileCache(root, decides).folder
    came = threading.Event()

    def come() -> None:
        CompileCache(root, decides)
        came.set()

    with open_own(root / f"{folder.name}.lock") as verifying:
        gc.collect()  # the first one holds its lock as long as it lives
        fcntl.flock(verifying, fcntl.LOCK_EX)
        coming = threading.Thread(target=come, daemon=True)
        coming.start()
        assert not came.wait(0.3)
        fcntl.flock(verifying, fcntl.LOCK_UN)
        assert came.wait(60)


def changes(folder: Path) -> Iterator[tuple[str, ModelSpec, str]]:
    spec = model(folder)
    yield "the layout", spec.model_copy(update={"parallel": ParallelDegrees(ring_degree=2)}), "gpu"
    yield "the type", spec.model_copy(update={"dtype": "bfloat16"}), "gpu"
    yield "the kernel", spec.model_copy(update={"attention_kernel": "torch-flash"}), "gpu"
    yield "the plan", spec.model_copy(update={"plan": "a.b:C"}), "gpu"
    yield "the recording", spec.model_copy(update={"cuda_graphs": True}), "gpu"
    yield "the class", spec.model_copy(update={"transformer_class": "a.b:C"}), "gpu"
    yield "the device", spec, "another gpu"


def test_all_that_decides_has_a_folder_of_its_own(
    demo_model: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def folder(spec: ModelSpec, device: str = "gpu") -> Path:
        return CompileCache(root, what_decides(spec, device)).folder

    copied = tmp_path / "finetuned"
    shutil.copytree(demo_model, copied)
    (copied / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"other weights")
    first = folder(model(demo_model))
    assert folder(model(copied, name="finetuned")) == first
    seen: dict[str, Any] = {"nothing": first}
    for what, spec, device in changes(demo_model):
        seen[what] = folder(spec, device)
    config = copied / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"num_layers": ', '"num_layers": 1'))
    seen["the config"] = folder(model(copied))
    for package in compile_cache.PACKAGES:
        with monkeypatch.context() as patched:
            found = compile_cache._version
            patched.setattr(compile_cache, "_version", lambda name, p=package, f=found: "9" if name == p else f(name))
            seen[package] = folder(model(demo_model))
    with monkeypatch.context() as patched:
        patched.setattr("sp_core.__path__", [str(tmp_path)])
        seen["our own code"] = folder(model(demo_model))
    assert len(set(seen.values())) == len(seen), seen
