# SPDX-License-Identifier: GPL-2.0-or-later
"""The UDP socket: datagrams in bulk, and answers from the address that was asked.

A detour may have several addresses, and a client takes an answer from the one it asked only
(ip(7), IP_PKTINFO).
"""

import ctypes
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
from detour_tools.mproxy import v1

# include/uapi/asm-generic/socket.h
_SO_ATTACH_FILTER = 26
_SO_DETACH_FILTER = 27
_SO_RCVBUFFORCE = 33
_SO_MEMINFO = 55
_MEMINFO = struct.Struct("=32xI")  # SK_MEMINFO_DROPS, of include/uapi/linux/sock_diag.h
# Bursts wait here while a commit runs: some 5,000 datagrams (the kernel takes it twice, and 768
# bytes for each), so that in a flood none is older than its client waits for an answer.
_RECEIVE_BUFFER = 2 << 20
_IP_PKTINFO = 8
# struct in_pktinfo: interface, local address, the header's destination address
_PKTINFO = struct.Struct("=I4s4s")
_ANCILLARY = socket.CMSG_SPACE(_PKTINFO.size)

# Classic BPF (include/uapi/linux/filter.h): code, jumps if true and if false, value. A UDP socket's
# filter sees the datagram with its header of 8 bytes.
_INSTRUCTION = struct.Struct("=HBBI")
_ONLY_REQUESTS = b"".join(_INSTRUCTION.pack(*each) for each in (
    (0x80, 0, 0, 0),                                     # load the length
    (0x15, 0, 3, 8 + v1.LENGTH),                         # another: to the last
    (0x28, 0, 0, 8),                                     # load version and op
    (0x15, 0, 1, v1.VERSION << 8 | v1.OP_REQUEST),
    (0x06, 0, 0, 0xFFFF),                                # take all of it
    (0x06, 0, 0, 0),                                     # take nothing
))


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

    def screen(self, *, on: bool) -> None:
        """Whether the kernel drops what is no request, before it takes room. Raises OSError."""
        if not on:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
            return
        program = ctypes.create_string_buffer(_ONLY_REQUESTS, len(_ONLY_REQUESTS))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack(
            "@HP", len(_ONLY_REQUESTS) // _INSTRUCTION.size, ctypes.addressof(program)))

    def lost(self) -> int:
        """How many datagrams the kernel has dropped, by the screen or for want of room."""
        found = self._socket.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
        return int(_MEMINFO.unpack(found)[0])

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
