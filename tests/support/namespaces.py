"""Two machines in one: network namespaces that a cable joins. Addresses come in; commands that enter either go out."""

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def joined_namespaces(addresses: Sequence[str], routed: bool = False) -> Iterator[list[str]]:
    """Two namespaces until the block ends; yields what to put before a command to run it in either.

    Args:
        addresses: of the two, in one /24.
        routed: the cable is their way to everywhere else as well, though nothing is there.
    """
    if os.geteuid() and "CI" not in os.environ:
        pytest.skip("only root may make network namespaces")
    holders = [subprocess.Popen(["unshare", "--net", "sleep", "1800"]) for _ in addresses]
    try:
        own = Path("/proc/self/ns/net").readlink()
        while any(Path(f"/proc/{holder.pid}/ns/net").readlink() == own for holder in holders):
            assert all(holder.poll() is None for holder in holders), "unshare --net is not allowed here"
            time.sleep(0.01)
        enter = [f"nsenter --target {holder.pid} --net" for holder in holders]
        cable = f"ip link add cable type veth peer name cable netns {holders[1].pid}"
        subprocess.run(f"{enter[0]} {cable}".split(), check=True)
        for command, address in zip(enter, addresses, strict=True):
            subprocess.run(f"{command} ip address add {address}/24 dev cable".split(), check=True)
            subprocess.run(f"{command} ip link set cable up".split(), check=True)
            subprocess.run(f"{command} ip link set lo up".split(), check=True)
        for command in enter if routed else ():
            subprocess.run(f"{command} ip route add default dev cable".split(), check=True)
        yield enter
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()
