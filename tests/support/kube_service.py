"""A Service of Kubernetes as kube-proxy has it: new connections go to the pod that it names now, those there are stay.

The pods are in network namespaces of their own. Callers are outside and know one address, as those of a cluster do.
"""

import contextlib
import ctypes
import os
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CLONE_NEWNET = 0x40000000


class Service:
    """One address; `point` names what is behind it.

    Attributes:
        url: where callers go.
        connections: how many have reached each pod.
        open: how many of them are still there.
    """

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = "http://{}:{}".format(*self._listener.getsockname())
        self.connections: Counter[str] = Counter()
        self.open: Counter[str] = Counter()
        self._pod: tuple[str, ThreadPoolExecutor, tuple[str, int]] | None = None
        threading.Thread(target=self._accept, daemon=True).start()

    def point(self, name: str, enter: list[str], address: tuple[str, int]) -> None:
        """Send new connections to this pod.

        Args:
            name: of the pod.
            enter: the command that enters its network: nsenter --target PID --net.
            address: host and port there.
        """
        inside = ThreadPoolExecutor(1, initializer=_enter, initargs=(enter[enter.index("--target") + 1],))
        self._pod = name, inside, address

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                threading.Thread(target=self._join, args=(self._listener.accept()[0],), daemon=True).start()

    def _join(self, caller: socket.socket) -> None:
        assert self._pod is not None
        name, inside, address = self._pod
        # Where the pod refuses, the caller sees an end.
        with caller, contextlib.suppress(OSError), inside.submit(socket.create_connection, address).result() as pod:
            self.connections[name] += 1
            self.open[name] += 1
            sends = threading.Thread(target=_copy, args=(caller, pod))
            sends.start()
            _copy(pod, caller)
            sends.join()
            self.open[name] -= 1


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _enter(pid: str) -> None:
    """Let this thread make its sockets in the network of a process."""
    namespace = os.open(Path("/proc") / pid / "ns" / "net", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
    os.close(namespace)
