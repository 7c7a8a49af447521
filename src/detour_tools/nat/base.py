# SPDX-License-Identifier: GPL-2.0-or-later
"""What a NAT back end does. All of it blocks: call it from one worker thread."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from detour_tools.endpoint import Network
from detour_tools.mapping import Mapping

# Our table of nftables, of family ip.
TABLE = "detour-tools"

# Our chains of legacy iptables: two of the table nat, one of the table filter.
PREROUTING = "DETOUR-PREROUTING"
POSTROUTING = "DETOUR-POSTROUTING"
FORWARD = "DETOUR-FORWARD"

# Flows of mappings bear this conntrack label when they come to the forward chains, by which a
# host's own firewall can tell them from what it has translated itself.
LABEL = 97


_LEAST_STRANGERS = 1000
_TRACKED = Path("/proc/sys/net/netfilter/nf_conntrack_max")

Relay = Literal["joins", "tcp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What of the flows to mapped ports the rules let through.

    ``relay``: "joins" is subflows that join an MPTCP connection (RFC 8684, section 3.2) and no
    others, "tcp" is any TCP.

    ``flows_per_client`` and ``flows`` (of all clients) may be open at a time; what comes beyond is
    refused. 0: no limit. ``flows`` None: three quarters of what the kernel tracks at most, so that
    the host's own connections find room.

    ``router``: whether the host forwards other IPv4 packets than those of mapped flows, too.

    ``requests``: the UDP port that clients ask at, of which the kernel soon forgets who asked, so
    that a flood fills no connection tracking; 0: none.

    ``requests_per_client``: so many requests a second the kernel lets in of one address, and but a
    few of others than ``clients``; 0: all. Of addresses whose joins no remote has answered yet it
    lets ``requests_of_strangers`` in, together, and ``requests_of_stranger`` of one.
    """

    relay: Relay = "joins"
    flows_per_client: int = 2000
    flows: int | None = None
    router: bool = True
    requests: int = 0
    requests_per_client: int = 0
    clients: tuple[Network, ...] = ()

    @property
    def all_flows(self) -> int:
        """``flows``, or what it means now."""
        return tracked() * 3 // 4 if self.flows is None else self.flows

    @property
    def requests_of_strangers(self) -> int:
        """So many a second that a server serves them from a part of one processor.

        In two seconds they fill an eighth of what the kernel tracks, at most.
        """
        return max(_LEAST_STRANGERS, min(2 * self.requests_per_client,
                                         tracked() // 16 or 2 * self.requests_per_client))

    @property
    def requests_of_stranger(self) -> int:
        """A fifth of that, so that few of them do not use it up; but more than a client may ask."""
        return max(self.requests_of_strangers // 5, self.requests_per_client // 10)


def tracked() -> int:
    """How many flows the kernel tracks at most; 0: none yet."""
    try:
        return int(_TRACKED.read_text(encoding="ascii"))
    except FileNotFoundError:
        return 0


class NatError(Exception):
    """The kernel did not take a change; nothing of it was done."""


class NatBackend(Protocol):
    """Keeps the kernel's rules for mappings: DNAT of their flows, and SNAT of just those."""

    @property
    def name(self) -> str:
        """What the back end is called in options and messages."""

    @property
    def quick_changes(self) -> int:
        """So many changes ``commit`` makes in a millisecond, and in any thread.

        If there are some, ``intact`` takes microseconds, in any thread as well.
        """

    def open(self) -> None:
        """Get ready for use; raises UserError where this back end cannot be used."""

    def leftovers(self) -> list[bytes] | None:
        """The mappings our rules in the kernel hold now; None when no rules of ours are there.

        By their keys (``mapping.flow_key``): there may be very many. Changes nothing, loads
        nothing, and may be asked before ``open``. Raises NatError.
        """

    def adopt(self, capacity: int, terms: Terms) -> bool:
        """Take over our rules as they stand, with what ``leftovers`` found last.

        Only if they are, as far as a quick look tells, what ``install`` would make of these; then
        ``whole`` tells the rest, before anything is changed. Raises NatError.
        """

    def whole(self) -> bool:
        """Whether what was adopted is all that ``install`` would have made. Raises NatError."""

    def install(self, mappings: Collection[Mapping], capacity: int, terms: Terms) -> None:
        """Make our rules anew, holding exactly these mappings on these terms, in one step.

        There must be room for ``capacity`` mappings. Raises NatError.
        """

    def commit(self, add: Sequence[Mapping], remove: Sequence[Mapping]) -> None:
        """Remove, then add mappings, all in one step. Raises NatError."""

    def admit(self, clients: Sequence[Network]) -> None:
        """Go by other ``clients`` from now on. Raises NatError."""

    def intact(self) -> bool:
        """Whether our rules still stand; cheap, and blind to changes within them."""

    def refused_flows(self) -> int:
        """How many flows the rules have refused for their number, since the first install.

        Raises NatError.
        """

    def dropped_requests(self) -> int:
        """How many datagrams to the port of requests the rules have dropped, since the start."""

    def uninstall(self) -> None:
        """Remove all that is ours; fine when there is nothing. Raises NatError."""
