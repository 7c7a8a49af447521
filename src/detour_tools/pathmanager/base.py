# SPDX-License-Identifier: GPL-2.0-or-later
"""What a path manager tells of connections, and what it can be told to do."""

from dataclasses import dataclass
from typing import Protocol

from detour_tools.endpoint import Endpoint, IPAddress


@dataclass(frozen=True, slots=True)
class _ConnectionEvent:
    token: int
    local: Endpoint
    remote: Endpoint
    server_side: bool = False
    deny_join: bool = False


class ConnectionCreated(_ConnectionEvent):
    """The handshake agreed on MPTCP; subflows cannot be added yet.

    ``server_side``: the connection came in. ``deny_join``: the peer set the C flag
    (RFC 8684, section 3.1) and wants no further subflow to its address.
    """


class ConnectionEstablished(_ConnectionEvent):
    """The connection is fully established: subflows may be added. Fields as when created."""


@dataclass(frozen=True, slots=True)
class ConnectionClosed:
    """The connection is gone; its token may come again."""

    token: int


@dataclass(frozen=True, slots=True)
class SubflowEstablished:
    """A further subflow completed its handshake; ``remote`` is where its packets go."""

    token: int
    local: Endpoint
    remote: Endpoint


@dataclass(frozen=True, slots=True)
class SubflowClosed:
    """A subflow ended, or never came to be.

    ``error`` is an errno, 0 when the kernel named none; ``reset_reason`` that of a TCP reset
    (RFC 8684, section 3.6), None without.
    """

    token: int
    local: Endpoint
    remote: Endpoint
    error: int = 0
    reset_reason: int | None = None


Event = (ConnectionCreated | ConnectionEstablished | ConnectionClosed
         | SubflowEstablished | SubflowClosed)


class EventsLostError(Exception):
    """The kernel had more events than the socket could hold: look at the connections afresh."""


class PathManager(Protocol):
    """A kernel path manager as the client service drives it."""

    def start(self) -> None:
        """Take over path management in this network namespace; raises UserError."""

    def stop(self) -> None:
        """Give it back as it was found."""

    def fileno(self) -> int:
        """A file descriptor that is readable when there are events."""

    def receive(self) -> list[Event] | None:
        """Some pending events, None when there are none; raises EventsLostError."""

    def create_subflow(self, token: int, local: IPAddress, remote: Endpoint) -> None:
        """Send a join from ``local`` to ``remote``; raises OSError when it cannot be sent.

        How it ends is told by SubflowEstablished or SubflowClosed.
        """
