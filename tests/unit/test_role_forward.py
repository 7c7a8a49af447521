# SPDX-License-Identifier: GPL-2.0-or-later
"""detour-forward: which forward chains drop mapped flows, and where its rule goes."""

import json
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

_PATH = Path(__file__).parents[2] / "roles/ip_forward/files/detour-forward"


@pytest.fixture(scope="module")
def program():
    spec = spec_from_loader("detour_forward", SourceFileLoader("detour_forward", str(_PATH)))
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def _state(*states: str) -> dict:
    return {"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": list(states)}}


_TCP = {"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": "tcp"}}
_DNAT = {"match": {"op": "in", "left": {"ct": {"key": "status"}}, "right": "dnat"}}
_LABEL = {"match": {"op": "in", "left": {"ct": {"key": "label"}}, "right": 97}}
_ETH9 = {"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "eth9"}}


def _vmap(**verdicts: str) -> dict:
    return {"vmap": {"key": {"ct": {"key": "state"}}, "data": {
        "set": [[state, {verdict: None}] for state, verdict in verdicts.items()]}}}


def _nft(policy: str, *rules: list, other: tuple = (), flags: str = "") -> str:
    chain = {"family": "inet", "table": "f", "name": "forward", "hook": "forward",
             "policy": policy}
    table = {"family": "inet", "name": "f"} | ({"flags": flags} if flags else {})
    items: list[dict] = [{"metainfo": {}}, {"table": table}, {"chain": chain},
                         {"chain": {"family": "inet", "table": "f", "name": "other"}}]
    items += [{"rule": {"family": "inet", "table": "f", "chain": name, "handle": number,
                        "expr": rule}}
              for number, (name, rule) in enumerate(
                  [("forward", rule) for rule in rules] + [("other", rule) for rule in other], 1)]
    return json.dumps({"nftables": items})


_ACCEPT: list = [{"accept": None}]
_DROP: list = [{"drop": None}]


@pytest.mark.parametrize(("text", "expected"), [
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
def test_nftables(program, text, expected):
    chain, = program.parse_nft(text)
    dropped, rule = program.judge(chain)
    assert dropped == (expected is not None)
    if expected:
        assert expected in program.command_for(chain, rule)[1]


@pytest.mark.parametrize(("text", "expected"), [
    ("-P FORWARD ACCEPT", None),
    ("-P FORWARD DROP", "-A FORWARD -p tcp"),
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
def test_iptables(program, text, expected):
    chain, = program.parse_iptables(text, "iptables-nft")
    dropped, rule = program.judge(chain)
    assert dropped == (expected is not None)
    if expected:
        assert expected in " ".join(program.command_for(chain, rule))


def test_a_table_that_nobody_else_may_change(program, monkeypatch):
    chains = program.parse_nft(_nft("drop", flags="owner"))
    monkeypatch.setattr(program, "chains", lambda: chains)
    with pytest.raises(program.FirewallError, match="StrictForwardPorts"):
        program.open_all(lambda command: None)
