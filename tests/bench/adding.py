# SPDX-License-Identifier: GPL-2.0-or-later
"""(b) What one more mapping costs, by how many there are.

The sizes stand side by side in labs of their own and take turns, request by request, so that
what the machine does meanwhile hits all of them alike.
"""

import contextlib
import random
import socket
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path

from tests.bench.bed import Bed, Program, pause
from tests.bench.figures import Figure, spread
from tests.bench.requests import ask, ask_one, distinct

NAME = "b"
TITLE = "cost of adding one mapping"

_MAPPINGS_A_CLIENT = 15000  # the detour picks from 16,384 ports for one client
_SAMPLES_A_TURN = 50


class _Size:
    """A server with so many mappings present."""

    def __init__(self, bed: Bed, backend: str, present: int) -> None:
        self.bed = bed
        self.present = present
        self.server: Program = bed.start_server("--backend", backend)
        fillers = -(-present // _MAPPINGS_A_CLIENT)
        self.client: IPv4Address
        self.client, *others = bed.client_addresses(1 + fillers)
        for n, other in enumerate(others):
            share = min(_MAPPINGS_A_CLIENT, present - n * _MAPPINGS_A_CLIENT)
            load = ask(bed.udp(other), bed.detour, distinct(share))
            if load.lost or len(load.ports) != share:
                raise RuntimeError(f"{load.lost} of {share} requests were not answered")
        self.socket: socket.socket = bed.udp(self.client)
        self.socket.connect(bed.detour)
        self.adding: list[float] = []
        self.repeating: list[float] = []

    def sample(self, request: bytes) -> None:
        self.adding.append(ask_one(self.socket, request))
        # The same exchange once more, for what is there already.
        self.repeating.append(ask_one(self.socket, request))

    def forget_samples(self) -> None:
        self.server.call("flush", client=str(self.client))


def run(say: Callable[[str], None], *, quick: bool, load: Path) -> Iterator[Figure]:
    del load
    turns = 4 if quick else 20
    for backend, sizes in (("nftables", (100, 10_000, 20_000 if quick else 100_000)),
                           ("iptables", (100, 1000, 3000))):
        with contextlib.ExitStack() as stack:
            measured = []
            for tag, present in zip("xyz", sizes, strict=True):
                bed = stack.enter_context(Bed(f"b{backend[0]}{tag}"))
                measured.append(_Size(bed, backend, present))
                say(f"{backend}: {present:,} mappings present")
            # Of iptables' growth a few samples tell enough; they take 20 ms each.
            _take_turns(measured, turns if backend == "nftables" else -(-turns // 4))
        yield from _figures(backend, measured)


def _take_turns(sizes: list[_Size], turns: int) -> None:
    order = list(sizes)
    pause(1.0)
    for _ in range(turns):
        for request in distinct(_SAMPLES_A_TURN, start=1 << 20):
            random.shuffle(order)
            for size in order:
                size.sample(request)
        for size in sizes:  # back to the number present
            size.forget_samples()


def _figures(backend: str, sizes: list[_Size]) -> Iterator[Figure]:
    medians = [spread(size.adding)["median"] for size in sizes]
    alone = [spread(size.adding)["median"] - spread(size.repeating)["median"] for size in sizes]
    for size, median, net in zip(sizes, medians, alone, strict=True):
        first = size is sizes[0]
        judged = backend == "nftables" and size is sizes[-1]
        ratio = median / medians[0]
        yield Figure(
            bench=NAME, name=f"adding one to {size.present:,}, {backend}",
            value=median * 1e6, unit="us",
            baseline=None if first else medians[0] * 1e6,
            baseline_name="" if first else f"to {sizes[0].present:,}",
            ratio=None if first else ratio,
            target="<= 1.5 x" if judged else "", met=ratio <= 1.5 if judged else None,
            details={
                "seconds": spread(size.adding),
                "seconds_when_it_is_there_already": spread(size.repeating),
                "ratio_without_the_exchange": net / alone[0],
            })
    yield Figure(
        bench=NAME, name=f"the same without the exchange, {backend}", value=alone[-1] * 1e6,
        unit="us", baseline=alone[0] * 1e6, baseline_name=f"to {sizes[0].present:,}",
        ratio=alone[-1] / alone[0])
