# SPDX-License-Identifier: GPL-2.0-or-later
"""Garbage collection at quiet times.

Python's full collections go through every object: with 60,000 mappings they were seen to hold
all requests up for 150 ms. Mappings make no reference cycles, and little else here does.
"""

import contextlib
import gc
from collections.abc import Iterator

_NEVER = 1 << 30
_PERIOD = 3600.0


class QuietCollector:
    """Leaves full collections to ``run``; those of young objects go on as ever."""

    def __init__(self, now: float) -> None:
        young, middle, _ = gc.get_threshold()
        gc.set_threshold(young, middle, _NEVER)
        self._last_run = now
        self._last_work = 0

    def run(self, work: int, now: float) -> None:
        """Collect if it is time (in seconds) to, and ``work`` is what it was at the last call."""
        quiet = work == self._last_work
        self._last_work = work
        if quiet and now - self._last_run >= _PERIOD:
            self._last_run = now
            gc.collect()


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """For a block that makes very many objects, all of which are to stay."""
    gc.disable()
    try:
        yield
    finally:
        # They are old at once: the collections of young objects to come would go through them all,
        # and with 100,000 mappings two of these took a tenth of a second each.
        gc.freeze()
        gc.unfreeze()
        gc.enable()
