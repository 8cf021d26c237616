"""Compiled blocks that outlive a process: a folder of this node for each combination of facts that decide their code.

A `ModelSpec` and `storage.compiled` come in. torch's compiler then reads and writes in that folder instead of its own,
and keys its files by graphs and shapes. Called by `workers.model.compiler`; `spray doctor` shows the place. It imports
no torch.

The files are code that ranks run. So only their user may write there, and a file that has changed since a rank noted
its checksum after a warm-up is not used. Damaged files are compiled again.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import sp_core
from deploy.model_folder import component_classes, is_transformer
from deploy.model_spec import ModelSpec
from workers.model.digests import file_digest
from workers.private_folder import make_private, open_own

logger = logging.getLogger(__name__)

MOST_BYTES = 4 * 2**30
"""Bytes of all folders of a node. Above, the least recently used go."""

PACKAGES = ("spray", "torch", "triton", "diffusers")


@dataclass(frozen=True)
class Warmed:
    """The result of a warm-up.

    Attributes:
        what: what was warmed up, in a word.
        cached: graphs whose code was in the cache.
        compiled: graphs that were compiled.
        seconds: how long it took.
    """

    what: str
    cached: int
    compiled: int
    seconds: float


def cache_folder(root: str | None) -> Path:
    """Where this user's compiled blocks are on a node.

    Args:
        root: `storage.compiled` of the deployment; None: among temporary files.
    """
    return Path(root or tempfile.gettempdir(), f"spray-{os.getuid()}", "compiled")


def what_decides(model: ModelSpec, device: str) -> dict[str, Any]:
    """The facts that decide compiled code, besides those that torch sees: graphs, shapes and its own settings.

    Weights do not decide, because they are arguments; nor does the rest of the model's class, which is traced at each
    start.

    Args:
        model: the model; its `source` is a folder of this node.
        device: the target of the code; see `workers.model.compiler.code_target`.

    Raises:
        ValueError: the folder is not a model.
        OSError: a file cannot be read.
    """
    folder = Path(model.source)
    names = [name for name in sorted(component_classes(folder)) if is_transformer(name)]
    ours = hashlib.sha256()  # the compiler sees our operators from outside, and would miss a change in one
    for file in sorted(Path(sp_core.__path__[0]).rglob("*.py")):
        ours.update(file.read_bytes())
    return {
        "transformers": {name: file_digest(folder / name / "config.json") for name in names},
        "transformer_class": model.transformer_class,
        "plan": model.plan,
        "parallel": asdict(model.parallel),
        "dtype": model.torch_dtype,
        "attention_kernel": model.attention_kernel,
        "cuda_graphs": model.cuda_graphs,
        "device": device,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "sp_core": ours.hexdigest(),
    }


class CompileCache:
    """One folder of compiled code, in use by this process as long as this object lives.

    Args:
        root: see `cache_folder`.
        decides: see `what_decides`.

    Raises:
        OSError: the folder cannot be used.
    """

    def __init__(self, root: Path, decides: Mapping[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:24]
        _check_parent(root)
        self.folder = make_private(root) / key
        self._notes, self._decides = root / f"{key}.json", dict(decides)
        self._in_use = open_own(root / f"{key}.lock")
        os.utime(self._in_use.fileno())
        alone = _try_lock(self._in_use)
        if not alone:
            fcntl.flock(self._in_use, fcntl.LOCK_SH)  # waits for who verifies
        if alone and bytes_in(self.folder) > MOST_BYTES:
            shutil.rmtree(self.folder)
        make_private(self.folder)
        with self._open_notes() as file:
            self._remove_damaged(_read(file), alone)
        fcntl.flock(self._in_use, fcntl.LOCK_SH)

    def keep(self, warmed: Warmed) -> None:
        """Note what was compiled so far, so that the next process uses it, and log what the cache saved.

        If the notes cannot be written, that is logged, and the next process compiles again.
        """
        try:
            with self._open_notes() as file:
                notes = _read(file)
                took = notes["seconds"].get(warmed.what, 0.0)
                if warmed.compiled or not notes["files"]:
                    notes |= {"decides": self._decides, "files": _digests(self.folder, notes["files"])}
                    notes["seconds"][warmed.what] = max(warmed.seconds, took)
                    file.seek(0)
                    file.truncate()
                    json.dump(notes, file)
            if warmed.compiled:
                _make_room(self.folder.parent)
        except OSError as error:
            logger.warning("what was compiled cannot be kept in %s: %s", self.folder, error)
            return
        if warmed.compiled:
            said = f"compiled {warmed.compiled} graphs and found {warmed.cached}"
        else:
            said = f"found all {warmed.cached} graphs, which saved {max(0.0, took - warmed.seconds):.0f} s,"
        logger.info("the %s took %.0f s; it %s in %s", warmed.what, warmed.seconds, said, self.folder)

    @contextlib.contextmanager
    def _open_notes(self) -> Iterator[TextIO]:
        with open_own(self._notes) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _remove_damaged(self, notes: Mapping[str, Any], alone: bool) -> None:
        """Remove files that differ from their checksum; if nobody writes, also files without one, maybe incomplete."""
        removed = 0
        for path in _files(self.folder):
            noted = notes["files"].get(str(path.relative_to(self.folder)))
            with contextlib.suppress(FileNotFoundError):  # somebody else removes it too
                if path.is_symlink() or (noted is not None and file_digest(path) != noted[1]):
                    path.unlink()
                    removed += 1
                elif noted is None and alone:
                    path.unlink()
        if removed:
            logger.warning("%d files in %s are not what was written there; compiling again", removed, self.folder)


def _check_parent(root: Path) -> None:
    """Make the folder of this user's things private first: `make_private` makes parents as they come."""
    root.parent.parent.mkdir(parents=True, exist_ok=True)
    make_private(root.parent)


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(file: TextIO) -> dict[str, Any]:
    """Notes, as `{"files": {path: [state, SHA-256]}, "seconds": {what: of a warm-up that compiled}}`."""
    try:
        found = json.load(file)
        files = {str(path): (str(state), str(digest)) for path, (state, digest) in found["files"].items()}
        return {"files": files, "seconds": {str(what): float(took) for what, took in found["seconds"].items()}}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {"files": {}, "seconds": {}}  # as if there were none: all files are made again


def _digests(folder: Path, known: Mapping[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """The state and checksum of each file. Only those that have changed are read."""
    found = {}
    for path in (path for path in _files(folder) if not path.is_symlink()):
        name = str(path.relative_to(folder))
        with contextlib.suppress(FileNotFoundError):  # a temporary file of somebody who compiles
            stat = path.lstat()
            state = f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns}"
            before = known.get(name, ("", ""))
            found[name] = before if before[0] == state else (state, file_digest(path))
    return found


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)
        yield from (path for name in folders if (path := Path(parent, name)).is_symlink())


def bytes_in(folder: Path) -> int:
    """The bytes of all files in a folder; 0 if it does not exist."""
    total = 0
    for path in _files(folder):
        with contextlib.suppress(FileNotFoundError):
            total += path.lstat().st_size
    return total


def _make_room(root: Path) -> None:
    """Remove folders that no process uses, the longest unused first, until the rest is small enough."""
    locks = sorted(root.glob("*.lock"), key=lambda lock: lock.stat().st_mtime_ns)
    total = bytes_in(root)
    for lock in locks:
        if total <= MOST_BYTES:
            return
        with open_own(lock) as file:
            if _try_lock(file):  # the lock itself stays: somebody may be waiting for it
                total -= bytes_in(root / lock.stem)
                lock.with_suffix(".json").unlink(missing_ok=True)
                shutil.rmtree(root / lock.stem, ignore_errors=True)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # triton, on CPU
