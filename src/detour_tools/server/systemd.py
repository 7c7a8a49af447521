# SPDX-License-Identifier: GPL-2.0-or-later
"""sd_notify(3): tell systemd, if that started us, how we are."""

import contextlib
import os
import socket


def notify(state: str) -> None:
    """Send ``READY=1`` and the like; without systemd, or when it does not listen, nothing."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    if path.startswith("@"):  # the abstract namespace
        path = "\0" + path[1:]
    with (contextlib.suppress(OSError),
          socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection):
        connection.connect(path)
        connection.send(state.encode())


def watchdog_seconds() -> float | None:
    """How often to send ``WATCHDOG=1``, None for never."""
    try:
        period = int(os.environ["WATCHDOG_USEC"]) / 1e6
        pid = int(os.environ.get("WATCHDOG_PID", os.getpid()))
    except (KeyError, ValueError):
        return None
    return period / 2 if pid == os.getpid() else None
