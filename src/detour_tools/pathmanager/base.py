# SPDX-License-Identifier: GPL-2.0-or-later
"""What a path manager tells of connections, and what it can be told to do.

There are two kinds. One joins when it is told to, connection by connection (CreateSubflow). The
other joins by itself: it is told which detour ports lead where (Offer, Withdraw), and keeps that
for all connections to come.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

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


@dataclass(frozen=True, slots=True)
class DetoursWanted:
    """A connection to ``remote`` may be joined, and the path manager would do so by itself."""

    remote: Endpoint


Event = (ConnectionCreated | ConnectionEstablished | ConnectionClosed
         | SubflowEstablished | SubflowClosed | DetoursWanted)


@dataclass(frozen=True, slots=True)
class CreateSubflow:
    """Join connection ``token`` from ``local`` to ``remote``; ``via`` is None without a detour.

    How it ends is told by SubflowEstablished or SubflowClosed.
    """

    token: int
    local: IPAddress
    remote: Endpoint
    via: Endpoint | None


@dataclass(frozen=True, slots=True)
class Offer:
    """Connections to ``remote`` may be joined by way of ``detour``, an address and detour port.

    The path manager forgets it after ``lifetime`` seconds, unless it is offered again before.
    A connection tries an offer once; one that was withdrawn and is offered again is a new one.
    """

    remote: Endpoint
    detour: Endpoint
    lifetime: int


@dataclass(frozen=True, slots=True)
class Withdraw:
    """No further joins to ``remote`` by way of ``detour``; subflows that were made live on."""

    remote: Endpoint
    detour: Endpoint


PathCommand = CreateSubflow | Offer | Withdraw


class Offered(NamedTuple):
    """An offer that the path manager has; ``lifetime`` is what is left of it, None: for ever."""

    remote: Endpoint
    detour: Endpoint
    lifetime: int | None


class EventsLostError(Exception):
    """The kernel had more events than the socket could hold: look at the connections afresh."""


class PathManager(Protocol):
    """A kernel path manager as the client service drives it."""

    name: str
    joins_by_itself: bool

    def start(self) -> None:
        """Take over path management in this network namespace; raises UserError."""

    def stop(self) -> None:
        """Give it back as it was found."""

    def fileno(self) -> int:
        """A file descriptor that is readable when there are events."""

    def receive(self) -> list[Event] | None:
        """Some pending events, None when there are none; raises EventsLostError."""

    def perform(self, command: PathCommand) -> None:
        """Do what the machine decided; raises OSError when it cannot be done.

        CreateSubflow is for those that do not join by themselves, Offer and Withdraw for those
        that do.
        """

    def offered(self) -> list[Offered]:
        """What stands offered, by whomever; empty where nothing ever is."""
