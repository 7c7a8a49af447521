# SPDX-License-Identifier: GPL-2.0-or-later
"""What a server does unasked: it tends its rules, and removes mappings that are not to stay."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from detour_tools.endpoint import Endpoint, IPAddress
from detour_tools.mapping import Mapping
from detour_tools.nat.base import NatError
from detour_tools.netlink.addresses import InterfaceAddress, interface_addresses
from detour_tools.netlink.route import EVERYWHERE, RouteChanges, Routes
from detour_tools.server.garbage import QuietCollector, no_collections
from detour_tools.server.keeper import Keeper
from detour_tools.server.listening import ListeningPorts
from detour_tools.server.policy import HostAddresses, NetworkSet, Policy
from detour_tools.server.table import Entry
from detour_tools.server.watch import FirewallWatch

log = logging.getLogger(__name__)

_CHECK_SECONDS = 2.0
# Where our rules keep the host from being a router; a look at whether they stand takes one part in
# so many of the time at most. Not by nf_tables' notifications: while anybody listens the kernel
# makes one of each mapping.
_GUARD_SECONDS = 0.2
_GUARD_SHARE = 10
_SWEEP_SECONDS = 15.0
# A look at the flows proves mappings; where unproven ones make room it must come before their turn.
_PROVING_SECONDS = 60.0
_PRESSED_PROVING_SECONDS = 4.0
# A look at the flows makes the kernel list them all: with 100,000 it takes 0.3 s of processor
# time. It may take one part in so many of it, and more only where room is scarce or somebody asks.
# But no longer than so many seconds lie between two: what is due must go some day, and in a flood
# what has a flow by now must be known before its turn.
_LOOKING = (400, 240.0)
_PRESSED_LOOKING = (20, 8.0)
# To look where each of 100,000 remotes is takes the best part of a second: one part in so many of
# the time at most.
_ROUTING_SHARE = 10
# Requests wait for so long at most. By the clock, as what an entry takes differs much: to look a
# route up is a system call, after which another thread that computes may go first.
_TURN_SECONDS = 0.003
# So many may pass between two looks at the clock.
_ENTRIES_A_STEP = 16


class Upkeep:
    """The server's periodic work.

    ``received`` tells how many datagrams came since the start; ``tend`` looks after the forwarding
    switch.
    """

    def __init__(self, keeper: Keeper, policy: Policy, listening: ListeningPorts,
                 firewall: FirewallWatch, received: Callable[[], int],
                 tend: Callable[[], Awaitable[None]]) -> None:
        self.expired = 0
        self._keeper = keeper
        self._policy = policy
        self._listening = listening
        self._listened_on: frozenset[int] = frozenset()
        self._looked_at = float("-inf")
        # The last that nobody asked for: who asks again and again keeps nothing from expiring.
        self._looked_unasked_at = float("-inf")
        self._look_took = 0.0
        self._firewall = firewall
        self._tend = tend
        self._received = received
        self._addresses: frozenset[InterfaceAddress] = frozenset()
        self._host = HostAddresses(frozenset(), NetworkSet(()))
        self._routes, self._route_changes = Routes(), RouteChanges()
        self._all_routes = True
        self._routes_from = float("-inf")

    def look(self) -> None:
        """Look which addresses the host has, before anybody is answered."""
        self._see_addresses()

    async def start(self) -> None:
        """Take over and sort out what stands in the kernel, before anything is made or removed.

        Raises NatError.
        """
        with no_collections():
            await self._keeper.take_over()
        await self.remove_forbidden()
        await self._remove_listened_on()
        await self._firewall.check()

    def standing(self, client: IPAddress, remote: Endpoint) -> Mapping | None:
        """The client's mapping that stands in the kernel, if it may stay by all that is known now.

        Of use before start() has ended: then the table may lack it, or have it still.
        """
        mapping = self._keeper.standing(client, remote)
        if (mapping is None or not self._addresses
                or mapping.detour_port in self._listening.now()
                or not self._policy.permits(mapping, self._host)):
            return None
        return mapping

    async def check(self) -> None:
        """Look every two seconds what others did to the host, for ever."""
        collector = QuietCollector(time.monotonic())
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            await self._tend()
            if self._see_addresses():
                await self.remove_forbidden()
            await self._remove_rerouted()
            await self._remove_listened_on()
            await self._firewall.check()
            collector.run(self._received(), time.monotonic())

    async def guard(self) -> None:
        """See that our rules stand, for ever."""
        while True:
            began = time.monotonic()
            await self._keeper.check()
            took = time.monotonic() - began
            await asyncio.sleep(_CHECK_SECONDS if self._keeper.router else
                                min(max(_GUARD_SECONDS, _GUARD_SHARE * took), _CHECK_SECONDS))

    async def sweep(self) -> None:
        """Remove idle mappings, for ever."""
        while True:
            await asyncio.sleep(min(_SWEEP_SECONDS, self._policy.rules.idle_timeout / 4))
            with contextlib.suppress(NatError, OSError):  # the next sweep tries again
                await self._expire()

    async def remove_forbidden(self) -> None:
        """Remove mappings that policy would refuse now; by their routes at the next look."""
        self._all_routes = True
        forbidden: list[Entry] = []
        async for some in _in_turns(list(self._keeper.table.entries())):
            forbidden += [entry for entry in some
                          if not self._policy.permits(entry.mapping, self._host)]
        await self._remove(forbidden, "that are not allowed any more")

    async def _remove_rerouted(self) -> None:
        """Remove mappings whose remotes' routes have changed, so that policy would refuse them."""
        if time.monotonic() < self._routes_from:
            return
        began = time.process_time()
        networks = self._route_changes.read() | ({EVERYWHERE} if self._all_routes else set())
        self._all_routes = False
        if not networks:
            return
        changed = NetworkSet(networks)
        stays: dict[Endpoint, bool] = {}
        forbidden: list[Entry] = []
        async for some in _in_turns(list(self._keeper.table.entries())):
            for entry in some:
                remote = entry.mapping.remote
                if remote not in stays:
                    stays[remote] = remote.address not in changed or (
                        self._policy.permits_by_route(entry.mapping,
                                                      self._routes.look_up(remote.address)))
                if not stays[remote]:
                    forbidden.append(entry)
        self._routes_from = time.monotonic() + _ROUTING_SHARE * (time.process_time() - began)
        await self._remove(forbidden, "whose remotes are elsewhere now")

    async def _remove_listened_on(self) -> None:
        """Remove mappings of ports that this host has begun to listen on."""
        before, self._listened_on = self._listened_on, self._listening.look()
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

    async def note_flows(self) -> None:
        """Note which mappings have flows, unless that was done just now. Raises OSError."""
        if self._may_look(pressed=True):
            await self._look(pressed=True)

    async def _look(self, *, pressed: bool) -> None:
        self._looked_at = time.monotonic()
        if not pressed:
            self._looked_unasked_at = self._looked_at
        live, took = await self._keeper.live()
        prove = self._keeper.table.prove
        async for some in _in_turns(list(self._keeper.table.entries())):
            now, began = time.monotonic(), time.thread_time()
            for entry in some:
                if entry.key in live:
                    prove(entry, now)
            took += time.thread_time() - began
        self._look_took = took

    def _may_look(self, *, pressed: bool) -> bool:
        share, longest = _PRESSED_LOOKING if pressed else _LOOKING
        last = self._looked_at if pressed else self._looked_unasked_at
        return time.monotonic() - last >= min(share * self._look_took, longest)

    async def look_before_making_room(self) -> None:
        """See that what has a flow by now makes no room, if the last look was not just before."""
        if self._may_look(pressed=True) and self._unproven_since(_PRESSED_PROVING_SECONDS):
            with contextlib.suppress(OSError):  # the next look tells
                await self._look(pressed=True)

    def _unproven_since(self, seconds: float) -> bool:
        """Whether there are unproven mappings, and no look at their flows for so long."""
        return bool(self._keeper.table.unproven) and (
            time.monotonic() - self._looked_at >= seconds)

    async def _expire(self) -> None:
        """Remove idle mappings, if there are some and a look at the flows may be taken.

        Unproven ones are a reason for that look as well: it is one for all that need it.
        """
        table = self._keeper.table
        now = time.monotonic()
        limit = self._policy.idle_limit(len(table))
        since = now - limit, now - self._policy.unproven_limit(len(table))
        pressed = limit < self._policy.rules.idle_timeout
        due = next(table.unused_since(*since), None) is not None
        if not self._may_look(pressed=pressed) or not (
                due or self._unproven_since(_PROVING_SECONDS)):
            return
        # None goes without a look at the flows just before; that look is one for all the others,
        # so that those with flows do not bring about the next.
        await self._look(pressed=pressed)
        used_at = {entry: entry.last_used for entry in table.unused_since(*since)}
        removed = await self._keeper.remove(
            list(used_at), lambda entry: entry.last_used == used_at[entry], idle=True)
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


async def _in_turns(entries: Sequence[Entry]) -> AsyncIterator[Sequence[Entry]]:
    """Some of the entries at a time, with everybody else's turn in between."""
    until = time.monotonic() + _TURN_SECONDS
    for start in range(0, len(entries), _ENTRIES_A_STEP):
        yield entries[start:start + _ENTRIES_A_STEP]
        if time.monotonic() >= until:
            await asyncio.sleep(0)
            until = time.monotonic() + _TURN_SECONDS
