# SPDX-License-Identifier: GPL-2.0-or-later
"""The nftables back end: one table of ours, one map and one set.

A mapping is one element of the map (for DNAT) and one of the set (for SNAT), so that neither a
commit nor a packet gets dearer with their number.
"""

import contextlib
import ctypes
import dataclasses
import importlib
import logging
import socket
import struct
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from detour_tools import sysctl
from detour_tools.errors import UserError
from detour_tools.mapping import Mapping
from detour_tools.nat import standing
from detour_tools.nat.base import LABEL, TABLE, NatError, Terms
from detour_tools.netlink.nf_tables import Element, NfTables

log = logging.getLogger(__name__)

# Ours come just before the host's own NAT (-100 and 100), so that a mapping that was answered
# means what the answer said. Only flows that are ours match, everything else passes on.
#
# 'input': a remote may become an address of the detour after its mapping was made; the detour's
# own services stay out of reach all the same.
#
# 'opening': who may not use the detour for plain TCP could still send an MP_JOIN first, and other
# SYNs over the same flow then; and a server without MPTCP answers an MP_JOIN as if it were none.
#
# 'clients' and 'shares': the kernel removes an element when the last flow that it counts has ended.
# A set that is full would count no more, so that there is room for the client of each mapping.
#
# 'ct status dnat': without it a plain forwarded flow of a client to a mapped remote would be
# masqueraded, where the detour is also the client's router.
#
# 'forward': before all chains of the host's own, and only for the first packet of a flow.
#
# 'asked': a request leaves an entry in connection tracking for 30 s otherwise, so that 9,000 forged
# ones a second fill a table of 262,144. Set in 'input', where the entry is not in the table yet.
#
# 'beginning-flow': a SYN leaves one for two minutes otherwise, so that 17 forged ones a second use
# up what a client may have open.
_RULESET = """
add table ip {table}
delete table ip {table}
table ip {table} {{
    comment "detour-server: made, changed and removed by it"
    map mappings {{
        type ipv4_addr . inet_service : ipv4_addr . inet_service
        size {size}
    }}
    set mapped {{
        type ipv4_addr . inet_service . ipv4_addr . inet_service
        size {size}
    }}
    set clients {{
        type ipv4_addr
        size {size}
        flags dynamic
    }}
    set shares {{
        type inet_service
        size {most_shares}
        flags dynamic
    }}
    counter refused-flows {{
    }}
    {timeouts}
    chain prerouting {{
        type nat hook prerouting priority dstnat - 1; policy accept;
        fib daddr type local {relayed} dnat to ip saddr . tcp dport map @mappings
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat - 1; policy accept;
        {mapped} masquerade
    }}
    chain input {{
        type filter hook input priority filter; policy accept;
        {mapped} drop
        {asking}
    }}
    chain opening {{
        tcp option mptcp subtype {join} return
        drop
    }}
    chain beginning {{
        {beginning}
    }}
    chain forward {{
        type filter hook forward priority raw; policy accept;
        {forward}
    }}
}}
"""
# In 'option mptcp': MP_JOIN (RFC 8684, section 8).
_JOIN = 1
_RELAYED = {
    "joins": f"tcp flags & (fin | syn | rst | ack) == syn tcp option mptcp subtype {_JOIN}",
    "tcp": "meta l4proto tcp",
}
# nft 1.0.6 lists no 'meta l4proto tcp' where a TCP port comes later in the rule, and refuses its
# own listing then, as the size of 'proto-dst' depends on the protocol. 'tcp dport != 0', always
# true, is listed and tells it: a rule set that an administrator saved must load again.
_MAPPED = """ct status dnat tcp dport != 0 \
ip saddr . ct original proto-dst . ip daddr . tcp dport @mapped"""
# The same of packets in either direction.
_OURS = """ct status dnat tcp dport != 0 ct original ip saddr . ct original proto-dst . \
ct reply ip saddr . ct reply proto-src @mapped"""

# To count all flows as one would take a look at each of them, for each that begins. They are
# counted in shares of some hundred instead, by bits of the client's port: not by the lowest, as
# connect() on Linux prefers ports that are even (net/ipv4/inet_hashtables.c).
_SHARE = 128
_MOST_SHARES = 1024
_COUNTER = "refused-flows"
_REFUSE = f"counter name {_COUNTER} reject with tcp reset"

# A request is answered within a second, or its client asks again. Whole seconds.
_ASKED = "ct timeout asked { protocol udp; l3proto ip; policy = { unreplied : 2, replied : 2 }; }"
# A client sends its SYN again after 1, 2 and 4 seconds; what comes later begins anew. The others
# are the host's own: left out, they would be nft's.
_BEGINNING = "ct timeout beginning-flow { protocol tcp; l3proto ip; policy = { %s }; }"
_BEGINNING_SECONDS = 10
_HOSTS_TIMEOUTS = {
    "established": "established", "fin_wait": "fin_wait", "close_wait": "close_wait",
    "last_ack": "last_ack", "time_wait": "time_wait", "close": "close",
    "retrans": "max_retrans", "unack": "unacknowledged"}
_ASKING = 'udp dport {port} ct state new ct timeout set "asked"'

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
        self._refused_before = 0
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
            for made_for, text in _ways(capacity, terms):
                if standing.is_remembered(text, digest):
                    self._made(made_for, terms)
                    self._refused_before -= self._counted()
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
        self._refused_before += self._counted()
        self._made(self._make(_ways(capacity, terms), mappings), terms)

    def commit(self, add: Sequence[Mapping], remove: Sequence[Mapping]) -> None:
        """Remove, then add elements in one transaction."""
        assert self._quick is not None  # noqa: S101 - opened
        try:
            self._quick.change(TABLE, _elements(remove), _elements(add))
        except OSError as error:
            raise NatError(error.strerror) from None

    def intact(self) -> bool:
        """Whether the table is the one we made."""
        return bool(self._handle) and self._quick is not None and (
            self._quick.table_handle(TABLE) == self._handle)

    def refused_flows(self) -> int:
        """What our counter says, and those before it."""
        return self._refused_before + self._counted()

    def _counted(self) -> int:
        # The table of a server before us has counted for that one.
        if not self._handle or self._netlink is None:
            return 0
        return self._netlink.counted(TABLE, _COUNTER)

    def uninstall(self) -> None:
        """Remove our table."""
        if self._nft is None:
            self.open()
        self._run(f"add table ip {TABLE}\ndelete table ip {TABLE}\n")
        self._handle = b""
        standing.forget()

    def _make(self, ways: Sequence[tuple[Terms, str]], mappings: Collection[Mapping]) -> Terms:
        for tried, text in ways[:-1]:
            with contextlib.suppress(NatError):
                self._make_of(text, mappings)
                return tried
        tried, text = ways[-1]
        self._make_of(text, mappings)
        return tried

    def _make_of(self, text: str, mappings: Collection[Mapping]) -> None:
        assert self._netlink is not None  # noqa: S101 - opened
        listed = list(mappings)
        if self._table_handle() is not None:  # in one step, which only libnftables can do
            self._run(text + "".join(_commands(listed)))
            _give_back_memory()
        else:
            self._run(text)
            try:
                for start in range(0, len(listed), _CHUNK):
                    self._netlink.change(TABLE, {}, _elements(listed[start:start + _CHUNK]))
            except OSError as error:
                with contextlib.suppress(NatError):
                    self.uninstall()
                raise NatError(error.strerror) from None
        with contextlib.suppress(OSError):
            standing.remember(text, self._netlink.digest(TABLE))

    def _made(self, used: Terms, wanted: Terms) -> None:
        self._handle = self._table_handle() or b""
        if (used.flows_per_client, used.flows) != (wanted.flows_per_client, wanted.flows):
            log.warning("flows are not limited: this kernel does not count them (nft_connlimit)")
        if used.requests != wanted.requests:
            why = ("this kernel has no time-outs of ours (CONFIG_NF_CONNTRACK_TIMEOUT)"
                   if _names_protocols() else "without /etc/protocols rules with a time-out would "
                   "not load again once saved; install netbase, and start again")
            log.warning("a flood of requests or of forged joins can fill connection tracking: %s; "
                        "or allow few clients, or raise net.netfilter.nf_conntrack_max", why)

    def _run(self, commands: str) -> None:
        status, _, error = self._nft.cmd(commands)
        if status:
            raise NatError(_first_line(error))

    def _table_handle(self) -> bytes | None:
        return self._netlink.table_handle(TABLE) if self._netlink else None


def _names_protocols() -> bool:
    """Whether nft lists a time-out in a way that it reads again: by the protocol's name."""
    try:
        return bool(socket.getprotobyname("udp"))
    except OSError:
        return False


def _ways(capacity: int, terms: Terms) -> list[tuple[Terms, str]]:
    """What to try in turn: a kernel without labels, 'ct timeout' or 'ct count' does without."""
    if not _names_protocols():
        terms = dataclasses.replace(terms, requests=0)
    unlimited = dataclasses.replace(terms, flows_per_client=0, flows=0)
    return [(tried, _ruleset(capacity, tried, labels=labels))
            for limited in (terms, unlimited)
            for tried in (limited, dataclasses.replace(limited, requests=0))
            for labels in (True, False)]


def _ruleset(capacity: int, terms: Terms, *, labels: bool) -> str:
    forward = []
    if terms.relay == "joins":
        # Of the answer by its label: the mapping may have made room for another meanwhile.
        forward += ([f"ct state new tcp flags & syn == syn {_OURS} jump opening",
                     f"tcp flags & syn == syn ct label {LABEL} jump opening"] if labels else
                    [f"tcp flags & syn == syn {_OURS} jump opening"])
    forward.append(f"ct state new {_OURS} goto beginning")
    if not terms.router:
        # Errors about a flow (ICMP) bear its label. Without labels they have no ports to go by.
        forward += ([f"ct label {LABEL} accept"] if labels else
                    [f"{_OURS} accept", "ct status dnat ct state related accept"])
        forward.append("drop")
    beginning = [f"ct label set {LABEL}"] if labels else []
    if terms.requests:
        beginning.append('ct timeout set "beginning-flow"')
    flows = terms.all_flows
    if terms.flows_per_client:
        beginning.append(f"add @clients {{ ip saddr ct count over {terms.flows_per_client} }} "
                         f"{_REFUSE}")
    if flows >= 2 * _SHARE:
        shares = min(1 << (flows // _SHARE).bit_length() - 1, _MOST_SHARES)
        beginning.append(f"add @shares {{ tcp sport & {shares - 1 << 1} "
                         f"ct count over {flows // shares} }} {_REFUSE}")
    elif flows:
        beginning.append(f"ct count over {flows} {_REFUSE}")
    return _RULESET.format(table=TABLE, size=capacity, most_shares=_MOST_SHARES, mapped=_MAPPED,
                           join=_JOIN, relayed=_RELAYED[terms.relay],
                           beginning="\n        ".join(beginning),
                           timeouts=f"{_ASKED}\n    {_beginning()}" if terms.requests else "",
                           asking=_ASKING.format(port=terms.requests) if terms.requests else "",
                           forward="\n        ".join(forward))


def _beginning() -> str:
    seconds = dict.fromkeys(("syn_sent", "syn_recv"), _BEGINNING_SECONDS)
    for name, setting in _HOSTS_TIMEOUTS.items():
        found = sysctl.read(f"net/netfilter/nf_conntrack_tcp_timeout_{setting}")
        if found is not None:
            seconds[name] = int(found)
    return _BEGINNING % ", ".join(f"{name} : {each}" for name, each in seconds.items())


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
