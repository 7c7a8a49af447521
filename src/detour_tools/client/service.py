# SPDX-License-Identifier: GPL-2.0-or-later
"""The client daemon: feeds the machine with events and datagrams, and performs its commands."""

import asyncio
import collections
import contextlib
import dataclasses
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, ip_address
from random import Random
from typing import Any

from detour_tools import control, mproxy, runtime, sdnotify
from detour_tools.client.given import Given, GivenDetours
from detour_tools.client.lookup import look_up
from detour_tools.client.machine import (
    Command,
    Machine,
    Note,
    SendDatagram,
    Snapshot,
)
from detour_tools.client.settings import ClientSettings
from detour_tools.endpoint import Endpoint
from detour_tools.errors import UserError
from detour_tools.log import BoundedLog
from detour_tools.netlink.inet_diag import Connection, InetDiag
from detour_tools.netlink.route import Routes
from detour_tools.pathmanager.base import (
    ConnectionClosed,
    ConnectionCreated,
    ConnectionEstablished,
    CreateSubflow,
    DetoursWanted,
    Event,
    EventsLostError,
    Offer,
    PathCommand,
    PathManager,
    SubflowClosed,
    SubflowEstablished,
)
from detour_tools.warnings import Warnings

PROGRAM = "detour-client"

# Events and datagrams handled before the event loop turns again.
_PER_TURN = 256

_DRAIN_AT_MOST = 65536

# What name servers that are there need. A connection's subflows are taken for whose they are from
# the beginning, then; but those that are not there hold nothing up.
_FIRST_LOOK_SECONDS = 2.0

_LOOK_UPS = 8

log = logging.getLogger(__name__)


class ClientService:
    """Runs a machine on a path manager until told to stop."""

    def __init__(self, detours: GivenDetours, settings: ClientSettings,
                 path_manager: PathManager) -> None:
        self._settings = settings
        self._random = Random()
        self._machine = Machine((), settings, self._random,
                                joins_by_itself=path_manager.joins_by_itself)
        self._detours = detours
        self._untried = set(detours.hopeful)
        self._all_tried = asyncio.Event()
        self._looking_up = asyncio.Semaphore(_LOOK_UPS)
        self._warnings = Warnings()
        self._path_manager = path_manager
        self._routes = Routes()
        self._diag = InetDiag()
        self._bounded = BoundedLog(log)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self._socket.bind(("0.0.0.0", 0))  # noqa: S104 - answers come to any of our addresses
        self._overruns = 0
        self._timer: asyncio.TimerHandle | None = None
        self._serving = False
        self._stopping = asyncio.Event()
        self._failed = False

    async def run(self) -> None:
        """Serve until SIGINT, SIGTERM or SIGHUP; raises UserError when it cannot start."""
        loop = asyncio.get_running_loop()
        lock = runtime.InstanceLock(PROGRAM)
        server = control.ControlServer(PROGRAM, {"status": self._status},
                                       self._settings.control_group)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._stopping.set)
        pursuits: list[asyncio.Task[None]] = []
        try:
            control.check_group(self._settings.control_group)
            self._path_manager.start()
            pursuits = [loop.create_task(self._pursue(given)) for given in self._detours.hopeful]
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_tried.wait(), _FIRST_LOOK_SECONDS)
            loop.add_reader(self._path_manager.fileno(), self._guarded(self._on_events))
            loop.add_reader(self._socket.fileno(), self._guarded(self._on_datagrams))
            self._resynchronise()
            self._serving = True
            self._warnings.put("detours", self._detours.warnings())
            await server.start()  # who may ask for the status finds all in place
            log.info("ready with the %s path manager; connections will ask %s",
                     self._path_manager.name, ", ".join(
                         str(detour.endpoint) for detour in self._machine.detours)
                     or "no detour yet")
            sdnotify.ready()
            async with sdnotify.watchdog():
                await self._stopping.wait()
            log.info("stopping; connections keep the subflows they have")
            self._perform(self._machine.stop())
        finally:
            sdnotify.stopping()
            for pursuit in pursuits:
                pursuit.cancel()
            with contextlib.suppress(ValueError, OSError):
                loop.remove_reader(self._path_manager.fileno())
                loop.remove_reader(self._socket.fileno())
            self._path_manager.stop()
            await server.stop()
            self._socket.close()
            lock.release()
        if self._failed:
            raise UserError("stopped by an error of its own, logged above", "please report it")

    # -- detours that are not used yet ---------------------------------------------------------

    async def _pursue(self, given: Given) -> None:
        """Have a detour used as soon as it can be."""
        try:
            while not await self._try(given):
                await asyncio.sleep(given.pause(self._random))
        except Exception:
            self._fail()

    async def _try(self, given: Given) -> bool:
        try:
            addresses = await self._addresses(given)
        except UserError as problem:
            self._detours.not_found(given, problem)
            endpoint = None
        else:
            endpoint = self._detours.found(given, [
                (address, self._routes.look_up(address)) for address in addresses])
        if endpoint is not None:
            self._machine.add(endpoint, given.order)
            if isinstance(given.host, str):
                log.info("detour %s is %s", given.host, endpoint)
        if self._serving:
            if endpoint is not None:
                self._drain_events()
                self._resynchronise()
            self._warnings.put("detours", self._detours.warnings())
        else:
            self._untried.discard(given)
            if not self._untried:
                self._all_tried.set()
        return endpoint is not None

    async def _addresses(self, given: Given) -> list[IPv4Address]:
        if isinstance(given.host, IPv4Address):
            return [given.host]
        async with self._looking_up:
            return await look_up(given.host)

    # -- from the kernel and the network -------------------------------------------------------

    def _on_events(self) -> None:
        for _ in range(_PER_TURN):
            try:
                events = self._path_manager.receive()
            except EventsLostError:
                self._overruns += 1
                self._bounded.warning("overrun", "the kernel had more events than we could read")
                self._drain_events()
                self._resynchronise()
                return
            if events is None:
                break
            for event in events:
                self._on_event(event)
        self._set_timer()

    def _on_event(self, event: Event) -> None:
        now = self._now()
        machine = self._machine
        if isinstance(event, ConnectionCreated):
            commands = machine.created(event, self._is_on_link(event.remote), now)
            connection = machine.connections[event.token]
            log.info("connection %08x %s -> %s created%s", event.token, event.local, event.remote,
                     f": no detour, {connection.reason_for_none}"
                     if connection.reason_for_none else "")
        elif isinstance(event, ConnectionEstablished):
            log.debug("connection %08x established", event.token)
            commands = machine.established(event, now)
        elif isinstance(event, DetoursWanted):
            log.debug("the kernel asks for detours to %s", event.remote)
            on_link = not machine.knows_remote(event.remote) and self._is_on_link(event.remote)
            commands = machine.wanted(event.remote, on_link, now)
        elif isinstance(event, ConnectionClosed):
            log.info("connection %08x closed", event.token)
            commands = machine.closed(event.token)
        elif isinstance(event, SubflowEstablished):
            log.info("connection %08x has subflow %s -> %s", event.token, event.local,
                     event.remote)
            commands = machine.subflow_established(event, now)
        else:
            log.info("connection %08x lost subflow %s -> %s%s", event.token, event.local,
                     event.remote, _why(event))
            commands = machine.subflow_closed(event, now)
        self._perform(commands)

    def _drain_events(self) -> None:
        """Handle what is left in the socket: it is older than what we are about to look at."""
        for _ in range(_DRAIN_AT_MOST):
            try:
                events = self._path_manager.receive()
            except EventsLostError:
                continue
            if events is None:
                return
            for event in events:
                self._on_event(event)

    def _on_datagrams(self) -> None:
        for _ in range(_PER_TURN):
            try:
                payload, (host, port) = self._socket.recvfrom(mproxy.MAX_DATAGRAM)
            except BlockingIOError:
                break
            except OSError as error:
                log.debug("receiving: %s", error)
                continue
            self._perform(self._machine.datagram(
                Endpoint(ip_address(host), port), payload, self._now()))
        self._set_timer()

    def _on_timer(self) -> None:
        self._timer = None
        self._perform(self._machine.tick(self._now()))
        self._set_timer()

    def _resynchronise(self) -> None:
        found = [Snapshot(
            connection.token, connection.local, connection.remote, connection.passive,
            self._is_on_link(connection.remote), connection.established,
            frozenset(subflow.remote for subflow in connection.subflows),
        ) for connection in self._diag.connections()]
        if found:
            log.info("%d connections found in the kernel", len(found))
        self._perform(self._machine.resynchronise(
            found, self._now(), self._path_manager.offered()))
        self._set_timer()

    def _is_on_link(self, remote: Endpoint) -> bool:
        return self._routes.look_up(remote.address).on_link

    # -- to the kernel and the network ---------------------------------------------------------

    def _perform(self, commands: Iterable[Command]) -> None:
        pending = collections.deque(commands)
        while pending:
            command = pending.popleft()
            if isinstance(command, SendDatagram):
                self._send(command)
            elif isinstance(command, Note):
                log.info("%s", command.text)
            else:
                pending += self._command_path_manager(command)

    def _send(self, command: SendDatagram) -> None:
        log.debug("asking %s for a mapping", command.detour)
        try:
            self._socket.sendto(command.payload,
                                (str(command.detour.address), command.detour.port))
        except OSError as error:  # as good as lost on the way: it is sent again
            self._bounded.warning("send", "cannot send to detour %s: %s", command.detour, error)

    def _command_path_manager(self, command: PathCommand) -> list[Command]:
        try:
            self._path_manager.perform(command)
        except OSError as error:
            self._bounded.warning("path manager", "the kernel did not take '%s': %s",
                                  _told(command), error.strerror)
            return self._machine.failed(command, error.errno or 0, self._now())
        level = logging.DEBUG if isinstance(command, Offer) else logging.INFO
        if log.isEnabledFor(level):
            log.log(level, "%s", _told(command))
        return []

    # -- time ----------------------------------------------------------------------------------

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _set_timer(self) -> None:
        deadline = self._machine.deadline()
        if self._timer is not None:
            if deadline is not None and self._timer.when() <= deadline:
                return
            self._timer.cancel()
            self._timer = None
        if deadline is not None:
            self._timer = asyncio.get_running_loop().call_at(deadline, self._guarded(
                self._on_timer))

    def _guarded(self, callback: Callable[[], None]) -> Callable[[], None]:
        """A callback whose failure stops the daemon in order, for systemd to start it anew."""
        def call() -> None:
            try:
                callback()
            except Exception:
                self._fail()
        return call

    def _fail(self) -> None:
        """Within an exception's handler: end in order, for systemd to start us anew."""
        log.exception("internal error")
        self._failed = True
        self._stopping.set()

    # -- status --------------------------------------------------------------------------------

    async def _status(self, _request: dict[str, Any]) -> dict[str, Any]:
        machine = self._machine
        connections = []
        for found in await asyncio.to_thread(_connections):
            known = machine.connections.get(found.token)
            connections.append({
                "token": f"{found.token:08x}",
                "local": str(found.local),
                "remote": str(found.remote),
                "no_detour_because": known.reason_for_none or None if known else None,
                "subflows": [{
                    "via": (None if subflow.remote == found.remote
                            else str(subflow.remote.address)),
                    "local": str(subflow.local),
                    "remote": str(subflow.remote),
                    "state": subflow.state,
                    "bytes_sent": subflow.bytes_sent,
                    "bytes_received": subflow.bytes_received,
                    "rtt_ms": subflow.rtt_ms,
                    "retransmissions": subflow.retransmissions,
                } for subflow in found.subflows],
            })
        return {
            "path_manager": self._path_manager.name,
            "detours": [{
                "address": str(detour.endpoint.address),
                "port": detour.endpoint.port,
                "state": detour.state.value,
                "rtt_ms": None if detour.rtt is None else round(detour.rtt * 1000, 3),
                "mappings": detour.mapping_count,
                "joins": detour.joins,
                "joins_established": detour.joins_established,
                "joins_refused": detour.joins_refused,
            } for detour in machine.detours],
            "warnings": self._warnings.all(),
            "connections": connections,
            "counters": dataclasses.asdict(machine.counters) | {"overruns": self._overruns},
        }


def _connections() -> list[Connection]:
    """For a thread of its own, as thousands of connections take a while to list."""
    with contextlib.closing(InetDiag()) as diag:
        return diag.connections()


def _told(command: PathCommand) -> str:
    if isinstance(command, CreateSubflow):
        return f"connection {command.token:08x} joins {command.remote}"
    if isinstance(command, Offer):
        return f"{command.detour} leads to {command.remote}, for {command.lifetime} s"
    return f"{command.detour} leads to {command.remote} no longer"


def _why(event: SubflowClosed) -> str:
    words = []
    if event.error:
        words.append(os.strerror(event.error))
    if event.reset_reason is not None:
        words.append(f"reset reason {event.reset_reason}")
    return f": {', '.join(words)}" if words else ""
