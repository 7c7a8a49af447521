# SPDX-License-Identifier: GPL-2.0-or-later
"""The UDP socket: datagrams in bulk, and answers from the address that was asked.

A detour may have several addresses, and a client takes an answer from the one it asked only
(ip(7), IP_PKTINFO).
"""

import errno
import socket
import struct
from collections.abc import Iterator
from functools import lru_cache
from ipaddress import IPv4Address
from typing import NamedTuple

from detour_tools import mproxy
from detour_tools.endpoint import Endpoint
from detour_tools.errors import UserError

_SO_RCVBUFFORCE = 33
# A second's worth and more: bursts wait here while a commit runs.
_RECEIVE_BUFFER = 8 << 20
_IP_PKTINFO = 8
# struct in_pktinfo: interface, local address, the header's destination address
_PKTINFO = struct.Struct("=I4s4s")
_ANCILLARY = socket.CMSG_SPACE(_PKTINFO.size)


class Sender(NamedTuple):
    """Where a datagram came from, and what must be told the kernel to answer it."""

    address: IPv4Address
    name: tuple[str, int]
    ancillary: tuple[tuple[int, int, bytes], ...]


class Receiver:
    """A non-blocking UDP socket on an IPv4 address and port."""

    def __init__(self, endpoint: Endpoint) -> None:
        """Listen; raises UserError."""
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            self._socket.setblocking(False)
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
            except PermissionError:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
            self._socket.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
            self._socket.bind((str(endpoint.address), endpoint.port))
        except OSError as error:
            self._socket.close()
            raise _explained(error, endpoint) from None

    def fileno(self) -> int:
        """The file descriptor, for an event loop."""
        return self._socket.fileno()

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()

    def receive(self, at_most: int) -> Iterator[tuple[bytes, Sender]]:
        """The datagrams that wait, one byte over MAX_DATAGRAM at most of each."""
        receive = self._socket.recvmsg
        for _ in range(at_most):
            try:
                data, ancillary, _, name = receive(mproxy.MAX_DATAGRAM + 1, _ANCILLARY)
            except BlockingIOError:
                return
            except OSError:  # an ICMP error for an answer of ours; the next read is another one
                continue
            yield data, Sender(_address(name[0]), name, _reply_ancillary(ancillary))

    def send(self, data: bytes, sender: Sender) -> None:
        """Answer; raises OSError. A full buffer drops the answer: the client asks again."""
        self._socket.sendmsg((data,), sender.ancillary, 0, sender.name)


@lru_cache(maxsize=4096)
def _address(text: str) -> IPv4Address:
    return IPv4Address(text)


def _reply_ancillary(received: list[tuple[int, int, bytes]]
                     ) -> tuple[tuple[int, int, bytes], ...]:
    for level, kind, data in received:
        if level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
            # The address alone: which way the answer leaves is up to the routing table.
            return ((level, kind, _PKTINFO.pack(0, data[4:8], b"")),)
    return ()


def _explained(error: OSError, endpoint: Endpoint) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(f"UDP port {endpoint.port} is in use",
                         f"'ss -ulpn sport = :{endpoint.port}' shows by whom; "
                         "or choose another with --listen")
    if error.errno == errno.EADDRNOTAVAIL:
        return UserError(f"{endpoint.address} is not an address of this host", "see --listen")
    return UserError(f"cannot listen on UDP {endpoint}: {error.strerror}", "see --listen")
