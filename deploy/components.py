"""Checks the components of a model folder: whether all are there, and whether their settings can be read.

A folder comes in; a `ValueError` with a line per mistake comes out. Called by `deploy.check`, `service.cli.doctor` and
`workers.model.files`. `deploy.safetensors_headers` looks at the weights.
"""

import importlib.util
from pathlib import Path

from deploy.families.lookup import find_family
from deploy.model_folder import INDEX, component_classes, component_folders, read_config, read_index
from deploy.tokenizer_files import verify_chat_template, verify_tokenizer

OTHER_INDEX = "modular_model_index.json"
"""diffusers reads it first, and it may name components of other models."""

PROCESSORS = ("processor", "text_processor")

WITH_TOKENIZER = ("tokenizer", *PROCESSORS)
"""Components with a tokenizer among their files, even if their class also prepares pictures."""

SEES = "vision_language_encoder"


def verify_components(folder: Path) -> None:
    """Reject a model that lacks a component, or has one whose settings or vocabulary cannot be used.

    Raises:
        ValueError: names each component or file, what is wrong, and what to do; a line each.
    """
    needed = find_family(folder).needed_components(read_index(folder))
    present = component_classes(folder)
    mistakes = [f"{folder / INDEX} has no {name}, which the pipeline needs" for name in needed if name not in present]
    mistakes += [
        f"{folder} has {name}, which is used only if {INDEX} sets {key}; set it, or remove {name} from {INDEX}"
        for key, name in find_family(folder).needed_with.items()
        if name in present and name not in needed
    ]
    if (folder / OTHER_INDEX).exists():
        mistakes.append(f"{folder / OTHER_INDEX} would be read instead of {INDEX}; remove it")
    for name in present:
        try:
            _verify_component(folder, name)
        except ValueError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ValueError("\n".join(mistakes))


def _verify_component(folder: Path, name: str) -> None:
    part, kind = folder / name, component_classes(folder)[name]
    if not part.is_dir():
        raise ValueError(f"{part} is missing, but {INDEX} names it; fetch the model again")
    configs = {file.name: read_config(file) for file in sorted(part.glob("*config.json")) if file.name[0] != "."}
    if "Scheduler" in kind:
        _verify_scheduler(part / "scheduler_config.json")
    elif "Tokenizer" in kind or name in WITH_TOKENIZER:
        verify_tokenizer(part, _embedded_tokens(folder / _reader(folder, name)))
        if find_family(folder).chats:
            verify_chat_template(part)
    elif name in component_folders(folder):
        config = configs.get("config.json") or read_config(part / "config.json")
        if not any(config.get(key) for key in ("_class_name", "model_type", "architectures")):
            raise ValueError(f"{part / 'config.json'} does not say what it configures; fetch or copy it again")


def _reader(folder: Path, name: str) -> str:
    """The component that reads the tokens of a tokenizer or processor. GLM-Image's processor serves a second too."""
    if name in PROCESSORS:
        return SEES if SEES in component_classes(folder) else "text_encoder"
    return name.replace("tokenizer", "text_encoder")


def _verify_scheduler(file: Path) -> None:
    if read_config(file).get("use_beta_sigmas") and importlib.util.find_spec("scipy") is None:
        raise ValueError(f"{file} sets use_beta_sigmas, which needs scipy; install it, or remove the key")


def _embedded_tokens(text_encoder: Path) -> int | None:
    """How many tokens a text encoder has embeddings for; None if its config does not say."""
    try:
        config = read_config(text_encoder / "config.json")
    except ValueError:
        return None  # reported for the text encoder itself
    inner = config.get("text_config")
    found = config.get("vocab_size") or (inner.get("vocab_size") if isinstance(inner, dict) else None)
    return found if isinstance(found, int) else None
