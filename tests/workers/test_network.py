"""Ranks on two nodes meet over the interface that they are told, or the one that has their node's address.

The two nodes are network namespaces of this machine, joined by a cable of their own.
"""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.namespaces import joined_namespaces
from tests.support.programs import needs_iproute
from workers.gang import network
from workers.gang.network import use_interface

THERE = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.5", "fd00::5"], "eth1": []}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "interfaces", lambda: THERE)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("environment")
def test_the_interface_of_the_nodes_address_is_gloos() -> None:
    assert use_interface(None, "10.0.0.5") == "10.0.0.5"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth0"
    assert "NCCL_SOCKET_IFNAME" not in os.environ


@pytest.mark.usefixtures("environment")
def test_a_named_interface_is_that_of_both_and_of_the_rendezvous() -> None:
    assert use_interface("eth0", "127.0.0.1") == "10.0.0.5"
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("eth0", "=eth0")


@pytest.mark.usefixtures("environment")
def test_the_operators_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    use_interface("eth0", "127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(("name", "said"), [("eth7", "is not on this machine"), ("eth1", "has no address")])
def test_an_interface_that_cannot_be_used_is_refused(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=rf"network_interface: {name} {said}; choose from eth0, lo"):
        use_interface(name, "10.0.0.5")


PATIENCE_S = 120
IN_VAIN_S = 15
"""Three times as long as those take that meet."""

ADDRESSES = ("10.77.0.1", "10.77.0.2")

RANK = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from workers.gang.network import use_interface

rank, interface, node_address, tells = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "tells"
wait = 60
if tells:
    use_interface(interface or None, node_address)
store = dist.TCPStore("10.77.0.1", 29500, is_master=rank == 0, wait_for_workers=False, timeout=timedelta(seconds=wait))
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=wait))
total = torch.tensor([float(rank + 1)])
dist.all_reduce(total)
dist.destroy_process_group()  # else its threads may outlive the interpreter, which C++ takes for a mistake
print("total", total.item())
"""


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[str]]:
    """The commands that run something on either node."""
    with joined_namespaces(ADDRESSES) as enter:
        yield enter


def ranks_meet(nodes: list[str], *, interface: str, tells: bool) -> list[str]:
    """The last line that each of two ranks prints."""
    variables = {name: value for name, value in os.environ.items() if not name.endswith("SOCKET_IFNAME")}
    ranks = [
        subprocess.Popen(
            [*node.split(), sys.executable, "-c", RANK, str(i), interface, ADDRESSES[i], "tells" if tells else ""],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=variables,
        )
        for i, node in enumerate(nodes)
    ]
    said = []
    for rank in ranks:
        try:
            output = rank.communicate(timeout=PATIENCE_S if tells else IN_VAIN_S)[0]
        except subprocess.TimeoutExpired:
            rank.kill()
            output = rank.communicate()[0]
        said.append((output.strip().splitlines() or [""])[-1])
    return said


@needs_iproute
@pytest.mark.processes
@pytest.mark.parametrize("interface", ["", "cable"])
def test_ranks_on_two_nodes_meet(nodes: list[str], interface: str) -> None:
    assert ranks_meet(nodes, interface=interface, tells=True) == ["total 3.0"] * 2


@needs_iproute
@pytest.mark.processes
def test_left_alone_they_do_not_meet(nodes: list[str]) -> None:
    assert "total 3.0" not in ranks_meet(nodes, interface="", tells=False)
