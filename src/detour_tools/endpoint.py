# SPDX-License-Identifier: GPL-2.0-or-later
"""An address with a port, and how people write them."""

from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import NamedTuple

from detour_tools.errors import UserError

IPAddress = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class Endpoint(NamedTuple):
    """One end of a TCP flow: an IP address and a port in host byte order."""

    address: IPAddress
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if self.address.version == 6 else (
            f"{self.address}:{self.port}")


def unmapped(address: IPAddress) -> IPAddress:
    """The IPv4 address inside an IPv4-mapped IPv6 one (a dual-stack socket's), or as given."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def split_host_port(text: str, default_port: int | None = None) -> tuple[str, int]:
    """Split ``HOST``, ``HOST:PORT``, ``[V6]:PORT`` or a bare IPv6 address.

    Raises UserError when the port is missing and there is no default, or is not 1 to 65535.
    """
    host, port_text = text, ""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise UserError(f"'{text}' is not an address", "write [ADDRESS]:PORT", status=2)
        port_text = rest[1:]
    elif text.count(":") == 1:
        host, _, port_text = text.partition(":")
    if not host:
        raise UserError(f"'{text}' has no host", "write HOST or HOST:PORT", status=2)
    if not port_text:
        if default_port is None or text.endswith(":"):
            raise UserError(f"'{text}' has no port", "write HOST:PORT", status=2)
        return host, default_port
    if not (port_text.isascii() and port_text.isdigit() and 0 < int(port_text) < 65536):
        raise UserError(f"'{port_text}' in '{text}' is not a port", "1 to 65535", status=2)
    return host, int(port_text)


def parse_endpoint(text: str, default_port: int | None = None) -> Endpoint:
    """Read a numeric ``ADDRESS:PORT``; raises UserError when it is not one."""
    host, port = split_host_port(text, default_port)
    try:
        return Endpoint(ip_address(host), port)
    except ValueError:
        raise UserError(f"'{host}' is not an IP address", status=2) from None


def parse_network(text: str) -> Network:
    """Read ``ADDRESS/PREFIX``, or an address alone; raises UserError when it is not one.

    An address within a network is refused: whoever writes 203.0.113.7/2 means something else than
    a quarter of the Internet.
    """
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        raise UserError(f"'{text}' is not a network",
                        "write ADDRESS/PREFIX, such as 192.0.2.0/24", status=2) from None
    address = text.partition("/")[0]
    if ip_address(address) != network.network_address:
        raise UserError(f"'{text}' is not a network, as {address} lies within {network}",
                        f"write {network}, or {address} for this one address", status=2)
    return network
