"""A model's folder on this machine: where it is, and what its configs say. Nothing is fetched and no weights are read.

Called by the rest of `deploy`, `service.cli.doctor` and `workers.model`.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from deploy.model_spec import ModelSpec
from deploy.spec import DeploymentSpec

INDEX = "model_index.json"

BYTE_ORDER_MARK = "\ufeff"

GUARDRAIL = "cosmos_guardrail"
"""The package with the checker of prompts and pictures that the license of Cosmos requires."""

WITHOUT_WEIGHTS = ("Guid", "Scheduler", "Tokenizer", "Processor", "FeatureExtractor")
"""Words in the names of the classes whose files hold settings and vocabularies."""


def model_folder(spec: DeploymentSpec, model: ModelSpec) -> Path | None:
    """Where the model's files are on this machine; None for a hub model that is not here."""
    if not model.from_hub:
        return Path(model.source)
    return cached_folder(model.source, model.digest or model.revision, cache_root(spec.storage.models))


def cache_root(models: str | None) -> Path:
    """The folder of hub models: `storage.models` of the deployment; None takes Hugging Face's own cache."""
    return Path(models or constants.HF_HUB_CACHE)


def cached_folder(source: str, revision: str | None, root: Path) -> Path | None:
    """The snapshot of a hub model; None if the cache does not have it.

    Args:
        source: the hub id, `org/name`.
        revision: branch, tag or commit; None is the branch `main`.
        root: see `cache_root`.
    """
    try:
        index = try_to_load_from_cache(source, INDEX, cache_dir=root, revision=revision)
    except HFValidationError:  # not a hub id, so nothing of it is here; fetching it says why
        return None
    return Path(index).parent if isinstance(index, str) else None


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: the file is missing, or diffusers could not read it. The message names it.
    """
    try:
        content = file.read_text(encoding="utf-8")
        if content.startswith(BYTE_ORDER_MARK):
            raise ValueError(f"{file} begins with a byte order mark (BOM); save it as UTF-8 without one")
        return json.loads(content)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing; fetch or copy it again") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); fetch or copy it again") from None


def read_config(file: Path) -> dict[str, Any]:
    """The content of a JSON file, which must be an object.

    Raises:
        ValueError: see `read_json`; or the content is something else.
    """
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} must be a JSON object, got {type(content).__name__}; fetch or copy it again")
    return content


def read_index(folder: Path) -> dict[str, Any]:
    """The `model_index.json` of a folder.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    if not (folder / INDEX).exists():
        raise ValueError(f"no model at {folder}: {INDEX} is missing; set source to a diffusers folder")
    return read_config(folder / INDEX)


def component_classes(folder: Path) -> dict[str, str]:
    """The components of a model, each with its class. The index lists components that it lacks as [null, null].

    A guardrail is no component: it has no files in the folder, and its package makes it.

    Raises:
        ValueError: see `read_index`.
    """
    entries = read_index(folder).items()
    return {name: str(entry[1]) for name, entry in entries if is_component(entry) and entry[0] not in (None, GUARDRAIL)}


def is_component(entry: Any) -> bool:
    """Whether an entry of an index is a component: library and class, both null for one that the model lacks."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str | None) for part in entry)


def is_transformer(name: str) -> bool:
    """Whether a component, by its name in `model_index.json`, denoises and is therefore divided among ranks."""
    return name.removeprefix("unconditional_").startswith("transformer")


def component_folders(folder: Path) -> dict[str, Path]:
    """The folders of the components that have weights, by name: all but schedulers, tokenizers and processors.

    Raises:
        ValueError: see `read_index`; or a component has no folder.
    """
    named = component_classes(folder)
    absent = [name for name in named if not (folder / name).is_dir()]
    if absent:
        raise ValueError(f"{folder / absent[0]} is missing, but {INDEX} names it; fetch the model again")
    return {name: folder / name for name, kind in named.items() if not any(word in kind for word in WITHOUT_WEIGHTS)}
