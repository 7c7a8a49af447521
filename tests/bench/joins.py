# SPDX-License-Identifier: GPL-2.0-or-later
"""(e) The client daemon: connections a second with no detour missed, and how soon it joins.

Connections a second: a program opens MPTCP connections at a steady rate, sends a byte over each,
and closes it 0.75 s later. Just before, it looks whether a second subflow is established; the
kernels' counters and the daemon's own are held against that. Without the daemon is the baseline.

How soon: from a capture at the client's interface. A connection is fully established, and the
kernel's ESTABLISHED event sent, when the server's first DATA_ACK (or ADD_ADDR) arrives; the join
is the SYN with MP_JOIN that bears the connection's token. The baseline is the kernel's own path
manager, told to join from a second address.
"""

import contextlib
import hashlib
import json
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from detour_tools.endpoint import Endpoint
from detour_tools.lab import namespaces
from detour_tools.lab.captures import Capture, segments
from tests.bench.bed import Bed, Program, busy_seconds, pause
from tests.bench.figures import Figure, quantile

NAME = "e"
TITLE = "client daemon"

_PORT = 20000
_PORTS = 400
_HOLD_MS = 750
_TARGET_RATE = 1000
_CACHED_PORT = _PORT + _PORTS - 1
_IPPROTO_MPTCP = 262

_OPTION_MPTCP = 30
_MP_CAPABLE, _MP_JOIN, _DSS, _ADD_ADDR = range(4)
_SYN, _ACK = 0x02, 0x10


def run(say: Callable[[str], None], *, quick: bool, load: Path) -> Iterator[Figure]:
    yield from _join_delays(say, load, count=40 if quick else 300)
    yield from _served(say, load, quick=quick)


# -- connections a second ----------------------------------------------------------------------


def _served(say: Callable[[str], None], program: Path, *, quick: bool) -> Iterator[Figure]:
    seconds = 2 if quick else 6
    without = _load_round(program, _TARGET_RATE, seconds, daemon=False)
    say(f"without the daemon: {_TARGET_RATE}/s, processors {without['processors']:.2f} busy")
    with_daemon = _load_round(program, _TARGET_RATE, seconds, daemon=True)
    say(_told(with_daemon))
    yield Figure(
        bench=NAME, name=f"connections without detour, of {with_daemon['opened']:,} "
        f"at {_TARGET_RATE:,}/s", value=with_daemon["missed"], unit="",
        baseline=without["missed"], baseline_name="no daemon", target="0",
        met=with_daemon["missed"] == 0 and with_daemon["rate"] >= 0.99 * _TARGET_RATE,
        details={"with_daemon": with_daemon, "without": without})
    yield Figure(bench=NAME, name=f"processors busy at {_TARGET_RATE:,}/s, all programs",
                 value=with_daemon["processors"], unit="",
                 baseline=without["processors"], baseline_name="no daemon",
                 ratio=with_daemon["processors"] / without["processors"])
    yield Figure(bench=NAME, name="processor time of the daemon a connection",
                 value=with_daemon["daemon_us"], unit="us")
    best = with_daemon["rate"] if not with_daemon["missed"] else 0.0
    for rate in () if quick or not best else (1500, 2000, 2500, 3000):
        tried = _load_round(program, rate, 3, daemon=True)
        say(_told(tried))
        if tried["missed"] or tried["rate"] < 0.99 * rate:
            break
        best = tried["rate"]
    if not quick:
        yield Figure(bench=NAME, name="highest rate tried with none missed", value=best,
                     unit="/s", details={"last_tried": tried} if best else {})


def _told(found: dict[str, Any]) -> str:
    return (f"{found['rate']:,.0f}/s: {found['missed']} of {found['opened']} missed, processors "
            f"{found['processors']:.2f} busy, {found['daemon_us']:.0f} us of the daemon a "
            "connection")


def _load_round(program: Path, rate: int, seconds: int, *, daemon: bool) -> dict[str, Any]:
    with Bed("ed" if daemon else "ew") as bed:
        bed.start("server", program, "echo", _PORT, 1).wait_output("serving")
        # Closed connections keep their ports for a minute.
        bed.set_sysctls("client", net__ipv4__ip_local_port_range="1024 65535")
        client: Program | None = None
        if daemon:
            bed.start_server()
            client = bed.start_client()
        busy, start = busy_seconds(), time.monotonic()
        used = client.cpu_seconds() if client else 0.0
        found: dict[str, Any] = json.loads(bed.run(
            "client", program, "mptcp", "10.0.3.2", _PORT, rate, seconds, _HOLD_MS))
        elapsed = time.monotonic() - start
        found["processors"] = (busy_seconds() - busy) / elapsed
        found["rate"] = found["opened"] / found["seconds"]
        found["missed"] = found["opened"] - found["with_detour"]
        for host in ("client", "server"):
            found[f"counters_{host}"] = _mptcp_counters(bed, host)
        if client:
            pause(0.5)
            found["daemon_us"] = (client.cpu_seconds() - used) / found["opened"] * 1e6
            found["daemon"] = client.call("status")["counters"]
    return found


def _mptcp_counters(bed: Bed, host: str) -> dict[str, int]:
    text = bed.run(host, "cat", "/proc/net/netstat")
    names, values = (line.split()[1:] for line in text.splitlines()
                     if line.startswith("MPTcpExt:"))
    return {name: int(value) for name, value in zip(names, values, strict=True)
            if int(value) and name.startswith(("MPJoin", "MPCapable", "Rm", "MPFallback"))}


# -- from ESTABLISHED to the join's SYN --------------------------------------------------------


def _join_delays(say: Callable[[str], None], program: Path, count: int) -> Iterator[Figure]:
    with Bed("ek") as bed:
        bed.start("server", program, "echo", _PORT, _PORTS).wait_output("serving")
        bed.run("client", "ip", "address", "add", "10.0.1.10/24", "dev", "L1")
        bed.run("client", "ip", "mptcp", "endpoint", "add", "10.0.1.10", "dev", "L1", "subflow")
        kernel = _capture_joins(bed, [_CACHED_PORT] * count)
    with Bed("ej") as bed:
        bed.start("server", program, "echo", _PORT, _PORTS).wait_output("serving")
        bed.start_server()
        bed.start_client()
        _open(bed, [_CACHED_PORT] * 3)
        cached = _capture_joins(bed, [_CACHED_PORT] * count)
        asked = _capture_joins(bed, [_PORT + n for n in range(count)])
    baseline = _median_ms(kernel, count)
    for name, delays in (("kernel path manager, no detour", kernel),
                         ("mapping cached", cached), ("mapping not cached", asked)):
        judged, ours = delays is cached, delays is not kernel
        median = _median_ms(delays, count)
        say(f"join after ESTABLISHED, {name}: median {median:.3f} ms, "
            f"{len(delays)} joins of {count} connections")
        yield Figure(
            bench=NAME, name=f"ESTABLISHED to join, {name}", value=median, unit="ms",
            baseline=baseline if ours else None, baseline_name="kernel" if ours else "",
            ratio=median / baseline if ours else None, target="<= 1 ms" if judged else "",
            met=median <= 1 if judged else None,
            details={"connections": count, "joins": len(delays),
                     "p90_ms": quantile(delays, 0.9) * 1000,
                     "p99_ms": quantile(delays, 0.99) * 1000})


def _median_ms(delays: list[float], count: int) -> float:
    """The median over all connections; one that closed before its join counts as for ever."""
    return statistics.median(delays + [1e3] * (count - len(delays))) * 1000


def _capture_joins(bed: Bed, ports: list[int]) -> list[float]:
    """Seconds from ESTABLISHED to the join, for each connection that has one."""
    path = bed.lab.folder() / f"joins-{ports[0]}.pcap"
    with Capture(bed.host("client"), "L1", path, expression="tcp", snaplen=128):
        _open(bed, ports)
        pause(0.2)
    return delays_in(path)


def _open(bed: Bed, ports: list[int]) -> None:
    """One connection after the other, each with time for its join."""
    for port in ports:
        with namespaces.inside(bed.host("client").namespace):
            connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM, _IPPROTO_MPTCP)
        with contextlib.closing(connection):
            connection.settimeout(5)
            connection.connect(("10.0.3.2", port))
            connection.sendall(b"x")
            connection.recv(1)
            pause(0.02)


def delays_in(path: Path) -> list[float]:
    """Seconds from ESTABLISHED to the join, by a capture at the client."""
    tokens: dict[Endpoint, bytes] = {}  # by the client's end
    established: dict[bytes, float] = {}
    joins: dict[bytes, float] = {}
    for each in segments(path):
        for subtype, option in _mptcp_options(each.options):
            if subtype == _MP_CAPABLE and each.flags & (_SYN | _ACK) == _SYN | _ACK:
                # RFC 8684, section 3.2: the token is the first 32 bits of the key's hash.
                tokens[each.destination] = hashlib.sha256(option[4:12]).digest()[:4]
            elif not each.flags & _SYN and (
                    subtype == _ADD_ADDR or (subtype == _DSS and option[3] & 1)):
                token = tokens.get(each.destination)
                if token is not None:
                    established.setdefault(token, each.time)
            elif subtype == _MP_JOIN and each.flags & (_SYN | _ACK) == _SYN:
                joins.setdefault(option[4:8], each.time)
    return [joins[token] - when for token, when in established.items() if token in joins]


def _mptcp_options(options: bytes) -> Iterator[tuple[int, bytes]]:
    """The MPTCP options of a segment, with their subtypes."""
    at = 0
    while at + 1 < len(options) and options[at]:
        if options[at] == 1:
            at += 1
            continue
        length = max(2, options[at + 1])
        if options[at] == _OPTION_MPTCP and length >= 4:
            yield options[at + 2] >> 4, options[at:at + length]
        at += length
