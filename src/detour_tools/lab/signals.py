# SPDX-License-Identifier: GPL-2.0-or-later
"""What signals do within a block; afterwards they do what they did before."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def taken(handler: Callable[[int, FrameType | None], None], *signums: int) -> Iterator[None]:
    """``handler`` takes these signals, but for those that are ignored: nohup stays nohup."""
    before = {signum: signal.signal(signum, handler) for signum in signums
              if signal.getsignal(signum) != signal.SIG_IGN}
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


@contextmanager
def leading_out() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as SIGINT does: by an exception, with status 128 + n."""
    def leave(signum: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    with taken(leave, signal.SIGTERM, signal.SIGHUP):
        yield


@contextmanager
def held_back() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP take effect after the block."""
    if threading.current_thread() is not threading.main_thread():  # no handler runs here
        yield
        return
    caught: list[int] = []
    try:
        with taken(lambda signum, _: caught.append(signum),
                   signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            yield
    finally:
        for signum in caught:
            signal.raise_signal(signum)
