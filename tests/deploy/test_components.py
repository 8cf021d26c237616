"""A model folder that lacks a component, a setting or a vocabulary is refused by name, before anything is loaded."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.check import check_deployment
from deploy.components import verify_components
from deploy.families.lookup import families
from deploy.model_spec import ModelSpec
from deploy.spec import DeploymentSpec, SpecError
from tests.support.model_folders import edit, stub_model, write

EACH = [(family.pipeline, name) for family in families().values() for name in family.components]


@pytest.mark.parametrize(("pipeline", "name"), EACH)
def test_each_component_is_needed(tmp_path: Path, pipeline: str, name: str) -> None:
    for entry in ([None, None], None):
        folder = stub_model(tmp_path / str(entry is None), pipeline)
        verify_components(folder)
        edit(folder / "model_index.json", {name: entry})
        model = ModelSpec(name="a", source=str(folder), device="cpu")
        with pytest.raises(SpecError, match=rf"a: .*model_index\.json has no {name}, which the pipeline needs"):
            check_deployment(DeploymentSpec(models=(model,)), {"cpu": 2.0})


def test_a_second_transformer_and_its_boundary_belong_together(tmp_path: Path) -> None:
    folder = stub_model(tmp_path / "model", "WanPipeline")
    edit(folder / "model_index.json", {"boundary_ratio": 0.875, "transformer_2": [None, None]})
    with pytest.raises(ValueError, match="has no transformer_2, which the pipeline needs"):
        verify_components(folder)
    (folder / "transformer_2").mkdir()
    write(folder / "transformer_2" / "config.json", {"_class_name": "AModel"})
    edit(folder / "model_index.json", {"transformer_2": ["a_library", "AModel"]})
    verify_components(folder)
    edit(folder / "model_index.json", {"boundary_ratio": None})
    with pytest.raises(ValueError, match=r"has transformer_2, which is used only if model_index.json sets boundary_r"):
        verify_components(folder)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is missing; fetch or copy it again"),
        ("{}", "does not say what it configures"),
        ("[1]", "must be a JSON object, got list"),
        ('\ufeff{"_class_name": "AModel"}', r"begins with a byte order mark \(BOM\)"),
        ("{broken", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
)
@pytest.mark.parametrize("part", ["text_encoder", "transformer", "vae"])
def test_settings_that_cannot_be_used(tmp_path: Path, part: str, content: str | None, says: str) -> None:
    folder = stub_model(tmp_path / "model")
    file = folder / part / "config.json"
    file.unlink() if content is None else file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{part}/config\.json {says}"):
        verify_components(folder)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, r"no model at .*: model_index.json is missing"),
        ("\ufeff{}", r"model_index.json begins with a byte order mark \(BOM\)"),
        ("[]", "model_index.json must be a JSON object, got list"),
        (b"\xff\xfe{\x00}\x00", "model_index.json is not JSON"),
    ],
)
def test_an_index_that_cannot_be_used(tmp_path: Path, content: str | bytes | None, says: str) -> None:
    file = stub_model(tmp_path / "model") / "model_index.json"
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=says):
        verify_components(file.parent)


def test_what_diffusers_does_not_read_may_be_damaged(tmp_path: Path) -> None:
    folder = stub_model(tmp_path / "model")
    (folder / "vae" / "._config.json").write_bytes(b"\x00\x05\x16\x07")
    (folder / "transformer" / "notes.json").write_text("no")
    (folder / "not_in_the_index").mkdir()
    (folder / "not_in_the_index" / "config.json").write_text("no")
    verify_components(folder)
    (folder / "modular_model_index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"modular_model_index.json would be read instead of model_index.json; remove"):
        verify_components(folder)


def test_a_scheduler_that_needs_scipy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stub_model(tmp_path / "model")
    write(folder / "scheduler" / "scheduler_config.json", {"use_beta_sigmas": True})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"scheduler_config\.json sets use_beta_sigmas, which needs scipy; install it"):
        verify_components(folder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    verify_components(folder)


def words(folder: Path) -> Path:
    """The tokenizer in the older form, of two files."""
    (folder / "tokenizer.json").unlink()
    write(folder / "vocab.json", {"a": 0, "b": 1})
    (folder / "merges.txt").write_text("a b\n")
    return folder


def vocabulary(vocab: object, **others: Any) -> Callable[[Path], object]:
    return lambda folder: write(folder / "tokenizer.json", {"model": {"vocab": vocab}, **others})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer has no vocabulary: neither tokenizer.json, "),
        (lambda folder: (folder / "tokenizer.json").write_text("\ufeff{}"), "tokenizer.json begins with a byte order"),
        (lambda folder: write(folder / "tokenizer.json", {}), "tokenizer.json has an empty vocabulary"),
        (vocabulary({}, added_tokens=[{"id": 0}]), "tokenizer.json has an empty vocabulary"),
        (vocabulary([]), "tokenizer.json has an empty vocabulary"),
        (vocabulary({"a": 0, "b": 2}), "has a token 2, but the text encoder has embeddings for 2 tokens"),
        (vocabulary([["a", 0.0]] * 3), "has a token 2, but the text encoder has embeddings for 2 tokens"),
        (vocabulary({"a": 0}, added_tokens=[{"id": 5}]), "has a token 5, but the text encoder has embeddings for 2"),
        (lambda folder: (words(folder) / "merges.txt").unlink(), "merges.txt is missing or empty"),
        (lambda folder: write(words(folder) / "vocab.json", {}), "vocab.json has an empty vocabulary"),
        (lambda folder: write(words(folder) / "added_tokens.json", {"<c>": 7}), "vocab.json has a token 7"),
        (lambda folder: (words(folder) / "vocab.json").unlink(), "tokenizer has no vocabulary"),
    ],
)
def test_vocabularies_that_cannot_be_used(tmp_path: Path, change: Callable[[Path], object], says: str) -> None:
    folder = stub_model(tmp_path / "model")
    change(folder / "tokenizer")
    with pytest.raises(ValueError, match=says):
        verify_components(folder)


@pytest.mark.parametrize("name", ["processor", "text_processor"])
def test_the_vocabulary_of_a_processor_is_that_of_the_model_that_reads_it(tmp_path: Path, name: str) -> None:
    folder = stub_model(tmp_path / "model")
    (folder / name).mkdir()
    write(folder / name / "tokenizer.json", {"model": {"vocab": {"a": 0, "b": 2}}})
    write(folder / name / "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    edit(folder / "model_index.json", {name: ["a_library", "AProcessor"]})
    with pytest.raises(ValueError, match=rf"{name}/tokenizer\.json has a token 2, but the text encoder has embeddings"):
        verify_components(folder)
    (folder / "vision_language_encoder").mkdir()
    write(folder / "vision_language_encoder" / "config.json", {"model_type": "a", "vocab_size": 3})
    edit(folder / "model_index.json", {"vision_language_encoder": ["a_library", "AModel"]})
    verify_components(folder)


def test_vocabularies_in_other_files(tmp_path: Path) -> None:
    folder = stub_model(tmp_path / "model", "FluxPipeline")
    words(folder / "tokenizer")
    (folder / "tokenizer_2" / "tokenizer.json").rename(folder / "tokenizer_2" / "spiece.model")
    write(folder / "text_encoder" / "config.json", {"model_type": "a", "text_config": {"vocab_size": 2}})
    verify_components(folder)
    write(folder / "text_encoder" / "config.json", {"model_type": "a", "text_config": {"vocab_size": 1}})
    with pytest.raises(
        ValueError, match=r"tokenizer/vocab.json has a token 1, but the text encoder has embeddings for"
    ):
        verify_components(folder)
    (folder / "tokenizer_2" / "spiece.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"tokenizer_2 has no vocabulary: .* spiece\.model"):
        verify_components(folder)


def test_a_family_that_chats_needs_a_template(tmp_path: Path) -> None:
    folder = stub_model(tmp_path / "model", "ZImagePipeline")
    (folder / "tokenizer" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer has no chat template: neither chat_template\.jinja nor a key of"):
        verify_components(folder)
    (folder / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    verify_components(folder)
