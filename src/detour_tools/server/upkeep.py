# SPDX-License-Identifier: GPL-2.0-or-later
"""What a server does unasked: it tends its rules, and removes mappings that are not to stay."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence

from detour_tools.nat.base import NatError
from detour_tools.netlink.addresses import InterfaceAddress, interface_addresses
from detour_tools.server.garbage import QuietCollector
from detour_tools.server.keeper import Keeper
from detour_tools.server.listening import ListeningPorts
from detour_tools.server.policy import HostAddresses, NetworkSet, Policy
from detour_tools.server.table import Entry
from detour_tools.server.watch import FirewallWatch

log = logging.getLogger(__name__)

_CHECK_SECONDS = 2.0
_SWEEP_SECONDS = 15.0
# A look at the flows proves mappings; where unproven ones make room it must come before their turn.
_PROVING_SECONDS = 60.0
_PRESSED_PROVING_SECONDS = 4.0
_ENTRIES_A_TURN = 1000


class Upkeep:
    """The server's periodic work.

    ``received`` tells how many datagrams came since the start, ``evicted`` how many mappings made
    room for others.
    """

    def __init__(self, keeper: Keeper, policy: Policy,
                 listening: ListeningPorts, firewall: FirewallWatch, *,
                 received: Callable[[], int], evicted: Callable[[], int]) -> None:
        self.expired = 0
        self._keeper = keeper
        self._policy = policy
        self._listening = listening
        self._listened_on: frozenset[int] = frozenset()
        self._evicted = evicted
        self._evicted_before = 0
        self._proved_at = float("-inf")
        self._firewall = firewall
        self._received = received
        self._addresses: frozenset[InterfaceAddress] = frozenset()
        self._host = HostAddresses(frozenset(), NetworkSet(()))

    async def start(self) -> None:
        """The first look, before anybody is served."""
        self._see_addresses()
        await self.remove_forbidden()
        await self._remove_listened_on()
        await self._firewall.check()

    async def check(self) -> None:
        """Look every two seconds what others did to the host, for ever."""
        collector = QuietCollector(time.monotonic())
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            await self._keeper.check()
            if self._see_addresses():
                await self.remove_forbidden()
            await self._remove_listened_on()
            await self._prove()
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
        await self._remove([entry for entry in self._keeper.table.entries()
                            if not self._policy.permits(entry.mapping, self._host)],
                           "that are not allowed any more")

    async def _remove_listened_on(self) -> None:
        """Remove mappings of ports that this host has begun to listen on."""
        before, self._listened_on = self._listened_on, self._listening.now()
        await self._remove([entry for port in self._listened_on - before
                            for entry in self._keeper.table.of_port(port)],
                           "of ports that this host listens on now")

    async def _remove(self, entries: Sequence[Entry], why: str) -> None:
        try:
            removed = await self._keeper.remove(entries, lambda _: True)
        except NatError as error:
            log.error("cannot remove mappings %s: %s", why, error)
            return
        if removed:
            log.info("removed %d mappings %s", len(removed), why)

    async def note_flows(self, entries: Sequence[Entry]) -> None:
        """Note which of these mappings have flows, as used now. Raises OSError."""
        live = await self._keeper.live()
        table = self._keeper.table
        for number, entry in enumerate(entries):
            if number % _ENTRIES_A_TURN == 0:
                await asyncio.sleep(0)  # requests do not wait for all of them
            if entry.mapping in live and table.holds(entry):
                table.prove(entry, time.monotonic())

    async def _prove(self) -> None:
        """Note which unproven mappings have flows by now, if it is time to."""
        evicted, now = self._evicted(), time.monotonic()
        pressed = evicted != self._evicted_before
        unproven = self._keeper.table.unproven
        if not unproven or now - self._proved_at < (
                _PRESSED_PROVING_SECONDS if pressed else _PROVING_SECONDS):
            return
        self._evicted_before, self._proved_at = evicted, now
        with contextlib.suppress(OSError):  # the next look tells
            await self.note_flows(list(unproven))

    async def _expire(self) -> None:
        table = self._keeper.table
        now = time.monotonic()
        idle = list(table.unused_since(now - self._policy.idle_limit(len(table)),
                                       now - self._policy.unproven_limit(len(table))))
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
        before = self._addresses
        with contextlib.suppress(OSError):  # the next look tells
            self._addresses = interface_addresses()
        if self._addresses == before:
            return False
        self._host = HostAddresses(frozenset(each.address for each in self._addresses),
                                   NetworkSet({each.network for each in self._addresses}))
        return True
