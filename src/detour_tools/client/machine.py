# SPDX-License-Identifier: GPL-2.0-or-later
"""The client's decisions: events in, commands out. Pure: no socket, and time is an argument.

Every method takes the time (seconds, monotonic) and returns the commands to perform, in order.
``deadline()`` says when ``tick()`` wants to be called next.

A path manager that joins by itself is told which detour ports lead where instead of single joins:
what the machine would join, it offers. The rest is the same for both kinds.
"""

import bisect
import errno
import heapq
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from random import Random

from detour_tools import mproxy
from detour_tools.client.detours import Detour, DetourState, Exchange
from detour_tools.client.offers import Offering, Offers
from detour_tools.client.settings import ClientSettings
from detour_tools.endpoint import Endpoint, IPAddress
from detour_tools.pathmanager.base import (
    ConnectionCreated,
    ConnectionEstablished,
    CreateSubflow,
    Offer,
    Offered,
    PathCommand,
    SubflowClosed,
    SubflowEstablished,
    Withdraw,
)

JOIN_PATIENCE = 10.0
"""Seconds until a join without an outcome no longer keeps another detour from being tried.

One that the path manager should have made by itself was never sent, then: it gives up a SYN sooner,
and says nothing where there was no route, no memory or no room."""

SHORT_LIVED = 2.0
"""A subflow that dies within this many seconds was refused by the server after the fact: the
server's limit is checked on the last packet of the handshake, when we already count it as made."""

LIMIT_MEMORY = 60.0
"""Seconds until a server that refused a join is tried again; doubles with each refusal."""

REPLACE_DELAY = 3.0
"""Seconds until a path that died is joined again; doubles with each failure in a row."""

CONFIRM_SPACING = 0.02
"""Seconds between the questions about what a daemon finds offered: detours limit their rate."""

LONGEST_DELAY = 3600.0

# RFC 8684, section 3.6: the peer has no resources, or forbids it.
_SERVER_REFUSALS = (2, 3)

_TO_A_DETOUR = "it goes to a detour itself"

Direct = None
"""The key of the path without a detour."""


@dataclass(frozen=True, slots=True)
class SendDatagram:
    """Send ``payload`` to the detour."""

    detour: Endpoint
    payload: bytes


@dataclass(frozen=True, slots=True)
class Note:
    """Tell whoever follows the log."""

    text: str


Command = SendDatagram | PathCommand | Note


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A connection as found in the kernel: for restarts, and after lost events."""

    token: int
    local: Endpoint
    remote: Endpoint
    passive: bool
    on_link: bool
    established: bool
    subflow_remotes: frozenset[Endpoint]


@dataclass(slots=True)
class Path:
    """One way of a connection: direct, or through one detour."""

    state: str = "idle"  # idle, joining, up
    remote: Endpoint | None = None  # where its packets go
    since: float = 0.0
    retry_at: float = 0.0
    failures: int = 0  # in a row
    asked_again: bool = False
    tried: Offering | None = None  # what the path manager joined by, if it does so by itself


@dataclass(slots=True)
class Connection:
    """A connection that we look after."""

    token: int
    local: Endpoint
    remote: Endpoint
    established: bool = False
    reason_for_none: str = ""  # why it gets no detour, empty when it does
    server_limit: int | None = None  # detour subflows that the server took when it refused one
    limit_until: float = 0.0
    refusals: int = 0
    paths: dict[Detour | None, Path] = field(default_factory=dict)


@dataclass(slots=True)
class Counters:
    """What the machine has seen, since it started."""

    detours_wanted: int = 0
    requests: int = 0
    retransmissions: int = 0
    answers: int = 0
    answers_late: int = 0
    answers_unmatched: int = 0
    datagrams_malformed: int = 0
    joins: int = 0
    joins_established: int = 0
    joins_refused: int = 0
    subflows_lost: int = 0
    resynchronisations: int = 0


class Machine:
    """Asks detours for mappings and decides which subflows to open."""

    def __init__(self, detours: Iterable[Endpoint], settings: ClientSettings,
                 random: Random, *, joins_by_itself: bool = False) -> None:
        """``joins_by_itself``: the path manager does, and wants offers."""
        self.settings = settings
        self.counters = Counters()
        self.detours: list[Detour] = []
        self.connections: dict[int, Connection] = {}
        self._random = random
        self._by_endpoint: dict[Endpoint, Detour] = {}
        self._by_address: dict[IPAddress, Detour] = {}
        self._by_remote: dict[Endpoint, set[int]] = {}
        self._joins_by_itself = joins_by_itself
        self._offers = Offers()
        # (when, tie-break, what); what no longer holds is noticed when its time comes.
        self._timers: list[tuple[float, int, Exchange | Detour | Offering | int]] = []
        self._tie_break = itertools.count()
        for order, endpoint in enumerate(detours):
            self.add(endpoint, order)

    def add(self, endpoint: Endpoint, order: int) -> None:
        """Have a further detour, whose address no other has; resynchronise() makes use of it.

        That also finds what an earlier daemon did with it.
        """
        detour = Detour(endpoint, order)
        bisect.insort(self.detours, detour, key=lambda each: each.order)
        self._by_endpoint[endpoint] = detour
        self._by_address[endpoint.address] = detour
        for connection in self.connections.values():
            if connection.remote.address == endpoint.address:
                connection.reason_for_none = connection.reason_for_none or _TO_A_DETOUR

    # -- events of the path manager ------------------------------------------------------------

    def created(self, event: ConnectionCreated, on_link: bool, now: float) -> list[Command]:
        """A connection's handshake is under way: ask for mappings while it completes."""
        return list(self._evaluate(self._connection(event, on_link, now), now))

    def established(self, event: ConnectionEstablished, now: float) -> list[Command]:
        """A connection takes further subflows from now on."""
        if not self.knows(event):
            # Closed at once: the kernel may say so before the handshake's last part has come.
            return []
        connection = self.connections[event.token]
        connection.established = True
        return list(self._evaluate(connection, now))

    def knows(self, event: ConnectionCreated | ConnectionEstablished) -> bool:
        """Whether the connection was reported before."""
        known = self.connections.get(event.token)
        return known is not None and (known.local, known.remote) == (event.local, event.remote)

    def knows_remote(self, remote: Endpoint) -> bool:
        """Whether a connection to ``remote`` was reported before."""
        return remote in self._by_remote

    def wanted(self, remote: Endpoint, on_link: bool, now: float) -> list[Command]:
        """The path manager would join a connection to ``remote``.

        That is news only when the events of the connection itself were missed.
        """
        self.counters.detours_wanted += 1
        if remote in self._by_remote or self._reason_for_none(remote, False, False, on_link):
            return []
        commands: list[Command] = []
        usable = [detour for detour in self._ranked({}) if self._reaches(detour, remote)]
        for detour in usable[:self.settings.max_subflows]:
            port = detour.mapping(remote)
            if port is not None:
                commands += self._offer(remote, Endpoint(detour.endpoint.address, port), now)
            elif (question := self._ask(detour, remote, now)) is not None:
                commands.append(question)
        return commands

    def closed(self, token: int) -> list[Command]:
        """A connection is gone."""
        self._forget(token)
        return []

    def subflow_established(self, event: SubflowEstablished, now: float) -> list[Command]:
        """A join succeeded."""
        connection = self.connections.get(event.token)
        if connection is None:
            return []
        key, path = self._find_path(connection, event.remote, event.local)
        if path is None:
            return []
        if path.state != "up":
            if path.state == "idle":
                self._count_join(key)
            path.state, path.remote, path.since = "up", event.remote, now
            path.tried = self._offers.get(connection.remote, event.remote.address)
            self.counters.joins_established += 1
            if key is not Direct:
                key.joins_established += 1
        return []

    def subflow_closed(self, event: SubflowClosed, now: float) -> list[Command]:
        """A subflow ended, or a join failed."""
        connection = self.connections.get(event.token)
        if connection is None:
            return []
        key, path = self._find_path(connection, event.remote, event.local)
        if path is None:
            return []
        if path.state == "idle":
            path.tried = self._offers.get(connection.remote, event.remote.address)
            if path.tried is None:
                return []
            path.since = now  # a join of the path manager's own that we did not count on
            self._count_join(key)
        was_up, age = path.state == "up", now - path.since
        path.state = "idle"
        if was_up and age >= SHORT_LIVED:
            self._path_lost(connection, path, age, now)
        else:
            refused_by_server = was_up or event.reset_reason in _SERVER_REFUSALS
            commands = list(self._join_refused(connection, key, path, refused_by_server, now))
            if refused_by_server:
                commands.append(
                    Note(f"connection {event.token:08x}: the server takes no more subflows"))
            return [*commands, *self._evaluate(connection, now)]
        return list(self._evaluate(connection, now))

    def failed(self, command: PathCommand, code: int, now: float) -> list[Command]:
        """The kernel did not do what it was told (``code`` is an errno)."""
        if isinstance(command, CreateSubflow):
            return self.join_failed(command, code, now)
        if isinstance(command, Offer):
            return self.offer_failed(command, now)
        return []

    def join_failed(self, command: CreateSubflow, code: int, now: float) -> list[Command]:
        """The kernel did not send a join (``code`` is an errno)."""
        connection = self.connections.get(command.token)
        if connection is None:
            return []
        key, path = self._find_path(connection, command.remote)
        if path is None or path.state != "joining":
            return []
        path.state = "idle"
        if code in (errno.ENOTCONN, errno.ESRCH, errno.EINVAL):
            # Not there any more, or fallen back to TCP: its end is on the way, if it is to come.
            path.failures += 3
        else:
            path.failures += 1
            self.counters.joins_refused += 1
            if key is not Direct:
                key.joins_refused += 1
        self._retry_later(connection, path, now)
        return list(self._evaluate(connection, now))

    def offer_failed(self, command: Offer, now: float) -> list[Command]:
        """The path manager did not take an offer."""
        offering = self._offers.get(command.remote, command.detour.address)
        if offering is None:
            return []
        self._offers.remove(offering)
        for token in self._by_remote.get(command.remote, ()):
            for path in self.connections[token].paths.values():
                if path.state == "joining" and path.tried is offering:
                    path.state, path.failures = "idle", path.failures + 1
                    self._retry_later(self.connections[token], path, now)
        return []

    def stop(self) -> list[Command]:
        """The end: what was offered is withdrawn, subflows that were made live on."""
        return [command for offering in self._offers for command in self._withdraw(offering)]

    def resynchronise(self, found: Iterable[Snapshot], now: float,
                      offered: Iterable[Offered] = ()) -> list[Command]:
        """Take over connections and offers as they stand in the kernel; all others are gone."""
        self.counters.resynchronisations += 1
        present = {snapshot.token: snapshot for snapshot in found}
        for token in [token for token in self.connections if token not in present]:
            self._forget(token)
        commands: list[Command] = list(self._adopt_offers(offered, now))
        for snapshot in present.values():
            # What the peer said of the C flag is not kept by the kernel; no flag is assumed.
            connection = self._connection(
                ConnectionCreated(snapshot.token, snapshot.local, snapshot.remote,
                                  snapshot.passive), snapshot.on_link, now)
            connection.established |= snapshot.established
            self._adopt_subflows(connection, snapshot.subflow_remotes, now)
            self._suppose_tried(connection)
        for token in present:
            commands += self._evaluate(self.connections[token], now)
        return commands

    # -- datagrams and time --------------------------------------------------------------------

    def datagram(self, source: Endpoint, payload: bytes, now: float) -> list[Command]:
        """A datagram arrived: only what answers one of our questions counts."""
        detour = self._by_endpoint.get(source)
        try:
            message = mproxy.decode(payload)
        except mproxy.MalformedMessageError:
            self.counters.datagrams_malformed += 1
            return []
        if (detour is None or not isinstance(message, mproxy.v1.Response)
                or not message.detour_port):
            self.counters.answers_unmatched += 1
            return []
        exchange = detour.exchanges.get(message.remote)
        if exchange is None:
            # A second answer to a question that was sent twice is late, anything else is forged.
            known = detour.mapping(message.remote) == message.detour_port
            self.counters.answers_late += known
            self.counters.answers_unmatched += not known
            return []
        self.counters.answers += 1
        was_down = detour.state == DetourState.DOWN
        commands: list[Command] = []
        if detour.mapping(message.remote) != message.detour_port:
            commands.append(Note(f"detour {detour.endpoint}: port {message.detour_port} leads to "
                                 f"{message.remote}"))
        detour.answered(exchange, message.detour_port, now)
        if self._joins_by_itself:
            commands += self._offer(message.remote, Endpoint(source.address, message.detour_port),
                                    now, confirmed=True)
        if was_down:
            commands.append(Note(f"detour {detour.endpoint} answers again"))
        tokens = set(self.connections) if was_down else self._by_remote.get(message.remote, ())
        for token in tokens:
            commands += self._evaluate(self.connections[token], now)
        return commands

    def deadline(self) -> float | None:
        """When tick() is next due, None when nothing is pending."""
        return self._timers[0][0] if self._timers else None

    def tick(self, now: float) -> list[Command]:
        """Do what is due."""
        commands: list[Command] = []
        while self._timers and self._timers[0][0] <= now:
            what = heapq.heappop(self._timers)[2]
            if isinstance(what, Exchange):
                commands += self._exchange_due(what, now)
            elif isinstance(what, Detour):
                commands += self._probe_due(what, now)
            elif isinstance(what, Offering):
                commands += self._offering_due(what, now)
            elif what in self.connections:
                commands += self._evaluate(self.connections[what], now)
        return commands

    def _connection(self, event: ConnectionCreated, on_link: bool, now: float) -> Connection:
        """The connection of that token: the one known, or a new one where that was another."""
        if self.knows(event):
            return self.connections[event.token]
        self._forget(event.token)
        connection = Connection(event.token, event.local, event.remote)
        connection.reason_for_none = self._reason_for_none(
            event.remote, event.server_side, event.deny_join, on_link)
        connection.paths[Direct] = Path("up", event.remote, now)
        self.connections[event.token] = connection
        self._by_remote.setdefault(event.remote, set()).add(event.token)
        if not connection.reason_for_none:
            self._hasten_probes(now)
        return connection

    # -- which subflows a connection should have -----------------------------------------------

    def _evaluate(self, connection: Connection, now: float) -> Iterator[Command]:
        """Bring a connection nearer to the subflows it should have."""
        if connection.reason_for_none:
            return
        if self._joins_by_itself:
            yield from self._give_up_unsent(connection, now)
        direct = connection.paths[Direct]
        if (direct.state == "idle" and connection.established and now >= direct.retry_at
                and not self._joins_by_itself):  # which knows detours only
            yield from self._join(connection, Direct, connection.remote, now)
        wanted = self.settings.max_subflows
        if connection.server_limit is not None:
            if now >= connection.limit_until:
                connection.server_limit = None
            else:
                wanted = min(wanted, connection.server_limit)
        wanted -= sum(self._counts(path, now) for key, path in connection.paths.items()
                      if key is not Direct)
        for detour in self._ranked(connection.paths):
            if wanted <= 0:
                return
            path = connection.paths.get(detour)
            if path is not None and (path.state != "idle" or now < path.retry_at):
                continue
            if not self._reaches(detour, connection.remote):
                continue
            port = detour.mapping(connection.remote)
            if port is None:
                question = self._ask(detour, connection.remote, now)
                if question is not None:
                    yield question
                exchange = detour.exchanges.get(connection.remote)
                # One that was asked twice in vain keeps no other detour waiting.
                wanted -= exchange is not None and exchange.attempts == 1
            else:
                here = Endpoint(detour.endpoint.address, port)
                if connection.established:
                    yield from self._join(connection, detour, here, now)
                elif self._joins_by_itself:
                    yield from self._offer(connection.remote, here, now)
                wanted -= 1

    @staticmethod
    def _reaches(detour: Detour, remote: Endpoint) -> bool:
        return (detour.state != DetourState.DOWN
                and detour.endpoint.address.version == remote.address.version)

    def _join(self, connection: Connection, key: Detour | None, remote: Endpoint,
              now: float) -> Iterator[Command]:
        path = connection.paths.setdefault(key, Path())
        path.state, path.remote, path.since = "joining", remote, now
        self._set_timer(now + JOIN_PATIENCE, connection.token)
        self._count_join(key)
        if not self._joins_by_itself:
            yield CreateSubflow(connection.token, connection.local.address, remote,
                                None if key is Direct else key.endpoint)
            return
        if path.tried is not None and self._offers.stands(path.tried):
            # Each connection tries an offer once; and a new one, even if it is the same, once more.
            yield from self._withdraw(path.tried)
        yield from self._offer(connection.remote, remote, now)
        path.tried = self._offers.get(connection.remote, remote.address)

    def _give_up_unsent(self, connection: Connection, now: float) -> Iterator[Command]:
        for key, path in connection.paths.items():
            if key is Direct or path.state != "joining" or now - path.since < JOIN_PATIENCE:
                continue
            path.state, path.failures = "idle", path.failures + 1
            self._retry_later(connection, path, now)
            if path.tried is None or self._offers.stands(path.tried):
                yield from self._drop_mapping(key, connection.remote)  # does it still answer?

    def _count_join(self, key: Detour | None) -> None:
        self.counters.joins += 1
        if key is not Direct:
            key.joins += 1

    def _counts(self, path: Path, now: float) -> bool:
        return path.state == "up" or (
            path.state == "joining" and now - path.since < JOIN_PATIENCE)

    def _join_refused(self, connection: Connection, key: Detour | None, path: Path,
                      by_server: bool, now: float) -> Iterator[Command]:
        self.counters.joins_refused += 1
        path.failures += 1
        if key is not Direct:
            key.joins_refused += 1
            if not by_server and not path.asked_again:
                # The detour may have dropped the mapping that we remembered: ask again, once.
                path.asked_again = True
                path.retry_at = now
                if path.tried is None or self._offers.stands(path.tried):
                    yield from self._drop_mapping(key, connection.remote)
                return
        if by_server:
            connection.refusals += 1
            connection.server_limit = sum(
                other.state == "up" for other_key, other in connection.paths.items()
                if other_key is not Direct)
            connection.limit_until = path.retry_at = now + _doubled(
                LIMIT_MEMORY, connection.refusals)
            self._set_timer(path.retry_at, connection.token)
        else:
            self._retry_later(connection, path, now)

    def _path_lost(self, connection: Connection, path: Path, age: float, now: float) -> None:
        self.counters.subflows_lost += 1
        connection.server_limit = None  # there is room again
        path.asked_again = False
        path.failures = 1 if age > LIMIT_MEMORY else path.failures + 1
        self._retry_later(connection, path, now)

    def _retry_later(self, connection: Connection, path: Path, now: float) -> None:
        path.retry_at = now + _doubled(REPLACE_DELAY, path.failures)
        self._set_timer(path.retry_at, connection.token)

    def _adopt_subflows(self, connection: Connection, remotes: frozenset[Endpoint],
                        now: float) -> None:
        for remote in remotes:
            key, path = self._find_path(connection, remote)
            if path is None:
                continue
            if path.state != "up":  # made unheard, so its age is not known; not just now
                path.state, path.remote, path.since = "up", remote, now - SHORT_LIVED
            if key is not Direct and key.mapping(connection.remote) is None:
                key.remember(connection.remote, remote.port)
        for path in connection.paths.values():
            if path.state != "idle" and path.remote not in remotes:
                path.state = "idle"
                self._path_lost(connection, path, now - path.since, now)

    def _find_path(self, connection: Connection, remote: Endpoint, local: Endpoint | None = None
                   ) -> tuple[Detour | None, Path | None]:
        """The path whose packets go to ``remote``; a subflow that others made counts too."""
        if remote == connection.remote:
            if local is not None and local.address != connection.local.address:
                return None, None  # by another interface, which is not ours
            return Direct, connection.paths[Direct]
        detour = self._by_address.get(remote.address)
        if detour is None:
            return None, None
        return detour, connection.paths.setdefault(detour, Path())

    # -- offers, to a path manager that joins by itself ----------------------------------------

    @property
    def _offer_seconds(self) -> int:
        """How long an offer stands unless the detour confirms it: it may miss it twice."""
        return math.ceil(3 * self._confirm_seconds) + 10

    @property
    def _confirm_seconds(self) -> float:
        """How often a detour is asked again for what stands offered and is in use."""
        return 2 * self.settings.probe_interval

    def _offer(self, remote: Endpoint, detour: Endpoint, now: float, *,
               confirmed: bool = False) -> Iterator[Command]:
        """See to it that an offer stands, and for longer when the detour confirmed it."""
        offering = self._offers.get(remote, detour.address)
        if offering is not None and offering.detour != detour:
            yield from self._withdraw(offering)
            offering = None
        if offering is not None and not confirmed and now < offering.until:
            return
        if offering is None:
            offering = Offering(remote, detour, 0.0)
            surplus = self._offers.add(offering)
            if surplus is not None:
                yield Withdraw(surplus.remote, surplus.detour)
            self._set_timer(now + self._confirm_seconds, offering)
        offering.until = now + self._offer_seconds
        yield Offer(remote, detour, self._offer_seconds)

    def _withdraw(self, offering: Offering) -> Iterator[Command]:
        if self._offers.remove(offering):
            yield Withdraw(offering.remote, offering.detour)

    def _withdraw_all(self, detour: Detour) -> Iterator[Command]:
        """Withdraw what a detour that fell silent was offered for."""
        for offering in self._offers:
            if offering.detour.address != detour.endpoint.address:
                continue
            yield from self._withdraw(offering)
            self._forget_joins(detour, offering.remote)

    def _forget_joins(self, detour: Detour, remote: Endpoint) -> None:
        """Joins under way may not have been tried: they are wanted again with a new mapping."""
        for token in self._by_remote.get(remote, ()):
            path = self.connections[token].paths.get(detour)
            if path is not None and path.state == "joining":
                path.state = "idle"

    def _drop_mapping(self, detour: Detour, remote: Endpoint) -> Iterator[Command]:
        detour.forget(remote)
        offering = self._offers.get(remote, detour.endpoint.address)
        if offering is not None:
            yield from self._withdraw(offering)

    def _offering_due(self, offering: Offering, now: float) -> Iterator[Command]:
        """Have an offer confirmed by its detour while somebody uses it; else let it lapse."""
        if not self._offers.stands(offering):
            return
        if now >= offering.until:
            self._offers.remove(offering)
            return
        detour = self._by_address.get(offering.detour.address)
        if detour is not None and any(
                not self.connections[token].reason_for_none
                for token in self._by_remote.get(offering.remote, ())):
            question = self._ask(detour, offering.remote, now)
            if question is not None:
                yield question
        self._set_timer(min(now + self._confirm_seconds, offering.until), offering)

    def _adopt_offers(self, offered: Iterable[Offered], now: float) -> Iterator[Command]:
        """Take over what stands offered for our detours; what others offer is left alone."""
        standing = {(each.remote, each.detour): each for each in offered}
        for offering in self._offers:
            if (offering.remote, offering.detour) not in standing:
                self._offers.remove(offering)
        due = now
        for remote, endpoint, lifetime in standing.values():
            detour = self._by_address.get(endpoint.address)
            ours = self._offers.get(remote, endpoint.address)
            if detour is None or (ours is not None and ours.detour == endpoint):
                continue
            if (ours is not None or not self._reaches(detour, remote)
                    or detour.mapping(remote) not in (None, endpoint.port)
                    or self._reason_for_none(remote, False, False, False)):
                yield Withdraw(remote, endpoint)
                continue
            detour.remember(remote, endpoint.port)
            offering = Offering(remote, endpoint, now + (
                self._offer_seconds if lifetime is None else lifetime))
            surplus = self._offers.add(offering)
            if surplus is not None:
                yield Withdraw(surplus.remote, surplus.detour)
            if lifetime is None:
                yield Offer(remote, endpoint, self._offer_seconds)
            self._set_timer(due, offering)  # is it still right?
            due += CONFIRM_SPACING

    def _suppose_tried(self, connection: Connection) -> None:
        """A connection found without a subflow that stands offered has tried it, and lost it."""
        for detour in self.detours if connection.established else ():
            offering = self._offers.get(connection.remote, detour.endpoint.address)
            if offering is not None:
                connection.paths.setdefault(detour, Path()).tried = offering

    def _reason_for_none(self, remote: Endpoint, server_side: bool, deny_join: bool,
                         on_link: bool) -> str:
        address = remote.address
        within = [network for network in self.settings.exclude if address in network]
        if server_side:
            return "it came in from outside"
        if deny_join:
            return "the server wants no further subflows (C flag)"
        if address.is_loopback:
            return "it stays on this host"
        if address in self._by_address:
            return _TO_A_DETOUR
        if within:
            return f"{within[0]} is excluded"
        if on_link and not any(address in network for network in self.settings.include):
            return "the remote is on link (see --include)"
        return ""

    def _forget(self, token: int) -> None:
        connection = self.connections.pop(token, None)
        if connection is not None:
            tokens = self._by_remote[connection.remote]
            tokens.discard(token)
            if not tokens:
                del self._by_remote[connection.remote]

    # -- asking detours ------------------------------------------------------------------------

    def _ranked(self, paths: Mapping[Detour | None, Path]) -> list[Detour]:
        """The detours, best first: those that failed this connection come last."""
        if len(self.detours) < 2:
            return self.detours
        by_rtt = self.settings.prefer == "rtt"

        def rank(detour: Detour) -> tuple[int, float, int]:
            path = paths.get(detour)
            # One that never answered comes first, so that its round-trip time becomes known.
            return (path.failures if path else 0,
                    (detour.rtt or 0.0) if by_rtt else 0.0, detour.order)

        return sorted(self.detours, key=rank)

    def _ask(self, detour: Detour, remote: Endpoint, now: float) -> SendDatagram | None:
        """Ask for a mapping, unless that is already under way or was lately refused."""
        exchange = detour.begin(remote, now)
        return None if exchange is None else self._send(exchange, now)

    def _send(self, exchange: Exchange, now: float) -> SendDatagram:
        self.counters.requests += 1
        self.counters.retransmissions += exchange.attempts > 0
        exchange.sent(now, self._random.uniform(0.9, 1.1))
        self._set_timer(exchange.due, exchange)
        # A client proposes the remote's own port.
        request = mproxy.v1.Request(exchange.remote, exchange.remote.port)
        return SendDatagram(exchange.detour.endpoint, mproxy.v1.encode(request))

    def _exchange_due(self, exchange: Exchange, now: float) -> Iterator[Command]:
        detour = exchange.detour
        if detour.exchanges.get(exchange.remote) is not exchange or now < exchange.due:
            return
        tokens: Iterable[int] = self._by_remote.get(exchange.remote, ())
        if exchange.may_retry:
            yield self._send(exchange, now)
        else:
            was_down = detour.state == DetourState.DOWN
            remote_to_check = detour.gave_up(exchange, now)
            if remote_to_check is not None:
                yield self._send(detour.begin_probe(remote_to_check, now), now)
            if detour.state == DetourState.DOWN:
                interval = self.settings.probe_interval * self._random.uniform(0.9, 1.1)
                self._schedule_probe(detour, now + interval)
                if not was_down:
                    yield Note(f"detour {detour.endpoint} does not answer: does detour-server "
                               "run there, and serve us? See detour-client check")
                    yield from self._withdraw_all(detour)
                    tokens = self.connections
            elif detour.refuses(exchange.remote, now):
                yield from self._drop_mapping(detour, exchange.remote)
                self._forget_joins(detour, exchange.remote)
                yield Note(f"detour {detour.endpoint} gives no mapping to {exchange.remote}")
                for token in tokens:
                    self._set_timer(detour.refused_until(exchange.remote), token)
        for token in tokens:
            yield from self._evaluate(self.connections[token], now)

    def _hasten_probes(self, now: float) -> None:
        """A new connection wants detours: look at the silent ones again rather soon."""
        for detour in self.detours:
            if detour.state == DetourState.DOWN and not detour.exchanges:
                soon = detour.earliest_probe(now)
                if soon < detour.probe_at:
                    self._schedule_probe(detour, soon)

    def _schedule_probe(self, detour: Detour, when: float) -> None:
        detour.probe_at = when
        self._set_timer(when, detour)

    def _probe_due(self, detour: Detour, now: float) -> Iterator[Command]:
        if detour.state != DetourState.DOWN or now < detour.probe_at:
            return
        # Any remote that is wanted now may be one that the detour does not serve: take turns.
        wanted = [remote for remote, tokens in self._by_remote.items()
                  if remote.address.version == detour.endpoint.address.version
                  and any(not self.connections[token].reason_for_none for token in tokens)]
        remote = self._random.choice(wanted) if wanted else detour.probe_remote
        if remote is not None:
            yield self._send(detour.begin_probe(remote, now), now)

    def _set_timer(self, when: float, what: Exchange | Detour | Offering | int) -> None:
        heapq.heappush(self._timers, (when, next(self._tie_break), what))


def _doubled(first: float, times: int) -> float:
    """A delay of ``first`` seconds that doubles each time after the first, within bounds."""
    return min(first * 2.0 ** min(max(times - 1, 0), 16), LONGEST_DELAY)
