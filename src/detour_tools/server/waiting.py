# SPDX-License-Identifier: GPL-2.0-or-later
"""Where requests wait; pure.

More may come than can be served, most of them forged. Clients take turns, so that who asks much
keeps nobody else waiting, and those that hold mappings come first: a forger makes up addresses
with more ease than he learns of theirs.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from itertools import islice
from typing import Generic, TypeVar

from detour_tools.endpoint import IPAddress

Item = TypeVar("Item")

_KNOWN = 4096
# Those of strangers wait for some tenths of a second: later answers come to nobody.
_STRANGERS = 1024
# One in so many of those served is a stranger's, however many others wait.
_SHARE = 4


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
        """With room for so many requests of clients that hold mappings, and of others."""
        self._known: _Line[Item] = _Line(known)
        self._strangers: _Line[Item] = _Line(strangers)

    def __len__(self) -> int:
        return len(self._known) + len(self._strangers)

    @property
    def crowded(self) -> bool:
        """Whether one more of a stranger costs another one its place."""
        return self._strangers.full

    def put(self, client: IPAddress, item: Item, *, known: bool) -> bool:
        """Add a request; False when one is lost, as there are too many."""
        return (self._known if known else self._strangers).put(client, item)

    def take(self, at_most: int) -> list[Item]:
        """The next ones, removed."""
        taken: list[Item] = []
        while len(taken) < at_most and len(self):
            turn = len(taken) % _SHARE == _SHARE - 1
            first, other = ((self._strangers, self._known) if turn else
                            (self._known, self._strangers))
            taken.append((first if len(first) else other).take())
        return taken

    def counts(self, at_most: int) -> Iterator[tuple[IPAddress, int]]:
        """How many wait of each client that the next ``at_most`` may be of; some come twice."""
        for line in (self._known, self._strangers):
            yield from islice(line.counts(), at_most)

    def clear(self) -> None:
        """Forget all."""
        self._known.clear()
        self._strangers.clear()
