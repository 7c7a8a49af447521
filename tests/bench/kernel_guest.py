# SPDX-License-Identifier: GPL-2.0-or-later
"""Both path managers against each other, in the VM: ``python -m tests.bench.kernel_guest LOAD``.

LOAD is load.c, compiled. Prints what it does as it goes, and what it found as JSON, last.

In rounds, in which everything takes its turn on one unshaped lab. The daemon is started anew in
each, so it has nothing in memory but what the round itself brings.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detour_tools.lab.captures import Capture
from tests.bench.bed import Bed, Program, busy_seconds, pause
from tests.bench.joins import delays_in

MANAGERS = ("userspace", "kernel")
_SERVER = "10.0.3.2"
_PORT = 20000  # always the same: known to the daemon, and in the kernel
_FRESH = _PORT + 1  # never seen before
_MOST_PORTS = 1200
_HOLD_MS = 1000
_SETTLE = 3.0


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("load", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--joins", type=int, default=40, help="of each kind, a round")
    parser.add_argument("--rate", type=float, default=20, help="connections a second")
    parser.add_argument("--seconds", type=int, default=10, help="of load, a round")
    arguments = parser.parse_args()
    with Bed("g") as bed:
        print(json.dumps(_Measurement(bed, arguments).run()))


class _Measurement:
    def __init__(self, bed: Bed, arguments: argparse.Namespace) -> None:
        self._bed = bed
        self._given = arguments
        self._fresh = _FRESH

    def run(self) -> dict[str, Any]:
        bed, given = self._bed, self._given
        bed.start("server", given.load, "echo", _PORT, _MOST_PORTS).wait_output("serving")
        # Closed connections keep their ports for a minute.
        bed.set_sysctls("client", net__ipv4__ip_local_port_range="1024 65535")
        bed.start_server()
        delays: dict[str, dict[str, list[float]]] = {
            manager: {"present": [], "absent": []} for manager in MANAGERS}
        loads: dict[str, list[dict[str, float]]] = {"none": [], **{each: [] for each in MANAGERS}}
        for number in range(given.rounds):
            # Whoever comes second must not always be the same one.
            for manager in MANAGERS[::1 if number % 2 else -1]:
                with self._daemon(manager) as daemon:
                    for kind, ports in (("present", [_PORT] * given.joins),
                                        ("absent", self._fresh_ports())):
                        found = self._joins(ports)
                        delays[manager][kind] += found
                        _say(f"round {number + 1}, {manager}, {kind}: {len(found)} joins, "
                             f"the middle one {sorted(found)[len(found) // 2] * 1e3:.1f} ms")
                    loads[manager].append(self._load(daemon))
                    _say(f"round {number + 1}, {manager}: {_told(loads[manager][-1])}")
            loads["none"].append(self._load(None))
            _say(f"round {number + 1}, no daemon: {_told(loads['none'][-1])}")
        return {"opened": given.rounds * given.joins, "delays": delays, "loads": loads}

    @contextlib.contextmanager
    def _daemon(self, manager: str) -> Iterator[Program]:
        """The daemon, with its mapping for the usual remote in place."""
        with Program(self._bed.host("client"), [
                "detour-client", "daemon", self._bed.host("detour").address,
                "--path-manager", manager], self._bed.lab.folder() / "client.log") as daemon:
            daemon.wait_control_socket()
            self._open([_PORT] * 3)
            if manager == "kernel" and f"{_SERVER}:{_PORT}" not in self._bed.run(
                    "client", "detour-client", "netlink", "list"):
                raise RuntimeError("the kernel has no entry for the remote")
            yield daemon

    def _fresh_ports(self) -> list[int]:
        first = self._fresh
        self._fresh += self._given.joins
        if self._fresh > _PORT + _MOST_PORTS:
            raise RuntimeError(f"more than {_MOST_PORTS} ports are needed")
        return list(range(first, self._fresh))

    def _open(self, ports: list[int]) -> None:
        """Connections one after the other; each waits for its join."""
        step = ports[1] - ports[0]
        found = json.loads(self._bed.run("client", self._given.load, "joined", _SERVER, ports[0],
                                         len(ports), step, timeout=300))
        if found["joined"] != len(ports):
            raise RuntimeError(f"{len(ports) - found['joined']} of {len(ports)} connections got "
                               "no second subflow")

    def _joins(self, ports: list[int]) -> list[float]:
        """Seconds from ESTABLISHED to the join."""
        path = self._bed.lab.folder() / "joins.pcap"
        with Capture(self._bed.host("client"), "L1", path, expression="tcp", snaplen=128):
            self._open(ports)
        return delays_in(path)

    def _load(self, daemon: Program | None) -> dict[str, float]:
        """Connections at a steady rate: processor seconds of the daemon, and of everything."""
        given = self._given
        pause(_SETTLE)
        busy, start = busy_seconds(), time.monotonic()
        pause(_SETTLE)
        idle = (busy_seconds() - busy) / (time.monotonic() - start)
        used = daemon.cpu_seconds() if daemon else 0.0
        busy, start = busy_seconds(), time.monotonic()
        found = json.loads(self._bed.run("client", given.load, "mptcp", _SERVER, _PORT,
                                         given.rate, given.seconds, _HOLD_MS, timeout=300))
        pause(1.0)  # what is left to do after the last one has closed
        elapsed = time.monotonic() - start
        return {
            "opened": found["opened"], "missed": found["opened"] - found["with_detour"],
            "daemon": (daemon.cpu_seconds() - used) if daemon else 0.0,
            "busy": busy_seconds() - busy - idle * elapsed, "elapsed": elapsed, "idle": idle,
        }


def _told(load: dict[str, float]) -> str:
    return (f"{load['opened']} connections, {load['missed']} without a detour, "
            f"{load['daemon']:.2f} s of the daemon, {load['busy']:.2f} s in all")


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
