# SPDX-License-Identifier: GPL-2.0-or-later
"""What a request comes to; pure: what the host says is asked for before.

Room is never a reason to refuse while there are unproven mappings: those make room, the client's
own first, then those of the prefix that has most of them.
"""

from dataclasses import dataclass
from typing import NamedTuple

from detour_tools.endpoint import Endpoint, IPAddress
from detour_tools.route import NO_ROUTE, Route
from detour_tools.server.policy import Policy, Refusal
from detour_tools.server.table import Decision, Entry, MappingTable, NoFreePortError, Outcome


class Request(NamedTuple):
    """Who asks for what; port 0 proposes none."""

    client: IPAddress
    remote: Endpoint
    proposed: int


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known: the mapping that the client has to the remote (``standing``), else what the
    host says: its route to the remote, and the TCP ports it listens on.
    """

    standing: Entry | None = None
    route: Route = NO_ROUTE
    listening: frozenset[int] = frozenset()


class Decided(NamedTuple):
    """The answer, and the mappings that made room for it; both are done in the table."""

    answer: Decision | Refusal
    gone: tuple[Entry, ...] = ()


def decide(request: Request, facts: Facts, table: MappingTable, policy: Policy,
           now: float) -> Decided:
    """Decide on a request at ``now`` (seconds), and note it in the table and the counters."""
    client, remote, proposed = request
    refusal = policy.check_remote(remote, facts.route)
    if refusal is not None:
        return Decided(refusal)
    if facts.standing is not None:
        table.touch(facts.standing, now)
        return Decided(Decision(Outcome.EXISTING, facts.standing))
    gone: list[Entry] = []
    refusal = _full(client, table, policy)
    if refusal is not None and not _make_room(refusal, client, table, gone):
        return Decided(policy.count(refusal))

    def forbidden(port: int) -> bool:
        return policy.forbids_port(port) or port in facts.listening

    while True:
        try:
            return Decided(table.add(client, remote, proposed, now, forbidden), tuple(gone))
        except NoFreePortError:
            if not _make_room(Refusal.NO_PORT, client, table, gone):
                return Decided(policy.count(Refusal.NO_PORT), tuple(gone))


def _full(client: IPAddress, table: MappingTable, policy: Policy) -> Refusal | None:
    if table.count(client) >= policy.rules.max_per_client:
        return Refusal.CLIENT_FULL
    return Refusal.FULL if len(table) >= policy.rules.max_mappings else None


def _make_room(why: Refusal, client: IPAddress, table: MappingTable, gone: list[Entry]) -> bool:
    unproven = table.unproven
    oldest = unproven.oldest_of_heaviest() if why is Refusal.FULL else unproven.oldest_of(client)
    if oldest is None:
        return False
    table.remove(oldest)
    gone.append(oldest)
    return True
