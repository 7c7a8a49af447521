# SPDX-License-Identifier: GPL-2.0-or-later
"""The ``DETOUR`` family as a person at the command line uses it: refusals are UserErrors."""

import errno
import select
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from detour_tools.endpoint import Endpoint
from detour_tools.errors import UserError
from detour_tools.netlink.codec import NetlinkError
from detour_tools.netlink.socket import GenericNetlink, GroupListener
from detour_tools.pathmanager import detour_codec
from detour_tools.pathmanager.detour_codec import Entry, Name, VpnName

_RECEIVE_BUFFER = 1 << 20

Result = TypeVar("Result")


def open_family() -> GenericNetlink:
    """A socket for commands of the family; raises UserError when this kernel does not have it."""
    try:
        return GenericNetlink(detour_codec.FAMILY)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise UserError(f"cannot use generic netlink: {error.strerror}") from None
        raise UserError("this kernel has no detour path manager: it knows no DETOUR netlink family",
                        "a kernel with CONFIG_MPTCP_PM_DETOUR is needed, see kernel/README.md"
                        ) from None


def told(name: Name) -> str:
    """An entry in words."""
    if isinstance(name, VpnName):
        return f"interface {name.interface}"
    return f"detour {name.detour} for {name.remote}"


class DetourFamily:
    """Commands of the family in this network namespace; every method raises UserError."""

    def __init__(self) -> None:
        self._netlink = open_family()

    def echo(self) -> None:
        """Have the kernel write its entries to its log."""
        self._do("write its entries to the log",
                 lambda: self._netlink.command(detour_codec.CMD_ECHO))

    def add(self, name: Name, lifetime: int | None) -> None:
        """Add an entry, or renew its lifetime (seconds; None: for ever)."""
        self._do(f"add {told(name)}", lambda: self._netlink.command(
            detour_codec.CMD_ADD, detour_codec.encode_name(name, lifetime)))

    def delete(self, name: Name) -> None:
        """Delete an entry."""
        self._do(f"delete {told(name)}", lambda: self._netlink.command(
            detour_codec.CMD_DEL, detour_codec.encode_name(name)))

    def entries(self) -> list[Entry]:
        """All entries."""
        return self._do("list its entries", lambda: [
            detour_codec.decode_entry(found)
            for found in self._netlink.command(detour_codec.CMD_GET, dump=True)])

    def stat(self, name: Name) -> Entry:
        """One entry with its figures."""
        return self._do(f"tell of {told(name)}", lambda: self._stat(name))

    def stats(self) -> list[Entry]:
        """All entries with their figures, but for those that expire meanwhile."""
        return self._do("tell of its entries", lambda: [
            entry for each in self.entries() if (entry := self._stat_or_none(each.name))])

    def _stat(self, name: Name) -> Entry:
        return detour_codec.decode_entry(
            self._netlink.command(detour_codec.CMD_STAT, detour_codec.encode_name(name))[0])

    def _stat_or_none(self, name: Name) -> Entry | None:
        try:
            return self._stat(name)
        except NetlinkError as error:
            if error.errno != errno.ENOENT:
                raise
            return None

    def requests(self, seconds: float | None) -> Iterator[Endpoint | None]:
        """The remotes that the kernel asks detours for, as it does; None where some were lost.

        Ends after ``seconds``, if that is not None.
        """
        group = self._netlink.family.groups[detour_codec.REQUEST_GROUP]
        listener = self._do("tell what it asks for", lambda: GroupListener(_RECEIVE_BUFFER, group))
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            left = None if end is None else max(0.0, end - time.monotonic())
            if not select.select([listener], [], [], left)[0]:
                return
            try:
                pending = listener.receive()
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                yield None
                continue
            for each in pending or ():
                if each.command == detour_codec.CMD_REQ:
                    yield detour_codec.decode_request(each.attributes)

    @staticmethod
    def _do(what: str, call: Callable[[], Result]) -> Result:
        try:
            return call()
        except detour_codec.MalformedDetourMessageError as error:
            raise UserError(f"cannot {what}: {error}", status=2) from None
        except OSError as error:
            hint = ("that needs CAP_NET_ADMIN: run it as root, or with sudo"
                    if error.errno == errno.EPERM else "")
            raise UserError(f"the kernel does not {what}: {error.strerror}", hint) from None
