# SPDX-License-Identifier: GPL-2.0-or-later
"""Logging for the daemons: stderr, and no time stamps of our own under systemd."""

import atexit
import logging
import os
import sys
import time

from detour_tools.printer import Printer


def configure(verbosity: int = 0) -> None:
    """Set up the root logger; ``verbosity`` is -1 for warnings only, 0 for info, 1 for debug."""
    under_journal = "JOURNAL_STREAM" in os.environ
    printer = Printer(sys.stderr)
    atexit.register(printer.close)
    handler = logging.StreamHandler(printer)
    handler.setFormatter(logging.Formatter(
        "%(message)s" if under_journal else "%(asctime)s.%(msecs)03d %(message)s",
        datefmt="%H:%M:%S"))
    logging.raiseExceptions = False  # a reader that went away is no reason for tracebacks
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel({-1: logging.WARNING, 0: logging.INFO}.get(verbosity, logging.DEBUG))


class BoundedLog:
    """Logs at most ``burst`` lines a ``period`` (seconds) of each kind; the rest is counted.

    The next line that passes says how many were left out.
    """

    def __init__(self, logger: logging.Logger, burst: int = 5, period: float = 10.0) -> None:
        self._logger = logger
        self._burst = burst
        self._period = period
        self._windows: dict[str, tuple[float, int]] = {}  # kind -> (window start, lines seen)

    def warning(self, kind: str, message: str, *args: object) -> None:
        """Log a warning of ``kind``; kinds must be few, they are kept for ever."""
        now = time.monotonic()
        start, seen = self._windows.get(kind, (now, 0))
        left_out = 0
        if now - start >= self._period:
            left_out = max(0, seen - self._burst)
            start, seen = now, 0
        self._windows[kind] = (start, seen + 1)
        if seen < self._burst:
            if left_out:
                message += f" ({left_out} more like it were not logged)"
            self._logger.warning(message, *args)
