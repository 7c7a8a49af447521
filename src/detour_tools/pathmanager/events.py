# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's notifications as events, those of several families in the order they were sent."""

import errno
from collections.abc import Callable, Iterable
from typing import NamedTuple

from detour_tools.netlink.socket import GenericFamily, GroupListener
from detour_tools.pathmanager.base import Event, EventsLostError

# An event is about 100 bytes, near 800 as the kernel counts them: room for some ten thousand.
RECEIVE_BUFFER = 8 << 20


class Source(NamedTuple):
    """A family's multicast group, and what makes events of its notifications."""

    family: GenericFamily
    group: str
    decode: Callable[[int, dict[int, bytes]], Event | None]


class EventListener:
    """Hears the groups of all ``sources``; raises OSError, or KeyError for an unknown group."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self._decoders = {source.family.id: source.decode for source in sources}
        self._listener = GroupListener(
            RECEIVE_BUFFER, *(source.family.groups[source.group] for source in sources))

    def fileno(self) -> int:
        """Readable when there are events."""
        return self._listener.fileno()

    def close(self) -> None:
        """Hear no more."""
        self._listener.close()

    def receive(self) -> list[Event] | None:
        """Some pending events, None when there are none; raises EventsLostError."""
        try:
            pending = self._listener.receive()
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                raise EventsLostError from None
            raise
        if pending is None:
            return None
        decoded = (self._decoders[each.family](each.command, each.attributes)
                   for each in pending if each.family in self._decoders)
        return [event for event in decoded if event is not None]
