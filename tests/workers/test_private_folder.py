"""Folders of one user among the files of all."""

import os
import stat
from pathlib import Path

import pytest

from workers.private_folder import make_private, open_own


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_private_folder_is_for_its_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    assert mode(make_private(folder)) == 0o700
    folder.chmod(0o777)  # made by an older version, or by a careless hand
    assert mode(make_private(folder)) == 0o700


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    with pytest.raises(PermissionError, match="belongs to somebody else"):
        make_private(tmp_path / "link")
    monkeypatch.setattr(os, "getuid", lambda: (tmp_path / "theirs").stat().st_uid + 1)
    with pytest.raises(PermissionError, match="belongs to somebody else"):
        make_private(tmp_path / "theirs")


def test_a_link_that_was_laid_out_is_not_followed(tmp_path: Path) -> None:
    (target := tmp_path / "target").write_text("precious")
    (tmp_path / "key.lock").symlink_to(target)
    with pytest.raises(OSError, match="symbolic link"):
        open_own(tmp_path / "key.lock")
    with open_own(tmp_path / "other.lock"):
        assert mode(tmp_path / "other.lock") == 0o600
    with open_own(target) as file:
        assert file.read() == "precious"
