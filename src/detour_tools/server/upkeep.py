# SPDX-License-Identifier: GPL-2.0-or-later
"""What a server does unasked: it tends its rules, and removes mappings that are not to stay."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence

from detour_tools.endpoint import IPAddress
from detour_tools.nat.base import NatError
from detour_tools.netlink.addresses import own_addresses
from detour_tools.server.garbage import QuietCollector
from detour_tools.server.keeper import Keeper
from detour_tools.server.policy import Policy
from detour_tools.server.table import Entry
from detour_tools.server.watch import FirewallWatch

log = logging.getLogger(__name__)

_CHECK_SECONDS = 2.0
_SWEEP_SECONDS = 15.0
_ENTRIES_A_TURN = 1000


class Upkeep:
    """The server's periodic work. ``received`` tells how many datagrams came since the start."""

    def __init__(self, keeper: Keeper, policy: Policy, firewall: FirewallWatch,
                 received: Callable[[], int]) -> None:
        self.expired = 0
        self._keeper = keeper
        self._policy = policy
        self._firewall = firewall
        self._received = received
        self._own: frozenset[IPAddress] = frozenset()

    async def start(self) -> None:
        """The first look, before anybody is served."""
        self._see_addresses()
        await self.remove_forbidden()
        await self._firewall.check()

    async def check(self) -> None:
        """Look every two seconds what others did to the host, for ever."""
        collector = QuietCollector(time.monotonic())
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            await self._keeper.check()
            if self._see_addresses():
                await self.remove_forbidden()
            await self._firewall.check()
            collector.run(self._received(), time.monotonic())

    async def sweep(self) -> None:
        """Remove idle mappings, for ever."""
        while True:
            await asyncio.sleep(min(_SWEEP_SECONDS, self._policy.rules.idle_timeout / 4))
            with contextlib.suppress(NatError, OSError):  # the next sweep tries again
                await self._expire()

    async def remove_forbidden(self) -> None:
        """Remove mappings that policy would refuse now."""
        forbidden = [entry for entry in self._keeper.table.entries()
                     if entry.mapping.remote.address in self._own
                     or not self._policy.permits(entry.mapping)]
        try:
            removed = await self._keeper.remove(forbidden, lambda _: True)
        except NatError as error:
            log.error("cannot remove mappings that are not allowed any more: %s", error)
            return
        if removed:
            log.info("removed %d mappings that are not allowed any more", len(removed))

    async def note_flows(self, entries: Sequence[Entry]) -> None:
        """Note which of these mappings have flows, as used now. Raises OSError."""
        live = await self._keeper.live()
        table = self._keeper.table
        for number, entry in enumerate(entries):
            if number % _ENTRIES_A_TURN == 0:
                await asyncio.sleep(0)  # requests do not wait for all of them
            if entry.mapping in live and table.holds(entry):
                table.touch(entry, time.monotonic())

    async def _expire(self) -> None:
        table = self._keeper.table
        limit = self._policy.idle_limit(len(table))
        idle = list(table.unused_since(time.monotonic() - limit))
        if not idle:
            return
        used_at = {entry.serial: entry.last_used for entry in idle}
        await self.note_flows(idle)
        removed = await self._keeper.remove(
            idle, lambda entry: entry.last_used == used_at[entry.serial])
        if removed:
            self.expired += len(removed)
            log.info("removed %d idle mappings", len(removed))

    def _see_addresses(self) -> bool:
        """Look which addresses are the detour's own; whether others than before."""
        before = self._own
        with contextlib.suppress(OSError):  # the next look tells
            self._own = own_addresses()
        return self._own != before
