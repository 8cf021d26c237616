"""A small disk for outputs, so that a disk can be full without filling that of the machine: a tmpfs in a mount
namespace that ends with the command.
"""

import errno
import os
import subprocess
import sys
from pathlib import Path

INSIDE = "JOB_FAULTS_NAMESPACE"
SIZE = "256m"
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

    Raises:
        subprocess.CalledProcessError: it cannot be mounted.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE},mode=0700", "tmpfs", folder], check=True)
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
