# SPDX-License-Identifier: GPL-2.0-or-later
"""What stands in the way now: said once in the log when it comes and when it goes; pure."""

import logging
from collections.abc import Iterable

log = logging.getLogger(__name__)


class Warnings:
    """The warnings that hold now, by who looks for them (a firewall's reader, a sysctl's guard)."""

    def __init__(self) -> None:
        self._by_source: dict[str, tuple[str, ...]] = {}

    def put(self, source: str, texts: Iterable[str]) -> None:
        """What ``source`` finds now, in place of what it found before."""
        before = self._by_source.get(source, ())
        now = tuple(dict.fromkeys(texts))
        self._by_source[source] = now
        for text in now:
            if text not in before:
                log.warning("%s", text)
        for text in before:
            if text not in now:
                log.info("no longer so: %s", text)

    def all(self) -> list[str]:
        """All that hold now."""
        return [text for texts in self._by_source.values() for text in texts]
