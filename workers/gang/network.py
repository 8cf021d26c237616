"""Over which network interface the ranks of a gang talk, and the address where they meet.

Left alone, gloo takes the interface of the host's name, which on many machines is loopback or does not resolve, and
ranks on other nodes never meet. Called in a rank's process by `workers.gang.rank_actor` and `workers.gang.local`.
"""

import os
import socket

import psutil  # type: ignore[import-untyped]

FAMILIES = (socket.AF_INET, socket.AF_INET6)


def use_interface(interface: str | None, node_address: str) -> str:
    """Let gloo and NCCL use one interface, unless the environment says otherwise. Call it before ranks meet.

    Args:
        interface: of the deployment; None: the one that has this node's address for gloo, and NCCL's own choice.
        node_address: by which Ray knows this node.

    Returns:
        The address on which this process can be reached by the other ranks.

    Raises:
        ValueError: this machine has no such interface, or it has no address.
    """
    if interface is None:
        if (found := _interface_of(node_address)) is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", found)
        return node_address
    address = _address_of(interface)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # without = it would be a prefix
    return address


def interfaces() -> dict[str, list[str]]:
    """The addresses of this machine, by interface; IPv4 first."""
    found = {}
    for name, addresses in psutil.net_if_addrs().items():
        sorted_ones = sorted((each for each in addresses if each.family in FAMILIES), key=lambda each: each.family)
        found[name] = [each.address.partition("%")[0] for each in sorted_ones]
    return found


def _interface_of(address: str) -> str | None:
    return next((name for name, addresses in interfaces().items() if address in addresses), None)


def _address_of(interface: str) -> str:
    there = interfaces()
    if not there.get(interface):
        usable = ", ".join(sorted(name for name, addresses in there.items() if addresses))
        what = "has no address" if interface in there else "is not on this machine"
        raise ValueError(f"placement.network_interface: {interface} {what}; choose from {usable}")
    return there[interface][0]
