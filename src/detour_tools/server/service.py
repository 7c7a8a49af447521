# SPDX-License-Identifier: GPL-2.0-or-later
"""The server: puts the parts together, starts and stops them."""

import asyncio
import contextlib
import dataclasses
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from detour_tools import mproxy, runtime, sdnotify
from detour_tools.control import ControlServer, check_group
from detour_tools.endpoint import parse_endpoint
from detour_tools.errors import UserError
from detour_tools.nat.base import NatError, Terms
from detour_tools.printer import Printer
from detour_tools.server.commands import Commands
from detour_tools.server.forwarding import FORWARDING, ForwardingSwitch
from detour_tools.server.garbage import no_collections
from detour_tools.server.keeper import Keeper
from detour_tools.server.listening import ListeningPorts
from detour_tools.server.policy import Policy
from detour_tools.server.receiver import Receiver
from detour_tools.server.requests import Requests
from detour_tools.server.settings import RELOADABLE, Settings
from detour_tools.server.status import Counters, PolicyStatus, Status
from detour_tools.server.upkeep import Upkeep
from detour_tools.server.watch import FirewallWatch
from detour_tools.warnings import Warnings

PROGRAM = "detour-server"

log = logging.getLogger(__name__)


class Server:
    """A detour, from start to clean-up."""

    def __init__(self, settings: Settings, load: Callable[[], Settings]) -> None:
        """``load`` reads the settings again; it raises UserError when they are bad."""
        self._settings = settings
        self._load = load
        self._stop = asyncio.Event()
        self._reload_wanted = asyncio.Event()
        self._started = time.monotonic()
        self._policy = Policy(settings.rules)
        self._keeper = Keeper(settings.max_mappings)
        self._router = True
        self._warnings = Warnings()
        self._requests: Requests | None = None
        self._switch: ForwardingSwitch | None = None
        firewall = FirewallWatch(parse_endpoint(settings.listen, mproxy.PORT).port,
                                 lambda: self._settings.allow_client or (), self._warnings)
        self._listening = ListeningPorts()
        self._upkeep = Upkeep(self._keeper, self._policy, self._listening, firewall,
                              lambda: self._counters().received, self._tend)

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
            stack.callback(self._listening.close)
            self._requests = Requests(receiver, self._keeper, self._policy, self._listening,
                                      self._upkeep.standing,
                                      self._upkeep.look_before_making_room, printer)
            stack.callback(self._requests.close)
            await stack.enter_async_context(self._rules(printer))
            # From here on whoever asks for what a server before us has left gets an answer.
            loop.add_reader(receiver.fileno(), self._requests.on_readable)
            stack.callback(loop.remove_reader, receiver.fileno())
            await self._tidy()
            # Last: who sees the control socket may take the server for ready.
            commands = Commands(self._keeper, self._upkeep)
            control = ControlServer(PROGRAM, {
                "status": self._status, "list": commands.list, "flush": commands.flush,
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
        self._switch = switch = ForwardingSwitch(PROGRAM)
        try:
            # The rules keep the host from being a router, so it is to forward with them only.
            self._router = switch.was_on()
            try:
                with no_collections():
                    await self._keeper.start(self._settings.backend, self._terms())
            except NatError as error:
                raise UserError(f"the kernel does not take our rules: {error}") from None
            switch.on()
            printer.print(f"{FORWARDING} = 1\n")
            self._upkeep.look()
            yield
        finally:
            switch.put_back()
            await self._keeper.stop()

    async def _tidy(self) -> None:
        try:
            await self._upkeep.start()
        except NatError as error:
            raise UserError(f"the kernel does not take our rules: {error}") from None

    async def _tend(self) -> None:
        if self._switch is not None:
            self._warnings.put("forwarding", self._switch.tend(time.monotonic()))
        if self._requests is not None:
            self._warnings.put("flood", self._requests.tend(
                await self._keeper.dropped_requests()))

    def _terms(self) -> Terms:
        return self._settings.terms(router=self._router)

    def _counters(self) -> Counters:
        return self._requests.counters if self._requests else Counters()

    async def _serve(self) -> None:
        assert self._requests is not None  # noqa: S101 - made by run()
        tasks = [asyncio.create_task(work) for work in (
            self._stop.wait(), self._requests.serve(), self._upkeep.check(),
            self._upkeep.guard(), self._upkeep.sweep(), self._reload_when_told())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # raises what must not be overlooked
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

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
            await self._keeper.adapt(self._settings.max_mappings, self._terms())
        except NatError as error:
            log.error("the kernel does not take rules for the new settings: %s", error)
        await self._upkeep.remove_forbidden()
        log.info("reloaded")

    async def _status(self, _: dict[str, Any]) -> dict[str, Any]:
        assert self._requests is not None  # noqa: S101 - made by run()
        settings = self._settings
        return Status(
            listen=settings.listen,
            backend=self._keeper.backend_name,
            uptime_s=round(time.monotonic() - self._started, 1),
            mappings=len(self._keeper.table),
            clients=self._keeper.table.clients,
            requests=dataclasses.asdict(self._requests.counters),
            refused={refusal.key: count for refusal, count in self._policy.refused.items()},
            refused_flows=await self._keeper.refused_flows(),
            expired=self._upkeep.expired,
            failed_commits=self._keeper.failed_commits,
            repairs=self._keeper.repairs,
            unprinted=self._requests.unprinted,
            policy=PolicyStatus(
                relay=settings.relay,
                allow_client=(None if settings.allow_client is None
                              else tuple(map(str, settings.allow_client))),
                allow_remote=tuple(map(str, settings.allow_remote)),
                deny_remote=tuple(map(str, settings.deny_remote)),
                deny_port=settings.deny_port,
                own_address=tuple(map(str, settings.own_address)),
                forbid_port=settings.forbid_port,
                rate=settings.rate,
                max_per_client=settings.max_per_client,
                max_mappings=settings.max_mappings,
                idle_timeout=settings.idle_timeout,
                max_flows_per_client=settings.max_flows_per_client,
                max_flows=self._terms().all_flows,
                router=self._terms().router),
            warnings=tuple(self._warnings.all()),
        ).as_json()


def _set(loop: asyncio.AbstractEventLoop, event: asyncio.Event, *_: object) -> None:
    loop.call_soon_threadsafe(event.set)
