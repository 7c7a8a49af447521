# SPDX-License-Identifier: GPL-2.0-or-later
"""Output from a thread of its own, so that whoever reads it cannot hold a daemon up."""

import logging
import os
import queue
import threading
from typing import TextIO

log = logging.getLogger(__name__)

# Texts, not lines: one a batch.
_QUEUED_TEXTS = 4096
_FAREWELL_SECONDS = 1.0


class Printer:
    """Prints texts in order; what a slow or vanished reader cannot take is dropped and counted.

    It is stream enough for a logging handler.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._fd = stream.fileno()
        self.dropped_lines = 0
        self._queue: queue.Queue[str | None] = queue.Queue(_QUEUED_TEXTS)
        self._broken = False
        self._thread = threading.Thread(target=self._run, name="printer", daemon=True)
        self._thread.start()

    def print(self, text: str) -> None:
        """Print whole lines, soon."""
        try:
            if self._broken:
                raise queue.Full
            self._queue.put_nowait(text)
        except queue.Full:
            self.dropped_lines += text.count("\n")

    write = print

    def flush(self) -> None:
        """Nothing waits for what is printed."""

    def close(self) -> None:
        """Print what is left, as far as the reader lets us."""
        try:
            self._queue.put(None, timeout=_FAREWELL_SECONDS)
        except queue.Full:
            return
        self._thread.join(_FAREWELL_SECONDS)

    def _run(self) -> None:
        while (text := self._queue.get()) is not None:
            try:
                # Not by the stream: its lock, held by a write that hangs, would hold up the end.
                data = text.encode(errors="replace")
                while data:
                    data = data[os.write(self._fd, data):]
            except OSError as error:
                self._broken = True
                log.warning("cannot write to %s any more: %s", self._stream.name, error)
                return
