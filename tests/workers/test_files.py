"""A hub id becomes a folder, once per node; what cannot be had is said in words. The hub is a cache made by hand."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from deploy.model_spec import ModelSpec
from tests.conftest import COMMIT, OTHER
from workers.model import files as sources
from workers.model.files import fetch

PARTS = ["scheduler", "text_encoder", "tokenizer", "transformer", "vae"]


def spec(source: str, revision: str | None = None) -> ModelSpec:
    return ModelSpec(name="demo", source=source, revision=revision)


@pytest.fixture(autouse=True)
def _own_temporaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


def test_a_hub_id_is_its_snapshot(hub: Path) -> None:
    snapshots = hub / "models--acme--demo" / "snapshots"
    assert fetch(spec("acme/demo"), str(hub)) == snapshots / COMMIT
    assert fetch(spec("acme/demo", "v1"), str(hub)) == snapshots / OTHER
    assert fetch(spec("acme/demo", OTHER), str(hub)) == snapshots / OTHER


def test_a_folder_is_itself(demo_model: Path, tmp_path: Path) -> None:
    assert fetch(spec(str(demo_model)), None) == demo_model
    with pytest.raises(ValueError, match=r"no model at .*: model_index.json is missing"):
        fetch(spec(str(tmp_path)), None)


def test_what_the_cache_has_not(hub: Path) -> None:
    with pytest.raises(
        ValueError, match=r"demo: acme/other, revision main, cannot be fetched: the hub cannot be reach"
    ):
        fetch(spec("acme/other"), str(hub))
    with pytest.raises(ValueError, match=r"acme/demo, revision v2, cannot be fetched: .*HF_HUB_OFFLINE"):
        fetch(spec("acme/demo", "v2"), str(hub))
    snapshot = hub / "models--acme--demo" / "snapshots" / COMMIT
    (snapshot / "vae").rename(snapshot / "elsewhere")
    with pytest.raises(ValueError, match=r"cannot be fetched: .* has no vae; the hub cannot be reached"):
        fetch(spec("acme/demo"), str(hub))
    (snapshot / "model_index.json").unlink()
    with pytest.raises(ValueError, match=r"acme/demo, revision main, has no model_index\.json"):
        fetch(spec("acme/demo"), str(hub))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errors.GatedRepoError, "accept the terms on its page, and set HF_TOKEN"),
        (errors.RepositoryNotFoundError, "no such model, or a private one; correct source, or set HF_TOKEN"),
        (errors.RevisionNotFoundError, "no such revision of it; set revision to a branch, a tag or a commit"),
        (lambda _: OSError(28, "No space left on device"), "cannot be fetched: OSError: .* No space left on device$"),
        (lambda _: errors.BadRequestError.__new__(errors.BadRequestError, "no"), "cannot be fetched: BadRequestError"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_errors_of_the_hub(monkeypatch: pytest.MonkeyPatch, error: Any, said: str) -> None:
    raised = error.__new__(error, "") if isinstance(error, type) else error("")

    def fails(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(sources, "snapshot_download", fails)
    with pytest.raises(ValueError, match=said) as failed:
        fetch(spec("acme/demo"), None)
    assert failed.value.__suppress_context__


def test_a_name_that_is_no_hub_id() -> None:
    with pytest.raises(ValueError, match="this is not a hub id; set source to org/name"):
        fetch(spec("acme/demo/main"), None)


def test_only_what_is_loaded_is_fetched(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    original = sources.snapshot_download

    def recorded(*args: Any, **kwargs: Any) -> str:
        asked.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(sources, "snapshot_download", recorded)
    fetch(spec("acme/demo"), str(hub))
    assert [each["revision"] for each in asked] == [None, COMMIT]  # the commit cannot move in between
    wanted = {
        "model_index.json": True,
        "transformer/config.json": True,
        "transformer/diffusion_pytorch_model-00001-of-00003.safetensors": True,
        "transformer/diffusion_pytorch_model.safetensors.index.json": True,
        "tokenizer/merges.txt": True,
        "tokenizer/spiece.model": True,
        "tokenizer/chat_template.jinja": True,
        "scheduler/scheduler_config.json": True,
        "demo.safetensors": False,
        "README.md": False,
        "transformer/diffusion_pytorch_model.fp16.safetensors": False,
        "transformer/model.bin": False,
        "vae/model.onnx": False,
        "vae/model.ckpt": False,
        "safety_checker/model.safetensors": False,
    }
    patterns = {key: asked[1][key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(wanted, **patterns)) == [name for name, fetched in wanted.items() if fetched]
    patterns = {key: asked[0][key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(wanted, **patterns)) == ["model_index.json"]


def test_gangs_wait_for_one_another(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four at once: one checks the files, the others find that it has."""
    checked: list[Path] = []

    def check(folder: Path) -> None:
        checked.append(folder)
        time.sleep(0.5)

    monkeypatch.setattr(sources, "CHECKS", (check,))
    found: list[Path] = []
    gangs = [threading.Thread(target=lambda: found.append(fetch(spec("acme/demo"), str(hub)))) for _ in range(4)]
    for gang in gangs:
        gang.start()
    for gang in gangs:
        gang.join()
    assert len(found) == 4
    assert checked == [found[0]]


def test_checks_are_made_anew_when_a_file_changes(
    demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    (folder / "vae").mkdir(parents=True)
    (folder / "model_index.json").write_text((demo_model / "model_index.json").read_text())
    checked: list[Path] = []
    monkeypatch.setattr(sources, "CHECKS", (checked.append,))
    for expected in (1, 1):
        fetch(spec(str(folder)), None)
        assert len(checked) == expected
    (folder / "vae" / "config.json").write_text("{}")
    fetch(spec(str(folder)), None)
    assert len(checked) == 2


def test_a_folder_that_fails_is_not_taken_for_good(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise ValueError(f"{folder} is damaged")

    monkeypatch.setattr(sources, "CHECKS", (refuse,))
    for _ in range(2):
        with pytest.raises(ValueError, match="is damaged"):
            fetch(spec(str(demo_model)), None)


def test_models_that_are_read_only(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to be remembered lies elsewhere then."""
    monkeypatch.setattr("os.access", lambda path, _: hub not in Path(path).parents)
    fetch(spec("acme/demo"), str(hub))
    assert len(list((tmp_path / "tmp").glob("spray-*/*.checked"))) == 1
    assert not list(hub.glob(".spray/*"))
