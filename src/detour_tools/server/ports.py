# SPDX-License-Identifier: GPL-2.0-or-later
"""One client's free ports among those a detour picks from; pure.

RFC 6335, section 6: 49152 to 65535 are dynamic ports; those from 1024 belong to no system service.
"""

from random import Random

FIRST = 49152
LAST = 65535
COUNT = LAST - FIRST + 1
# What is left when these are used up.
FIRST_OTHER = 1024


class PortPool:
    """The ports ``first`` to ``last`` that are free for one client, drawn at random.

    A shuffled deck that is never written out: only the cards that have moved are stored, so that
    drawing, taking and putting back cost the same however many are in use, and memory grows with
    the ports that were ever in use rather than with all there are.
    """

    __slots__ = ("_at", "_first", "_last", "_left", "_where")

    def __init__(self, first: int = FIRST, last: int = LAST) -> None:
        self._first = first
        self._last = last
        self._left = last - first + 1
        self._at: dict[int, int] = {}     # position -> port, where it is not first + position
        self._where: dict[int, int] = {}  # port -> position, likewise

    def __len__(self) -> int:
        return self._left

    def draw(self, random: Random) -> int | None:
        """Take a random free port; None when there is none."""
        if not self._left:
            return None
        # By a fraction, as randrange() takes as long again; at most 65,535 of its 2^53 steps.
        port = self._port_at(int(random.random() * self._left))
        self._swap_out(port)
        return port

    def take(self, port: int) -> None:
        """Take this free port; one outside the pool's range is none of its business."""
        if self._first <= port <= self._last:
            self._swap_out(port)

    def put_back(self, port: int) -> None:
        """Free a port that was drawn or taken."""
        if self._first <= port <= self._last:
            self._swap(port, self._left)
            self._left += 1

    def _port_at(self, position: int) -> int:
        return self._at.get(position, self._first + position)

    def _swap_out(self, port: int) -> None:
        self._left -= 1
        self._swap(port, self._left)

    def _swap(self, port: int, position: int) -> None:
        other = self._port_at(position)
        old = self._where.get(port, port - self._first)
        self._place(other, old)
        self._place(port, position)

    def _place(self, port: int, position: int) -> None:
        if port - self._first == position:
            self._at.pop(position, None)
            self._where.pop(port, None)
        else:
            self._at[position] = port
            self._where[port] = position
