# SPDX-License-Identifier: GPL-2.0-or-later
"""What the client knows of a detour: is it there, how far, and which mappings it gave. Pure."""

import enum
import math
from collections import OrderedDict
from dataclasses import dataclass, field

from detour_tools.endpoint import Endpoint

INITIAL_TIMEOUT = 0.5
"""Seconds to wait for an answer while the round-trip time is unknown."""

SHORTEST_TIMEOUT = 0.1
LONGEST_TIMEOUT = 8.0

ATTEMPTS = 4
"""Times a request is sent before the client gives up; for a detour that is down it takes two."""

REFUSAL_MEMORY = 60.0
"""Seconds for which a remote is not asked for again that a live detour did not answer for.

They double each time, up to an hour.
"""

LONGEST_REFUSAL_MEMORY = 3600.0

PROBE_SPACING = 5.0
"""Seconds between two probes of a silent detour at least."""

MAX_MAPPINGS = 65536
MAX_REFUSALS = 4096
MAX_EXCHANGES = 4096


class DetourState(enum.Enum):
    """Whether a detour answers."""

    NEW = "new"  # never asked, or not yet answered
    UP = "up"
    DOWN = "down"


@dataclass(slots=True, eq=False)
class Exchange:
    """A request under way, and its retransmission clock."""

    detour: "Detour"
    remote: Endpoint
    first_sent: float
    attempts_left: int
    attempts: int = 0
    last_sent: float = 0.0
    due: float = 0.0

    @property
    def may_retry(self) -> bool:
        """Whether it is worth sending once more."""
        return self.attempts_left > 0

    def sent(self, now: float, jitter: float) -> None:
        """Note that the request was sent; ``jitter`` is a factor near 1."""
        timeout = min(self.detour.timeout() * 2 ** self.attempts, LONGEST_TIMEOUT)
        self.attempts += 1
        self.attempts_left -= 1
        self.last_sent = now
        self.due = now + timeout * jitter


@dataclass(slots=True, eq=False)
class Detour:
    """One detour; ``rtt`` is the smoothed round-trip time of requests in seconds."""

    endpoint: Endpoint
    order: int
    state: DetourState = DetourState.NEW
    rtt: float | None = None
    rtt_variation: float = 0.0
    exchanges: dict[Endpoint, Exchange] = field(default_factory=dict)
    joins: int = 0
    joins_established: int = 0
    joins_refused: int = 0
    last_answer: float = -math.inf
    probe_remote: Endpoint | None = None
    probe_at: float = math.inf
    _probed_at: float = -math.inf
    _last_good: Endpoint | None = None
    _mappings: OrderedDict[Endpoint, int] = field(default_factory=OrderedDict)
    # until when, and for how long that is
    _refusals: OrderedDict[Endpoint, tuple[float, float]] = field(default_factory=OrderedDict)

    @property
    def mapping_count(self) -> int:
        """How many mappings are remembered."""
        return len(self._mappings)

    def mapping(self, remote: Endpoint) -> int | None:
        """The detour port that leads to ``remote``, None when there is no mapping yet."""
        port = self._mappings.get(remote)
        if port is not None:
            self._mappings.move_to_end(remote)
        return port

    def remember(self, remote: Endpoint, port: int) -> None:
        """Keep a mapping, instead of the one least used if there are too many."""
        self._mappings[remote] = port
        self._mappings.move_to_end(remote)
        if len(self._mappings) > MAX_MAPPINGS:
            self._mappings.popitem(last=False)

    def forget(self, remote: Endpoint) -> None:
        """Drop a mapping that seems not to work."""
        self._mappings.pop(remote, None)

    def refuses(self, remote: Endpoint, now: float) -> bool:
        """Whether the detour, though alive, lately did not answer for ``remote``."""
        return now < self.refused_until(remote)

    def refused_until(self, remote: Endpoint) -> float:
        """When ``remote`` may be asked for again."""
        return self._refusals.get(remote, (-math.inf, 0.0))[0]

    def timeout(self) -> float:
        """Seconds to wait for the first answer (as in RFC 6298, with bounds of our own)."""
        if self.rtt is None:
            return INITIAL_TIMEOUT
        return min(max(self.rtt + 4 * self.rtt_variation, SHORTEST_TIMEOUT), LONGEST_TIMEOUT)

    def begin(self, remote: Endpoint, now: float) -> Exchange | None:
        """Start asking for ``remote``; None when that is under way, refused, or too much."""
        if (remote in self.exchanges or len(self.exchanges) >= MAX_EXCHANGES
                or self.refuses(remote, now)):
            return None
        return self._start(remote, now, ATTEMPTS)

    def begin_probe(self, remote: Endpoint, now: float) -> Exchange:
        """Start asking for ``remote`` only to see whether the detour is there."""
        self._probed_at = now
        self.probe_at = math.inf
        # One thought to be there is not given up lightly.
        return self._start(remote, now, 2 if self.state == DetourState.DOWN else ATTEMPTS)

    def answered(self, exchange: Exchange, port: int, now: float) -> None:
        """The answer to ``exchange`` came: the mapping is live, and so is the detour."""
        del self.exchanges[exchange.remote]
        self._refusals.pop(exchange.remote, None)
        self.remember(exchange.remote, port)
        self._last_good = exchange.remote
        self.last_answer = now
        self.state = DetourState.UP
        self.probe_at = math.inf
        if exchange.attempts == 1:  # otherwise it is not known which request was answered (Karn)
            self._measured(now - exchange.last_sent)

    def gave_up(self, exchange: Exchange, now: float) -> Endpoint | None:
        """No answer came to ``exchange``: decide whether the detour or the remote is to blame.

        A detour does not answer for a remote it does not serve. Returns a remote to ask for
        that it did serve before, when only that can tell.
        """
        del self.exchanges[exchange.remote]
        if self.last_answer > exchange.first_sent:
            self._refuse(exchange.remote, now)
            return None
        if (self.state == DetourState.UP and self._last_good is not None
                and self._last_good != exchange.remote):
            self._refuse(exchange.remote, now)
            return None if self._last_good in self.exchanges else self._last_good
        if self.state != DetourState.DOWN:
            self.state = DetourState.DOWN
            self.probe_remote = exchange.remote
            self.exchanges.clear()
            self._refusals.clear()
            self._probed_at = now
        return None

    def earliest_probe(self, now: float) -> float:
        """When the next probe may leave at the earliest."""
        return max(now, self._probed_at + PROBE_SPACING)

    def _start(self, remote: Endpoint, now: float, attempts: int) -> Exchange:
        exchange = Exchange(self, remote, now, attempts)
        self.exchanges[remote] = exchange
        return exchange

    def _refuse(self, remote: Endpoint, now: float) -> None:
        _, last = self._refusals.pop(remote, (0.0, REFUSAL_MEMORY / 2))
        memory = min(2 * last, LONGEST_REFUSAL_MEMORY)
        self._refusals[remote] = (now + memory, memory)
        if len(self._refusals) > MAX_REFUSALS:
            self._refusals.popitem(last=False)

    def _measured(self, sample: float) -> None:
        if self.rtt is None:
            self.rtt, self.rtt_variation = sample, sample / 2
        else:  # RFC 6298, section 2.3
            self.rtt_variation += (abs(self.rtt - sample) - self.rtt_variation) / 4
            self.rtt += (sample - self.rtt) / 8
