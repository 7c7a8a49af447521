# SPDX-License-Identifier: GPL-2.0-or-later
"""Remembers which table of ours stands in the kernel, and what it was made of.

So that the next server, after a kill, takes over a table as it stands, instead of making very many
elements anew; unless this release would make another one, or somebody changed it.
"""

import contextlib
import hashlib
import os
from pathlib import Path

from detour_tools import runtime

_PROGRAM = "detour-server"


def remember(text: str, digest: bytes | None) -> None:
    """Note that the table of this digest was made of this text."""
    forget()
    if digest is None:
        return
    with contextlib.suppress(OSError):  # the next server makes its table anew then
        fd = os.open(_path(), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="ascii") as stream:
            stream.write(_line(text, digest))


def is_remembered(text: str, digest: bytes | None) -> bool:
    """Whether the table that was made last has this digest, and was made of this text."""
    if digest is None:
        return False
    try:
        return _path().read_text(encoding="ascii") == _line(text, digest)
    except (OSError, ValueError):
        return False


def forget() -> None:
    """There is no such table any more."""
    with contextlib.suppress(OSError):
        _path().unlink(missing_ok=True)


def _path() -> Path:
    return runtime.directory(_PROGRAM) / f"{_PROGRAM}.table"


def _line(text: str, digest: bytes) -> str:
    return f"{hashlib.sha256(text.encode()).hexdigest()} {digest.hex()}\n"
