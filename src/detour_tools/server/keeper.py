# SPDX-License-Identifier: GPL-2.0-or-later
"""Keeps the mapping table and the kernel's rules in step.

Everything that touches the kernel's NAT runs in one thread of its own; ``lock`` is held from a
decision on the table until the kernel has taken it, so that the two never differ in between.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from random import SystemRandom
from typing import TypeVar

from detour_tools.mapping import Mapping, flow_key
from detour_tools.nat.base import NatBackend, NatError, Terms
from detour_tools.nat.choose import choose
from detour_tools.netlink.conntrack import Conntrack
from detour_tools.server.table import Entry, MappingTable

log = logging.getLogger(__name__)

T = TypeVar("T")

# Room beyond the cap: what was taken over may exceed it.
_SLACK = 1024
_REPAIR_PAUSE = 1.0


class Keeper:
    """The table, the NAT back end, and the flows through removed mappings."""

    def __init__(self, max_mappings: int) -> None:
        self.table = MappingTable(SystemRandom())
        self.lock = asyncio.Lock()
        self.failed_commits = 0
        self.repairs = 0
        self._max_mappings = max_mappings
        self._terms = Terms()
        self._capacity = 0
        self._backend: NatBackend | None = None
        self._last_repair = float("-inf")
        self._refused_flows = 0
        self._nat_thread = ThreadPoolExecutor(1, "nat")
        # Apart from the other, so that a long look at the flows holds no request up.
        self._flow_thread = ThreadPoolExecutor(1, "flows")

    @property
    def backend_name(self) -> str:
        """The back end in use."""
        return self._backend.name if self._backend else ""

    @property
    def router(self) -> bool:
        """Whether the host forwards other packets than those of mapped flows."""
        return self._terms.router

    async def start(self, wanted: str, terms: Terms) -> None:
        """Open the back end ``wanted``; take over what a server before us has left in the kernel.

        Raises UserError, NatError.
        """
        chosen = await self._in_nat(choose, wanted)
        now = time.monotonic()
        taken = sum(self.table.insert(mapping, now) is not None for mapping in chosen.found)
        self._backend = chosen.backend
        self._terms = terms
        try:
            await self._install()
        except NatError:
            self._backend = None  # what is there stays as it is, for the next attempt
            raise
        for other in chosen.others:
            await self._in_nat(other.uninstall)
        if taken:
            log.info("took over %d mappings of a server before", taken)

    async def commit(self, new: Sequence[Entry], gone: Sequence[Entry]) -> None:
        """Bring changes of the table to the kernel; the lock must be held.

        Raises NatError after undoing them in the table.
        """
        assert self._backend is not None  # noqa: S101 - started
        try:
            await self._in_nat(self._backend.commit, [entry.mapping for entry in new],
                               [entry.mapping for entry in gone])
        except NatError as error:
            self.failed_commits += 1
            try:
                await self._repair(f"the kernel refused a change ({error})")
            except NatError:
                for entry in new:
                    self.table.remove(entry)
                for entry in gone:
                    self.table.insert(entry.mapping, time.monotonic())
                raise error from None

    async def remove(self, entries: Sequence[Entry], still: Callable[[Entry], bool],
                     at_once: int = 512) -> list[Mapping]:
        """Remove the entries of which ``still`` holds, then cut their flows; returns which.

        Raises NatError; what was removed until then stays removed.
        """
        removed: list[Mapping] = []
        try:
            for start in range(0, len(entries), at_once):
                async with self.lock:
                    gone = [entry for entry in entries[start:start + at_once]
                            if self.table.holds(entry) and still(entry)]
                    for entry in gone:
                        self.table.remove(entry)
                    if gone:
                        await self.commit([], gone)
                removed += [entry.mapping for entry in gone]
        finally:
            await self.cut(removed)
        return removed

    async def live(self) -> set[bytes]:
        """The keys of the mappings that a flow known to the kernel goes through."""
        return await self._in_flows(_live)

    async def cut(self, mappings: Iterable[Mapping]) -> None:
        """Cut the flows through mappings that are no more."""
        wanted = list(mappings)
        try:
            if wanted:
                await self._in_flows(_cut, wanted)
        except OSError as error:
            log.warning("cannot cut flows: %s", error.strerror)

    async def adapt(self, max_mappings: int, terms: Terms) -> None:
        """See that the kernel has room for so many, on these terms. Raises NatError."""
        async with self.lock:
            other = terms != self._terms
            self._max_mappings, self._terms = max_mappings, terms
            if other or max_mappings + _SLACK > self._capacity:
                await self._install()

    async def refused_flows(self) -> int:
        """How many flows the kernel refused, as there were too many."""
        if self._backend is None:
            return 0
        with contextlib.suppress(NatError):  # busy
            self._refused_flows = await self._in_nat(self._backend.refused_flows)
        return self._refused_flows

    async def check(self) -> None:
        """Put our rules back when somebody else has removed them."""
        async with self.lock:
            if self._backend is None or await self._in_nat(self._backend.intact):
                return
            try:
                await self._repair("somebody removed our rules")
            except NatError as error:
                log.error("cannot put our rules back: %s", error)

    async def stop(self) -> None:
        """Remove our rules, and cut the flows that went through them."""
        async with self.lock:
            if self._backend is not None:
                try:
                    await self._in_nat(self._backend.uninstall)
                except NatError as error:
                    log.error("cannot remove our %s rules: %s", self._backend.name, error)
                await self.cut(self.table.mappings())
        self._nat_thread.shutdown()
        self._flow_thread.shutdown()

    async def _repair(self, reason: str) -> None:
        now = time.monotonic()
        if now - self._last_repair < _REPAIR_PAUSE:
            raise NatError(reason)
        self._last_repair = now
        await self._install()
        self.repairs += 1
        log.warning("%s: made them anew, with %d mappings", reason, len(self.table))

    async def _install(self) -> None:
        assert self._backend is not None  # noqa: S101 - started
        self._capacity = max(self._max_mappings, len(self.table)) + _SLACK
        limit: int | None = None
        # Twice where the kernel tracked nothing before, and so told no limit.
        while limit != self._terms.all_flows:
            limit = self._terms.all_flows
            await self._in_nat(self._backend.install, list(self.table.mappings()),
                               self._capacity, self._terms)

    async def _in_nat(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self._nat_thread, function, *arguments)

    async def _in_flows(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self._flow_thread, function, *arguments)


def _live() -> set[bytes]:
    with contextlib.closing(Conntrack()) as conntrack:
        return conntrack.live()


def _cut(mappings: Iterable[Mapping]) -> None:
    with contextlib.closing(Conntrack()) as conntrack:
        for flow in conntrack.flows(frozenset(map(flow_key, mappings))):
            conntrack.cut(flow)
