# SPDX-License-Identifier: GPL-2.0-or-later
"""The nftables back end: one table of ours, one map and one set.

A mapping is one element of the map (for DNAT) and one of the set (for SNAT), so that neither a
commit nor a packet gets dearer with their number.
"""

import contextlib
import ctypes
import importlib
import logging
import struct
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from detour_tools.endpoint import Network
from detour_tools.errors import UserError
from detour_tools.mapping import Mapping
from detour_tools.nat import standing
from detour_tools.nat.base import TABLE, NatError, Terms
from detour_tools.nat.ruleset import (
    DROPPED,
    REFUSED,
    REGULARS,
    Abilities,
    admitted,
    names_protocols,
    ways,
)
from detour_tools.netlink.nf_tables import Element, NfTables

log = logging.getLogger(__name__)

_DNAT = "mappings"
_SNAT = "mapped"
# A mapping as the set's key, and the map's key and data: client, detour port, remote, port.
_KEY = struct.Struct("!IHxxIHxx")

# Elements a command: what libnftables takes in one go has no limit, but its parser's memory.
_CHUNK = 4096


def _context() -> Any:
    try:
        NfTables().close()
    except OSError as error:  # libnftables would end this process
        raise UserError(f"nftables cannot be used: {error.strerror}",
                        "the kernel needs nf_tables, or use --backend iptables") from None
    try:
        return importlib.import_module("nftables").Nftables()
    except (ImportError, OSError) as error:
        raise UserError(f"the nftables back end needs libnftables and its Python binding: {error}",
                        "apt install python3-nftables, or use --backend iptables") from None


class NftablesBackend:
    """Mappings as elements of an nftables map, through libnftables in this process."""

    name = "nftables"
    quick_changes = 256

    def __init__(self) -> None:
        self._nft: Any = None
        self._netlink: NfTables | None = None
        # For commit() and intact(): another thread may ask by the first one meanwhile.
        self._quick: NfTables | None = None
        # A kernel without nf_tables is what open() says in its words.
        with contextlib.suppress(OSError):
            self._netlink, self._quick = NfTables(), NfTables()
        self._handle = b""
        # What was counted by tables before this one, and by this one when it was looked at last.
        self._before = {REFUSED: 0, DROPPED: 0}
        self._seen = dict(self._before)
        self._clients: Sequence[Network] = ()
        self._left: list[bytes] | None = None  # the map's elements, all of the usual size

    def open(self) -> None:
        """Load libnftables, and see that the kernel answers it."""
        self._nft = _context()
        status, _, text = self._nft.cmd(f"list table ip {TABLE}-probe")
        if status and "No such file" not in text:
            raise UserError(f"nftables cannot be used: {_first_line(text)}",
                            "the kernel needs nf_tables, or use --backend iptables")

    def leftovers(self) -> list[bytes] | None:
        """The elements of our table's map."""
        self._left = None
        if self._netlink is None or self._table_handle() is None:
            return None
        try:
            found = self._netlink.elements(TABLE, _DNAT)
        except FileNotFoundError:  # a table of ours, but not as we make it
            return []
        except OSError as error:
            raise NatError(error.strerror) from None
        usual = [each for each in found if len(each) == _KEY.size]
        if len(usual) == len(found):
            self._left = found
        return [key[:6] + key[8:14] for key in usual]

    def adopt(self, capacity: int, terms: Terms) -> bool:
        """Take over our table if it is one that we would make: but for its elements."""
        if self._left is None or self._netlink is None:
            return False
        with contextlib.suppress(OSError):
            digest = self._netlink.digest(TABLE)
            for able, text in ways(capacity, terms):
                if standing.is_remembered(text, digest):
                    self._made(able, terms)
                    for name in self._before:
                        self._before[name] -= self._counted(name)
                    with contextlib.suppress(NatError):
                        self.admit(terms.clients)
                        return True
        return False

    def whole(self) -> bool:
        """Whether the set holds what the map holds: to read it takes as long again."""
        left, self._left = self._left, None
        if left is None or self._netlink is None:
            return False
        try:
            found = self._netlink.elements(TABLE, _SNAT)
        except OSError as error:
            raise NatError(error.strerror) from None
        return len(found) == len(left) and set(found) == set(left)

    def install(self, mappings: Collection[Mapping], capacity: int, terms: Terms) -> None:
        """Make our table anew; a table that stood there is replaced in the same transaction."""
        self._left = None
        seen = {name: self._counted(name) for name in self._before}
        regulars = self._regulars()
        self._clients = terms.clients
        self._made(self._make(ways(capacity, terms), mappings), terms)
        for name, count in seen.items():
            self._before[name] += count
            self._seen[name] = 0
        if self._netlink is not None:
            with contextlib.suppress(OSError):  # they are strangers then, until the next join
                self._netlink.change(TABLE, {}, {REGULARS: regulars})

    def commit(self, add: Sequence[Mapping], remove: Sequence[Mapping]) -> None:
        """Remove, then add elements in one transaction."""
        assert self._quick is not None  # noqa: S101 - opened
        try:
            self._quick.change(TABLE, _elements(remove), _elements(add))
        except OSError as error:
            raise NatError(error.strerror) from None

    def admit(self, clients: Sequence[Network]) -> None:
        """Fill the set of those who may ask."""
        self._clients = clients
        self._run(admitted(clients))

    def intact(self) -> bool:
        """Whether the table is the one we made."""
        return bool(self._handle) and self._quick is not None and (
            self._quick.table_handle(TABLE) == self._handle)

    def refused_flows(self) -> int:
        """What our counter says, and those before it."""
        return self._before[REFUSED] + self._counted(REFUSED)

    def dropped_requests(self) -> int:
        """What our counter says, and those before it."""
        return self._before[DROPPED] + self._counted(DROPPED)

    def _counted(self, name: str) -> int:
        # A table that is not the one we made has counted for others.
        if self._handle and self._netlink is not None and self._table_handle() == self._handle:
            with contextlib.suppress(OSError):  # the next look tells
                self._seen[name] = self._netlink.counted(TABLE, name)
        return self._seen[name]

    def _regulars(self) -> list[Element]:
        """Clients that the table knows which stands now, whoever made it."""
        try:
            return [(key, b"") for key in self._netlink.elements(TABLE, REGULARS)
                    ] if self._netlink is not None else []
        except OSError:
            return []

    def uninstall(self) -> None:
        """Remove our table."""
        if self._nft is None:
            self.open()
        self._run(f"add table ip {TABLE}\ndelete table ip {TABLE}\n")
        self._handle = b""
        standing.forget()

    def _make(self, ways: Sequence[tuple[Abilities, str]],
              mappings: Collection[Mapping]) -> Abilities:
        for able, text in ways[:-1]:
            with contextlib.suppress(NatError):
                self._make_of(text, mappings)
                return able
        able, text = ways[-1]
        self._make_of(text, mappings)
        return able

    def _make_of(self, text: str, mappings: Collection[Mapping]) -> None:
        assert self._netlink is not None  # noqa: S101 - opened
        listed = list(mappings)
        if self._table_handle() is not None:  # in one step, which only libnftables can do
            self._run(text + admitted(self._clients) + "".join(_commands(listed)))
            _give_back_memory()
        else:
            self._run(text + admitted(self._clients))
            try:
                for start in range(0, len(listed), _CHUNK):
                    self._netlink.change(TABLE, {}, _elements(listed[start:start + _CHUNK]))
            except OSError as error:
                with contextlib.suppress(NatError):
                    self.uninstall()
                raise NatError(error.strerror) from None
        with contextlib.suppress(OSError):
            standing.remember(text, self._netlink.digest(TABLE))

    def _made(self, able: Abilities, terms: Terms) -> None:
        self._handle = self._table_handle() or b""
        if not able.counts and (terms.flows_per_client or terms.all_flows):
            log.warning("flows are not limited: this kernel does not count them (nft_connlimit)")
        if not able.limits and terms.requests_per_client:
            log.warning("in a flood of requests clients wait: this kernel does not limit how many "
                        "come (nft_limit)")
        if not able.timeouts and terms.requests:
            why = ("this kernel has no time-outs of ours (CONFIG_NF_CONNTRACK_TIMEOUT)"
                   if names_protocols() else "without /etc/protocols rules with a time-out would "
                   "not load again once saved; install netbase, and start again")
            log.warning("a flood of requests or of forged joins can fill connection tracking: %s; "
                        "or allow few clients, or raise net.netfilter.nf_conntrack_max", why)

    def _run(self, commands: str) -> None:
        status, _, error = self._nft.cmd(commands)
        if status:
            raise NatError(_first_line(error))

    def _table_handle(self) -> bytes | None:
        return self._netlink.table_handle(TABLE) if self._netlink else None


def _elements(mappings: Collection[Mapping]) -> dict[str, Sequence[Element]]:
    """The elements of both sets. Each part of a concatenation fills whole words."""
    keys = [_KEY.pack(int(client), port, int(address), remote_port)
            for client, port, (address, remote_port) in mappings]
    half = _KEY.size // 2
    return {_DNAT: [(key[:half], key[half:]) for key in keys], _SNAT: [(key, b"") for key in keys]}


def _commands(mappings: Sequence[Mapping]) -> Iterable[str]:
    for start in range(0, len(mappings), _CHUNK):
        chunk = mappings[start:start + _CHUNK]
        pairs = ",".join(f"{client} . {port} : {remote.address} . {remote.port}"
                         for client, port, remote in chunk)
        flows = ",".join(f"{client} . {port} . {remote.address} . {remote.port}"
                         for client, port, remote in chunk)
        yield f"add element ip {TABLE} {_DNAT} {{ {pairs} }}\n"
        yield f"add element ip {TABLE} {_SNAT} {{ {flows} }}\n"


def _give_back_memory() -> None:
    """What libnftables took for many elements stays with the process otherwise (malloc_trim(3))."""
    with contextlib.suppress(AttributeError):  # a C library that has none
        ctypes.CDLL(None).malloc_trim(0)


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].removeprefix("Error: ") or "no reason given"
