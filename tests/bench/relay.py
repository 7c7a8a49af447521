# SPDX-License-Identifier: GPL-2.0-or-later
"""(h) What a table that relays joins only costs a new flow, against one that relays any TCP.

A new flow is a SYN with MP_JOIN, of a source port not used before, from the client through the
detour to the server, which counts it and drops it. The kernel carries it all the way within
send(), so that the time of a send is that of the whole way. Two labs, and rounds in turn.
"""

import contextlib
import json
import os
import random
import socket
import statistics
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from detour_tools.lab import namespaces
from tests.bench.bed import Bed, pause
from tests.bench.figures import Figure, spread
from tests.bench.requests import ask, for_remotes

NAME = "h"
TITLE = "new flows, relay=joins against relay=tcp"

_PORT = 80
_SYNS_A_ROUND = 4000
_FIRST_SOURCE_PORT = 2000
_SYN = 2
# A SYN's MP_JOIN (RFC 8684, section 3.2): subtype, address id, token, nonce.
_JOIN = struct.pack("!BBBB8x", 30, 12, 1 << 4, 1)
_COUNTED = ("add table ip sink; add counter ip sink syns; "
            "add chain ip sink first { type filter hook prerouting priority raw; }; "
            f"add rule ip sink first tcp dport {_PORT} counter name syns drop")


def _join(addresses: bytes, source: int, destination: int) -> bytes:
    head = struct.pack("!HHIIBBHHH", source, destination, source, 0, 20 + len(_JOIN) << 2, _SYN,
                       65535, 0, 0)
    pseudo = addresses + struct.pack("!HH", socket.IPPROTO_TCP, len(head) + len(_JOIN))
    total = sum(struct.unpack("!22H", pseudo + head + _JOIN))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return head[:16] + struct.pack("!H", ~total & 0xFFFF) + head[18:] + _JOIN


class _Side:
    """A lab whose detour relays that."""

    def __init__(self, bed: Bed, relay: str) -> None:
        self.bed = bed
        self.times: list[float] = []
        bed.start_server("--backend", "nftables", "--relay", relay)
        bed.run("server", "nft", _COUNTED)
        client, server = bed.host("client").address, bed.host("server").address
        with contextlib.closing(bed.udp(client)) as asking:
            found = ask(asking, bed.detour, for_remotes([(int(server), _PORT)]))
        [port] = found.ports.values()
        with namespaces.inside(bed.host("client").namespace):
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
        self._socket.bind((str(client), 0))
        self._socket.connect((bed.detour[0], 0))
        addresses = client.packed + bed.host("detour").address.packed
        self._syns = [_join(addresses, _FIRST_SOURCE_PORT + n, port)
                      for n in range(_SYNS_A_ROUND)]

    def close(self) -> None:
        self._socket.close()

    def round(self) -> None:
        """Send them; notes the seconds for one."""
        self.bed.forget_flows()
        pause(0.05)
        before, send = self._arrived(), self._socket.send
        began = time.perf_counter()
        for syn in self._syns:
            send(syn)
        took = time.perf_counter() - began
        pause(0.05)
        arrived = self._arrived() - before
        if arrived < 0.99 * _SYNS_A_ROUND:
            raise RuntimeError(f"only {arrived} of {_SYNS_A_ROUND} SYNs arrived")
        self.times.append(took / _SYNS_A_ROUND)

    def _arrived(self) -> int:
        listed = json.loads(self.bed.run("server", "nft", "-j", "list", "counters"))["nftables"]
        return int(next(each["counter"]["packets"] for each in listed if "counter" in each))


def run(say: Callable[[str], None], *, quick: bool, load: Path) -> Iterator[Figure]:
    del load
    processors = os.sched_getaffinity(0)
    with contextlib.ExitStack() as stack:
        sides = []
        for tag, relay in (("ht", "tcp"), ("hj", "joins")):
            side = _Side(stack.enter_context(Bed(tag)), relay)
            sides.append(stack.enter_context(contextlib.closing(side)))
        stack.callback(os.sched_setaffinity, 0, processors)
        os.sched_setaffinity(0, {max(processors)})
        for side in sides:  # to warm up
            side.round()
            side.times.clear()
        for _ in range(10 if quick else 60):
            for side in random.sample(sides, 2):
                side.round()
    tcp, joins = sides
    # Neighbouring rounds meet the same noise, so that their ratio has less of it.
    ratios = spread([b / a for a, b in zip(tcp.times, joins.times, strict=True)])
    medians = [statistics.median(side.times) * 1e6 for side in sides]
    say(f"tcp {medians[0]:.1f} us, joins {medians[1]:.1f} us a flow, ratio {ratios['median']:.3f} "
        f"(middle half {ratios['p25']:.3f} to {ratios['p75']:.3f})")
    yield Figure(bench=NAME, name="a new flow, joins only", value=medians[1], unit="us",
                 baseline=medians[0], baseline_name="any TCP", ratio=ratios["median"],
                 details={"ratios": ratios, "tcp": spread(tcp.times),
                          "joins": spread(joins.times)})
