# SPDX-License-Identifier: GPL-2.0-or-later
"""The local control socket of a running daemon: one JSON object a line, each way.

The socket lies in the network namespace's runtime folder and is open to root and, if one is
named, one group. A request is ``{"command": NAME, ...}``; the answer ``{"result": ...}`` or
``{"error": TEXT}``.
"""

import asyncio
import contextlib
import grp
import json
import logging
import os
import re
import socket
import stat
import struct
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from detour_tools import runtime
from detour_tools.errors import UserError

log = logging.getLogger(__name__)

Handler = Callable[[dict[str, Any]], Awaitable[Any]]

_LINE_LIMIT = 64 * 1024
# Of all requests of a connection, and of an answer.
_SECONDS = 10.0
_CONNECTIONS = 16
# A page of mappings takes some 120 KiB.
_ANSWER_LIMIT = 16 << 20
# struct ucred: pid, uid, gid (unix(7), SO_PEERCRED)
_UCRED = struct.Struct("=iII")
# C0, DEL, C1 and what turns the direction of writing: a terminal obeys them. Half of a pair of
# UTF-16 cannot be written at all.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
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
        self._connections = 0

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
        self._connections += 1
        try:
            if self._connections > _CONNECTIONS:
                writer.write(_line({"error": "too many ask at once: try again"}))
            else:
                await self._converse(reader, writer)
        except (OSError, ValueError, TimeoutError) as error:
            log.debug("control connection ended: %s", error)
            writer.transport.abort()  # with what it does not read
        finally:
            self._connections -= 1
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Who sends nothing, or bit by bit, has a place for so long and no longer.
        now = asyncio.get_running_loop().time
        deadline = now() + _SECONDS
        while line := await asyncio.wait_for(reader.readline(), deadline - now()):
            began = now()
            writer.write(_line(await self._answer(line)))
            deadline += now() - began  # our own time is not his
            await asyncio.wait_for(writer.drain(), _SECONDS)

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
        except Exception:
            log.exception("cannot answer %r", request["command"])
            return {"error": f"{self._program} failed to answer: its log tells why"}


def _line(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer).encode() + b"\n"


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
        connection.settimeout(_SECONDS)
        try:
            connection.connect(str(path))
            _check_peer(connection, path)
        except (FileNotFoundError, ConnectionRefusedError):
            raise UserError(f"no {program} runs in this network namespace",
                            _how_to_start(program)) from None
        except PermissionError:
            raise UserError(f"may not speak to {program}",
                            "run it as root or as a member of its control group") from None
        except OSError as error:
            raise UserError(f"{program} did not answer: {error}") from None
        try:
            # Who is too busy says so without reading, and is gone then.
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
            line = (_read_line(connection) or b"{}").decode()
            escaped = answer = json.loads(line)
            # Nothing to write out, and very many texts, in a page of mappings.
            if not (line.isascii() and line[:-1].isprintable() and "\\" not in line):
                escaped = _escaped(answer)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{program} did not answer: {_escaped(str(error))}") from None
    if not isinstance(escaped, dict):
        raise _no_answer(program)
    if "error" in escaped:
        raise UserError(str(escaped["error"]))
    if "result" not in escaped:
        raise UserError(f"{program} ended while it was asked")
    return escaped["result"]


@contextlib.contextmanager
def understood(program: str) -> Iterator[None]:
    """What is made of a result of call() here raises UserError if that lacks what it should have.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        raise _no_answer(program) from None


def _no_answer(program: str) -> UserError:
    return UserError(f"{program} gave an answer that is none",
                     "it may be of another version: restart it")


def _check_peer(connection: socket.socket, path: Path) -> None:
    """Raise UserError unless root, we ourselves or the folder's owner answer."""
    _, uid, _ = _UCRED.unpack(connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    folder = path.parent.lstat()
    if not stat.S_ISDIR(folder.st_mode):
        raise UserError(f"{path.parent} is no folder",
                        "nothing was asked; find out who put it there")
    if uid not in (0, os.geteuid(), folder.st_uid):
        raise UserError(f"user {uid} answers at {path}, whose folder is another's",
                        "nothing was asked; find out how that came about")


def _read_line(connection: socket.socket) -> bytes:
    """A line of at most _ANSWER_LIMIT bytes that is whole in time. Raises OSError, ValueError."""
    deadline = time.monotonic() + _SECONDS
    found = bytearray()
    while not found.endswith(b"\n"):
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        part = connection.recv(1 << 16)
        if not part:
            break
        found += part
        if len(found) > _ANSWER_LIMIT:
            raise ValueError("the answer is too long")
    return bytes(found)


def _escaped(value: Any) -> Any:
    """The same with what a terminal would obey written out, in all texts."""
    if isinstance(value, str):
        return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), value)
    if isinstance(value, list):
        return [_escaped(each) for each in value]
    if isinstance(value, dict):
        return {_escaped(key): _escaped(each) for key, each in value.items()}
    return value
