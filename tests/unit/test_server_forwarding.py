# SPDX-License-Identifier: GPL-2.0-or-later
"""Which firewalls would drop detoured packets, judged from their text."""

import pytest

from detour_tools.nat.forwarding import judge, parse_legacy, parse_nft

NFT = "\ttype filter hook forward priority filter; policy {policy};\n"


def nft(policy: str, *rules: str, family: str = "ip", more: str = "") -> list[str]:
    text = (f"table {family} fw {{\n\tset s {{\n\t\ttype ipv4_addr\n\t}}\n{more}\tchain f {{\n\t"
            + NFT.format(policy=policy) + "".join(f"\t\t{rule}\n" for rule in rules) + "\t}\n}\n")
    return [warning for chain in parse_nft(text) for warning in judge(chain)]


def legacy(*lines: str) -> list[str]:
    return [warning for chain in parse_legacy("\n".join(lines)) for warning in judge(chain)]


@pytest.mark.parametrize("rules", [
    (),
    ("counter packets 5 bytes 300",),
    ("ct state invalid drop",),
    ("ct state invalid,untracked drop", "ct state established,related accept"),
    ("meta l4proto udp drop", "ip protocol icmp drop", "udp dport 53 reject"),
    ("meta nfproto ipv6 drop",),
    ("ct status dnat accept", "drop"),
    ("ct label 97 accept", "drop"),
    ("meta l4proto tcp counter packets 0 bytes 0 accept", "reject with icmp port-unreachable"),
    ('counter packets 1 bytes 2 accept comment "drop nothing"', "drop"),
    ("ct state vmap { invalid : drop, established : accept }",),
    ('log prefix "drop " level info',),
    ("return", "drop"),
])
def test_nothing_to_say(rules):
    assert nft("accept", *rules) == []


@pytest.mark.parametrize("rules", [
    ("drop",),
    ("counter packets 1 bytes 2 drop",),
    ("ct state established,related accept", "reject with icmp port-unreachable"),
    ('tcp dport 80 accept', 'meta l4proto { tcp, udp } drop comment "no"'),
    ('log prefix "forward " drop',),
    ("ct state new drop",),
])
def test_a_rule_that_drops(rules):
    assert nft("accept", *rules) == [
        f"rule '{rules[-1]}' of chain ip fw f drops detoured packets; allow them before it with: "
        "nft insert rule ip fw f ct label 97 accept"]


@pytest.mark.parametrize("rule", [
    'iifname "eth0" drop', "tcp dport 25 reject", "ip saddr @s drop",
    "limit rate over 3/second drop", "tcp dport vmap { 25 : drop }",
    "ct state vmap { new : drop }",
])
def test_a_rule_that_may_drop(rule):
    assert nft("accept", rule) == [
        f"rule '{rule}' of chain ip fw f may drop detoured packets; allow them before it with: "
        "nft insert rule ip fw f ct label 97 accept"]


def test_policies():
    said = ("chain inet fw f has policy drop: detoured packets will be dropped; allow them with: "
            "nft insert rule inet fw f ct label 97 accept")
    assert nft("drop", family="inet") == [said]
    assert nft("drop", "ct state established,related accept", 'oifname "lan" accept',
               family="inet") == [said]
    assert nft("drop", "ct status dnat counter packets 0 bytes 0 accept") == []
    assert nft("drop", "meta l4proto tcp accept") == []
    assert nft("drop", family="ip6") == [], "not our packets"


def test_chains_that_are_jumped_to():
    more = "\tchain g {\n\t\ttcp dport 25 return\n\t\tdrop\n\t}\n\tchain h {\n\t\taccept\n\t}\n"
    assert nft("accept", "jump g", more=more) == [
        "rule 'drop' of chain ip fw g drops detoured packets; allow them before it with: "
        "nft insert rule ip fw f ct label 97 accept"]
    assert "may drop" in nft("accept", 'iifname "eth0" jump g', more=more)[0]
    assert nft("drop", "jump h", more=more) == []
    assert nft("drop", "goto h", more=more) == []
    assert nft("accept", "jump nowhere") == []


def test_the_cure_fits_iptables_nft():
    text = "table ip filter {\n\tchain FORWARD {\n" + NFT.format(policy="drop") + "\t}\n}\n"
    assert [judged for chain in parse_nft(text) for judged in judge(chain)] == [
        "chain ip filter FORWARD has policy drop: detoured packets will be dropped; "
        "allow them with: iptables -I FORWARD -m connlabel --label 97 -j ACCEPT"]


def test_other_hooks_do_not_count():
    text = ("table ip fw {\n\tchain i {\n\t\ttype filter hook input priority 0; policy drop;\n"
            "\t\tdrop\n\t}\n}\n")
    assert parse_nft(text) == []


def test_legacy():
    cure = "iptables-legacy -I FORWARD -m connlabel --label 97 -j ACCEPT"
    assert legacy("-P INPUT DROP", "-P FORWARD ACCEPT", "-P OUTPUT ACCEPT") == []
    assert legacy("-P FORWARD DROP") == [
        "chain FORWARD (legacy iptables) has policy drop: detoured packets will be dropped; "
        f"allow them with: {cure}"]
    assert legacy("-P FORWARD DROP",
                  "-A FORWARD -m conntrack --ctstate DNAT -j ACCEPT") == []
    assert legacy("-P FORWARD DROP", '-A FORWARD -m connlabel --label "97" -j ACCEPT') == []
    assert legacy("-P FORWARD ACCEPT", "-A FORWARD -p udp -j DROP",
                  "-A FORWARD -m conntrack --ctstate INVALID -j DROP",
                  "-A FORWARD -m state --state RELATED,ESTABLISHED -j ACCEPT",
                  '-A FORWARD -p tcp -m comment --comment "all else" -j REJECT '
                  "--reject-with icmp-port-unreachable") == [
        "rule '-p tcp -m comment --comment \"all else\" -j REJECT --reject-with "
        "icmp-port-unreachable' of chain FORWARD (legacy iptables) drops detoured packets; "
        f"allow them before it with: {cure}"]
    assert legacy("-P FORWARD ACCEPT", "-N X", "-A FORWARD -i eth0 -j X", "-A X -j DROP") == [
        "rule '-j DROP' of chain X (legacy iptables) may drop detoured packets; "
        f"allow them before it with: {cure}"]
