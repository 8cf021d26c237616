"""Small disks for outputs and for the store of jobs, so that a disk can be full without filling that of the machine:
each a tmpfs in a mount namespace that ends with the command.
"""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

INSIDE = "JOB_FAULTS_NAMESPACE"
SIZE = "256m"
STORE_SIZE = "64m"
FILLER = "filler"
BLOCK = bytes(1 << 20)


def enter_namespace() -> bool:
    """Run this command again in a mount namespace of its own; False where this user may not.

    Root takes a mount namespace alone; others need a user namespace with it, in which they are root.
    """
    if os.environ.get(INSIDE):
        return os.environ[INSIDE] == "yes"
    flags = ["--mount"] if os.getuid() == 0 else ["--mount", "--map-root-user"]
    try:
        allowed = subprocess.run(["unshare", *flags, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        allowed = False
    os.environ[INSIDE] = "yes" if allowed else "no"
    if allowed:
        os.execvp("unshare", ["unshare", *flags, sys.executable, "-m", __package__, *sys.argv[1:]])
    return False


class Disk:
    """A disk of its own at a folder.

    Args:
        folder: where; made if it is not there.
        size: as `mount` takes it.

    Raises:
        subprocess.CalledProcessError: it cannot be mounted.
    """

    def __init__(self, folder: Path, size: str = SIZE) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", folder], check=True)
        self._folder = folder
        self._filler = folder / FILLER

    def fill(self) -> None:
        """Leave no byte free."""
        with self._filler.open("wb", buffering=0) as file:
            size = len(BLOCK)
            while size:
                try:
                    size = min(size, file.write(BLOCK[:size]))
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    size //= 2

    def free(self) -> None:
        """Give back what `fill` has taken."""
        self._filler.unlink(missing_ok=True)


class KeptDisk(Disk):
    """A disk of its own whose files outlive the command.

    Args:
        folder: as `Disk`; what is in it is there, too.

    Attributes:
        forgotten: a command that was killed has left nothing of what was written on its disk.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._kept, self._mark = folder.with_name(f"{folder.name}.kept"), folder.with_name(f"{folder.name}.mounted")
        self.forgotten = self._mark.exists()
        if self.forgotten:
            shutil.rmtree(folder)
        self._mark.touch()
        shutil.copytree(folder, self._kept, dirs_exist_ok=True) if folder.exists() else self._kept.mkdir()
        super().__init__(folder, STORE_SIZE)
        self._take(self._kept, folder)

    def close(self) -> None:
        """Give the folder what is on the disk; nobody has a file of it open anymore."""
        self.free()
        shutil.copytree(self._folder, self._kept)
        subprocess.run(["umount", "--lazy", self._folder], check=True)  # what was just killed may still be ending
        shutil.rmtree(self._folder)
        self._take(self._kept, self._folder)
        self._mark.unlink()

    @staticmethod
    def _take(source: Path, target: Path) -> None:
        shutil.copytree(source, target, dirs_exist_ok=True)
        shutil.rmtree(source)
