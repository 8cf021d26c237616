"""`python -m service.rollout.drain SECONDS`: moves the gangs and gateways of this node elsewhere before it ends.

Kubernetes runs it before it stops a pod. It tells Ray that the node will be gone after this many seconds. Then nothing
starts there anymore, and Serve starts the node's gangs and gateways on other nodes. The old ones stop when the new ones
serve, or when the time is over, and finish their work first. The command returns when nothing of Serve is left on the
node, when the time is over, or when the whole cluster ends. It never fails, since the pod ends anyway.
"""

import logging
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]

logger = logging.getLogger(__name__)

SERVING = ("ray::ServeReplica", "ray::ProxyActor", "ray::RankActor")
"""The beginnings of the titles of serving processes. A gang that spans nodes has ranks on nodes without its replica."""

PERIOD_S = 0.5

ANNOUNCE_S = 30.0
"""Seconds for telling Ray, which takes two."""

WITHOUT_HEAD_S = 60.0
"""Seconds after which a silent head counts as gone, and with it the cluster: nothing would be moved anymore."""


def drain(raylet: psutil.Process, seconds: float) -> bool:
    """Let a node's gangs, gateways and proxies finish, while others take their place.

    Args:
        raylet: the node's process.
        seconds: the time until the node ends.

    Returns:
        Whether nothing serves there anymore.
    """
    until = time.monotonic() + seconds
    if not _announce(raylet, seconds):
        return False
    answered = time.monotonic()
    while serving := list(_serving(raylet)):
        now = time.monotonic()
        answered = now if _answers(_flag(raylet, "--gcs-address")) else answered
        if now > until or now > answered + WITHOUT_HEAD_S:
            logger.warning("the node ends with %s", ", ".join(serving))
            return False
        time.sleep(PERIOD_S)
    return True


def raylet_of_this_pod() -> psutil.Process | None:
    """The node's process; None if it has ended."""
    return next((process for process in psutil.process_iter() if _name(process) == "raylet"), None)


def _announce(raylet: psutil.Process, seconds: float) -> bool:
    """Tell Ray, by a command that Ray does not list as public; `tests/live/test_drain.py` runs it."""
    command = [str(Path(sys.executable).parent / "ray"), "drain-node", f"--address={_flag(raylet, '--gcs-address')}"]
    command += [f"--node-id={_flag(raylet, '--node_id')}", f"--deadline-remaining-seconds={int(seconds)}"]
    command += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=its pod is asked to end"]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=ANNOUNCE_S)
    except subprocess.TimeoutExpired:
        logger.warning("the head does not answer, so nothing goes on elsewhere")
    except subprocess.CalledProcessError as error:
        logger.warning("Ray does not drain the node: %s", error.stderr.strip().rpartition("\n")[2])
    else:
        return True
    return False


def _serving(raylet: psutil.Process) -> Iterator[str]:
    """Titles of the node's processes that serve."""
    try:
        children = raylet.children()
    except psutil.NoSuchProcess:
        return
    titles = ("".join(_command(process)[:1]) for process in children)
    yield from (title for title in titles if title.startswith(SERVING))


def _flag(process: psutil.Process, name: str) -> str:
    given = (each.partition("=") for each in _command(process))
    return next((value for flag, _, value in given if flag == name), "")


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
    except (OSError, ValueError):
        return False
    return True


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def _command(process: psutil.Process) -> list[str]:
    try:
        return [*process.cmdline()]
    except psutil.Error:
        return []


def main() -> None:
    """Drain the node of this pod."""
    logging.basicConfig(level=logging.INFO)
    raylet = raylet_of_this_pod()
    if raylet is not None:
        drain(raylet, float(sys.argv[1]))


if __name__ == "__main__":
    main()
