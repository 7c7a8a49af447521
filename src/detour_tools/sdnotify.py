# SPDX-License-Identifier: GPL-2.0-or-later
"""Telling systemd how we are (sd_notify(3)); does nothing when nobody asked."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator


def ready() -> None:
    """We serve now."""
    _notify("READY=1")


def stopping() -> None:
    """We are on our way out."""
    _notify("STOPPING=1")


@contextlib.asynccontextmanager
async def watchdog() -> AsyncIterator[None]:
    """Within it, the event loop's own turning keeps the watchdog quiet."""
    interval = _watchdog_seconds()
    task = asyncio.create_task(_beat(interval)) if interval else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()


async def _beat(interval: float) -> None:
    while True:
        _notify("WATCHDOG=1")
        await asyncio.sleep(interval)


def _watchdog_seconds() -> float:
    """How often to send a sign of life, 0 for never."""
    try:
        period = int(os.environ["WATCHDOG_USEC"]) / 1e6
        for_us = int(os.environ.get("WATCHDOG_PID", os.getpid())) == os.getpid()
    except (KeyError, ValueError):
        return 0.0
    return period / 2 if for_us else 0.0


def _notify(state: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.sendto(state.encode(), address)
