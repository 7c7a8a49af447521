# SPDX-License-Identifier: GPL-2.0-or-later
"""From datagrams to answers: check, queue, decide, commit, answer.

Requests that come while a commit runs wait for the next one, so that the cost of a commit is
shared by all that came meanwhile; an answer leaves when its mapping is live in the kernel.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from detour_tools import mproxy
from detour_tools.endpoint import Endpoint, IPAddress
from detour_tools.log import BoundedLog
from detour_tools.mapping import Mapping
from detour_tools.mproxy import v1
from detour_tools.nat.base import NatError
from detour_tools.netlink.route import Routes
from detour_tools.printer import Printer
from detour_tools.server import decide
from detour_tools.server.decide import Decided, Facts
from detour_tools.server.keeper import Keeper
from detour_tools.server.listening import ListeningPorts
from detour_tools.server.policy import Policy, Refusal
from detour_tools.server.receiver import Receiver, Sender
from detour_tools.server.status import Counters
from detour_tools.server.table import Decision, Entry, Outcome, Rank
from detour_tools.server.waiting import Waiting

log = logging.getLogger(__name__)

# More than are served meanwhile: what waits in the kernel is served in the order it came.
_DATAGRAMS_A_WAKE_UP = 2048
_REQUESTS_A_COMMIT = 256
# In ten seconds, of each kind: enough to follow a client, and no flood of the journal.
_GRANTED_LINES = 50

# Malformed or dropped ones between two looks (two seconds) that are a flood: no more is learned
# from them.
_FLOOD = 2000


# A client's mapping to a remote, if it stands and may stay.
Standing = Callable[[IPAddress, Endpoint], Mapping | None]


class _Request(NamedTuple):
    message: v1.Request
    sender: Sender


class Requests:
    """Serves what the receiver receives."""

    def __init__(self, receiver: Receiver, keeper: Keeper, policy: Policy,
                 listening: ListeningPorts, standing: Standing,
                 look: Callable[[], Awaitable[None]], printer: Printer) -> None:
        """``standing`` tells what may be answered before serve() runs; ``look`` is awaited before
        mappings may have to make room for others.
        """
        self.counters = Counters()
        self._receiver = receiver
        self._keeper = keeper
        self._policy = policy
        self._printer = printer
        self._listening = listening
        self._standing: Standing | None = standing
        self._look = look
        self._routes = Routes()
        self._queue: Waiting[_Request] = Waiting()
        self._waiting = asyncio.Event()
        self._screened = False
        self._useless = 0  # at the last look: malformed and lost ones
        self._behind = False  # whether more came than could be read at the last wake-up
        self._bounded = BoundedLog(log)
        printing = _printing_logger(printer)
        self._refused_print = BoundedLog(printing)
        self._granted_print = BoundedLog(printing, burst=_GRANTED_LINES)

    def close(self) -> None:
        """Close what was opened."""
        self._routes.close()

    @property
    def unprinted(self) -> int:
        """How many lines the reader of the output missed."""
        return self._printer.dropped_lines

    def on_readable(self) -> None:
        """Take datagrams; a flood of them keeps nothing else from its turn."""
        now, before = time.monotonic(), self.counters.received
        for data, sender in self._receiver.receive(_DATAGRAMS_A_WAKE_UP):
            self._take(data, sender, now)
        self._behind = self.counters.received - before == _DATAGRAMS_A_WAKE_UP
        if self._queue:
            self._waiting.set()

    def tend(self, dropped: int) -> list[str]:
        """Have the kernel drop malformed datagrams in a flood; what there is to warn of.

        To be called every two seconds, with how many the kernel's rules have dropped.
        """
        counters = self.counters
        too_many = dropped - counters.dropped >= _FLOOD
        counters.dropped = dropped
        counters.lost = self._receiver.lost()
        useless = counters.malformed + (counters.lost if self._screened else 0)
        flood = useless - self._useless >= _FLOOD
        if flood != self._screened:
            self._receiver.screen(on=flood)
            self._screened = flood
        self._useless = counters.malformed + (counters.lost if flood else 0)
        return [f"a flood of {what}: the kernel drops {which} unread, and '{counter}' counts them"
                for on, what, which, counter in (
                    (flood, "malformed datagrams", "them", "lost"),
                    (too_many, "requests", "what is too much", "dropped")) if on]

    def forget(self) -> None:
        """Drop what was let in by an older policy and still waits: clients ask again."""
        self._queue.clear()

    async def serve(self) -> None:
        """Serve what is queued, for ever."""
        self._standing = None
        while True:
            await self._waiting.wait()
            self._waiting.clear()
            while self._queue:
                if self._may_need_room():
                    await self._look()
                async with self._keeper.lock:
                    await self._serve_batch()

    def _take(self, data: bytes, sender: Sender, now: float) -> None:
        counters = self.counters
        counters.received += 1
        rank = self._keeper.table.rank(sender.address)
        # What waits in the kernel meanwhile gets old, and may be of clients that are known.
        if (rank is Rank.STRANGER and self._behind and not self._standing
                and self._queue.crowded and v1.is_request(data)):
            self._overflowed()
            return
        try:
            if len(data) > mproxy.MAX_DATAGRAM:
                raise mproxy.MalformedMessageError(f"more than {mproxy.MAX_DATAGRAM} bytes")
            message = mproxy.decode(data)
            if not isinstance(message, v1.Request):
                raise mproxy.MalformedMessageError("not a request")
        except mproxy.MalformedMessageError as error:
            counters.malformed += 1
            self._bounded.warning("malformed", "malformed datagram from %s: %s",
                                  sender.address, error)
            return
        refusal = self._policy.check_client(sender.address, message.remote, now)
        if refusal is not None:
            self._refuse(refusal, sender.address, message)
            return
        request = _Request(message, sender)
        standing = self._standing and self._standing(sender.address, message.remote)
        if standing:
            self._answer(request, Outcome.EXISTING, standing)
        elif not self._queue.put(sender.address, request, rank):
            self._overflowed()

    def _overflowed(self) -> None:
        self.counters.overflowed += 1
        self._bounded.warning("overflow", "too many requests at once: some are dropped")

    def _may_need_room(self) -> bool:
        table, rules = self._keeper.table, self._policy.rules
        batch = min(len(self._queue), _REQUESTS_A_COMMIT)
        return len(table) + batch > rules.max_mappings or any(
            table.count(client) + number > rules.max_per_client
            for client, number in self._queue.counts(batch))

    async def _serve_batch(self) -> None:
        batch = self._queue.take(_REQUESTS_A_COMMIT)
        now = time.monotonic()
        decided: list[tuple[_Request, Decision]] = []
        new: dict[int, Entry] = {}  # by serial
        gone: list[Entry] = []
        for request in batch:
            answer, removed = self._decide(request, now)
            # The kernel has never seen what this batch brought.
            gone += [entry for entry in removed if new.pop(entry.serial, None) is None]
            self.counters.evicted += len(removed)
            if isinstance(answer, Refusal):
                self._refuse(answer, request.sender.address, request.message)
                continue
            decided.append((request, answer))
            if answer.outcome is not Outcome.EXISTING:
                new[answer.entry.serial] = answer.entry
        if new or gone:
            try:
                await self._keeper.commit(list(new.values()), gone)
            except NatError as error:
                self.counters.failed += len(decided)
                self._bounded.warning("commit", "the kernel takes no mappings: %s", error)
                return  # nobody is answered: clients ask again
        table = self._keeper.table
        for request, (outcome, entry) in decided:
            if table.holds(entry):
                self._answer(request, outcome, entry.mapping)

    def _decide(self, request: _Request, now: float) -> Decided:
        message, table = request.message, self._keeper.table
        asked = decide.Request(request.sender.address, message.remote, message.detour_port)
        standing = table.find(asked.client, asked.remote)
        facts = Facts(standing) if standing is not None else Facts(
            None, self._routes.look_up(asked.remote.address), self._listening.now())
        return decide.decide(asked, facts, table, self._policy, now)

    def _answer(self, request: _Request, outcome: Outcome, mapping: Mapping) -> None:
        counters, (message, sender), (client, detour_port, remote) = (
            self.counters, request, mapping)
        try:
            self._receiver.send(v1.encode(v1.Response(remote, detour_port)), sender)
        except OSError as error:
            counters.unsent += 1
            self._bounded.warning("unsent", "cannot answer %s: %s", client, error.strerror)
        if outcome is Outcome.NEW:
            counters.new += 1
        elif outcome is Outcome.MOVED:
            counters.moved += 1
        else:
            counters.existing += 1
        self._granted_print.warning(
            outcome.value, "%-8s client %s remote %s detour port %d proposed %d",
            outcome.value, client, remote, detour_port, message.detour_port)

    def _refuse(self, refusal: Refusal, client: IPAddress, message: v1.Request) -> None:
        self.counters.refused += 1
        remote: Endpoint = message.remote
        self._refused_print.warning(
            refusal.key, "refused  client %s remote %s proposed %s: %s",
            client, remote, message.detour_port, refusal.value)


class _PrintHandler(logging.Handler):
    def __init__(self, printer: Printer) -> None:
        super().__init__()
        self._printer = printer

    def emit(self, record: logging.LogRecord) -> None:
        self._printer.print(record.getMessage() + "\n")


def _printing_logger(printer: Printer) -> logging.Logger:
    logger = logging.Logger("requests")
    logger.addHandler(_PrintHandler(printer))
    return logger
