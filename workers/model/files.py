"""Where a model's files are on this node: fetched once per node, checked once, shared by all gangs of the node.

A `ModelSpec` comes in, its folder goes out. Called by `workers.gang.gang` before its ranks start, in a thread, since it
waits for the network and for other gangs; by each rank; and by `service` to fetch ahead. It fetches what
`workers.model.loader` loads, and brings no torch.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from deploy.components import verify_components
from deploy.families.lookup import family_name
from deploy.model_folder import INDEX, component_classes
from deploy.model_spec import ModelSpec
from deploy.safetensors_headers import CHECKSUMS, verify_checksums, verify_weights
from workers.model.digests import REDEPLOY, folder_digest, settle_loras
from workers.private_folder import make_private, open_own

logger = logging.getLogger("ray.serve")

CHECKS: tuple[Callable[[Path], object], ...] = (verify_components, verify_weights, verify_checksums)
"""The checks that every model folder must pass once per node. Each raises ValueError or OSError."""

KINDS = ("json", "safetensors", "txt", "model", "jinja")
"""Suffixes of the files that a component is loaded from: configs, weights, tokenizers and their templates."""

VARIANTS = ["*.fp16*", "*.bf16*", "*.non_ema*"]
"""The same weights in another precision. Not fetched: `dtype` converts."""

REASONS: tuple[tuple[type[Exception], str], ...] = (
    (GatedRepoError, "access is restricted; accept the terms on its page, and set HF_TOKEN on the nodes"),
    (RepositoryNotFoundError, "the hub has no such model, or a private one; correct source, or set HF_TOKEN"),
    (RevisionNotFoundError, "the hub has no such revision of it; set revision to a branch, a tag or a commit"),
    (HFValidationError, "this is not a hub id; set source to org/name, or to an existing folder"),
    (
        LocalEntryNotFoundError,
        "the hub cannot be reached, and this node's cache does not have all of it; connect the node, unset "
        "HF_HUB_OFFLINE if it is set, or copy the model here and set source to its folder",
    ),
)
"""Reasons why nothing could be fetched, each with what to do. The first that matches the error counts."""


def fetch(model: ModelSpec, cache: str | None) -> Path:
    """Return the folder of a model on this node; fetch and check it first if nobody has. May take very long.

    Callers on one node wait for one download. Without the network, or with HF_HUB_OFFLINE=1, the cache is used if it
    has the whole model.

    Args:
        model: whose `source` is a folder, which is then the answer, or a hub id.
        cache: folder for models from the hub, from `storage.models`; None: Hugging Face's own cache.

    Returns:
        A folder in diffusers' format. For a hub id, its name is the commit.

    Raises:
        ValueError: it cannot be fetched, is not a model that spray runs, or fails a check; the message says what to do.
        OSError: a file cannot be read.
    """
    notes = _notes_folder(cache)
    with _lock(notes / f"{_key(f'{model.source}@{model.revision}')}.lock", model.name):
        folder = _download(model, cache) if model.from_hub else Path(model.source)
        family_name(folder)  # rejects anything but a model that spray runs
        _check_once(folder, notes)
        if model.digest and (found := _digest(model, folder, notes)) != model.digest:
            raise ValueError(
                f"{model.name}: {folder} does not hold the files that were deployed: their digest is {found[:12]}..., "
                f"expected {model.digest[:12]}...; {REDEPLOY}"
            )
    return folder


def settle_files(model: ModelSpec, cache: str | None) -> ModelSpec:
    """The model with its digest and those of its adapters, as their files are now. Fetches the model if need be.

    Raises:
        ValueError: see `fetch`.
        OSError: a file cannot be read.
    """
    folder = fetch(model, cache)
    notes = _notes_folder(cache)
    with _lock(notes / f"{_key(f'{model.source}@{model.revision}')}.lock", model.name):
        digest = model.digest or _digest(model, folder, notes)
    return settle_loras(model.model_copy(update={"digest": digest}))


def _digest(model: ModelSpec, folder: Path, notes: Path) -> str:
    """A hub model's commit names its content; a folder must be read, once."""
    return folder.name if model.from_hub else folder_digest(folder, notes / f"{_key(str(folder.resolve()))}.digests")


def _download(model: ModelSpec, cache: str | None) -> Path:
    started = time.monotonic()
    what = f"{model.name}: {model.source}, revision {model.digest or model.revision or 'main'},"

    def snapshot(revision: str | None, patterns: list[str]) -> Path:
        try:
            folder = snapshot_download(
                model.source, revision=revision, cache_dir=cache, allow_patterns=patterns, ignore_patterns=VARIANTS
            )
        except Exception as error:  # the hub, the network, the disk: libraries below raise anything
            raised = f"{type(error).__name__}: {error}".splitlines()[0]
            reason = next((reason for kind, reason in REASONS if isinstance(error, kind)), raised)
            raise ValueError(f"{what} cannot be fetched: {reason}") from None
        return Path(folder)

    disable_progress_bars()  # they would flood a replica's log
    folder = snapshot(model.digest or model.revision, [INDEX])  # a branch may have moved since it was deployed
    if not (folder / INDEX).is_file():
        raise ValueError(f"{what} has no {INDEX}; set source to a model in diffusers' format")
    family_name(folder)  # before tens of gigabytes are fetched
    parts = component_classes(folder)
    folder = snapshot(folder.name, [INDEX, CHECKSUMS, *(f"{part}/*.{kind}" for part in parts for kind in KINDS)])
    absent = [part for part in parts if not (folder / part).is_dir()]
    if absent:  # offline, the hub's client returns a partial snapshot without a word
        raise ValueError(f"{what} cannot be fetched: {folder} has no {', '.join(absent)}; {REASONS[-1][1]}")
    logger.info("%s is at %s after %.0f s", what, folder, time.monotonic() - started)
    return folder


def _check_once(folder: Path, notes: Path) -> None:
    """Check a folder unless it has passed on this node: hashing every file again would delay every gang's start."""
    note = notes / f"{_key(str(folder.resolve()))}.checked"
    state = _state(folder)
    if note.is_file() and note.read_text() == state:
        return
    for check in CHECKS:
        check(folder)
    with open_own(note) as file:
        file.truncate()
        file.write(state)


def _state(folder: Path) -> str:
    """A hash that changes with any file's name, size or time, and with the list of checks."""
    lines = [check.__name__ for check in CHECKS]
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for path in (Path(parent, name) for name in sorted(files)):
            stat = path.stat()
            lines.append(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _notes_folder(cache: str | None) -> Path:
    """The folder of locks and notes: beside the models, or among temporary files if that is read-only."""
    own = Path(tempfile.gettempdir(), f"spray-{os.getuid()}")
    if cache:
        place = Path(cache, ".spray")
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            if os.access(place, os.W_OK):
                return place
    try:
        return make_private(own)
    except PermissionError:
        raise
    except OSError:
        raise OSError(f"{own} is not writable; set TMPDIR to a folder that is") from None


@contextlib.contextmanager
def _lock(lock: Path, name: str) -> Iterator[None]:
    """Let one process of this node in at a time. The lock ends with its process, however that ends."""
    with open_own(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("%s: waiting for another process of this node that fetches the model", name)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
