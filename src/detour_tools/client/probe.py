# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether joins of MPTCP connections get through to a server, without a connection to join.

A SYN with MP_JOIN and a token that the server does not know is answered by a reset that says so in
an MPTCP option (RFC 8684, section 3.6); one from anybody on the way has no such option.
"""

import enum
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress

from detour_tools.endpoint import Endpoint

_SYN, _RST = 2, 4
_MPTCP = 30  # the TCP option
_MP_JOIN = 1 << 4
_WAIT_SECONDS = 1.0
_TRIES = 3


class Joined(enum.Enum):
    """What became of the probe."""

    ARRIVED = "MPTCP answered"
    REFUSED = "a reset by something that is not MPTCP"
    SILENCE = "no answer"


def join(target: Endpoint) -> Joined:
    """Send joins to ``target`` until one is answered, three at most. Blocks for three seconds.

    Raises OSError; PermissionError without CAP_NET_RAW.
    """
    with (socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw,
          socket.socket(socket.AF_INET, socket.SOCK_STREAM) as holder):
        raw.connect((str(target.address), 0))
        source = raw.getsockname()[0]
        holder.bind((source, 0))  # so that nobody else has the port meanwhile
        port = holder.getsockname()[1]
        addresses = socket.inet_aton(source) + target.address.packed
        for _ in range(_TRIES):
            raw.send(_syn(addresses, port, target.port))
            until = time.monotonic() + _WAIT_SECONDS
            with suppress(TimeoutError):
                while (left := until - time.monotonic()) > 0:
                    raw.settimeout(left)
                    packet = raw.recv(2048)
                    segment = packet[(packet[0] & 15) * 4:]
                    if struct.unpack_from("!HH", segment) == (target.port, port) and (
                            segment[13] & _RST):
                        return Joined.ARRIVED if _MPTCP in _options(segment) else Joined.REFUSED
    return Joined.SILENCE


def _syn(addresses: bytes, source: int, destination: int) -> bytes:
    # MP_JOIN of a SYN (section 3.2): subtype, address id, token, nonce.
    option = struct.pack("!BBBB8s", _MPTCP, 12, _MP_JOIN, 1, os.urandom(8))
    head = struct.pack("!HH4s4xBBHHH", source, destination, os.urandom(4),
                       20 + len(option) << 2, _SYN, 65535, 0, 0)
    pseudo = addresses + struct.pack("!HH", socket.IPPROTO_TCP, len(head) + len(option))
    total = sum(struct.unpack("!22H", pseudo + head + option))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return head[:16] + struct.pack("!H", ~total & 0xFFFF) + head[18:] + option


def _options(segment: bytes) -> Iterator[int]:
    """The kinds of a segment's options (RFC 9293, section 3.1)."""
    position, end = 20, min((segment[12] >> 4) * 4, len(segment))
    while position + 1 < end and segment[position]:
        yield segment[position]
        position += 1 if segment[position] == 1 else max(segment[position + 1], 2)
