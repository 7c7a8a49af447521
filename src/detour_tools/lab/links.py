# SPDX-License-Identifier: GPL-2.0-or-later
"""Links of the lab: veth pairs, shaped each way by tc, with random loss, and cut at will.

With netem in the kernel a link has its delay and its loss from netem and its rate from a tbf
below it. Without netem the rate is tbf's, loss is a random drop by nftables, and there is no delay.
"""

import contextlib
import subprocess
from dataclasses import dataclass
from errno import ENOENT
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from detour_tools import sysctl
from detour_tools.errors import UserError
from detour_tools.lab import namespaces
from detour_tools.lab.topology import Link, Topology

_ROOT_HANDLE = 0x10000
_CHILD_HANDLE = 0x100000
_FULL_FRAME = 1514
# Room for a timer that fires late: tokens beyond the burst are lost, and so is the rate.
_BURST_SECONDS = 0.004
_LOSS_TABLE = "detour_lab_loss"
_CUT_TABLE = "detour_lab_cut"
# How long a packet may wait in a full queue. Enough for a single TCP flow to fill its link, and
# for Multipath TCP to fill two.
_QUEUE_SECONDS = 0.1
_NETEM_MIN_PACKETS = 1000  # netem's own default


@dataclass(frozen=True)
class Shaping:
    """What tc shall do at one end of a link, for packets leaving it. Sizes in bytes."""

    delay_us: int = 0
    netem_loss_percent: float = 0.0
    netem_limit_packets: int = _NETEM_MIN_PACKETS
    rate_bytes: int | None = None  # a second
    burst: int = 0
    limit: int = 0

    @property
    def by_netem(self) -> bool:
        """Whether netem has anything to do."""
        return self.delay_us > 0 or self.netem_loss_percent > 0


def shaping(link: Link, with_netem: bool) -> Shaping:
    """What tc shall do at either end of ``link``."""
    rate = burst = limit = None
    if link.rate_mbps is not None:
        rate = int(link.rate_mbps * 1e6 / 8)
        burst = max(2 * _FULL_FRAME, int(rate * _BURST_SECONDS))
        limit = burst + max(10 * _FULL_FRAME, int(rate * _QUEUE_SECONDS))
    # netem only holds what is on its way: the queue is tbf's.
    in_flight = int((rate or 125_000_000) * link.delay_ms / 1000 / 64)
    return Shaping(
        delay_us=round(link.delay_ms * 1000) if with_netem else 0,
        netem_loss_percent=link.loss_percent if with_netem else 0.0,
        netem_limit_packets=max(_NETEM_MIN_PACKETS, in_flight),
        rate_bytes=rate, burst=burst or 0, limit=limit or 0)


def kernel_has_netem(namespace: str) -> bool:
    """Try netem on the namespace's loopback interface."""
    with namespaces.inside(namespace), IPRoute() as route:
        try:
            route.tc("add", "netem", index=1, handle=_ROOT_HANDLE, delay=1, limit=1)
        except NetlinkError as error:
            if error.code == ENOENT:
                return False
            raise
        route.tc("del", index=1, root=True)
        return True


def connect(topology: Topology, namespace_of: dict[str, str], *, with_netem: bool) -> None:
    """Make all interfaces with their addresses, shaping, loss and routes. Raises OSError."""
    # What is shaped or dropped must be packets, not bundles of them: no segmentation offload.
    bundles = all(link.rate_mbps is None and not link.loss_percent for link in topology.links)
    for link in topology.links:
        _make_pair(link, namespace_of, bundles=bundles)
    for host in topology.hosts:
        with namespaces.inside(namespace_of[host.name]), IPRoute() as route:
            route.link("set", index=1, state="up")
            for link in topology.links_of(host.name):
                index = route.link_lookup(ifname=link.name)[0]
                interface = link.end_of(host.name).interface
                route.addr("add", index=index, address=str(interface.ip),
                           prefixlen=interface.network.prefixlen)
                route.link("set", index=index, state="up")
                _shape(route, index, shaping(link, with_netem))
            for each in topology.routes_of(host.name):
                route.route("add", dst=str(each.destination), gateway=str(each.gateway),
                            **_congestion_control())
    if not with_netem:
        for link in topology.links:
            if link.loss_percent:
                _lose(topology, link, namespace_of)


def _make_pair(link: Link, namespace_of: dict[str, str], *, bundles: bool) -> None:
    """Make the veth pair right where it belongs, so that the machine itself never sees it."""
    options = {"ifname": link.name} if bundles else {"ifname": link.name, "gso_max_segs": 1}
    far = (namespaces.RUN / namespace_of[link.b.host]).open("rb")
    with far, namespaces.inside(namespace_of[link.a.host]), IPRoute() as route:
        route.link("add", kind="veth", peer={**options, "net_ns_fd": far.fileno()}, **options)


def _shape(route: IPRoute, index: int, wanted: Shaping) -> None:
    tbf_place = {"handle": _ROOT_HANDLE}
    if wanted.by_netem:
        route.tc("add", "netem", index=index, handle=_ROOT_HANDLE, delay=wanted.delay_us,
                 loss=wanted.netem_loss_percent, limit=wanted.netem_limit_packets)
        tbf_place = {"parent": _ROOT_HANDLE + 1, "handle": _CHILD_HANDLE}
    if wanted.rate_bytes is None:
        return
    try:
        route.tc("add", "tbf", index=index, rate=wanted.rate_bytes, burst=wanted.burst,
                 limit=wanted.limit, **tbf_place)
    except NetlinkError as error:
        if error.code == ENOENT:
            raise UserError("this kernel cannot limit rates", "it lacks sch_tbf") from None
        raise


def _congestion_control() -> dict[str, Any]:
    """CUBIC as in the reference, whatever this machine's default.

    A namespace's own sysctl takes only what the machine allows everybody; a route takes any.
    """
    available = sysctl.read("net.ipv4.tcp_available_congestion_control") or ""
    if "cubic" not in available.split():
        return {}
    return {"metrics": {"cc_algo": "cubic"}}


def _keeper(topology: Topology, link: Link) -> str:
    """The host that drops a link's packets: a router, for its sender is told nothing."""
    return next((end.host for end in link.ends if topology.host(end.host).forwards), link.a.host)


def _lose(topology: Topology, link: Link, namespace_of: dict[str, str]) -> None:
    per_million = round(link.loss_percent * 10_000)
    _drop_both_ways(namespace_of[_keeper(topology, link)], f"{_LOSS_TABLE}_{link.name}", link.name,
                    f"numgen random mod 1000000 < {per_million} counter drop")


def cut(topology: Topology, link: Link, namespace_of: dict[str, str]) -> None:
    """Let the link lose every packet, silently: no interface goes down, nobody is told."""
    _drop_both_ways(namespace_of[_keeper(topology, link)], f"{_CUT_TABLE}_{link.name}", link.name,
                    "counter drop")


def mend(topology: Topology, link: Link, namespace_of: dict[str, str]) -> None:
    """Undo cut(); nothing happens when the link was not cut."""
    table = f"{_CUT_TABLE}_{link.name}"
    _nft(namespace_of[_keeper(topology, link)],
         f"add table netdev {table}\ndelete table netdev {table}\n")


def cut_links(topology: Topology, namespace_of: dict[str, str]) -> frozenset[str]:
    """The names of the links that are cut."""
    tables: set[str] = set()
    for host in {_keeper(topology, link) for link in topology.links}:
        # A kernel without nftables cannot have cut any, and needs none to be looked at.
        with contextlib.suppress(UserError):
            tables |= set(_nft(namespace_of[host], "list tables\n").splitlines())
    return frozenset(link.name for link in topology.links
                     if f"table netdev {_CUT_TABLE}_{link.name}" in tables)


def _drop_both_ways(namespace: str, table: str, device: str, rule: str) -> None:
    chains = "".join(
        f'  chain {hook} {{ type filter hook {hook} device "{device}" priority 0; {rule}; }}\n'
        for hook in ("ingress", "egress"))
    _nft(namespace, f"add table netdev {table}\ndelete table netdev {table}\n"
                    f"table netdev {table} {{\n{chains}}}\n")


def _nft(namespace: str, commands: str) -> str:
    with namespaces.inside(namespace):
        try:
            done = subprocess.run(["nft", "-f", "-"], input=commands, capture_output=True,
                                  text=True, check=False)
        except FileNotFoundError:
            raise UserError("the command 'nft' is missing; the lab needs it for loss and for "
                            "cutting links", "install the package nftables") from None
    if done.returncode:
        why = done.stderr.strip().splitlines()
        raise UserError(f"nft failed in {namespace}: {why[0] if why else 'no reason given'}")
    return done.stdout
