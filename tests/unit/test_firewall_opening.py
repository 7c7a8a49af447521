# SPDX-License-Identifier: GPL-2.0-or-later
"""Which forward chains drop mapped flows, and where the rule that opens them goes."""

from ipaddress import IPv4Network

import pytest

from detour_tools.errors import UserError
from detour_tools.firewall import flows, legacy, look, nft, opening


def _state(*states: str) -> dict:
    return {"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": list(states)}}


_TCP = {"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": "tcp"}}
_DNAT = {"match": {"op": "in", "left": {"ct": {"key": "status"}}, "right": "dnat"}}
_LABEL = {"match": {"op": "in", "left": {"ct": {"key": "label"}}, "right": 97}}
_ETH9 = {"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "eth9"}}


def _vmap(**verdicts: str) -> dict:
    return {"vmap": {"key": {"ct": {"key": "state"}}, "data": {
        "set": [[state, {verdict: None}] for state, verdict in verdicts.items()]}}}


def _nft(policy: str, *rules: list, other: tuple = (), flags: str = "") -> list[dict]:
    chain = {"family": "inet", "table": "f", "name": "forward", "type": "filter",
             "hook": "forward", "policy": policy}
    table = {"family": "inet", "name": "f"} | ({"flags": flags} if flags else {})
    items: list[dict] = [{"metainfo": {}}, {"table": table}, {"chain": chain},
                         {"chain": {"family": "inet", "table": "f", "name": "other"}}]
    items += [{"rule": {"family": "inet", "table": "f", "chain": name, "handle": number,
                        "expr": rule}}
              for number, (name, rule) in enumerate(
                  [("forward", rule) for rule in rules] + [("other", rule) for rule in other], 1)]
    return items


_ACCEPT: list = [{"accept": None}]
_DROP: list = [{"drop": None}]


@pytest.mark.parametrize(("objects", "expected"), [
    (_nft("accept"), None),
    (_nft("drop"), "add rule inet f forward"),
    (_nft("drop", [_TCP, _DNAT, *_ACCEPT]), None),
    (_nft("drop", [_TCP, _LABEL, *_ACCEPT]), None),
    (_nft("drop", [_state("established", "related"), *_ACCEPT]), "add rule"),
    (_nft("drop", [_state("established", "new"), *_ACCEPT]), None),
    # What a host's own rule singles out stays dropped: ours comes last.
    (_nft("drop", [_ETH9, *_DROP]), "add rule"),
    (_nft("accept", [_ETH9, *_DROP]), None),
    (_nft("accept", [_ETH9, *_ACCEPT], [{"counter": {}}, {"reject": {}}]), "position 2"),
    (_nft("drop", [_vmap(established="accept", invalid="drop")]), "add rule"),
    (_nft("drop", [_vmap(established="accept", new="accept")]), None),
    (_nft("accept", [{"jump": {"target": "other"}}], other=(_DROP,)), "position 1"),
    (_nft("accept", [{"jump": {"target": "other"}}], other=([{"return": None}], _DROP)), None),
    (_nft("accept", [{"goto": {"target": "other"}}], _DROP, other=([_ETH9, *_DROP],)), None),
    (_nft("drop", [{"jump": {"target": "forward"}}]), "add rule"),
    (_nft("drop", [{"xt": None}, *_ACCEPT]), "add rule"),
])
def test_nftables(objects, expected):
    stopped = opening.flows_stopped(nft.chains(objects))
    assert [expected in opening.to_let_flows_pass(each)[1] for each in stopped] == [True] * bool(
        expected)


@pytest.mark.parametrize(("text", "expected"), [
    ("-P FORWARD ACCEPT", None),
    ("-P FORWARD DROP", "-A FORWARD -m comment"),
    ("-P FORWARD DROP\n-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", "-A"),
    ("-P FORWARD DROP\n-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT", None),
    ("-P FORWARD DROP\n-A FORWARD -p tcp -m conntrack --ctstate DNAT -m comment "
     '--comment "a -j b" -j ACCEPT', None),
    ('-P FORWARD DROP\n-A FORWARD -p tcp -m connlabel --label "97" -j ACCEPT', None),
    ("-P FORWARD DROP\n-A FORWARD -p tcp -m connlabel --label 9 -j ACCEPT", "-A"),
    ("-P FORWARD DROP\n-A FORWARD -p udp -j ACCEPT", "-A"),
    ("-P FORWARD DROP\n-A FORWARD ! -p udp -j ACCEPT", None),
    ("-P FORWARD ACCEPT\n-A FORWARD -i eth9 -j DROP", None),
    ("-P FORWARD ACCEPT\n-A FORWARD -i eth9 -j ACCEPT\n-A FORWARD -j REJECT --reject-with x",
     "-I FORWARD 2"),
    ("-P FORWARD ACCEPT\n-N X\n-A FORWARD -j LOG\n-A FORWARD -j X\n-A X -p tcp -j DROP",
     "-I FORWARD 2"),
    ("-P FORWARD ACCEPT\n-N X\n-A FORWARD -g X\n-A FORWARD -j DROP\n-A X -p udp -j DROP", None),
])
def test_iptables(text, expected):
    stopped = opening.flows_stopped(legacy.chains(text, "iptables-nft"))
    assert [expected in " ".join(opening.to_let_flows_pass(each)) for each in stopped] == [
        True] * bool(expected)


def test_a_line_that_cannot_be_read_has_its_number():
    stopped, = opening.flows_stopped(legacy.chains(
        '-P FORWARD ACCEPT\n-A FORWARD -m comment --comment "two\nlines" -j ACCEPT\n'
        "-A FORWARD -j DROP", "iptables-legacy"))
    assert "-I FORWARD 2" in " ".join(opening.to_let_flows_pass(stopped))


def test_a_table_that_nobody_else_may_change(monkeypatch):
    chains = nft.chains(_nft("drop", flags="owner"))
    monkeypatch.setattr(look, "chains", lambda **_: (chains, []))
    with pytest.raises(UserError) as raised:
        flows.open_way(only_say=True)
    assert "StrictForwardPorts" in str(raised.value)


_CLIENT = IPv4Network("203.0.113.0/24")
_UFW = "-P INPUT DROP\n-N ufw-user-input\n-A INPUT -j ufw-user-input"
_ALLOWED = "-A ufw-user-input -s 203.0.113.0/24 -p udp -m udp --dport 45672 -j ACCEPT"


@pytest.mark.parametrize(("rules", "left"), [
    ((_ALLOWED,), False),
    (("-A ufw-user-input -s 203.0.113.0/24 -j DROP", _ALLOWED), True),
    (("-A ufw-user-input -p udp -m udp --dport 45672 -j DROP", _ALLOWED), True),
    (("-A ufw-user-input -s 203.0.113.128/25 -j DROP", _ALLOWED), False),
    # Where clients come by that interface they are let in.
    (("-A ufw-user-input -i eth1 -j ACCEPT", "-A ufw-user-input -p udp -j DROP", _ALLOWED), False),
    ((), True),
])
def test_what_drops_requests_all_the_same(rules, left):
    chains = legacy.chains("\n".join([_UFW, *rules]), "iptables-nft")
    assert bool(opening.requests_left(chains, 45672, [_CLIENT])) == left


def test_requests_that_are_dropped_when_they_come_in():
    chain = {"chain": {"family": "ip", "table": "t", "name": "p", "type": "filter",
                       "hook": "prerouting", "policy": "drop"}}
    assert opening.requests_left(nft.chains([chain]), 45672, [_CLIENT])
    rule = {"rule": {"family": "ip", "table": "t", "chain": "p", "handle": 1,
                     "expr": [{"notrack": None}]}}
    chain["chain"]["policy"] = "accept"
    assert not opening.requests_left(nft.chains([chain, rule]), 45672, [_CLIENT])


def test_what_the_owner_had_is_not_ours():
    ours, theirs, old = ("a", "ours"), ("b", "theirs"), ("c", "of before")
    assert opening.changes({"ufw": [old]}, {"ufw": [ours, theirs]}, {"ufw": [ours]}) == (
        {"ufw": [old]}, {"ufw": [ours]})


def test_a_rule_of_ours_is_found_again_and_does_not_count():
    chain = {"chain": {"family": "ip", "table": "t", "name": "i", "type": "filter",
                       "hook": "input", "policy": "drop"}}
    rule, = opening.for_requests(nft.chains([chain]), 7, [IPv4Network("192.0.2.0/24")])
    added = {"rule": {"family": "ip", "table": "t", "chain": "i", "handle": 5,
                      "comment": rule[1].split('"')[1], "expr": _ACCEPT}}
    assert opening.handles([chain, added], rule) == ["5"]
    assert opening.without_ours([chain, added]) == [chain]
