# SPDX-License-Identifier: GPL-2.0-or-later
"""(c) New TCP connections a second through the detour, with one mapping and with very many.

Each connection is a whole handshake between client and server, ended by the server's reset, so
that neither end is left with a port in TIME_WAIT. With many mappings, connections go through all
of them at random; the server has addresses enough for that. Two labs, and rounds in turn.
"""

import contextlib
import json
import random
import statistics
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path

from tests.bench.bed import Bed, pause
from tests.bench.figures import Figure, spread
from tests.bench.requests import ask, for_remotes

NAME = "c"
TITLE = "new TCP connections through the detour"

_AT_ONCE = 64
_FIRST_PORT = 20000
_PORTS = 60
_SERVER_NETWORK = IPv4Address("10.0.99.0")
_SERVER_ADDRESSES = 250


class _Side:
    """A lab whose detour has ``wanted`` mappings, each to an open port of the server."""

    def __init__(self, bed: Bed, wanted: int, program: Path) -> None:
        self.bed = bed
        self.wanted = wanted
        self.program = program
        self.rates: list[float] = []
        self.failed = 0
        self._prepare_hosts()
        bed.start_server("--backend", "nftables")
        bed.start("server", program, "sink", _FIRST_PORT, _PORTS).wait_output("serving")
        self.file = bed.lab.folder() / "targets"
        self.file.write_text("".join(self._mappings()), encoding="ascii")

    def _prepare_hosts(self) -> None:
        bed = self.bed
        network = f"{_SERVER_NETWORK}/24"
        bed.host("server").run(["ip", "-batch", "-"], input="".join(
            f"address add {_SERVER_NETWORK + 1 + n}/32 dev lo\n"
            for n in range(_SERVER_ADDRESSES)))
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
        for client in bed.client_addresses(-(-self.wanted // len(remotes))):
            share = remotes[:self.wanted]
            self.wanted -= len(share)
            load = ask(bed.udp(client), bed.detour, for_remotes(share))
            if load.lost or len(load.ports) != len(share):
                raise RuntimeError(f"{load.lost} of {len(share)} requests were not answered")
            yield from (f"{client} {bed.detour[0]} {port}\n" for port in load.ports.values())

    def round(self, seconds: float) -> float:
        self.bed.forget_flows()
        pause(0.2)
        found = json.loads(self.bed.run("client", self.program, "connect", self.file, _AT_ONCE,
                                        seconds))
        self.failed += found["failed"]
        self.rates.append(found["connections"] / found["seconds"])
        return self.rates[-1]


def run(say: Callable[[str], None], *, quick: bool, load: Path) -> Iterator[Figure]:
    many = 10_000 if quick else 100_000
    with contextlib.ExitStack() as stack:
        one_side = _Side(stack.enter_context(Bed("cx")), 1, load)
        many_side = _Side(stack.enter_context(Bed("cy")), many, load)
        say(f"{many:,} mappings made")
        rounds = 6 if quick else 30
        for number in range(-1, rounds):  # the first is for warming up
            pair = [one_side, many_side]
            random.shuffle(pair)
            for side in pair:
                side.round(0.5)
            if number < 0:
                one_side.rates.clear()
                many_side.rates.clear()
            else:
                say(f"at 1: {one_side.rates[-1]:,.0f}/s, "
                    f"at {many:,}: {many_side.rates[-1]:,.0f}/s")
    one, more = statistics.median(one_side.rates), statistics.median(many_side.rates)
    # Neighbouring rounds meet the same noise, so that their ratio has less of it.
    ratio = statistics.median(b / a for a, b in zip(one_side.rates, many_side.rates, strict=True))
    details = {"at_1": spread(one_side.rates), "at_many": spread(many_side.rates),
               "failed": one_side.failed + many_side.failed,
               "ratio_of_medians": more / one}
    yield Figure(bench=NAME, name="new TCP connections at 1 mapping", value=one, unit="/s")
    yield Figure(bench=NAME, name=f"new TCP connections at {many:,} mappings", value=more,
                 unit="/s", baseline=one, baseline_name="at 1", ratio=ratio,
                 target=">= 0.9 x", met=ratio >= 0.9, details=details)
