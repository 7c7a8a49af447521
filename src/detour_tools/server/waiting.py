# SPDX-License-Identifier: GPL-2.0-or-later
"""Where requests wait; pure.

More may come than can be served, most of them forged. Clients take turns, so that who asks much
keeps nobody else waiting, and those that are better known come first.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import islice
from typing import Generic, TypeVar

from detour_tools.endpoint import IPAddress
from detour_tools.server.table import Rank

Item = TypeVar("Item")

_KNOWN = 4096
# Those of strangers wait for some tenths of a second: later answers come to nobody.
_STRANGERS = 1024
# Of four that are served one is a stranger's, and one of those that have no flow yet, however many
# others wait.
_TURNS = (Rank.PROVEN, Rank.KNOWN, Rank.PROVEN, Rank.STRANGER)


class _Line(Generic[Item]):
    """Queues of clients that take turns; the first is next."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._size = 0
        self._queues: OrderedDict[IPAddress, deque[Item]] = OrderedDict()

    def __len__(self) -> int:
        return self._size

    @property
    def full(self) -> bool:
        """Whether there is no room for one more."""
        return self._size >= self._most

    def put(self, client: IPAddress, item: Item) -> bool:
        """Add one; False when one is lost for want of room: this, or the next client's last."""
        queue = self._queues.get(client)
        full = self.full
        if full:
            if queue is not None:
                return False
            unlucky, of_next = next(iter(self._queues.items()))
            of_next.pop()
            self._size -= 1
            if not of_next:
                del self._queues[unlucky]
        if queue is None:
            queue = self._queues[client] = deque()
        queue.append(item)
        self._size += 1
        return not full

    def take(self) -> Item:
        """The next one; the line must not be empty."""
        client, queue = self._queues.popitem(last=False)
        self._size -= 1
        item = queue.popleft()
        if queue:
            self._queues[client] = queue
        return item

    def counts(self) -> Iterator[tuple[IPAddress, int]]:
        """How many of each client wait."""
        return ((client, len(queue)) for client, queue in self._queues.items())

    def clear(self) -> None:
        """Forget all."""
        self._queues.clear()
        self._size = 0


class Waiting(Generic[Item]):
    """Requests that wait, by client."""

    def __init__(self, known: int = _KNOWN, strangers: int = _STRANGERS) -> None:
        """With room for so many requests of clients that hold mappings, twice, and of others."""
        # In the order of whose turn it is if it is not another's.
        self._lines: dict[Rank, _Line[Item]] = {
            Rank.PROVEN: _Line(known), Rank.KNOWN: _Line(known), Rank.STRANGER: _Line(strangers)}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    @property
    def crowded(self) -> bool:
        """Whether one more of a stranger costs another one its place."""
        return self._lines[Rank.STRANGER].full

    def put(self, client: IPAddress, item: Item, rank: Rank) -> bool:
        """Add a request; False when one is lost, as there are too many."""
        return self._lines[rank].put(client, item)

    def take(self, at_most: int) -> list[Item]:
        """The next ones, removed."""
        taken: list[Item] = []
        while len(taken) < at_most and len(self):
            line = self._lines[_TURNS[len(taken) % len(_TURNS)]]
            if not len(line):
                line = next(other for other in self._lines.values() if len(other))
            taken.append(line.take())
        return taken

    def counts(self, at_most: int) -> Iterator[tuple[IPAddress, int]]:
        """How many wait of each client that the next ``at_most`` may be of; some come twice."""
        for line in self._lines.values():
            yield from islice(line.counts(), at_most)

    def clear(self) -> None:
        """Forget all."""
        for line in self._lines.values():
            line.clear()
