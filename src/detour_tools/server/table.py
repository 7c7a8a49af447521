# SPDX-License-Identifier: GPL-2.0-or-later
"""Which mappings there are, and which detour port a new one gets; pure.

The four rules of MPROXY v1, in their order: the client has a mapping to the remote already;
it proposes no port; it proposes one that cannot be had; it gets what it asked for.
"""

import enum
import itertools
import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from random import Random
from typing import NamedTuple

from detour_tools.endpoint import Endpoint, IPAddress
from detour_tools.mapping import Mapping, flow_key, pair
from detour_tools.server.ports import FIRST, FIRST_OTHER, PortPool
from detour_tools.server.unproven import Unproven


class NoFreePortError(Exception):
    """The client uses, or the detour forbids, every port that could be picked."""


class Outcome(enum.Enum):
    """What a request came to."""

    NEW = "new"
    EXISTING = "existing"
    MOVED = "moved"


class Rank(enum.Enum):
    """How well the table knows a client: it has no mapping, it has some, a flow went through one.

    A forger makes up addresses with more ease than he learns of theirs, and has no flow.
    """

    STRANGER = 0
    KNOWN = 1
    PROVEN = 2


class Decision(NamedTuple):
    """The answer to a request."""

    outcome: Outcome
    entry: "Entry"


@dataclass(slots=True, eq=False)
class Entry:
    """A mapping in the table; ``serial`` grows with every new one, ``last_used`` in seconds.

    ``key`` is its ``flow_key``. ``proven``: a flow through it was seen.
    """

    mapping: Mapping
    key: bytes
    serial: int
    last_used: float
    proven: bool = False


_serial = attrgetter("serial")


@dataclass(slots=True)
class _Client:
    ports: dict[int, Entry] = field(default_factory=dict)
    proven: int = 0
    free: PortPool = field(default_factory=PortPool)
    # Made when the dynamic ports are used up, which hardly ever is.
    others: PortPool | None = None

    def take(self, port: int) -> None:
        self.free.take(port)
        if self.others is not None:
            self.others.take(port)

    def put_back(self, port: int) -> None:
        self.free.put_back(port)
        if self.others is not None:
            self.others.put_back(port)

    def pools(self) -> Iterator[PortPool]:
        """Those to pick from, in order of preference."""
        yield self.free
        if self.others is None:
            self.others = PortPool(FIRST_OTHER, FIRST - 1)
            for port in self.ports:
                self.others.take(port)
        yield self.others


class MappingTable:
    """The mappings by client and remote. Times are seconds and never go backwards."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._serials = itertools.count(1)
        # In order of serial. By bytes, as an address takes longer to hash than all the rest.
        self._by_remote: dict[bytes, Entry] = {}
        self._clients: dict[IPAddress, _Client] = {}
        self._proven: OrderedDict[int, Entry] = OrderedDict()  # least recently used first
        self.unproven = Unproven()

    def __len__(self) -> int:
        return len(self._by_remote)

    @property
    def clients(self) -> int:
        """How many clients have a mapping."""
        return len(self._clients)

    def count(self, client: IPAddress) -> int:
        """How many mappings the client has."""
        found = self._clients.get(client)
        return len(found.ports) if found else 0

    def rank(self, client: IPAddress) -> Rank:
        """How well the client is known."""
        found = self._clients.get(client)
        if found is None:
            return Rank.STRANGER
        return Rank.PROVEN if found.proven else Rank.KNOWN

    def find(self, client: IPAddress, remote: Endpoint) -> Entry | None:
        """The client's mapping to the remote."""
        return self._by_remote.get(pair(flow_key(Mapping(client, 0, remote))))

    def holds(self, entry: Entry) -> bool:
        """Whether the entry is (still) in the table."""
        return entry.serial in self._proven or entry in self.unproven

    def mappings(self) -> Iterator[Mapping]:
        """All mappings, oldest first; the table must not change meanwhile."""
        return (entry.mapping for entry in self._by_remote.values())

    @property
    def newest(self) -> int:
        """The highest serial in the table, 0 when it is empty."""
        return next(reversed(self._by_remote.values())).serial if self._by_remote else 0

    def entries(self, after: int = 0, until: float = math.inf) -> Iterator[Entry]:
        """The entries whose serial is above ``after`` and up to ``until``, oldest first."""
        every = list(self._by_remote.values())  # half a millisecond for 100,000
        return itertools.islice(every, bisect_right(every, after, key=_serial),
                                bisect_right(every, until, key=_serial))

    def add(self, client: IPAddress, remote: Endpoint, proposed: int, now: float,
            forbidden: Callable[[int], bool]) -> Decision:
        """Make the client's mapping to a remote to which it has none; it is in the table at once.

        ``forbidden`` says which ports the detour must not give away, to anybody.
        Raises NoFreePortError, and changes nothing then.
        """
        state = self._clients.get(client)
        if state is None:
            state = _Client()
        free = proposed and proposed not in state.ports and not forbidden(proposed)
        if free:
            port = proposed
            state.take(port)
        else:
            port = self._pick(state, forbidden)
        mapping = Mapping(client, port, remote)
        entry = self._insert(state, mapping, flow_key(mapping), now)
        return Decision(Outcome.NEW if free or not proposed else Outcome.MOVED, entry)

    def insert(self, mapping: Mapping, now: float) -> Entry | None:
        """Take over a mapping that stands already; None when it contradicts another."""
        client, port, _ = mapping
        state = self._clients.get(client) or _Client()
        key = flow_key(mapping)
        if port in state.ports or pair(key) in self._by_remote:
            return None
        state.take(port)
        return self._insert(state, mapping, key, now)

    def remove(self, entry: Entry) -> None:
        """Forget a mapping that is in the table."""
        client, port, _ = entry.mapping
        del self._by_remote[pair(entry.key)]
        state = self._clients[client]
        if entry.proven:
            del self._proven[entry.serial]
            state.proven -= 1
        else:
            self.unproven.remove(entry)
        del state.ports[port]
        state.put_back(port)
        if not state.ports:
            del self._clients[client]

    def touch(self, entry: Entry, now: float) -> None:
        """Note that the mapping was used."""
        entry.last_used = now
        if entry.proven:
            self._proven.move_to_end(entry.serial)
        else:
            self.unproven.touch(entry)

    def prove(self, entry: Entry, now: float) -> None:
        """Note that a flow goes through the mapping, if it is (still) in the table."""
        # Called for every mapping at every look at the flows.
        serial = entry.serial
        if serial not in self._proven:
            if entry not in self.unproven:
                return
            self.unproven.remove(entry)
            entry.proven = True
            self._clients[entry.mapping.client].proven += 1
            self._proven[serial] = entry
        entry.last_used = now
        self._proven.move_to_end(serial)

    def unused_since(self, limit: float, unproven_limit: float) -> Iterator[Entry]:
        """The entries last used at or before ``limit``, the unproven ones ``unproven_limit``.

        Costs no more than there are of them.
        """
        return itertools.chain(
            itertools.takewhile(lambda entry: entry.last_used <= limit, self._proven.values()),
            itertools.takewhile(lambda entry: entry.last_used <= unproven_limit, self.unproven))

    def of_port(self, port: int) -> list[Entry]:
        """The mappings of this detour port, of all clients."""
        return [state.ports[port] for state in self._clients.values() if port in state.ports]

    def _insert(self, state: _Client, mapping: Mapping, key: bytes, now: float) -> Entry:
        entry = Entry(mapping, key, next(self._serials), now)
        self._clients[mapping.client] = state
        state.ports[mapping.detour_port] = entry
        self._by_remote[pair(entry.key)] = entry
        self.unproven.add(entry)
        return entry

    def _pick(self, state: _Client, forbidden: Callable[[int], bool]) -> int:
        for pool in state.pools():
            passed_over = []
            try:
                while (port := pool.draw(self._random)) is not None:
                    if not forbidden(port):
                        return port
                    passed_over.append(port)
            finally:
                for each in passed_over:
                    pool.put_back(each)
        raise NoFreePortError

