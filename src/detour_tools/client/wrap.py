# SPDX-License-Identifier: GPL-2.0-or-later
"""Running an unmodified program over MPTCP: mptcpize's preloaded library, and Go's own switch."""

import os
import shutil
import stat
import struct
import sys
from pathlib import Path
from typing import NoReturn

from detour_tools.errors import UserError

_PT_INTERP = 3


def exec_over_mptcp(command: list[str]) -> NoReturn:
    """Become ``command``, its TCP sockets made MPTCP ones; raises UserError when that fails."""
    program = shutil.which(command[0])
    if program is None:
        raise UserError(f"{command[0]}: no such program, or not executable", status=127)
    mptcpize = shutil.which("mptcpize")
    if mptcpize is None:
        raise UserError("mptcpize is not installed", "apt install mptcpize")
    obstacle = why_not_wrapped(Path(program))
    if obstacle:
        print(f"detour-client: {command[0]} {obstacle}", file=sys.stderr)
    settings = [part for part in os.environ.get("GODEBUG", "").split(",") if part]
    os.environ["GODEBUG"] = ",".join([*settings, "multipathtcp=1"])
    try:
        os.execv(mptcpize, [mptcpize, "run", program, *command[1:]])  # noqa: S606
    except OSError as error:
        raise UserError(f"cannot run {mptcpize}: {error.strerror}", status=126) from None


def why_not_wrapped(program: Path) -> str:
    """Why a preloaded library does not reach the program; empty when it does."""
    try:
        mode = program.stat().st_mode
        with program.open("rb") as stream:
            head = stream.read(64 * 1024)
    except OSError:
        return ""
    if mode & (stat.S_ISUID | stat.S_ISGID) and os.geteuid() != 0:
        return "is set-uid: it will use plain TCP"
    if _is_static_elf(head):
        return "is statically linked: it will use plain TCP, unless it is a Go program"
    return ""


def _is_static_elf(head: bytes) -> bool:
    """Whether it is a 64-bit ELF executable without an interpreter (elf(5))."""
    if len(head) < 64 or head[:5] != b"\x7fELF\x02":
        return False
    order = "<" if head[5] == 1 else ">"
    offset, = struct.unpack_from(order + "Q", head, 32)
    size, count = struct.unpack_from(order + "HH", head, 54)
    kinds = [struct.unpack_from(order + "I", head, offset + index * size)[0]
             for index in range(count) if offset + index * size + 4 <= len(head)]
    return _PT_INTERP not in kinds
