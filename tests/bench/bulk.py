# SPDX-License-Identifier: GPL-2.0-or-later
"""(d) Bulk throughput through the detour: NAT, plain forwarding, a userspace relay.

All three take the same hops: client, r1, r3, detour, r3, r2, server, and back the same way, to an
address of the server that is routed through the detour. For plain forwarding the detour has no
NAT rule, and tracks no connection. Links are not shaped, and all is one machine: what is compared
is processor time. Congestion control is cubic, by the lab's routes.
"""

import contextlib
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path

from tests.bench.bed import Bed
from tests.bench.figures import Figure, spread
from tests.bench.requests import ask, for_remotes

NAME = "d"
TITLE = "bulk throughput through the detour"

_PORT = 5201
_RELAY_PORT = 7000
_BYTES = 1_000_000_000
_SECONDS = 80
_LEAST_ROUNDS = 5
_ROUTED = "10.0.98.1"  # the server's, reached through the detour

# Spliced within the kernel where it can: the relay at its best.
_HAPROXY = """
global
    maxconn 100
defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    option splice-auto
listen relay
    bind :{port}
    server it {server}:{target}
"""


class _Way:
    def __init__(self, name: str, bed: Bed, target: str, port: int) -> None:
        self.name = name
        self.bed = bed
        self.target = target
        self.port = port
        self.rates: list[float] = []

    def measure(self) -> None:
        # Each end on a processor of its own: else it is the scheduler's choice that is measured.
        pinned = ["-A", "0,1"] if (os.cpu_count() or 1) > 1 else []
        report = json.loads(self.bed.run("client", "iperf3", "-c", self.target, "-p", self.port,
                                         "-J", "-n", _BYTES, *pinned))
        self.rates.append(report["end"]["sum_received"]["bits_per_second"] / 1e9)


def run(say: Callable[[str], None], *, quick: bool, load: Path) -> Iterator[Figure]:
    del load
    with contextlib.ExitStack() as stack:
        ways = [make(stack.enter_context(Bed(f"d{tag}")))
                for make, tag in ((_plain, "p"), (_nat, "n"), (_relay, "r"))]
        for way in ways:
            way.bed.start("server", "iperf3", "-s", "-p", _PORT, "--forceflush").wait_output(
                "Server listening")
        plain, nat, relay = ways
        stop = time.monotonic() + (10 if quick else _SECONDS)
        # Many short rounds, since what else the machine does changes from second to second.
        for number in itertools.count():
            if time.monotonic() > stop and number >= _LEAST_ROUNDS:
                break
            for way in random.sample((plain, nat), 2) + [relay] * (number % 8 == 0):
                way.measure()
            if number % 8 == 0:
                say(", ".join(f"{way.name} {way.rates[-1]:.1f} Gbit/s" for way in ways))
    medians = {way.name: statistics.median(way.rates) for way in ways}
    # Neighbouring rounds meet the same noise, so that their ratio has less of it.
    ratios = [a / b for a, b in zip(nat.rates, plain.rates, strict=True)]
    ratio = statistics.median(ratios)
    yield Figure(bench=NAME, name="bulk, plain forwarding", value=medians[plain.name],
                 unit="Gbit/s", details=spread(plain.rates))
    yield Figure(bench=NAME, name="bulk, NAT detour", value=medians[nat.name], unit="Gbit/s",
                 baseline=medians[plain.name], baseline_name="plain", ratio=ratio,
                 target=">= 0.9 x", met=ratio >= 0.9,
                 details=spread(nat.rates) | {"ratios": spread(ratios)})
    yield Figure(bench=NAME, name="bulk, userspace relay (haproxy, splicing)",
                 value=medians[relay.name], unit="Gbit/s", details=spread(relay.rates))
    yield Figure(bench=NAME, name="bulk, NAT detour against the relay",
                 value=medians[nat.name], unit="Gbit/s", baseline=medians[relay.name],
                 baseline_name="relay", ratio=medians[nat.name] / medians[relay.name])


def _plain(bed: Bed) -> _Way:
    _route_by_detour(bed)
    bed.set_sysctls("detour", net__ipv4__ip_forward=1)
    return _Way("plain", bed, _ROUTED, _PORT)


def _nat(bed: Bed) -> _Way:
    _route_by_detour(bed)
    bed.start_server("--backend", "nftables", "--relay", "tcp")
    load = ask(bed.udp("10.0.1.1"), bed.detour, for_remotes([(int(IPv4Address(_ROUTED)), _PORT)]))
    (port,) = load.ports.values()
    return _Way("NAT", bed, bed.detour[0], port)


def _relay(bed: Bed) -> _Way:
    _route_by_detour(bed)
    configuration = bed.lab.folder() / "haproxy.cfg"
    configuration.write_text(_HAPROXY.format(port=_RELAY_PORT, server=_ROUTED, target=_PORT),
                             encoding="ascii")
    bed.start("detour", "haproxy", "-db", "-f", configuration)
    return _Way("relay", bed, bed.detour[0], _RELAY_PORT)


def _route_by_detour(bed: Bed) -> None:
    """Give the server an address that is routed through the detour, there and back.

    In all labs alike, as the rules for it cost something, too.
    """
    bed.run("server", "ip", "address", "add", f"{_ROUTED}/32", "dev", "lo")
    for host, command in (
        # There: r1, r3, the detour, r3 again, r2.
        ("r1", f"route add {_ROUTED} via 10.0.4.2"),
        ("r3", f"route add {_ROUTED} via 10.0.5.1"),
        ("r3", f"rule add iif L4 to {_ROUTED} table 100"),
        ("r2", f"route add {_ROUTED} via 10.0.3.2"),
        # And back.
        ("r2", f"rule add from {_ROUTED} table 100"),
        ("r2", "route add default via 10.0.5.2 table 100"),
        ("r3", f"rule add iif L5 from {_ROUTED} table 100"),
        ("r3", "route add default via 10.0.6.2 table 100"),
    ):
        bed.run(host, "ip", *command.split())
