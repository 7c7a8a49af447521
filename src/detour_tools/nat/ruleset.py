# SPDX-License-Identifier: GPL-2.0-or-later
"""What our table of nftables says, as text."""

import itertools
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network, collapse_addresses

from detour_tools import sysctl
from detour_tools.endpoint import Network
from detour_tools.nat.base import LABEL, TABLE, Terms

# The table's counters, the set of those whom remotes have answered, and of those who may ask.
REFUSED = "refused-flows"
DROPPED = "dropped-requests"
REGULARS = "regulars"
_ALLOWED = "allowed"
# Clients that come and go within a day, however few mappings there may be.
_LEAST_REGULARS = 65535

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
# 'requests': what is too much is dropped before connection tracking keeps it, and the server reads
# it, one at a time. 'regulars' are those whose join a remote has answered, which takes more than to
# make up addresses: they wait for no strangers. 'askers' is full in a flood of very many addresses;
# those that it has no room for count among all strangers only.
#
# 'asked': a request leaves an entry in connection tracking for 30 s otherwise, so that 9,000 forged
# ones a second fill a table of 262,144. Set in 'input', where the entry is not in the table yet.
#
# 'beginning-flow': a SYN leaves one for two minutes otherwise, so that 17 forged ones a second use
# up what a client may have open.
_TABLE = """
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
    set allowed {{
        type ipv4_addr
        flags interval
    }}
    set regulars {{
        type ipv4_addr
        size {regulars}
        flags dynamic, timeout
        timeout 1d
    }}
    set asking-regulars {{
        type ipv4_addr
        size {regulars}
        flags dynamic, timeout
        timeout 2s
    }}
    set askers {{
        type ipv4_addr
        size 65535
        flags dynamic, timeout
        timeout 2s
    }}
    counter refused-flows {{
    }}
    counter dropped-requests {{
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
    chain requests {{
        {requests}
    }}
    chain regular-requests {{
        {regular_requests}
    }}
    chain answered {{
        {answered}
    }}
    chain opening {{
        tcp option mptcp subtype {join} goto answered
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
_REFUSE = f"counter name {REFUSED} reject with tcp reset"

# What who is not allowed asks is told in the server's log: of a flood, so many a second will do.
_UNWANTED = 1000
_BURST = 5000
_DROP = f"counter name {DROPPED} drop"
_OVER = "limit rate over {0}/second burst {1} packets"

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
_FORGET = 'udp dport {} ct state new ct timeout set "asked"'
_ANSWERED = f"ct direction reply update @{REGULARS} {{ ip daddr }}"


@dataclass(frozen=True, slots=True)
class Abilities:
    """What not every kernel has, the dearest first: to count flows ('ct count'), to limit how many
    packets come, time-outs of ours ('ct timeout'), and conntrack labels.
    """

    counts: bool
    limits: bool
    timeouts: bool
    labels: bool


def ways(capacity: int, terms: Terms) -> list[tuple[Abilities, str]]:
    """The table for so many mappings, as kernels of these abilities take it, the best first."""
    either = (True, False)
    found: dict[str, Abilities] = {}
    for parts in itertools.product(either, either, either if names_protocols() else (False,),
                                   either):
        able = Abilities(*parts)
        found.setdefault(_table(capacity, terms, able), able)
    return [(able, text) for text, able in found.items()]


def names_protocols() -> bool:
    """Whether nft lists a time-out in a way that it reads again: by the protocol's name."""
    try:
        return bool(socket.getprotobyname("udp"))
    except OSError:
        return False


def admitted(clients: Iterable[Network]) -> str:
    """The commands that let these clients ask, and no others."""
    listed = ", ".join(map(str, collapse_addresses(
        each for each in clients if isinstance(each, IPv4Network))))
    return f"flush set ip {TABLE} {_ALLOWED}\n" + (
        f"add element ip {TABLE} {_ALLOWED} {{ {listed} }}\n" if listed else "")


def _table(capacity: int, terms: Terms, able: Abilities) -> str:
    limits = able.limits and terms.requests and terms.requests_per_client
    timeouts = able.timeouts and terms.requests
    beginning = [f"ct label set {LABEL}"] if able.labels else []
    if timeouts:
        beginning.append('ct timeout set "beginning-flow"')
    if able.counts:
        beginning += _counting(terms)
    return _TABLE.format(
        table=TABLE, size=capacity, most_shares=_MOST_SHARES, mapped=_MAPPED, join=_JOIN,
        relayed=_RELAYED[terms.relay], regulars=max(capacity, _LEAST_REGULARS),
        timeouts=f"{_ASKED}\n    {_beginning()}" if timeouts else "",
        asking=_lines([*([f"udp dport {terms.requests} jump requests"] if limits else []),
                       *([_FORGET.format(terms.requests)] if timeouts else [])]),
        requests=_lines(_limiting(terms) if limits else []),
        regular_requests=_lines(
            [_of_each("asking-regulars", terms.requests_per_client)] if limits else []),
        answered=_ANSWERED if limits else "",
        forward=_lines(_forward(terms, able)), beginning=_lines(beginning))


def _lines(rules: Iterable[str]) -> str:
    return "\n        ".join(rules)


def _forward(terms: Terms, able: Abilities) -> list[str]:
    rules = []
    if terms.relay == "joins":
        # Of the answer by its label: the mapping may have made room for another meanwhile.
        rules += ([f"ct state new tcp flags & syn == syn {_OURS} jump opening",
                   f"tcp flags & syn == syn ct label {LABEL} jump opening"] if able.labels else
                  [f"tcp flags & syn == syn {_OURS} jump opening"])
    else:
        rules.append("tcp flags & (syn | ack) == syn | ack "
                     f"{f'ct label {LABEL}' if able.labels else _OURS} jump answered")
    rules.append(f"ct state new {_OURS} goto beginning")
    if not terms.router:
        # Errors about a flow (ICMP) bear its label. Without labels they have no ports to go by.
        rules += ([f"ct label {LABEL} accept"] if able.labels else
                  [f"{_OURS} accept", "ct status dnat ct state related accept"])
        rules.append("drop")
    return rules


def _counting(terms: Terms) -> list[str]:
    rules, flows = [], terms.all_flows
    if terms.flows_per_client:
        rules.append(f"add @clients {{ ip saddr ct count over {terms.flows_per_client} }} "
                     f"{_REFUSE}")
    if flows >= 2 * _SHARE:
        shares = min(1 << (flows // _SHARE).bit_length() - 1, _MOST_SHARES)
        rules.append(f"add @shares {{ tcp sport & {shares - 1 << 1} "
                     f"ct count over {flows // shares} }} {_REFUSE}")
    elif flows:
        rules.append(f"ct count over {flows} {_REFUSE}")
    return rules


def _limiting(terms: Terms) -> list[str]:
    strangers = terms.requests_of_strangers
    return [f"ip saddr != @{_ALLOWED} {_OVER.format(_UNWANTED, _UNWANTED)} {_DROP}",
            f"ip saddr @{REGULARS} goto regular-requests",
            _of_each("askers", terms.requests_of_stranger),
            # No more at once than wait for the server (server/receiver.py).
            f"{_OVER.format(strangers, min(strangers // 2, _BURST))} {_DROP}"]


def _of_each(counted_in: str, most: int) -> str:
    return f"update @{counted_in} {{ ip saddr {_OVER.format(most, most)} }} {_DROP}"


def _beginning() -> str:
    seconds = dict.fromkeys(("syn_sent", "syn_recv"), _BEGINNING_SECONDS)
    for name, setting in _HOSTS_TIMEOUTS.items():
        found = sysctl.read(f"net/netfilter/nf_conntrack_tcp_timeout_{setting}")
        if found is not None:
            seconds[name] = int(found)
    return _BEGINNING % ", ".join(f"{name} : {each}" for name, each in seconds.items())
