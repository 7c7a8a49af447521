# SPDX-License-Identifier: GPL-2.0-or-later
"""Keeps the mapping table and the kernel's rules in step.

Everything that touches the kernel's NAT runs in one thread of its own; ``lock`` is held from a
decision on the table until the kernel has taken it, so that the two never differ in between.
"""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from random import SystemRandom
from typing import TypeVar

from detour_tools.endpoint import Endpoint, IPAddress
from detour_tools.mapping import Mapping, flow_key, of_flow_key, pair
from detour_tools.nat.base import NatBackend, NatError, Terms, tracked
from detour_tools.nat.choose import Left, choose
from detour_tools.nat.choose import others as choose_others
from detour_tools.netlink.conntrack import Conntrack
from detour_tools.server.table import Entry, MappingTable

log = logging.getLogger(__name__)

T = TypeVar("T")

# Room beyond the cap: what was taken over may exceed it.
_SLACK = 1024
_REPAIR_PAUSE = 1.0
# Requests wait for so many at most: some milliseconds.
_TAKEN_OVER_A_TURN = 500
_REMOVED_A_TURN = 512


class Keeper:
    """The table, the NAT back end, and the flows through removed mappings."""

    def __init__(self, max_mappings: int) -> None:
        self.table = MappingTable(SystemRandom())
        # What stands in the kernel and is not in the table yet, by client and remote.
        self._standing: dict[bytes, bytes] = {}
        self._adopted = False
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
        """Open the back end ``wanted``; keep what a server before us has left in the kernel.

        The table is whole after ``take_over`` only. Raises UserError, NatError.
        """
        self._terms = terms
        backend, found = await self._in_nat(choose, wanted)
        standing = {key[:4] + key[6:]: key for key in found}  # pair(), which takes half as long
        self._capacity = self._room_for(len(standing))
        if len(standing) == len(found) and await self._in_nat(
                backend.adopt, self._capacity, terms):
            self._backend, self._standing, self._adopted = backend, standing, True
            return
        others = await self._in_nat(choose_others, backend)
        for keys in (found, *(other.found for other in others)):
            self._insert(keys)
        self._backend = backend
        try:
            await self._install()
        except NatError:
            self._backend = None  # what is there stays as it is, for the next attempt
            raise
        await self._finish(others)

    async def take_over(self) -> None:
        """Bring what stands in the kernel into the table, with everybody else's turn in between.

        Nothing may be committed before. Raises NatError.
        """
        if not self._adopted:
            return
        assert self._backend is not None  # noqa: S101 - started
        whole = asyncio.ensure_future(self._in_nat(self._backend.whole))
        try:
            while self._standing:
                some = min(len(self._standing), _TAKEN_OVER_A_TURN)
                self._insert([self._standing.popitem()[1] for _ in range(some)])
                await asyncio.sleep(0)
        finally:
            is_whole = await whole
        others = await self._in_nat(choose_others, self._backend)
        for other in others:
            self._insert(other.found)
        if others or not is_whole:
            await self._install()
        await self._finish(others)

    def standing(self, client: IPAddress, remote: Endpoint) -> Mapping | None:
        """The mapping of the client to the remote that stands in the kernel, maybe before it is
        in the table.
        """
        entry = self.table.find(client, remote)
        if entry is not None:
            return entry.mapping
        found = self._standing.get(pair(flow_key(Mapping(client, 0, remote))))
        return None if found is None else of_flow_key(found)

    def _insert(self, keys: Iterable[bytes]) -> None:
        now = time.monotonic()
        for key in keys:
            self.table.insert(of_flow_key(key), now)

    async def _finish(self, others: Iterable[Left]) -> None:
        for other in others:
            await self._in_nat(other.backend.uninstall)
        if len(self.table):
            log.info("took over %d mappings of a server before", len(self.table))

    async def commit(self, new: Sequence[Entry], gone: Sequence[Entry]) -> None:
        """Bring changes of the table to the kernel; the lock must be held.

        Raises NatError after undoing them in the table.
        """
        assert self._backend is not None  # noqa: S101 - started
        add, remove = [entry.mapping for entry in new], [entry.mapping for entry in gone]
        try:
            # A thread takes longer to begin than the kernel to make a few changes.
            if len(add) + len(remove) <= self._backend.quick_changes:
                self._backend.commit(add, remove)
                await asyncio.sleep(0)  # others' turn
            else:
                await self._in_nat(self._backend.commit, add, remove)
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

    async def remove(self, entries: Sequence[Entry], still: Callable[[Entry], bool], *,
                     idle: bool = False) -> list[Mapping]:
        """Remove the entries of which ``still`` holds, then cut their flows; returns which.

        ``idle``: they have none, as a look has just shown, so that no other is needed to find them.
        Raises NatError; what was removed until then stays removed.
        """
        removed: list[Mapping] = []
        try:
            for start in range(0, len(entries), _REMOVED_A_TURN):
                async with self.lock:
                    gone = [entry for entry in entries[start:start + _REMOVED_A_TURN]
                            if self.table.holds(entry) and still(entry)]
                    for entry in gone:
                        self.table.remove(entry)
                    if gone:
                        await self.commit([], gone)
                removed += [entry.mapping for entry in gone]
        finally:
            if not idle:
                await self.cut(removed)
        return removed

    async def live(self) -> tuple[set[bytes], float]:
        """The keys of the mappings that a flow known to the kernel goes through.

        And the processor time, in seconds, that it took to find out. Raises OSError.
        """
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
            assert self._backend is not None  # noqa: S101 - started
            before, self._terms = self._terms, terms
            self._max_mappings = max_mappings
            try:
                if (dataclasses.replace(before, clients=terms.clients) != terms
                        or max_mappings + _SLACK > self._capacity):
                    await self._install()
                elif before != terms:  # to make very many mappings anew would take long
                    await self._in_nat(self._backend.admit, terms.clients)
            except NatError:
                self._terms = before  # the next reload tries again
                raise

    async def refused_flows(self) -> int:
        """How many flows the kernel refused, as there were too many."""
        if self._backend is None:
            return 0
        with contextlib.suppress(NatError):  # busy
            self._refused_flows = await self._in_nat(self._backend.refused_flows)
        return self._refused_flows

    async def dropped_requests(self) -> int:
        """How many requests the kernel dropped, as there were too many."""
        return await self._in_nat(self._backend.dropped_requests) if self._backend else 0

    async def check(self) -> None:
        """Put our rules back when somebody else has removed them."""
        async with self.lock:
            if self._backend is None:
                return
            # Several times a second: a thread's turn takes several times as long as the question.
            if (self._backend.intact() if self._backend.quick_changes else
                    await self._in_nat(self._backend.intact)):
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
        self._capacity = self._room_for(len(self.table))
        limit: int | None = None
        # Twice where the kernel tracked nothing before, and so told no limit.
        while limit != tracked():
            limit = tracked()
            await self._in_nat(self._backend.install, list(self.table.mappings()),
                               self._capacity, self._terms)

    def _room_for(self, number: int) -> int:
        return max(self._max_mappings, number) + _SLACK

    async def _in_nat(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self._nat_thread, function, *arguments)

    async def _in_flows(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self._flow_thread, function, *arguments)


def _live() -> tuple[set[bytes], float]:
    began = time.thread_time()
    with contextlib.closing(Conntrack()) as conntrack:
        return conntrack.live(), time.thread_time() - began


def _cut(mappings: Iterable[Mapping]) -> None:
    with contextlib.closing(Conntrack()) as conntrack:
        for flow in conntrack.flows(frozenset(map(flow_key, mappings))):
            conntrack.cut(flow)
