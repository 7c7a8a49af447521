# SPDX-License-Identifier: GPL-2.0-or-later
"""(a) New mappings a second, and their latency, with 64 requests outstanding."""

import contextlib
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench.bed import Bed, pause
from tests.bench.figures import Figure, quantile
from tests.bench.requests import Load, ask, distinct

NAME = "a"
TITLE = "new mappings, 64 outstanding"

_OUTSTANDING = 64


class _Way:
    """One way of making mappings: name, how to start it, and how many to make a round."""

    def __init__(self, name: str, tag: str, start: Callable[[Bed], Callable[[], object]],
                 count: int, seconds: float) -> None:
        """``start`` starts the server and returns what removes its mappings."""
        self.name = name
        self.bed = Bed(tag)
        self.start = start
        self.requests = distinct(count)
        self.seconds = seconds
        self.loads: list[Load] = []


def run(say: Callable[[str], None], *, quick: bool, load: Path) -> Iterator[Figure]:
    del load
    rounds = 1 if quick else 3
    ways = [
        _Way("naive", "an", _start_naive, 2000, 1.0 if quick else 2.0),
        _Way("iptables", "ai", lambda bed: _start_ours(bed, "iptables"), 1000 if quick else 3000,
             6.0),
        # As many as one client can have at ports that the detour picks, less some.
        _Way("nftables", "af", lambda bed: _start_ours(bed, "nftables"), 5000 if quick else 15000,
             10.0),
    ]
    with contextlib.ExitStack() as stack:
        clients, empty = [], []
        for way in ways:
            bed = stack.enter_context(way.bed)
            empty.append(way.start(bed))
            clients.append(bed.client_addresses(rounds))
        for number in range(rounds):
            for way, addresses, remove_all in zip(ways, clients, empty, strict=True):
                # All start from nothing: iptables, run or in process, gets slower with rules.
                remove_all()
                pause(0.3)
                # A new client each round, as the naive server remembers the last one's.
                load_result = ask(way.bed.udp(addresses[number]), way.bed.detour, way.requests,
                                  _OUTSTANDING, way.seconds)
                way.loads.append(load_result)
                say(f"{way.name}: {load_result.rate:,.0f}/s, p99 "
                    f"{quantile(load_result.latencies, 0.99) * 1000:.1f} ms, "
                    f"{load_result.retransmissions} retransmitted")
    naive = statistics.median(each.rate for each in ways[0].loads)
    for way in ways:
        yield from _figures(way, naive)


def _start_naive(bed: Bed) -> Callable[[], object]:
    program = Path(__file__).with_name("naive_server.py")
    bed.start("detour", sys.executable, program).wait_output("serving")
    return lambda: bed.run("detour", "iptables", "-t", "nat", "-F")


def _start_ours(bed: Bed, backend: str) -> Callable[[], object]:
    server = bed.start_server("--backend", backend)
    return lambda: server.call("flush")


def _figures(way: _Way, naive: float) -> Iterator[Figure]:
    rate = statistics.median(each.rate for each in way.loads)
    latencies = [latency for each in way.loads for latency in each.latencies]
    details = {
        "mappings_a_round": [len(each.latencies) for each in way.loads],
        "rates": [each.rate for each in way.loads],
        "retransmissions": sum(each.retransmissions for each in way.loads),
        "lost": sum(each.lost for each in way.loads),
        "load_client_processor_share": [each.client_share for each in way.loads],
    }
    if way.name == "naive":
        yield Figure(bench=NAME, name="new mappings, naive (iptables twice)", value=rate,
                     unit="/s", details=details)
    else:
        ours = way.name == "nftables"
        yield Figure(
            bench=NAME, name=f"new mappings, {way.name}", value=rate, unit="/s",
            baseline=naive, baseline_name="naive", ratio=rate / naive,
            target=">= 60 x naive, >= 20,000/s" if ours else "",
            met=(rate >= 60 * naive and rate >= 20000) if ours else None, details=details)
    p99 = quantile(latencies, 0.99) * 1000
    yield Figure(bench=NAME, name=f"latency p50, {way.name}",
                 value=quantile(latencies, 0.5) * 1000, unit="ms")
    yield Figure(bench=NAME, name=f"latency p99, {way.name}", value=p99, unit="ms",
                 target="< 20 ms" if way.name == "nftables" else "",
                 met=p99 < 20 and not details["lost"] if way.name == "nftables" else None,
                 details={"p99_a_round_ms": [quantile(each.latencies, 0.99) * 1000
                                             for each in way.loads]})
