"""The one address at which a host that somebody else named is called, if that is safe.

`service.api.fetching` and `service.jobs.webhooks` ask, and connect to what they are told, so that nobody can answer a
second look at the name with another address.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Callable


class AddressRefused(Exception):
    """The host has no address, or one that must not be called.

    Attributes:
        address: the one that must not be called; empty: it has none. Not for whoever named the host.
    """

    def __init__(self, host: str, address: str = "") -> None:
        said = f"has the address {address}, which is not public" if address else "has no address"
        super().__init__(f"the host {host!r} {said}")
        self.address = address


def is_public(address: str) -> bool:
    """Whether an IP address is that of a host on the Internet. Addresses that lead to others are none."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        unicast = found in ipaddress.ip_network("2000::/3")
        return unicast and found.is_global and found.sixtofour is None and found.teredo is None
    return found.is_global and not found.is_multicast


async def public_address(host: str, port: int, allowed: Callable[[str], bool] = is_public) -> str:
    """Look a host up once.

    Args:
        host: its name.
        port: where it is to be called.
        allowed: whether an address may be called. All that the name has must be: else its owner could choose.

    Raises:
        AddressRefused: it must not be called.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        raise AddressRefused(host) from None
    addresses = [str(entry[4][0]) for entry in found]
    refused = next((address for address in addresses if not allowed(address)), "")
    if refused or not addresses:
        raise AddressRefused(host, refused)
    return addresses[0]
