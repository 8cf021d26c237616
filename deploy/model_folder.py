"""A model's folder on this machine: where it is, and what its configs say. Nothing is fetched and no weights are read.

Called by `deploy.check`, `deploy.memory`, `service.cli.doctor` and `workers.model.files`.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from deploy.spec import DeploymentSpec, ModelSpec

INDEX = "model_index.json"


def model_folder(spec: DeploymentSpec, model: ModelSpec) -> Path | None:
    """Where the model's files are on this machine; None for a hub model that is not here."""
    if not model.from_hub:
        return Path(model.source)
    return cached_folder(model.source, model.revision, cache_root(spec.storage.models))


def cache_root(models: str | None) -> Path:
    """The folder of hub models: `storage.models` of the deployment; None takes Hugging Face's own cache."""
    return Path(models or constants.HF_HUB_CACHE)


def cached_folder(source: str, revision: str | None, root: Path) -> Path | None:
    """The snapshot of a hub model; None where the cache does not have it.

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


def read_config(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def verify_configs(folder: Path) -> None:
    """Reject a model whose components have configs that are not JSON.

    Raises:
        ValueError: names the file.
    """
    for file in sorted(folder.glob("*/*config.json")):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON ({error}); fetch or copy it again") from None


def component_folders(folder: Path) -> dict[str, Path]:
    """The folders of the components that have weights, by name: those that the index names and that have a config.

    Schedulers and tokenizers have other files.

    Raises:
        ValueError: `model_index.json` is missing or not a JSON object, or a component has no folder.
    """
    file = folder / INDEX
    try:
        index = json.loads(file.read_text())
        named = [name for name, entry in index.items() if isinstance(entry, list) and entry[0]]
    except (OSError, ValueError, AttributeError, IndexError):
        raise ValueError(f"{file} is missing or damaged; set source to a folder in diffusers' format") from None
    absent = [name for name in named if not (folder / name).is_dir()]
    if absent:
        raise ValueError(f"{folder / absent[0]} is missing, but {INDEX} names it; fetch the model again")
    return {name: folder / name for name in named if (folder / name / "config.json").is_file()}
