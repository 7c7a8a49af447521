# SPDX-License-Identifier: GPL-2.0-or-later
"""Standard output from a thread of its own, so that whoever reads it cannot hold the server up."""

import logging
import queue
import sys
import threading

log = logging.getLogger(__name__)

# Texts, not lines: one a batch.
_QUEUED_TEXTS = 4096
_FAREWELL_SECONDS = 2.0


class Printer:
    """Prints texts in order; what a slow or vanished reader cannot take is dropped and counted."""

    def __init__(self) -> None:
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
                sys.stdout.write(text)
                sys.stdout.flush()
            except (OSError, ValueError) as error:
                self._broken = True
                log.warning("cannot print requests any more: %s", error)
                return
