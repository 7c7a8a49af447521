# SPDX-License-Identifier: GPL-2.0-or-later
"""(c) New TCP connections a second through the detour, with one mapping and with very many.

Each connection is a whole handshake between client and server, ended by the server's reset, so
that neither end is left with a port in TIME_WAIT. With many mappings, connections go through one
of them, or through all of them at random, which the processor's caches feel; the server has
addresses enough for that. The same to all its ports without a detour tells what of that is felt at
both ends and on the way. Two labs, and rounds in turn.
"""

import contextlib
import json
import random
import statistics
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from tests.bench.bed import Bed, pause
from tests.bench.figures import Figure, spread
from tests.bench.requests import ask, for_remotes

NAME = "c"
TITLE = "new TCP connections through the detour"

_AT_ONCE = 64
_ROUND_SECONDS = 0.5
_FIRST_PORT = 20000
_PORTS = 60
_SERVER_NETWORK = IPv4Address("10.0.99.0")
_SERVER_ADDRESSES = 250


class _Side:
    """A lab whose detour has ``wanted`` mappings, each to an open port of the server."""

    def __init__(self, bed: Bed, wanted: int, program: Path) -> None:
        self.bed = bed
        self._wanted = wanted
        self._program = program
        self._prepare_hosts()
        bed.start_server("--backend", "nftables", "--relay", "tcp")
        bed.start("server", program, "sink", _FIRST_PORT, _PORTS).wait_output("serving")
        self.targets = list(self._mappings())

    def _prepare_hosts(self) -> None:
        bed = self.bed
        network = f"{_SERVER_NETWORK}/24"
        bed.host("server").run(["ip", "-batch", "-"], input="".join(
            f"address add {_SERVER_NETWORK + 1 + n}/32 dev lo\n"
            for n in range(_SERVER_ADDRESSES)))
        bed.run("r1", "ip", "route", "add", network, "via", "10.0.2.2")
        bed.run("r2", "ip", "route", "add", network, "via", "10.0.3.2")
        bed.run("r3", "ip", "route", "add", network, "via", "10.0.5.1")
        # Flows that were reset go soon: a table full of them would be what is measured.
        bed.set_sysctls("detour", net__netfilter__nf_conntrack_tcp_timeout_close=1)
        bed.set_sysctls("client", net__ipv4__ip_local_port_range="1024 65535")

    def _mappings(self) -> Iterator[str]:
        """Ask for the mappings; source, detour's address and port of each."""
        bed = self.bed
        remotes = [(int(_SERVER_NETWORK + 1 + n), _FIRST_PORT + port)
                   for n in range(_SERVER_ADDRESSES) for port in range(_PORTS)]
        for client in bed.client_addresses(-(-self._wanted // len(remotes))):
            share = remotes[:self._wanted]
            self._wanted -= len(share)
            load = ask(bed.udp(client), bed.detour, for_remotes(share))
            if load.lost or len(load.ports) != len(share):
                raise RuntimeError(f"{load.lost} of {len(share)} requests were not answered")
            yield from (f"{client} {bed.detour[0]} {port}\n" for port in load.ports.values())

    def directly(self) -> list[str]:
        """The same from the same clients to the server itself."""
        clients = sorted({target.split()[0] for target in self.targets})
        return [f"{client} {_SERVER_NETWORK + 1 + n} {_FIRST_PORT + port}\n" for client in clients
                for n in range(_SERVER_ADDRESSES) for port in range(_PORTS)]

    def connect(self, file: Path, seconds: float) -> dict[str, Any]:
        """Connect to the targets in the file, as fast as it goes."""
        self.bed.forget_flows()
        pause(0.2)
        found: dict[str, Any] = json.loads(self.bed.run(
            "client", self._program, "connect", file, _AT_ONCE, seconds))
        return found


class _Way:
    """Connections through some of a side's mappings."""

    def __init__(self, name: str, side: _Side, targets: list[str]) -> None:
        self.name = name
        self.rates: list[float] = []
        self.failed = 0
        self._side = side
        self._file = side.bed.lab.folder() / f"targets of {name}"
        self._file.write_text("".join(targets), encoding="ascii")

    def round(self) -> None:
        found = self._side.connect(self._file, _ROUND_SECONDS)
        self.failed += found["failed"]
        self.rates.append(found["connections"] / found["seconds"])


def run(say: Callable[[str], None], *, quick: bool, load: Path) -> Iterator[Figure]:
    many = 10_000 if quick else 100_000
    with contextlib.ExitStack() as stack:
        small = _Side(stack.enter_context(Bed("cx")), 1, load)
        large = _Side(stack.enter_context(Bed("cy")), many, load)
        say(f"{many:,} mappings made")
        directly = large.directly()
        ways = [_Way("at 1", small, small.targets),
                _Way(f"at {many:,}, through one", large, large.targets[:1]),
                _Way(f"at {many:,}, through all", large, large.targets),
                _Way("without detour, to one", large, directly[:1]),
                _Way("without detour, to all", large, directly)]
        for way in ways:  # to warm up
            way.round()
            way.rates.clear()
        for _ in range(6 if quick else 24):
            for way in random.sample(ways, len(ways)):
                way.round()
            say("; ".join(f"{way.name}: {way.rates[-1]:,.0f}/s" for way in ways))
    one, *others, one_directly, all_directly = ways
    yield Figure(bench=NAME, name="new TCP connections at 1 mapping",
                 value=statistics.median(one.rates), unit="/s",
                 details=spread(one.rates) | {"failed": one.failed})
    for way in others:
        yield _against(way, one, least=0.9)
    yield _against(all_directly, one_directly)


def _against(way: _Way, other: _Way, least: float | None = None) -> Figure:
    """The way's rate, and its ratio to another's, which may be ``least`` at least."""
    # Neighbouring rounds meet the same noise, so that their ratio has less of it.
    ratios = [b / a for a, b in zip(other.rates, way.rates, strict=True)]
    ratio = statistics.median(ratios)
    return Figure(bench=NAME, name=f"new TCP connections {way.name}",
                  value=statistics.median(way.rates), unit="/s",
                  baseline=statistics.median(other.rates), baseline_name=other.name,
                  ratio=ratio, target="" if least is None else f">= {least} x",
                  met=None if least is None else ratio >= least and not way.failed,
                  details=spread(way.rates) | {"failed": way.failed, "ratios": spread(ratios)})
