# SPDX-License-Identifier: GPL-2.0-or-later
"""The mappings that no flow was seen through yet, and which of them goes first; pure.

Anybody can forge requests, and what was forged never gets a flow. So these are what room is made
of: they never keep anybody out.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from detour_tools.endpoint import IPAddress

if TYPE_CHECKING:
    from detour_tools.server.table import Entry

# Wide enough that whoever forges all addresses of a network fills few prefixes, so that a good
# client's neighbours are not the heaviest; as narrow as networks that differ are wide apart.
_HOST_BITS = {4: 32 - 16, 6: 128 - 48}
_PREFIX_WIDTH = 48
_ADDRESS_WIDTH = 128


def prefix(address: IPAddress) -> int:
    """The network of a client, to weigh it: a number of its first 16 bits, or 48 of IPv6."""
    version = address.version
    return int(address) >> _HOST_BITS[version] | version << _PREFIX_WIDTH


def _number(address: IPAddress) -> int:
    """An address as a number: addresses themselves are slow to hash."""
    return int(address) | address.version << _ADDRESS_WIDTH


class Unproven:
    """The unproven mappings by use: all, by client, by prefix. Every step costs the same."""

    def __init__(self) -> None:
        self._all: OrderedDict[int, Entry] = OrderedDict()
        self._clients = _Groups()
        self._prefixes = _Groups()
        self._heaviest = _Heaviest()

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator["Entry"]:
        """Least recently used first."""
        return iter(self._all.values())

    def __contains__(self, entry: "Entry") -> bool:
        return entry.serial in self._all

    def add(self, entry: "Entry") -> None:
        """Note a mapping, as used last."""
        client = entry.mapping.client
        self._all[entry.serial] = entry
        self._clients.add(_number(client), entry)
        network = prefix(client)
        self._heaviest.weigh(network, self._prefixes.add(network, entry))

    def remove(self, entry: "Entry") -> None:
        """Forget a mapping that is here."""
        client = entry.mapping.client
        del self._all[entry.serial]
        self._clients.remove(_number(client), entry)
        network = prefix(client)
        self._heaviest.weigh(network, self._prefixes.remove(network, entry))

    def touch(self, entry: "Entry") -> None:
        """Note that a mapping was used."""
        client = entry.mapping.client
        self._all.move_to_end(entry.serial)
        self._clients.touch(_number(client), entry)
        self._prefixes.touch(prefix(client), entry)

    def oldest_of(self, client: IPAddress) -> "Entry | None":
        """The client's least recently used one."""
        return self._clients.oldest(_number(client))

    def oldest_of_heaviest(self) -> "Entry | None":
        """The least recently used one of the prefix that has most."""
        network = self._heaviest.top()
        return None if network is None else self._prefixes.oldest(network)


class _Groups:
    """Entries by a key, least recently used first; ``add`` and ``remove`` return how many."""

    def __init__(self) -> None:
        self._groups: dict[int, OrderedDict[int, Entry]] = {}

    def add(self, key: int, entry: "Entry") -> int:
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = OrderedDict()
        group[entry.serial] = entry
        return len(group)

    def remove(self, key: int, entry: "Entry") -> int:
        group = self._groups[key]
        del group[entry.serial]
        if not group:
            del self._groups[key]
        return len(group)

    def touch(self, key: int, entry: "Entry") -> None:
        self._groups[key].move_to_end(entry.serial)

    def oldest(self, key: int) -> "Entry | None":
        group = self._groups.get(key)
        return next(iter(group.values())) if group else None


class _Heaviest:
    """Which key has the greatest weight, where weights change by one at a time."""

    def __init__(self) -> None:
        self._weights: dict[int, int] = {}
        self._by_weight: dict[int, dict[int, None]] = {}
        self._top = 0

    def weigh(self, key: int, weight: int) -> None:
        before = self._weights.pop(key, 0)
        if before:
            peers = self._by_weight[before]
            del peers[key]
            if not peers:
                del self._by_weight[before]
        if weight:
            self._weights[key] = weight
            self._by_weight.setdefault(weight, {})[key] = None
        self._top = max(self._top, weight)
        if self._top not in self._by_weight:  # the only one of the top has become lighter by one
            self._top = weight

    def top(self) -> int | None:
        peers = self._by_weight.get(self._top)
        return next(iter(peers)) if peers else None
