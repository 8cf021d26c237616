"""Exporter: lets Prometheus read the metrics of a whole node at one port.

Each process of a cluster calls `share_values` once, so that its values lie in files of one folder per node, and makes
an `Exporter`. All exporters wait for one lock. The process that holds it answers for all processes; when it ends,
another takes over within `RETRY_S`. So there is nothing to deploy or to discover.

This and `value_file` are the files that use prometheus_client's private parts: `values`, `mmap_dict`, and the two
halves of a merge. `tests/workers/test_exporter.py` pins what they rely on.
"""

import contextlib
import errno
import fcntl
import importlib.metadata
import itertools
import json
import logging
import math
import os
import re
import shutil
import struct
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from prometheus_client import CollectorRegistry, Metric, start_http_server, values
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from workers.disk import watch_disk
from workers.metrics import BUILD
from workers.private_folder import make_private
from workers.value_file import ValueFile

logger = logging.getLogger("ray.serve")

RETRY_S = 2.0

FOLD_PERIOD_S = 300.0
"""Seconds between two looks for files of ended processes, whether somebody scrapes or not."""

KEPT = "kept"
"""Takes the place of a pid in the name of the files that hold what ended processes have counted."""


NOTE = "folding.json"
"""Which files were added to which, until they are deleted."""

NAME = re.compile(rf"(counter|histogram|summary|gauge_[a-z]+)_([1-9][0-9]*|{KEPT})\.db")
"""Of a file of values: kind and process."""

SMALLEST_ENTRY = 24
"""Bytes that a value takes in a file at least: the length of its key, the key, two numbers."""

Counted = list[tuple[str, float]]
"""What a process has counted, by key."""


def share_values() -> Path | None:
    """Keep this process's metrics where the whole node can read them.

    Call it once, at the start of a process: each labeled series keeps the kind of value with which it was created.

    Returns:
        The folder of this node and cluster. None outside Ray's worker processes, and where the folder cannot be used:
        then values stay in the process, which costs its metrics and nothing else.
    """
    raylet = os.environ.get("RAY_RAYLET_PID")
    if raylet is None:
        return None
    named = os.environ.get("SPRAY_METRICS_DIR")
    folder = Path(named or f"{_temporary_folder(raylet)}/spray-metrics-{raylet}")
    try:
        if named:
            folder.mkdir(parents=True, exist_ok=True)
        else:
            make_private(folder)
        for file in folder.glob(f"gauge_*_{os.getpid()}.db"):  # left by an ended process that had the same pid
            file.unlink()
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        logger.warning("this process exports no metrics: %s: %s", folder, error.strerror or error)
        return None
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)  # in this process only: Ray's own processes read it too
    values.MmapedDict = ValueFile  # type: ignore[attr-defined]
    values.ValueClass = values.MultiProcessValue()
    watch_disk("metrics", folder)
    return folder


def _temporary_folder(raylet: str) -> str:
    """Where the node keeps temporary files. A model's `env` may name another folder for its own processes."""
    with contextlib.suppress(OSError, psutil.Error):  # it has just ended, or is another user's
        return psutil.Process(int(raylet)).environ().get("TMPDIR") or "/tmp"
    return tempfile.gettempdir()


class Exporter:
    """One process's share in answering Prometheus, and in keeping the folder small where nobody asks.

    Args:
        folder: what `share_values` returned; None: never answer.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            threading.Thread(target=_fold_now_and_then, args=(folder,), name="spray-metrics-fold", daemon=True).start()
        self._where: tuple[str, int | None] | None = None
        self._stopped = threading.Event()

    def serve_at(self, host: str, port: int | None) -> None:
        """From now on, answer or wait to answer at `http://host:port/metrics`.

        Args:
            host: address to bind.
            port: the same for all processes of the node; None: do not answer.
        """
        if (host, port) == self._where:
            return
        self._where = host, port
        self._stopped.set()
        self._stopped = threading.Event()  # a new one: the former thread must not miss that its own is set
        if port is not None and self._folder is not None:
            BUILD.labels(importlib.metadata.version("spray")).set(1)
            arguments = host, port, self._folder, self._stopped
            threading.Thread(target=_serve, args=arguments, name="spray-metrics", daemon=True).start()


class NodeCollector(Collector):
    """The metrics of all processes of a node: counts of the running and the ended ones, gauges of the running ones.

    A file that cannot be read is set aside: one such file must not cost the node its metrics.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._told: set[Path] = set()

    def collect(self) -> Iterable[Metric]:
        """Read all files. Each scrape calls it from a thread of its own."""
        if not self._folder.is_dir():
            logger.warning(
                "metrics: %s was deleted; it is made again, but processes that run now export no more", self._folder
            )
            self._folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            return _merged(self._sound_files())

    def fold(self) -> None:
        """Add the files of ended processes to those that are kept, as each scrape does; else they would pile up.

        Raises:
            OSError: the folder cannot be used.
        """
        with self._alone():
            self._sound_files()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While it lasts, no other process of the node reads or folds: it would unlink what this one reads."""
        with (self._folder / "collect.lock").open("a") as lock:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
            _finish_fold(self._folder)
            yield

    def _sound_files(self) -> set[Path]:
        """The files to read: of running processes, and one per kind with what ended processes have counted.

        Files of ended processes are added to the latter; else they would pile up with every restart.
        """
        sound, ended = set(), defaultdict(list)
        for file in self._folder.glob("*.db"):
            named = NAME.fullmatch(file.name)
            if named is None:
                self._set_aside(file, "its name tells no kind and process")
                continue
            kind, process = named.groups()
            runs = process != KEPT and _is_alive(int(process))
            has_ended = process != KEPT and not runs
            if has_ended and kind.startswith("gauge"):
                file.unlink()
                continue
            try:
                counted = _read(file)
            except (OSError, ValueError) as error:
                if not runs:
                    self._set_aside(file, str(error))
                elif file not in self._told and file.exists() and file.stat().st_size:  # else about to be written
                    self._told.add(file)
                    logger.warning("metrics: %s is left out: %s", file, error)
                continue
            if has_ended:
                ended[kind].append((file, counted))
            else:
                sound.add(file)
        for kind, files in ended.items():
            sound |= self._folded(kind, files)
        return sound

    def _folded(self, kind: str, ended: list[tuple[Path, Counted]]) -> set[Path]:
        """The files to read in place of those of ended processes. On a full disk those are read themselves."""
        try:
            return {_fold(self._folder, kind, ended)}
        except OSError as error:
            if self._folder not in self._told:
                self._told.add(self._folder)
                logger.warning("metrics: files of ended processes pile up in %s: %s", self._folder, error.strerror)
            kept = self._folder / f"{kind}_{KEPT}.db"
            return {file for file in (kept, *(file for file, _ in ended)) if file.exists()}

    def _set_aside(self, file: Path, reason: str) -> None:
        aside = file.with_suffix(".damaged")
        with contextlib.suppress(OSError):
            file.rename(aside)
        if file not in self._told:
            logger.warning("metrics: %s is damaged: %s; it is set aside as %s", file, reason, aside.name)
            self._told.add(file)


def _merged(files: Iterable[Path]) -> list[Metric]:
    """The metrics in these files. A gauge that is `observing.GONE` in one process is what the others say of it."""
    found = MultiProcessCollector._read_metrics(map(str, files))
    for metric in found.values():
        metric.samples = [sample for sample in metric.samples if not math.isnan(sample.value)]
    told = {name: metric for name, metric in found.items() if metric.samples}
    return list(MultiProcessCollector._accumulate_metrics(told, True))


def _read(file: Path) -> Counted:
    """All values of a file.

    Raises:
        ValueError: it is damaged.
    """
    most = file.stat().st_size // SMALLEST_ENTRY
    try:
        found = MmapedDict.read_all_values_from_file(str(file))
        counted = [(key, value) for key, value, *_ in itertools.islice(found, most + 1)]  # a damaged one may not end
        keys = [json.loads(key) for key, _ in counted]
    except (struct.error, RuntimeError) as error:
        raise ValueError(str(error)) from None
    if len(counted) > most or not all(isinstance(key, list) and len(key) == 4 for key in keys):
        raise ValueError("its entries make no sense")
    return counted


def _fold(folder: Path, kind: str, ended: list[tuple[Path, Counted]]) -> Path:
    """Add what ended processes have counted to the file of their kind, and delete theirs.

    It happens as a whole or not at all, wherever this process may be killed: the sums go to a new file, a note says
    which files are in it, and renaming the new file decides.
    """
    kept, new = folder / f"{kind}_{KEPT}.db", folder / f"{kind}_{KEPT}.new"
    new.unlink(missing_ok=True)
    if kept.exists():
        shutil.copyfile(kept, new)
    made = ValueFile(str(new))
    sums: MmapedDict = made
    try:
        for _, counted in ended:
            for key, value in counted:
                sums.write_value(key, sums.read_value(key)[0] + value, 0.0)
        if not made.shared:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        sums.close()
    note = {"kept": kept.name, "inode": new.stat().st_ino, "ended": [file.name for file, _ in ended]}
    draft = folder / f"{NOTE}.new"
    draft.write_text(json.dumps(note))
    draft.replace(folder / NOTE)
    new.replace(kept)
    _finish_fold(folder)
    return kept


def _finish_fold(folder: Path) -> None:
    """Delete the files that the latest fold has added, if it took place; else they are added next time."""
    note = folder / NOTE
    if not note.exists():
        return
    try:
        said = json.loads(note.read_text())
        kept, inode, ended = folder / said["kept"], said["inode"], [folder / name for name in said["ended"]]
    except (ValueError, KeyError, TypeError):
        logger.warning("metrics: %s is damaged; it is set aside", note)
        note.replace(note.with_suffix(".damaged"))
        return
    if kept.exists() and kept.stat().st_ino == inode:
        for file in ended:
            file.unlink(missing_ok=True)
    note.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OverflowError:  # no pid is that large
        return False
    except PermissionError:
        return True
    return True


def _serve(host: str, port: int, folder: Path, stopped: threading.Event) -> None:
    """Wait for the lock, then for the port, then answer until stopped.

    The lock elects the process, not the port: another program may hold the port, and closing the file gives the lock
    up however this process ends.
    """
    registry = CollectorRegistry()
    registry.register(NodeCollector(folder))
    warned = False
    with (folder / f"port-{port}.lock").open("a") as lock:
        while not _try_lock(lock.fileno()):
            if stopped.wait(RETRY_S):
                return
        while not stopped.is_set():
            try:
                server, _ = start_http_server(port, host, registry)
            except OSError as error:
                if not warned:
                    logger.warning("metrics: this node cannot answer at %s:%d: %s", host, port, error.strerror)
                warned = True
                stopped.wait(RETRY_S)
                continue
            stopped.wait()
            server.shutdown()
            server.server_close()


def _fold_now_and_then(folder: Path) -> None:
    """Fold as long as this process runs, if it is the one of the node that has the lock.

    It needs no port: a deployment may name none, and another program may hold it.
    """
    collector = NodeCollector(folder)
    while True:
        time.sleep(FOLD_PERIOD_S)
        try:
            with (folder / "fold.lock").open("a") as lock:
                while _try_lock(lock.fileno()):
                    collector.fold()
                    time.sleep(FOLD_PERIOD_S)
        except FileNotFoundError:
            continue  # the folder was deleted; a scrape makes it again
        except Exception:  # the next try may succeed, on a disk with room
            logger.exception("metrics: files of ended processes in %s pile up", folder)


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
