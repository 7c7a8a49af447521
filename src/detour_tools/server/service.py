# SPDX-License-Identifier: GPL-2.0-or-later
"""The server: puts the parts together, starts and stops them."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from ipaddress import ip_address
from itertools import islice
from typing import Any

from detour_tools import mproxy, runtime, sdnotify
from detour_tools.control import ControlServer, check_group
from detour_tools.endpoint import IPAddress, parse_endpoint
from detour_tools.errors import UserError
from detour_tools.nat import forwarding
from detour_tools.nat.base import NatError
from detour_tools.printer import Printer
from detour_tools.server.addresses import own_addresses
from detour_tools.server.garbage import QuietCollector
from detour_tools.server.keeper import Keeper
from detour_tools.server.policy import Policy
from detour_tools.server.receiver import Receiver
from detour_tools.server.requests import Requests
from detour_tools.server.settings import RELOADABLE, Settings
from detour_tools.server.table import Entry
from detour_tools.sysctl import BorrowedSysctls

PROGRAM = "detour-server"

log = logging.getLogger(__name__)

_FORWARDING = "net.ipv4.ip_forward"
_PER_INTERFACE = "/proc/sys/net/ipv4/conf"
_CHECK_SECONDS = 2.0
_SWEEP_SECONDS = 15.0
_PAGE = 1000


class Server:
    """A detour, from start to clean-up."""

    def __init__(self, settings: Settings, load: Callable[[], Settings]) -> None:
        """``load`` reads the settings again; it raises UserError when they are bad."""
        self._settings = settings
        self._load = load
        self._stop = asyncio.Event()
        self._reload_wanted = asyncio.Event()
        self._started = time.monotonic()
        self._expired = 0
        self._policy = Policy(settings.rules)
        self._keeper = Keeper(settings.max_mappings)
        self._requests: Requests | None = None
        self._own: frozenset[IPAddress] = frozenset()

    async def run(self) -> None:
        """Serve until SIGINT or SIGTERM. Raises UserError."""
        runtime.need_capability("CAP_NET_ADMIN", PROGRAM)
        # All that the user may have got wrong comes before the rules: to fail after them would
        # cut the flows of a server before us.
        check_group(self._settings.control_group)
        loop = asyncio.get_running_loop()
        async with contextlib.AsyncExitStack() as stack:
            for number, event in ((signal.SIGINT, self._stop), (signal.SIGTERM, self._stop),
                                  (signal.SIGHUP, self._reload_wanted)):
                # Not by the loop: it would put the defaults back when it ends, and a further
                # signal could still kill us then.
                signal.signal(number, partial(_set, loop, event))
                stack.callback(signal.signal, number, signal.SIG_IGN)
            lock = runtime.InstanceLock(PROGRAM)
            stack.callback(lock.release)
            printer = Printer(sys.stdout)
            stack.callback(printer.close)
            endpoint = parse_endpoint(self._settings.listen, mproxy.PORT)
            receiver = Receiver(endpoint)
            stack.callback(receiver.close)
            self._requests = Requests(receiver, self._keeper, self._policy, printer)
            stack.callback(self._requests.close)
            await stack.enter_async_context(self._rules(printer))
            loop.add_reader(receiver.fileno(), self._requests.on_readable)
            stack.callback(loop.remove_reader, receiver.fileno())
            # Last: who sees the control socket may take the server for ready.
            control = ControlServer(PROGRAM, {
                "status": self._status, "list": self._list, "flush": self._flush,
            }, self._settings.control_group)
            await control.start()
            stack.push_async_callback(control.stop)
            log.info("serving on UDP %s with %s", endpoint, self._keeper.backend_name)
            sdnotify.ready()
            async with sdnotify.watchdog():
                await self._serve()
            sdnotify.stopping()
            log.info("stopping")

    @contextlib.asynccontextmanager
    async def _rules(self, printer: Printer) -> AsyncIterator[None]:
        sysctls = BorrowedSysctls(runtime.directory(PROGRAM) / f"{PROGRAM}.sysctls")
        try:
            # See inet_forward_change() in the kernel's net/ipv4/devinet.c.
            sysctls.set(_FORWARDING, "1", resets={
                f"net/ipv4/conf/{name}/forwarding": "0" for name in os.listdir(_PER_INTERFACE)
                if name != "all"} | {"net/ipv4/conf/all/accept_redirects": "1"})
            printer.print(f"{_FORWARDING} = 1\n")
            try:
                await self._keeper.start(self._settings.backend)
            except NatError as error:
                raise UserError(f"the kernel does not take our rules: {error}") from None
            self._see_addresses()
            await self._remove_forbidden()
            await _warn()
            yield
        finally:
            await self._keeper.stop()
            sysctls.restore()

    async def _serve(self) -> None:
        assert self._requests is not None  # noqa: S101 - made by run()
        tasks = [asyncio.create_task(work) for work in (
            self._stop.wait(), self._requests.serve(), self._check(), self._sweep(),
            self._reload_when_told())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # raises what must not be overlooked
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _check(self) -> None:
        assert self._requests is not None  # noqa: S101 - made by run()
        collector = QuietCollector(time.monotonic())
        while True:
            await asyncio.sleep(_CHECK_SECONDS)
            await self._keeper.check()
            if self._see_addresses():
                await self._remove_forbidden()
            collector.run(self._requests.counters.received, time.monotonic())

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(_SWEEP_SECONDS, self._settings.idle_timeout / 4))
            with contextlib.suppress(NatError, OSError):  # the next sweep tries again
                await self._expire()

    async def _expire(self) -> None:
        table = self._keeper.table
        limit = self._policy.idle_limit(len(table))
        idle = list(table.unused_since(time.monotonic() - limit))
        if not idle:
            return
        used_at = {entry.serial: entry.last_used for entry in idle}
        await self._note_flows(idle)
        removed = await self._keeper.remove(
            idle, lambda entry: entry.last_used == used_at[entry.serial])
        if removed:
            self._expired += len(removed)
            log.info("removed %d idle mappings", len(removed))

    async def _note_flows(self, entries: Sequence[Entry]) -> None:
        """Note which of these mappings have flows, as used now. Raises OSError."""
        live = await self._keeper.live()
        table = self._keeper.table
        for number, entry in enumerate(entries):
            if number % _PAGE == 0:
                await asyncio.sleep(0)  # requests do not wait for all of them
            if entry.mapping in live and table.holds(entry):
                table.touch(entry, time.monotonic())

    def _see_addresses(self) -> bool:
        """Look which addresses are the detour's own; whether others than before."""
        before = self._own
        with contextlib.suppress(OSError):  # the next look tells
            self._own = own_addresses()
        return self._own != before

    async def _remove_forbidden(self) -> None:
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

    async def _reload_when_told(self) -> None:
        while True:
            await self._reload_wanted.wait()
            self._reload_wanted.clear()
            await self._reload()

    async def _reload(self) -> None:
        assert self._requests is not None  # noqa: S101 - made by run()
        try:
            fresh = self._load()
        except UserError as error:
            log.error("not reloaded: %s", error)
            return
        old = self._settings
        for field in dataclasses.fields(fresh):
            if field.name not in RELOADABLE and (
                    getattr(fresh, field.name) != getattr(old, field.name)):
                log.warning("%s takes effect at the next start only",
                            field.name.replace("_", "-"))
        self._settings = dataclasses.replace(
            old, **{name: getattr(fresh, name) for name in RELOADABLE})
        self._policy.set_rules(self._settings.rules)
        self._requests.forget()
        try:
            await self._keeper.make_room(self._settings.max_mappings)
        except NatError as error:
            log.error("no room for max-mappings %d: %s", self._settings.max_mappings, error)
        await self._remove_forbidden()
        log.info("reloaded")

    async def _status(self, _: dict[str, Any]) -> dict[str, Any]:
        assert self._requests is not None  # noqa: S101 - made by run()
        settings = self._settings
        return {
            "listen": settings.listen,
            "backend": self._keeper.backend_name,
            "uptime_s": round(time.monotonic() - self._started, 1),
            "mappings": len(self._keeper.table),
            "clients": self._keeper.table.clients,
            "requests": dataclasses.asdict(self._requests.counters),
            "refused": {refusal.key: count for refusal, count in self._policy.refused.items()},
            "expired": self._expired,
            "failed_commits": self._keeper.failed_commits,
            "repairs": self._keeper.repairs,
            "unprinted": self._requests.unprinted,
            "policy": {
                "allow_client": [str(network) for network in settings.allow_client],
                "allow_remote": [str(network) for network in settings.allow_remote],
                "forbid_port": list(settings.forbid_port),
                "rate": settings.rate,
                "max_per_client": settings.max_per_client,
                "max_mappings": settings.max_mappings,
                "idle_timeout": settings.idle_timeout,
            },
        }

    async def _list(self, request: dict[str, Any]) -> dict[str, Any]:
        # By pages: the answer with all of them would keep requests waiting.
        after = request.get("after", 0)
        if not isinstance(after, int):
            raise UserError("'after' must be a number")
        if after == 0:
            with contextlib.suppress(OSError):  # it is as it was at the last sweep then
                await self._note_flows(list(self._keeper.table.entries()))
        now = time.monotonic()
        page = list(islice(self._keeper.table.entries(after), _PAGE))
        return {
            "mappings": [{
                "client": str(entry.mapping.client),
                "detour_port": entry.mapping.detour_port,
                "remote": str(entry.mapping.remote),
                "unused_s": round(now - entry.last_used, 1),
            } for entry in page],
            "next": page[-1].serial if len(page) == _PAGE else None,
        }

    async def _flush(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            client = ip_address(request["client"]) if request.get("client") else None
        except ValueError:
            raise UserError(f"'{request['client']}' is not an IP address") from None
        remote = parse_endpoint(str(request["remote"])) if request.get("remote") else None

        def wanted(entry: Entry) -> bool:
            return ((client is None or entry.mapping.client == client)
                    and (remote is None or entry.mapping.remote == remote))

        try:
            removed = await self._keeper.remove(
                [entry for entry in self._keeper.table.entries() if wanted(entry)],
                lambda _: True)
        except NatError as error:
            raise UserError(f"the kernel does not take the change: {error}") from None
        if removed:
            log.info("flushed %d mappings", len(removed))
        return {"flushed": len(removed)}


async def _warn() -> None:
    """Say what stands in the way of detoured packets; whatever fails here is no harm."""
    try:
        warnings = await asyncio.to_thread(forwarding.warnings)
    except Exception as error:  # other people's rules may be anything
        log.warning("cannot tell whether a firewall drops detoured packets: %s", error)
        return
    for warning in warnings:
        log.warning("%s", warning)


def _set(loop: asyncio.AbstractEventLoop, event: asyncio.Event, *_: object) -> None:
    loop.call_soon_threadsafe(event.set)
