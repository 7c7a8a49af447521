# SPDX-License-Identifier: GPL-2.0-or-later
"""The local control socket of a running daemon: one JSON object a line, each way.

The socket lies in the network namespace's runtime folder and is open to root and, if one is
named, one group. A request is ``{"command": NAME, ...}``; the answer ``{"result": ...}`` or
``{"error": TEXT}``.
"""

import asyncio
import grp
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from detour_tools import runtime
from detour_tools.errors import UserError

log = logging.getLogger(__name__)

Handler = Callable[[dict[str, Any]], Awaitable[Any]]

_LINE_LIMIT = 64 * 1024
_IDLE_SECONDS = 10.0
_UNITS = Path("/etc/systemd/system")


def socket_path(program: str) -> Path:
    """Where ``program`` listens in this network namespace."""
    return runtime.directory(program) / f"{program}.sock"


def check_group(name: str | None) -> int:
    """The number of a control group, -1 for none; raises UserError when it does not exist."""
    try:
        return grp.getgrnam(name).gr_gid if name else -1
    except KeyError:
        raise UserError(f"there is no group '{name}'", "see --control-group", status=2) from None


class ControlServer:
    """Serves ``handlers`` (by command name) on the control socket of ``program``."""

    def __init__(self, program: str, handlers: dict[str, Handler], group: str | None) -> None:
        self._program = program
        self._path = socket_path(program)
        self._handlers = handlers
        self._group = group
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen; raises UserError when the group does not exist."""
        gid = check_group(self._group)
        runtime.make_directory(self._program)
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        old_mask = os.umask(0o177)
        try:
            listener.bind(str(self._path))
        finally:
            os.umask(old_mask)
        if gid >= 0:
            os.chown(self._path, -1, gid)
            self._path.chmod(0o660)
        self._server = await asyncio.start_unix_server(
            self._serve, sock=listener, limit=_LINE_LIMIT)

    async def stop(self) -> None:
        """Stop listening and remove the socket."""
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await asyncio.wait_for(reader.readline(), _IDLE_SECONDS):
                writer.write(json.dumps(await self._answer(line)).encode() + b"\n")
                await asyncio.wait_for(writer.drain(), _IDLE_SECONDS)
        except (OSError, ValueError, TimeoutError) as error:
            log.debug("control connection ended: %s", error)
            writer.transport.abort()  # with what it does not read
        finally:
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            handler = self._handlers[request["command"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            return {"error": "unknown command"}
        try:
            return {"result": await handler(request)}
        except UserError as error:
            return {"error": str(error)}


def _how_to_start(program: str) -> str:
    if (_UNITS / f"{program}.service").exists():  # as the Ansible roles make it
        return f"systemctl start {program}; journalctl -u {program} tells why it ended"
    return "start it first"


def call(program: str, command: str, **arguments: Any) -> Any:
    """Ask the ``program`` running in this network namespace; returns its result.

    Raises UserError when none runs here, when we may not ask it, or with what it refused.
    """
    path = socket_path(program)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_IDLE_SECONDS)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            raise UserError(f"no {program} runs in this network namespace",
                            _how_to_start(program)) from None
        except PermissionError:
            raise UserError(f"may not speak to {program}",
                            "run it as root or as a member of its control group") from None
        try:
            with connection.makefile("rwb") as stream:
                stream.write(json.dumps({"command": command, **arguments}).encode() + b"\n")
                stream.flush()
                answer = json.loads(stream.readline() or b"{}")
        except (OSError, ValueError) as error:
            raise UserError(f"{program} did not answer: {error}") from None
    if "error" in answer:
        raise UserError(answer["error"])
    if "result" not in answer:
        raise UserError(f"{program} ended while it was asked")
    return answer["result"]
