"""What /proc says of a rank's process: is it halted, and has it done anything lately? For `workers.gang.watch`.

It answers when the process itself cannot: a thread that imports or reads may hold Python's lock for seconds.
"""

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")

READ_BYTES = 256 * 1024
CPU_S = 0.3
"""An idle process of Ray reads some kilobytes and takes about 0.1 s of CPU time in ten seconds."""


@dataclass(frozen=True)
class Use:
    """What a process has used since it began.

    Attributes:
        read_bytes: by system calls, from disks and by page faults.
        cpu_s: CPU time in seconds.
    """

    read_bytes: int
    cpu_s: float

    def exceeds(self, before: "Use") -> bool:
        """True if more was used since `before` than an idle process uses in some seconds."""
        return self.read_bytes - before.read_bytes > READ_BYTES or self.cpu_s - before.cpu_s > CPU_S


class Activity:
    """Tells for how long a process has done nothing.

    Args:
        pid: a process of this machine.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._last = use_of(pid)
        self._at = time.monotonic()

    def idle_s(self) -> float:
        """Seconds without reading or computing. 0 where the system does not tell, and while a thread waits for a file:
        what a slow server sends is counted when the read returns, which may take minutes."""
        now = use_of(self._pid)
        if now is None or self._last is None or now.exceeds(self._last) or _waits_for_a_file(self._pid):
            self._last, self._at = now, time.monotonic()
        return time.monotonic() - self._at

    def restart(self) -> None:
        """Count from now on."""
        self._last, self._at = use_of(self._pid), time.monotonic()


def is_halted(pid: int) -> bool:
    """True if a process of this machine is stopped, a zombie or gone. False on systems without /proc."""
    if not PROC.is_dir():
        return False
    try:
        return _stat(PROC / str(pid))[0] in "TtZX"
    except OSError:
        return True


def use_of(pid: int) -> Use | None:
    """What a process of this machine has used; None where the system does not tell."""
    try:
        stat = _stat(PROC / str(pid))
        io = dict(line.split(": ") for line in (PROC / str(pid) / "io").read_text().splitlines())
    except OSError:
        return None
    faults = int(stat[7]) + int(stat[9])  # minor and major: files that are mapped are read by page faults
    cpu_s = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
    return Use(int(io["rchar"]) + int(io["read_bytes"]) + faults * os.sysconf("SC_PAGE_SIZE"), cpu_s)


def _waits_for_a_file(pid: int) -> bool:
    """Whether a thread is in the state D, as in a read from NFS or a disk."""
    for thread in (PROC / str(pid) / "task").glob("*"):
        with contextlib.suppress(OSError):  # it has ended
            if _stat(thread)[0] == "D":
                return True
    return False


def _stat(process: Path) -> list[str]:
    """The fields of the `stat` of a process or thread from the state on, which is the third in proc(5)."""
    return (process / "stat").read_text().rpartition(")")[2].split()
