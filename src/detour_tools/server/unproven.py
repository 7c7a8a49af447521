# SPDX-License-Identifier: GPL-2.0-or-later
"""The mappings that no flow was seen through yet, and which of them goes first; pure.

Anybody can forge requests, and what was forged never gets a flow. So these are what room is made
of: they never keep anybody out.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

from detour_tools.endpoint import IPAddress

if TYPE_CHECKING:
    from detour_tools.server.table import Entry

# Wide enough that whoever forges all addresses of a network fills few prefixes, so that a good
# client's neighbours are not the heaviest; as narrow as networks that differ are wide apart.
_PREFIX_BITS = {4: 16, 6: 48}

_K = TypeVar("_K")


def prefix(address: IPAddress) -> tuple[int, int]:
    """The network of a client, to weigh it: its first 16 bits, or 48 of IPv6."""
    bits = _PREFIX_BITS[address.version]
    return address.version, int(address) >> (address.max_prefixlen - bits)


class Unproven:
    """The unproven mappings by use: all, by client, by prefix. Every step costs the same."""

    def __init__(self) -> None:
        self._all: OrderedDict[int, Entry] = OrderedDict()
        self._clients = _Groups[IPAddress]()
        self._prefixes = _Groups[tuple[int, int]]()
        self._heaviest = _Heaviest[tuple[int, int]]()

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
        self._clients.add(client, entry)
        network = prefix(client)
        self._heaviest.weigh(network, self._prefixes.add(network, entry))

    def remove(self, entry: "Entry") -> None:
        """Forget a mapping that is here."""
        client = entry.mapping.client
        del self._all[entry.serial]
        self._clients.remove(client, entry)
        network = prefix(client)
        self._heaviest.weigh(network, self._prefixes.remove(network, entry))

    def touch(self, entry: "Entry") -> None:
        """Note that a mapping was used."""
        client = entry.mapping.client
        self._all.move_to_end(entry.serial)
        self._clients.touch(client, entry)
        self._prefixes.touch(prefix(client), entry)

    def oldest_of(self, client: IPAddress) -> "Entry | None":
        """The client's least recently used one."""
        return self._clients.oldest(client)

    def oldest_of_heaviest(self) -> "Entry | None":
        """The least recently used one of the prefix that has most."""
        network = self._heaviest.top()
        return None if network is None else self._prefixes.oldest(network)


class _Groups(Generic[_K]):
    """Entries by a key, least recently used first; ``add`` and ``remove`` return how many."""

    def __init__(self) -> None:
        self._groups: dict[_K, OrderedDict[int, Entry]] = {}

    def add(self, key: _K, entry: "Entry") -> int:
        group = self._groups.setdefault(key, OrderedDict())
        group[entry.serial] = entry
        return len(group)

    def remove(self, key: _K, entry: "Entry") -> int:
        group = self._groups[key]
        del group[entry.serial]
        if not group:
            del self._groups[key]
        return len(group)

    def touch(self, key: _K, entry: "Entry") -> None:
        self._groups[key].move_to_end(entry.serial)

    def oldest(self, key: _K) -> "Entry | None":
        group = self._groups.get(key)
        return next(iter(group.values())) if group else None


class _Heaviest(Generic[_K]):
    """Which key has the greatest weight, where weights change by one at a time."""

    def __init__(self) -> None:
        self._weights: dict[_K, int] = {}
        self._by_weight: dict[int, dict[_K, None]] = {}
        self._top = 0

    def weigh(self, key: _K, weight: int) -> None:
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

    def top(self) -> _K | None:
        peers = self._by_weight.get(self._top)
        return next(iter(peers)) if peers else None
