"""What lies between gateways and PostgreSQL: it forwards bytes, and can be cut for one process.

A connection over it is held, not closed, as by a network that drops packets, or a proxy whose server hangs: bytes are
taken, and nobody answers. What was sent meanwhile arrives later, as does the end of a connection.
"""

import contextlib
import shutil
import socket
import struct
import tempfile
import threading
from pathlib import Path

from tests.support.postgres import Postgres

SOCKET = ".s.PGSQL.5432"
LOOK_S = 0.05
PART = 1 << 16


class Link:
    """A socket of its own before that of a server, which may stop and start meanwhile.

    Args:
        server: that it leads to.

    Attributes:
        held: pieces that were held back since the last cut.
    """

    def __init__(self, server: Postgres) -> None:
        self._server = server.url.rpartition("host=")[2]
        self._folder = Path(tempfile.mkdtemp(prefix="link-", dir="/tmp"))  # a socket's path is short
        self.url = server.url.replace(self._server, str(self._folder))
        self.held = 0
        self._cut: int | None = None
        self._answers = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._folder / SOCKET))
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, pid: int, answers: bool = False) -> None:
        """Let nothing through from this process, or to it, from now on; or only no answers."""
        self.held, self._answers, self._cut = 0, answers, pid

    def heal(self) -> None:
        """Let everything through again, with what was held."""
        self._cut = None

    def close(self) -> None:
        """Take no more connections."""
        self._cut = None
        self._listener.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                pid, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
                server = socket.socket(socket.AF_UNIX)
                try:
                    server.connect(str(Path(self._server) / SOCKET))
                except OSError:  # it is stopped
                    client.close()
                    continue
                for ends in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._forward, args=(pid, *ends), daemon=True).start()

    def _forward(self, pid: int, source: socket.socket, target: socket.socket, answers: bool) -> None:
        def is_cut() -> bool:
            return self._cut == pid and (answers or not self._answers)

        data = b"?"
        with contextlib.suppress(OSError):
            while data:
                data = source.recv(PART)
                self.held += is_cut()
                while is_cut():
                    threading.Event().wait(LOOK_S)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
