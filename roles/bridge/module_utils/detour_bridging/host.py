# SPDX-License-Identifier: GPL-2.0-or-later
"""The host: its commands and files, and where we keep ours."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

WORK = Path("/var/lib/detour-tools/bridge")
SYS = Path("/sys/class/net")

Files = dict[str, tuple[str, int]]


class BridgeError(Exception):
    """What is wrong, in one line."""


def run(*command: str, check: bool = True) -> str:
    """Run a command and return what it prints; '' when it fails and ``check`` is off."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False,
                              env={**os.environ, "LC_ALL": "C"})
    except FileNotFoundError:
        if check:
            raise BridgeError(f"there is no '{command[0]}' on this host") from None
        return ""
    if done.returncode and check:
        raise BridgeError(f"'{shlex.join(command)}' failed: {done.stderr.strip()}")
    return "" if done.returncode else done.stdout


def text_of(path: str | Path) -> str | None:
    """A file's text, None when there is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return None


def active(unit: str) -> bool:
    """Whether a unit runs."""
    return run("systemctl", "is-active", unit, check=False).strip() == "active"
