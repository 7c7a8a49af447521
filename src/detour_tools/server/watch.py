# SPDX-License-Identifier: GPL-2.0-or-later
"""Watches the host's firewall while a server runs, for what comes to stand in its way."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable

from detour_tools.endpoint import Network
from detour_tools.firewall import look
from detour_tools.netlink.nf_tables import NfTables
from detour_tools.warnings import Warnings

# Our own commits change the generation as well, so that under load there is a look every so often.
_AT_MOST_EVERY = 5.0
# Legacy iptables has no generation.
_AT_LEAST_EVERY = 60.0


class FirewallWatch:
    """Looks at the rules again when they may be others. ``sources`` are the clients', if known."""

    def __init__(self, port: int, sources: Callable[[], Iterable[Network]],
                 warnings: Warnings) -> None:
        self._port = port
        self._sources = sources
        self._warnings = warnings
        self._looked_at: float | None = None
        self._seen: object = None
        self._netlink: NfTables | None = None
        with contextlib.suppress(OSError):  # a kernel without nf_tables
            self._netlink = NfTables()

    async def check(self) -> None:
        """Look, if the rule set's generation is another one and the last look not too recent.

        Whatever fails here is no harm.
        """
        now, sources = time.monotonic(), tuple(self._sources())
        seen = (self._generation(), sources)  # a reload may have changed the clients
        if self._looked_at is not None and now - self._looked_at < (
                _AT_LEAST_EVERY if seen == self._seen else _AT_MOST_EVERY):
            return
        # Before the look: what changes meanwhile is for the next one.
        self._looked_at, self._seen = now, seen
        try:
            found = await asyncio.to_thread(look.warnings, self._port, sources)
        except Exception as error:  # other people's rules may be anything
            found = [f"cannot tell whether a firewall drops detoured packets: {error}"]
        self._warnings.put("firewall", found)

    def _generation(self) -> int | None:
        with contextlib.suppress(OSError):
            return self._netlink.generation() if self._netlink else None
        return None
