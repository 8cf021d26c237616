"""A local cluster's folder: private, and removed by the next cluster if nobody else could."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from service.rollout import cluster_folder
from service.rollout.cluster_folder import make_folder, remove_abandoned

MAKE_AND_DIE = """
import os, sys
from pathlib import Path
from service.rollout import cluster_folder
cluster_folder.place = lambda: Path(sys.argv[1])
folder, lock = cluster_folder.make_folder()
print(folder, flush=True)
os.kill(os.getpid(), 9)
"""


def test_only_folders_of_ended_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_folder, "place", lambda: tmp_path)
    killed = subprocess.run([sys.executable, "-c", MAKE_AND_DIE, str(tmp_path)], capture_output=True, text=True)
    abandoned = Path(killed.stdout.strip())
    (tmp_path / "spray-0").mkdir()  # of another program, or too young
    mine, lock = make_folder()
    assert (stat.S_IMODE(mine.stat().st_mode), abandoned.exists()) == (0o700, True)
    remove_abandoned()
    assert sorted(tmp_path.iterdir()) == sorted([mine, tmp_path / "spray-0"])
    lock.close()
    remove_abandoned()
    assert not mine.exists()


def test_links_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_folder, "place", lambda: tmp_path)
    (theirs := tmp_path / "theirs").mkdir()
    (theirs / "file").touch()
    (tmp_path / "spray-1").mkdir()
    (tmp_path / "spray-1" / "in_use").symlink_to(theirs / "file")
    remove_abandoned()
    assert (theirs / "file").exists()
    assert (tmp_path / "spray-1").exists()


def test_folders_are_among_temporary_files_unless_sockets_would_have_too_long_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for temporary, found in (("/var/t", "/var/t"), ("/var/folders/zz/" + "x" * 40, "/tmp")):
        monkeypatch.setattr("tempfile.tempdir", temporary)
        assert cluster_folder.place() == Path(found)
    longest = "/spray-abcdefgh/ray/session_2026-11-25_22-02-40_123456_4194304/sockets/plasma_store"
    assert cluster_folder.MAX_PLACE_BYTES + len(longest) <= 107
