"""Digests of a deployment's files, so that two gangs of one model cannot load different bytes.

A `ModelSpec` comes in; one with digests goes out, or a `ValueError` if files differ from those that were deployed.
Called by `service.rollout.preflight` when a model is deployed, and by `workers.model.files` and `workers.model.loader`
whenever it is loaded.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

from deploy.model_folder import INDEX, component_classes
from deploy.model_sections import LoRA
from deploy.model_spec import ModelSpec

REDEPLOY = "deploy the file again (spray deploy), or restore what was there"


def file_digest(file: Path) -> str:
    """The SHA-256 of a file's content.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def folder_digest(folder: Path, notes: Path) -> str:
    """The SHA-256 of a model: of the names and contents of its index and its components' files.

    Args:
        folder: in diffusers' format.
        notes: a file that remembers the digest of each file by inode, size and time, so that none is read twice. It is
            written if it can be.

    Raises:
        ValueError: the folder is not a model.
        OSError: a file cannot be read.
    """
    parts = [folder / name for name in sorted(component_classes(folder))]
    files = [file for part in parts for file in sorted(part.rglob("*")) if file.is_file() and file.name[0] != "."]
    known = _read_notes(notes)
    found = {}
    for file in (folder / INDEX, *files):
        stat = file.stat()
        state = f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns}"
        name = str(file.relative_to(folder))
        before, digest = known.get(name, ("", ""))
        found[name] = (state, digest if before == state else file_digest(file))
    if found != known:
        with contextlib.suppress(OSError):
            unfinished = notes.with_name(f"{notes.name}.{os.getpid()}")
            unfinished.write_text(json.dumps(found))
            unfinished.replace(notes)
    return hashlib.sha256("\n".join(f"{digest} {name}" for name, (_, digest) in found.items()).encode()).hexdigest()


def settle_loras(model: ModelSpec) -> ModelSpec:
    """The model with the digests of its adapters, as their files are now.

    Raises:
        OSError: a file cannot be read.
    """
    loras = (lora.model_copy(update={"digest": lora.digest or file_digest(Path(lora.source))}) for lora in model.loras)
    return model.model_copy(update={"loras": tuple(loras)})


def verify_lora(lora: LoRA) -> None:
    """Reject an adapter whose file is not the one that was deployed. To be called after the file was read.

    Raises:
        ValueError: its content differs.
        OSError: it cannot be read.
    """
    if lora.digest and (found := file_digest(Path(lora.source))) != lora.digest:
        raise ValueError(
            f"{lora.source} is not the file that was deployed: its SHA-256 is {found[:12]}..., expected "
            f"{lora.digest[:12]}...; {REDEPLOY}"
        )


def _read_notes(notes: Path) -> dict[str, tuple[str, str]]:
    try:
        return {name: (str(state), str(digest)) for name, (state, digest) in json.loads(notes.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # as if there were none: all files are read
