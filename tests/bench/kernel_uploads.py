# SPDX-License-Identifier: GPL-2.0-or-later
"""Uploads on a shaped lab: plain TCP on each path, and Multipath TCP by either path manager.

The hosts may be in a VM, and are where the kernel's path manager is measured; the test of it
stands on this, too.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from detour_tools.lab import transfers
from detour_tools.lab.daemons import Daemon
from detour_tools.lab.network import Host
from detour_tools.lab.topology import Topology

PORT = 5201
# The links' rates in the reference network, in relation to each other.
CORE_LIMITED = {"L1": 2, "L2": 1, "L3": 2, "L4": 1, "L5": 1, "L6": 2}
# Python takes seconds to start where the processor is emulated.
_PATIENCE = 60.0
# How a program gets Multipath TCP: with the kernel's path manager it is not even told.
_DAEMON = {"userspace": (), "kernel": ("--upgrade-tcp",)}
_PREFIX = {"userspace": ("detour-client", "run", "--"), "kernel": ()}


@dataclass(frozen=True)
class Upload:
    """An upload's speed, and what the core links carried meanwhile, headers and all."""

    mbps: float
    bytes_by_link: dict[str, int]


class Uploads:
    """A lab, with the programs that uploads need running."""

    def __init__(self, host: Callable[[str], Host], topology: Topology) -> None:
        self._client, self._server, self._r1 = host("client"), host("server"), host("r1")
        self._detours = [host(name) for name in topology.detours()]
        # The second link of each path is the one that limits it, and is no other path's.
        self.links = [topology.path("client", each.address)[1]
                      for each in (self._server, *self._detours)]
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Uploads":
        with contextlib.ExitStack() as stack:
            self._server.run(["ip", "mptcp", "limits", "set", "subflows", 8])
            iperf = stack.enter_context(Daemon(
                self._server, ["mptcpize", "run", "iperf3", "-s", "-J", "-p", PORT]))
            serving = [stack.enter_context(Daemon(
                each, ["detour-server", "--allow-remote", "10.0.0.0/8", "--relay", "tcp"]))
                for each in self._detours]
            for each in serving:
                each.wait_line("serving on", _PATIENCE)
            iperf.wait_listening(PORT, _PATIENCE)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def plain(self) -> Iterator[Upload]:
        """Plain TCP on each path, the direct one first; detours by mappings asked for by hand."""
        yield self._upload(self._server, PORT, ())
        for each in self._detours:
            answer = json.loads(self._client.run([
                "detour-client", "request", each.address, f"{self._server.address}:{PORT}",
                "--json"]).stdout)
            yield self._upload(each, int(answer["detour_port"]), ())

    def multipath(self, manager: str) -> Upload:
        """Multipath TCP by the path manager ``userspace`` or ``kernel``, all detours offered."""
        with Daemon(self._client, [
                "detour-client", "daemon", *(each.address for each in self._detours),
                "--path-manager", manager, "--max-subflows", len(self._detours),
                *_DAEMON[manager]]) as daemon:
            daemon.wait_line(f"ready with the {manager}", _PATIENCE)
            return self._upload(self._server, PORT, _PREFIX[manager])

    def _upload(self, target: Host, port: int, prefix: tuple[str, ...]) -> Upload:
        before = self._sent()
        done = transfers.upload(self._client, str(target.address), port, prefix, lambda: None)
        return Upload(done.mbps, {link: count - before[link]
                                  for link, count in self._sent().items()})

    def _sent(self) -> dict[str, int]:
        """What has gone from the client's router into each path."""
        counts = self._r1.run(["cat", *(f"/sys/class/net/{link}/statistics/tx_bytes"
                                        for link in self.links)]).stdout.split()
        return dict(zip(self.links, map(int, counts), strict=True))
