# SPDX-License-Identifier: GPL-2.0-or-later
"""What a running server answers on its control socket: list and flush; status is the service's."""

import contextlib
import logging
import time
from ipaddress import ip_address
from itertools import islice
from socket import inet_ntoa
from typing import Any

from detour_tools.endpoint import parse_endpoint
from detour_tools.errors import UserError
from detour_tools.nat.base import NatError
from detour_tools.server.keeper import Keeper
from detour_tools.server.table import Entry
from detour_tools.server.upkeep import Upkeep

log = logging.getLogger(__name__)

# Requests wait for so many at most: some milliseconds.
_PAGE = 4000
# Of a mapping in an answer: names to each would take longer than all the rest.
COLUMNS = ("client", "detour_port", "remote", "unused_s")


class Commands:
    """Commands on the mappings. All raise UserError."""

    def __init__(self, keeper: Keeper, upkeep: Upkeep) -> None:
        self._keeper = keeper
        self._upkeep = upkeep

    async def list(self, request: dict[str, Any]) -> dict[str, Any]:
        """A page of the mappings, those after serial number ``after``, up to ``until``.

        Without ``until``, and so on the first page, it is the newest mapping's; each page tells it.
        """
        # By pages: the answer with all of them would keep requests waiting.
        after = request.get("after", 0)
        # What is made while somebody lists is not listed, or the list might never end.
        until = request.get("until", self._keeper.table.newest)
        if not isinstance(after, int) or not isinstance(until, int):
            raise UserError("'after' and 'until' must be numbers")
        if after == 0:
            with contextlib.suppress(OSError):  # it is as it was at the last sweep then
                await self._upkeep.note_flows()
        now = time.monotonic()
        page = list(islice(self._keeper.table.entries(after, until), _PAGE))
        return {
            "columns": COLUMNS,
            "mappings": [(
                inet_ntoa(entry.key[:4]),  # a fifth of what str() takes
                entry.mapping.detour_port,
                f"{inet_ntoa(entry.key[6:10])}:{entry.mapping.remote.port}",
                round(now - entry.last_used, 1),
            ) for entry in page],
            "next": page[-1].serial if len(page) == _PAGE else None,
            "until": until,
        }

    async def flush(self, request: dict[str, Any]) -> dict[str, Any]:
        """Drop all mappings, or those of ``client`` and to ``remote``, and cut their flows."""
        # An empty text is no address; to take it for all would drop more than was meant.
        client = remote = None
        if request.get("client") is not None:
            try:
                client = ip_address(str(request["client"]))
            except ValueError:
                raise UserError(f"'{request['client']}' is not an IP address") from None
        if request.get("remote") is not None:
            remote = parse_endpoint(str(request["remote"]))

        def wanted(entry: Entry) -> bool:
            return ((client is None or entry.mapping.client == client)
                    and (remote is None or entry.mapping.remote == remote))

        try:
            removed = await self._keeper.remove(
                [entry for entry in self._keeper.table.entries() if wanted(entry)],
                lambda _: True)
        except NatError as error:
            raise UserError(f"the kernel does not take the change: {error}") from None
        if removed:
            log.info("flushed %d mappings", len(removed))
        return {"flushed": len(removed)}
