# SPDX-License-Identifier: GPL-2.0-or-later
"""Sends datagrams that must make no mapping: python -m tests.netns.flood DETOUR SEED [PID]

Random bytes, damaged requests, and well-formed requests for what is never allowed, until it is
stopped: as fast as it goes, or as fast as the server of that PID takes them, so that none is lost.
"""

import itertools
import random
import socket
import struct
import sys
import time
from pathlib import Path

from detour_tools import mproxy

_DISTINCT = 20_000
_BURST = 100
# In bytes of the kernel's bookkeeping, 768 of a small datagram; the server has room for 16 times
# as much.
_WAITING = 1 << 20
_REQUEST = struct.Struct("!BBH4sHH")


def bad_datagram(source: random.Random) -> bytes:
    """One that is malformed, or asks for a remote that no policy allows."""
    kind = source.randrange(5)
    if kind == 0:
        return source.randbytes(source.choice((0, 1, 11, 12, 13, 100, 512, 513, 1400)))
    request = bytearray(_REQUEST.pack(1, 0, 0, socket.inet_aton("10.0.3.2"),
                                      source.randrange(65536), source.randrange(65536)))
    if kind == 1:  # one byte of the head is wrong
        request[source.randrange(2)] = source.randrange(2, 256)
    elif kind == 2:  # a bit too long or too short
        request = request[:source.randrange(12)] + source.randbytes(source.choice((0, 13, 40)))
    else:  # whole, but to where nobody may go
        request[4:8] = bytes((source.choice((0, 127, 224, 239, 240, 255, 10)),)) + (
            source.randbytes(3))
    return bytes(request)


def is_harmless(datagram: bytes) -> bool:
    """Whether it might be a request for an allowed remote after all (random bytes may be)."""
    try:
        message = mproxy.decode(datagram)
    except mproxy.MalformedMessageError:
        return True
    address = message.remote.address
    return address.is_multicast or not address.is_global


def waiting(table: Path) -> int:
    """How much waits in the server's socket; ``table`` is a /proc/net/udp (proc(5))."""
    fields = [line.split() for line in table.read_text(encoding="ascii").splitlines()[1:]]
    return sum(int(each[4].partition(":")[2], 16) for each in fields
               if int(each[1].partition(":")[2], 16) == mproxy.PORT)


def main(detour: str, seed: str, pid: str = "") -> None:
    source = random.Random(int(seed))
    pool: list[bytes] = []
    while len(pool) < _DISTINCT:
        datagram = bad_datagram(source)
        if is_harmless(datagram):
            pool.append(datagram)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as connection:
        connection.connect((detour, mproxy.PORT))
        send = connection.send
        for number in itertools.count():
            send(pool[number % _DISTINCT])
            while pid and number % _BURST == 0 and waiting(Path(f"/proc/{pid}/net/udp")) > _WAITING:
                time.sleep(0.001)


if __name__ == "__main__":
    main(*sys.argv[1:])
