# SPDX-License-Identifier: GPL-2.0-or-later
"""Names to addresses."""

import asyncio
import concurrent.futures
import socket
import threading
from ipaddress import IPv4Address

from detour_tools.client.given import can_be_host, read_host, unanswered
from detour_tools.endpoint import Endpoint
from detour_tools.errors import UserError


def resolve(text: str, default_port: int | None = None) -> Endpoint:
    """The IPv4 endpoint that ``HOST[:PORT]`` means; raises UserError."""
    host, port = read_host(text, default_port)
    return Endpoint(host if isinstance(host, IPv4Address) else addresses_of(host)[0], port)


def addresses_of(name: str) -> list[IPv4Address]:
    """The IPv4 addresses of a name, at least one; raises UserError. Blocks, maybe for a minute."""
    try:
        found = _ask(name, socket.AF_INET)
    except OSError as error:
        if error.errno == socket.EAI_AGAIN:
            raise unanswered(name) from None
        if _has_ipv6(name):
            raise UserError(f"'{name}' has IPv6 addresses only, which MPROXY does not carry",
                            "give it an IPv4 address, too") from None
        raise UserError(f"'{name}' is no name of an IPv4 address: {error.strerror}",
                        "check the spelling; ssh's aliases are known to ssh only") from None
    addresses = [IPv4Address(each) for each in dict.fromkeys(found)]
    hosts = [address for address in addresses if can_be_host(address)]
    if not hosts:
        raise UserError(f"'{name}' is {addresses[0]}, which is not the address of a host")
    return hosts


def _has_ipv6(name: str) -> bool:
    try:
        return bool(_ask(name, socket.AF_INET6))
    except OSError:
        return False


def _ask(name: str, family: int) -> list[str]:
    return [str(found[4][0]) for found in socket.getaddrinfo(
        name, None, family, socket.SOCK_STREAM)]


async def look_up(name: str) -> list[IPv4Address]:
    """As addresses_of(), beside the event loop.

    In a thread that no exit waits for, unlike those of the loop's own pool.
    """
    future: concurrent.futures.Future[list[IPv4Address]] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()  # so that it takes an outcome that nobody awaits any more

    def work() -> None:
        try:
            future.set_result(addresses_of(name))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=work, name=f"look up {name}", daemon=True).start()
    return await asyncio.wrap_future(future)
