"""Where the Hugging Face cache of this machine keeps a model, if it has it. Nothing is fetched.

A hub id and a revision come in; a snapshot's folder comes out, for `deploy.check` and `service.cli.doctor`. The cache
is laid out as `models--org--name/snapshots/COMMIT/`, and `models--org--name/refs/BRANCH` says which commit a branch is
at.
"""

import os
from pathlib import Path


def cache_root(models: str | None) -> Path:
    """The folder that holds `models--org--name`.

    Args:
        models: `storage.models` of the deployment; None takes HF_HUB_CACHE, else HF_HOME/hub, else the default.
    """
    if models is not None:
        return Path(models)
    if os.environ.get("HF_HUB_CACHE"):
        return Path(os.environ["HF_HUB_CACHE"])
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def cached_folder(source: str, revision: str | None, root: Path) -> Path | None:
    """The snapshot of a hub model; None where the cache does not have it.

    Args:
        source: the hub id, `org/name`.
        revision: branch, tag or commit; None is the branch `main`.
        root: see `cache_root`.
    """
    repository = root / f"models--{source.replace('/', '--')}"
    wanted = revision or "main"
    try:
        commit = (repository / "refs" / wanted).read_text().strip()
    except OSError:
        commit = wanted
    folder = repository / "snapshots" / commit
    return folder if commit and folder.is_dir() else None
