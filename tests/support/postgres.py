"""A real PostgreSQL for tests: a server of its own, in a folder of its own, reached by a socket in it."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

NEEDED = "there is no PostgreSQL: install Debian's package postgresql"


class Postgres:
    """One server. It refuses root, so root runs it under another user.

    Args:
        folder: of its data and its socket; owned by the user that runs it.
        durable: survives the loss of power, as in service; else it is faster.
    """

    def __init__(self, folder: Path, durable: bool = False) -> None:
        self._folder = folder
        self._fsync = "on" if durable else "off"
        self._programs = _programs()
        self._as = {"user": _user(), "extra_groups": ()} if os.getuid() == 0 else {}
        if self._as:
            shutil.chown(folder, _user())
        self._run("initdb", "--no-sync", "--auth=trust", "--username=test", "--encoding=UTF8", "--locale=C.UTF-8")
        self._server: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Of its first database."""
        return f"postgresql://test@/postgres?host={self._folder}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        settings = ("listen_addresses=", f"unix_socket_directories={self._folder}", f"fsync={self._fsync}")
        command: list[str | Path] = [self._programs / "postgres", "-D", self._folder / "data"]
        command += [word for setting in settings for word in ("-c", setting)]
        log = (self._folder / "log").open("ab")
        self._server = subprocess.Popen(command, stdout=log, stderr=log, cwd="/", **self._as)  # type: ignore[call-overload]
        ask = [self._programs / "pg_isready", "-q", "-h", self._folder]
        deadline = time.monotonic() + 60
        while subprocess.run(ask, check=False).returncode:
            assert self._server.poll() is None and time.monotonic() < deadline, (self._folder / "log").read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop it at once; its clients lose their connections."""
        if self._server is not None:
            self._server.send_signal(signal.SIGINT)
            self._server.wait(30)
            self._server = None

    def _run(self, program: str, *options: str) -> None:
        command = [self._programs / program, "-D", self._folder / "data", *options]
        subprocess.run(command, check=True, capture_output=True, cwd="/", **self._as)


@contextlib.contextmanager
def running_postgres(durable: bool = False) -> Iterator[Postgres]:
    """A server that ends with the block. Without PostgreSQL the test is skipped, in CI it fails."""
    if not (_programs() / "initdb").exists():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(NEEDED)
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # where the other user can go, unlike pytest's folders
    try:
        server = Postgres(folder, durable)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name))
    beside = shutil.which("initdb")
    return found[-1] if found else Path(beside).resolve().parent if beside else Path("/nowhere")


def _user() -> str:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"
