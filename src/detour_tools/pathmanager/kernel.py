# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's detour path manager, through the ``DETOUR`` family: it joins by itself."""

import errno
from collections.abc import Mapping

from detour_tools.errors import UserError
from detour_tools.netlink.codec import NetlinkError
from detour_tools.netlink.socket import GenericNetlink
from detour_tools.pathmanager import codec, detour_codec
from detour_tools.pathmanager.base import (
    DetoursWanted,
    Event,
    Offer,
    Offered,
    PathCommand,
    Withdraw,
)
from detour_tools.pathmanager.borrowing import BorrowingPathManager, need_mptcp
from detour_tools.pathmanager.detour_family import open_family
from detour_tools.pathmanager.events import EventListener, Source

SYSCTL = ("net.mptcp.pm_type", "2")
"""The sysctl that chooses this path manager, and its value."""

SUBFLOWS_SYSCTL = "net.mptcp.detour_subflows"

MOST_SUBFLOWS = 8
"""Subflows of a connection at most, the first included."""


class KernelPathManager(BorrowingPathManager):
    """The ``DETOUR`` family of this network namespace."""

    name = "kernel"
    joins_by_itself = True

    def __init__(self, subflows: int, sysctls: Mapping[str, str]) -> None:
        """Open the sockets; raises UserError when the kernel or the privileges do not do.

        ``subflows`` is what a connection has at most, the first included. ``sysctls`` are set
        besides those of the path manager.
        """
        commands = open_family()
        need_mptcp()
        try:
            with_events = GenericNetlink(codec.FAMILY)
            with_events.close()
            events = EventListener([
                Source(with_events.family, codec.EVENT_GROUP, codec.decode_event),
                Source(commands.family, detour_codec.REQUEST_GROUP, _decode_request)])
        except (OSError, KeyError) as error:
            raise UserError(f"cannot listen to the kernel's path manager: {error}") from None
        super().__init__(commands, events, {
            SUBFLOWS_SYSCTL: str(min(subflows, MOST_SUBFLOWS)), **sysctls, SYSCTL[0]: SYSCTL[1]})

    def perform(self, command: PathCommand) -> None:
        """Add or delete an entry; raises OSError when that cannot be done."""
        if isinstance(command, Offer):
            self._commands.command(detour_codec.CMD_ADD, detour_codec.encode_name(
                detour_codec.NatName(command.detour, command.remote), command.lifetime))
        elif isinstance(command, Withdraw):
            try:
                self._commands.command(detour_codec.CMD_DEL, detour_codec.encode_name(
                    detour_codec.NatName(command.detour, command.remote)))
            except NetlinkError as error:
                if error.errno != errno.ENOENT:  # expired, or deleted by hand
                    raise
        else:
            raise NetlinkError(errno.EOPNOTSUPP)

    def offered(self) -> list[Offered]:
        """The kernel's NAT entries, by whomever they were added."""
        entries = (detour_codec.decode_entry(found) for found in self._commands.command(
            detour_codec.CMD_GET, dump=True))
        return [Offered(entry.name.remote, entry.name.detour, entry.lifetime)
                for entry in entries if isinstance(entry.name, detour_codec.NatName)]


def _decode_request(command: int, attributes: dict[int, bytes]) -> Event | None:
    if command != detour_codec.CMD_REQ:
        return None
    try:
        return DetoursWanted(detour_codec.decode_request(attributes))
    except detour_codec.MalformedDetourMessageError:
        return None
