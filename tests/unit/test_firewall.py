# SPDX-License-Identifier: GPL-2.0-or-later
"""Which firewalls stand in the way, judged from what nft (in rulesets/) and iptables print."""

import json
from ipaddress import IPv4Network
from pathlib import Path

import pytest

from detour_tools.firewall import forwarders, judge, legacy, look, nft, opening, packet

RULESETS = Path(__file__).parent / "rulesets"
# Rules as nft 1.0.6 printed them in JSON, by what it was told.
RULES = json.loads((RULESETS / "rules.json").read_text(encoding="utf-8"))
PORT = 45672


def texts(chains, sources):
    return [each.text for each in judge.findings(chains, PORT, sources)]


def warnings(objects, *sources, iptables=()):
    return texts([*nft.chains(objects), *iptables], map(IPv4Network, sources))


def ruleset(family, policy, rules, hook="forward", **others):
    where = {"family": family, "table": "fw"}
    objects = [{"chain": {**where, "name": "f", "type": "filter", "hook": hook, "prio": 0,
                          "policy": policy}}]
    objects += [{"chain": {**where, "name": name}} for name in others]
    return objects + [{"rule": {**where, "chain": name, "expr": RULES[rule]}}
                      for name, listed in {"f": rules, **others}.items() for rule in listed]


def forward(policy, *rules, family="ip", **others):
    return warnings(ruleset(family, policy, rules, **others))


def requests(policy, *rules, sources=(), before=()):
    return warnings(ruleset("ip", policy, rules, "input")
                    + [{kind: {**what, "table": "raw"}} for item in
                       ruleset("ip", "accept", before, "prerouting")
                       for kind, what in item.items()], *sources)


def iptables(*lines, tool="iptables-legacy", table="filter"):
    return warnings([], iptables=legacy.chains("\n".join(lines), tool, table))


@pytest.mark.parametrize("rules", [
    (),
    ("counter packets 5 bytes 300",),
    ("ct state invalid drop",),
    ("ct state invalid,untracked drop", "ct state established,related accept"),
    ("meta l4proto udp drop", "ip protocol icmp drop", "udp dport 53 reject"),
    ("meta nfproto ipv6 drop",),
    ("ct status dnat accept", "drop"),
    ("ct status & dnat == dnat accept", "drop"),
    ("ct label 97 accept", "drop"),
    ("ct state vmap { invalid : drop, established : accept, new : accept }", "drop"),
    ("meta l4proto != tcp drop", "ct state != new drop", "udp dport != 53 drop"),
    ("tcp flags & (fin|syn|rst|ack) != syn ct state new drop",),
    ("meta l4proto tcp counter packets 0 bytes 0 accept", "reject with icmp port-unreachable"),
    ('counter packets 1 bytes 2 accept comment "drop nothing"', "drop"),
    ("ct state vmap { invalid : drop, established : accept }",),
    ('log prefix "drop " level info',),
    ("return", "drop"),
])
def test_nothing_to_say(rules):
    assert forward("accept", *rules) == []


def bare(rule):
    """Counters and comments are not repeated: they would make it another warning each time."""
    return rule.replace("counter packets 1 bytes 2 ", "").replace(' comment "no"', "").replace(
        " with icmp port-unreachable", "")


@pytest.mark.parametrize("rules", [
    ("drop",),
    ("tcp flags & (fin|syn|rst|ack) == { syn|ack, syn } drop",),
    ("meta l4proto != udp drop",),
    ("ct state vmap { new : drop }",),
    ("tcp flags & (fin|syn|rst|ack) == syn drop",),
    ("counter packets 1 bytes 2 drop",),
    ("ct state established,related accept", "reject with icmp port-unreachable"),
    ('tcp dport 80 accept', 'meta l4proto { tcp, udp } drop comment "no"'),
    ('log prefix "forward " drop',),
    ("ct state new drop",),
])
def test_a_rule_that_drops(rules):
    assert forward("accept", *rules) == [
        f"rule '{bare(rules[-1])}' of chain ip fw f drops detoured packets; "
        "allow them before it with: nft insert rule ip fw f ct label 97 accept"]


@pytest.mark.parametrize("rule", [
    'iifname "eth0" drop', "tcp dport 25 reject", "ip saddr @s drop",
    "limit rate over 3/second drop", "tcp dport vmap { 25 : drop }",
])
def test_a_rule_that_may_drop(rule):
    assert forward("accept", rule) == [
        f"rule '{rule}' of chain ip fw f may drop detoured packets; allow them before it with: "
        "nft insert rule ip fw f ct label 97 accept"]


def test_policies():
    said = ("chain inet fw f has policy drop: detoured packets will be dropped; allow them with: "
            "nft insert rule inet fw f ct label 97 accept")
    assert forward("drop", family="inet") == [said]
    assert forward("drop", "ct state established,related accept", 'oifname "lan" accept',
                   family="inet") == [said]
    assert forward("drop", "ct status dnat counter packets 0 bytes 0 accept") == []
    assert forward("drop", "meta l4proto tcp accept") == []
    assert forward("drop", family="ip6") == [], "not our packets"


def test_chains_that_are_jumped_to():
    g = ("tcp dport 25 return", "drop")
    assert forward("accept", "jump g", g=g) == [
        "rule 'drop' of chain ip fw g drops detoured packets; allow them before it with: "
        "nft insert rule ip fw f ct label 97 accept"]
    assert "may drop" in forward("accept", 'iifname "eth0" jump g', g=g)[0]
    accept = ("meta l4proto tcp accept",)
    assert forward("drop", "jump g", g=accept) == []
    assert forward("drop", "goto g", g=accept) == []
    assert forward("accept", "jump g") == []
    assert "drops" in forward(
        "accept", "meta l4proto vmap { tcp : jump g, udp : accept }", g=("drop",))[0]


def test_of_sets_of_interfaces_only_names_are_compared():
    named, told = ({"elem": {"val": "br0", "comment": "x"}},), ("br0",)
    found = [packet.Condition("meta oifname", one).excludes(packet.Condition("meta oifname", two))
             for one in (named, told, ("@s",), ("br1",)) for two in (named, told)]
    assert found == [False] * 7 + [True]


ISOLATED = ("-P FORWARD ACCEPT", "-N ONE", "-N TWO", "-A FORWARD -j ONE")


@pytest.mark.parametrize(("rules", "may"), [
    (("-A ONE -i br0 ! -o br0 -j TWO", "-A TWO -o br0 -j DROP"), False),
    (("-A ONE -i br0 ! -o br0 -j TWO", "-A TWO -o br1 -j DROP"), True),
    (("-A ONE -o br0 -j TWO", "-A TWO -o br1 -j DROP"), False),
    (("-A ONE -o br+ -j TWO", "-A TWO -o br1 -j DROP"), True),
    (("-A ONE -o br1 -j TWO", "-A TWO -o br+ -j DROP"), True),
    (("-A ONE -o br0 -j TWO", "-A TWO ! -o br1 -j DROP"), True),
    (("-A ONE ! -o br0 -j TWO", "-A TWO ! -o br0 -j DROP"), True),
    (("-A ONE -i br0 -j TWO", "-A TWO -o br1 -j DROP"), True),
    # Another rule's conditions are no matter.
    (("-A ONE ! -o br0 -j TWO", "-A ONE -o br0 -j DROP"), True),
])
def test_no_packet_leaves_by_two_interfaces(rules, may):
    found = iptables(*ISOLATED, *rules)
    assert [" may drop " in text for text in found] == [True] * may


def test_after_a_goto_comes_the_policy():
    assert "policy drop" in forward("drop", "goto g", "meta l4proto tcp accept",
                                    g=("tcp dport 25 return",))[0]
    assert forward("drop", "jump g", "meta l4proto tcp accept", g=("tcp dport 25 return",)) == []


def test_the_cure_fits_iptables_nft():
    objects = [{"chain": {"family": "ip", "table": "filter", "name": "FORWARD", "type": "filter",
                          "hook": "forward", "policy": "drop"}}]
    assert warnings(objects) == [
        "chain ip filter FORWARD has policy drop: detoured packets will be dropped; "
        "allow them with: iptables -I FORWARD -m connlabel --label 97 -j ACCEPT"]


def test_other_hooks_do_not_count():
    assert warnings(ruleset("ip", "drop", ("drop",), "output")) == []
    assert warnings(ruleset("ip", "drop", ("drop",), "input"))[0].startswith(
        "rule 'drop' of chain ip fw f drops clients' requests"), "of input, only requests"


@pytest.mark.parametrize(("rules", "sources"), [
    (("udp dport 45672 accept",), ()),
    (("udp dport { 53, 45672 } accept",), ()),
    (("udp dport 40000-50000 accept",), ()),
    (("ip saddr 10.0.0.0/8 accept",), ("10.1.0.0/16",)),
    (("ip saddr 10.0.0.0/8 udp dport 45672 accept",), ()),
    (("ip saddr 10.0.0.0/8 udp dport 45672 accept",), ("10.1.0.0/16",)),
    (("ct state vmap { invalid : drop, established : accept, new : accept }",), ()),
])
def test_requests_that_come_in(rules, sources):
    assert requests("drop", *rules, sources=sources) == []


@pytest.mark.parametrize(("rules", "sources"), [
    ((), ()),
    (("tcp dport 80 accept", 'iifname "lo" accept', "ct state established,related accept"), ()),
    (("ct status dnat accept", "ct label 97 accept"), ()),
])
def test_a_policy_that_drops_requests(rules, sources):
    assert requests("drop", *rules, sources=sources) == [
        "chain ip fw f has policy drop: clients' requests will be dropped; allow them with: "
        "nft insert rule ip fw f udp dport 45672 accept"]


def test_the_network_whose_requests_are_dropped_is_named():
    rule = "ip saddr 192.0.2.0/24 udp dport 45672 accept"
    assert requests("drop", rule, sources=("192.0.2.0/25", "10.0.0.0/8")) == [
        "chain ip fw f has policy drop: clients' requests from 10.0.0.0/8 will be dropped; "
        "allow them with: nft insert rule ip fw f ip saddr 10.0.0.0/8 udp dport 45672 accept"]


def test_a_rule_that_only_may_drop_requests_is_not_said():
    assert requests("accept", "limit rate over 3/second drop", "ip saddr @s drop") == []


@pytest.mark.parametrize(("rule", "how"), [
    ("notrack", "leaves"), ("meta l4proto tcp notrack", "leaves"),
    ("tcp dport 80 notrack", "may leave"),
])
def test_notrack(rule, how):
    assert warnings(ruleset("ip", "accept", (rule,), "prerouting")) == [
        f"rule '{rule}' of chain ip fw f {how} detoured packets untracked, so that nothing is "
        "translated; let them pass before it with: "
        "nft insert rule ip fw f fib daddr type local meta l4proto tcp accept"]


def test_no_notrack_of_detoured_packets():
    assert warnings(ruleset("ip", "accept", (
        "meta l4proto udp notrack", "fib saddr . iif oif missing drop"), "prerouting")) == []
    cured = ("fib daddr type local meta l4proto tcp accept", "notrack")
    assert warnings(ruleset("ip", "accept", cured, "prerouting")) == []


def test_what_is_dropped_when_it_comes_in():
    cures = {FLOWS: "fib daddr type local meta l4proto tcp accept", REQUESTS: LET_IN}
    assert warnings(ruleset("ip", "drop", (), "prerouting")) == [
        policy("ip fw f", what, f"nft insert rule ip fw f {cure}") for what, cure in cures.items()]
    for cure in cures.values():
        assert len(warnings(ruleset("ip", "drop", (cure,), "prerouting"))) == 1
    assert warnings(ruleset("ip", "drop", tuple(cures.values()), "prerouting")) == []
    assert warnings(ruleset("ip", "accept", ("meta l4proto udp drop",), "prerouting")) == [
        rule("meta l4proto udp drop", "ip fw f", f"drops {REQUESTS}",
             f"nft insert rule ip fw f {LET_IN}")]
    # As filters of forged sources do, on many hosts.
    assert warnings(ruleset("ip", "accept", ('iifname "eth0" drop',), "prerouting")) == []
    # Requests need no tracking, only what comes of it.
    assert requests("accept", before=("meta l4proto udp notrack",)) == []


def test_an_untracked_request():
    drops = requests("accept", "ct state untracked drop", before=("meta l4proto udp notrack",))
    assert drops[0].startswith("rule 'ct state untracked drop' of chain ip fw f drops clients'")
    assert requests("accept", "ct state untracked drop") == []


@pytest.fixture
def read(monkeypatch):
    """All chains, as look reads them, of a rule set here by its name; and its objects."""
    def one(name, **options):
        listed = {}
        for tool in ("iptables-nft", "iptables-legacy"):
            path = RULESETS / f"{name}.{tool}"
            parts = path.read_text(encoding="utf-8").split("*")[1:] if path.exists() else []
            listed[tool] = dict(part.split("\n", 1) for part in parts)
        monkeypatch.setattr(look, "_iptables", lambda tool, table: listed[tool].get(table))
        monkeypatch.setattr(look, "_loaded", lambda: list(listed["iptables-legacy"]))
        objects = nft.parse((RULESETS / f"{name}.json").read_bytes())
        chains, unread = look.chains_of(objects, **options)
        assert unread == []
        return chains, objects
    return one


def policy(chain, what, cure):
    return f"chain {chain} has policy drop: {what} will be dropped; allow them with: {cure}"


def rule(text, chain, does, cure):
    return f"rule '{text}' of chain {chain} {does}; allow them before it with: {cure}"


REQUESTS = "clients' requests"
FLOWS = "detoured packets"
LET_IN = "udp dport 45672 accept"
LET_BY = "ct label 97 accept"
IPTABLES_LET_IN = "-I INPUT -p udp --dport 45672 -j ACCEPT"
IPTABLES_LET_BY = "iptables -I FORWARD -m connlabel --label 97 -j ACCEPT"
REJECT = "-j REJECT --reject-with icmp-port-unreachable"
MAY = f"may drop {FLOWS}"
UFW_FLOWS = policy("ip filter FORWARD", FLOWS, IPTABLES_LET_BY)
FIREWALLD = "nft insert rule inet firewalld filter_INPUT " + LET_IN
LIBVIRT_MAY = [rule(f"-o virbr0 {REJECT}", "ip filter LIBVIRT_FWI", MAY, IPTABLES_LET_BY),
               rule(f"-i virbr0 {REJECT}", "ip filter LIBVIRT_FWO", MAY, IPTABLES_LET_BY)]
UFW = [policy("ip filter INPUT", REQUESTS, "iptables " + IPTABLES_LET_IN), UFW_FLOWS]


def firewalld(where, text="reject with icmpx admin-prohibited"):
    return rule(text, f"inet firewalld {where}", f"drops {REQUESTS}", FIREWALLD)


OWNED_TABLE = "rule 'reject with icmpx admin-prohibited' of chain inet firewalld {} drops"
OWNED = (f"{OWNED_TABLE.format('filter_INPUT_POLICIES')} {REQUESTS}; only the program that owns "
         "the table can let them through (detour-server firewall open requests --client CIDR)")

# Rule sets by name: whether requests came in and mapped flows passed where they were loaded (see
# rulesets/README.md), and what is said.
CAPTURED = {
    "nftables-1.0.6-workstation": ("stopped", "passed", [
        rule("drop", "inet filter input", f"drops {REQUESTS}",
             f"nft insert rule inet filter input {LET_IN}")]),
    "ufw-0.36.2": ("stopped", "stopped", UFW),
    "ufw-0.36.2-reject": ("stopped", "stopped", [
        rule(REJECT, "ip filter ufw-reject-input", f"drops {REQUESTS}",
             "iptables " + IPTABLES_LET_IN),
        rule(REJECT, "ip filter ufw-reject-forward", f"drops {FLOWS}", IPTABLES_LET_BY)]),
    "ufw-0.36.2-iptables-legacy": ("stopped", "stopped", [
        policy("INPUT (legacy iptables)", REQUESTS, "iptables-legacy " + IPTABLES_LET_IN),
        policy("FORWARD (legacy iptables)", FLOWS,
               IPTABLES_LET_BY.replace("iptables", "iptables-legacy"))]),
    "firewalld-1.3.3": ("stopped", "passed", [firewalld("filter_IN_public")]),
    "firewalld-1.3.3-panic": ("stopped", "stopped", [
        firewalld("filter_IN_public"),
        policy("inet firewalld_policy_drop raw_prerouting", FLOWS,
               "nft insert rule inet firewalld_policy_drop raw_prerouting fib daddr type local "
               "meta l4proto tcp accept"),
        policy("inet firewalld_policy_drop raw_prerouting", REQUESTS,
               f"nft insert rule inet firewalld_policy_drop raw_prerouting {LET_IN}")]),
    "firewalld-1.3.3-masquerade": ("stopped", "passed", [firewalld("filter_IN_public")]),
    "firewalld-1.3.3-iptables": ("stopped", "passed", [
        rule(REJECT, "ip filter IN_public", f"drops {REQUESTS}", "iptables " + IPTABLES_LET_IN)]),
    "firewalld-2.3.1": ("stopped", "passed", [OWNED]),
    "firewalld-2.3.1-strict": ("stopped", "stopped", [
        OWNED, f"{OWNED_TABLE.format('filter_FORWARD_dnat')} {FLOWS}; only the program that owns "
        "the table can let them through (firewalld: StrictForwardPorts=no)"]),
    "libvirt-9.0.0": ("came", "passed", LIBVIRT_MAY),
    "libvirt-11.3.0-nftables": ("came", "passed", [
        rule(f'{which} "virbr0" reject', f"ip libvirt_network guest_{way}", MAY,
             f"nft insert rule ip libvirt_network forward {LET_BY}")
        for which, way in (("oif", "input"), ("iif", "output"))]),
    "docker-20.10.24": ("came", "stopped", [UFW_FLOWS]),
    "docker-28-shape": ("came", "stopped", [UFW_FLOWS]),
    "docker-20.10.24-ufw-0.36.2": ("stopped", "stopped", UFW),
    "firewalld-1.3.3-libvirt-9.0.0-docker-20.10.24": ("stopped", "passed", [
        firewalld("filter_IN_public"), *LIBVIRT_MAY]),
    "latin1": ("came", "stopped", [
        rule("drop", "ip fw f", f"drops {FLOWS}", f"nft insert rule ip fw f {LET_BY}")]),
}


@pytest.mark.parametrize("name", CAPTURED)
def test_what_others_make(read, name):
    requests_do, flows_do, said = CAPTURED[name]
    found = judge.findings(read(name)[0], PORT, ())
    assert [each.text for each in found] == said
    dropped = [each.text for each in found if each.certain]
    assert any(REQUESTS in text for text in dropped) == (requests_do == "stopped")
    assert any(FLOWS in text for text in dropped) == (flows_do == "stopped")


@pytest.mark.parametrize("name", CAPTURED)
def test_what_is_to_be_opened_of_what_others_make(read, name):
    """By iptables' own numbers, where nft's listing would do for judging."""
    chains, _ = read(name, to_change=True)
    requests_do, flows_do, said = CAPTURED[name]
    if any("prerouting" in text for text in said):
        return  # no label is there yet; left to the host's owner
    client = [IPv4Network("203.0.113.0/24")]
    assert bool(opening.requests_stopped(chains, PORT, client)) == (requests_do == "stopped")
    assert bool(opening.flows_stopped(chains)) == (flows_do == "stopped")


@pytest.mark.parametrize(("name", "command"), [
    ("ufw-0.36.2", "-A FORWARD"),
    ("ufw-0.36.2-reject", "-I FORWARD 5"),  # before ufw-reject-forward
    ("docker-20.10.24", "-A FORWARD"),
    ("docker-20.10.24-ufw-0.36.2", "-A FORWARD"),
])
def test_where_the_rule_for_flows_goes(read, name, command):
    found, = opening.flows_stopped(read(name, to_change=True)[0])
    assert " ".join(opening.to_let_flows_pass(found)).startswith(
        f"iptables-nft -w 5 -t filter {command} -m comment")


def test_a_client_is_named_to_the_owner_of_a_table(read):
    client = IPv4Network("203.0.113.0/24")
    found, = judge.findings(read("firewalld-2.3.1")[0], PORT, [client])
    assert found.text.endswith("(detour-server firewall open requests --client 203.0.113.0/24)")


def test_every_rule_set_here_is_looked_at():
    found = {path.name.removesuffix(path.suffix) for path in RULESETS.glob("*.json")}
    assert found - {"rules"} == CAPTURED.keys()


_DOCKERS = {"ip filter FORWARD", "ip nat POSTROUTING"}
_LIBVIRTS = {"ip filter FORWARD", "ip nat LIBVIRT_PRT"}


@pytest.mark.parametrize(("name", "relying"), [
    ("nftables-1.0.6-workstation", set()),
    ("ufw-0.36.2", set()),
    ("ufw-0.36.2-iptables-legacy", set()),
    ("firewalld-1.3.3", set()),
    ("firewalld-1.3.3-masquerade", {"inet firewalld filter_FORWARD",
                                    "inet firewalld nat_POST_external_allow"}),
    ("libvirt-9.0.0", _LIBVIRTS),
    ("libvirt-11.3.0-nftables", {"ip libvirt_network forward", "ip libvirt_network guest_nat"}),
    ("docker-20.10.24", _DOCKERS),
    ("docker-20.10.24-ufw-0.36.2", _DOCKERS),
    ("docker-28-shape", {"ip filter FORWARD"}),
    ("latin1", set())])
def test_who_relies_on_forwarding(read, name, relying):
    chains, objects = read(name)
    assert forwarders.letting_through(chains) | forwarders.steering(objects) | (
        forwarders.translating(objects)) == relying


@pytest.mark.parametrize(("rules", "relies"), [
    (("-j DROP",), False),
    (("-j DOCKER",), False),
    (("-m conntrack --ctstate INVALID -j DROP",), False),
    (("-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",), False),
    (('-m connlabel --label "97" -m comment --comment "detour-tools: mapped flows" -j ACCEPT',),
     False),
    (("-m conntrack --ctstate DNAT -j ACCEPT",), False),
    (("-p icmp -j ACCEPT",), False),
    (("-j LOG", "-j RETURN", "-j ACCEPT"), False),
    (("-j X", "-j ACCEPT"), False),
    (("-i eth9 -j X", "-j ACCEPT"), True),
    (("-j DETOUR-FORWARD", "-p udp -j ACCEPT"), True),
    (("-i docker0 -j ACCEPT",), True),
    (("-m set --match-set inside src -j ACCEPT",), True),
])
def test_which_rules_tell_that_somebody_relies_on_forwarding(rules, relies):
    lines = ["-P FORWARD ACCEPT", "-N X", "-N DETOUR-FORWARD", "-A X -j DROP",
             *(f"-A FORWARD {rule}" for rule in rules)]
    found = forwarders.letting_through(legacy.chains("\n".join(lines), "iptables-nft"))
    assert found == ({"ip filter FORWARD"} if relies else set())


def test_our_own_translation_is_nobodys():
    lines = ("-A POSTROUTING -j DETOUR-POSTROUTING",
             "-A DETOUR-POSTROUTING -s 10.0.0.1/32 -j MASQUERADE",
             "-A DETOUR-NONE -s 10.0.0.1/32 -j MASQUERADE")
    assert forwarders.translating_by_iptables("\n".join(lines), "iptables-legacy", "nat") == {
        "iptables-legacy nat DETOUR-NONE"}


def test_elements_with_comments():
    assert " drops " in forward("accept", 'ct state { new comment "c" } drop')[0]
    assert requests("drop", 'udp dport { 45672 comment "c" } accept') == []


@pytest.mark.parametrize("line", [
    "-A FORWARD -p", "-A FORWARD -m", "-A FORWARD", "-P INPUT", "-P"])
def test_what_iptables_never_prints_hides_nothing(line):
    assert "policy drop" in iptables("-P FORWARD DROP", line)[0]


def test_text_that_is_no_utf8():
    text = b'{"nftables": [{"table": {"family": "ip", "name": "t", "comment": "caf\xe9"}}]}'
    assert nft.chains(nft.parse(text)) == []


def test_legacy():
    cure = "iptables-legacy -I FORWARD -m connlabel --label 97 -j ACCEPT"
    assert iptables("-P FORWARD ACCEPT", "-P OUTPUT ACCEPT") == []
    assert iptables("-P FORWARD DROP") == [
        "chain FORWARD (legacy iptables) has policy drop: detoured packets will be dropped; "
        f"allow them with: {cure}"]
    assert iptables("-P FORWARD DROP",
                  "-A FORWARD -m conntrack --ctstate DNAT -j ACCEPT") == []
    assert iptables("-P FORWARD DROP", '-A FORWARD -m connlabel --label "97" -j ACCEPT') == []
    assert iptables("-P FORWARD ACCEPT", "-A FORWARD -p udp -j DROP",
                  "-A FORWARD -m conntrack --ctstate INVALID -j DROP",
                  "-A FORWARD -m state --state RELATED,ESTABLISHED -j ACCEPT",
                  '-A FORWARD -p tcp -m comment --comment "all else" -j REJECT '
                  "--reject-with icmp-port-unreachable") == [
        "rule '-p tcp -m comment --comment \"all else\" -j REJECT --reject-with "
        "icmp-port-unreachable' of chain FORWARD (legacy iptables) drops detoured packets; "
        f"allow them before it with: {cure}"]
    assert iptables("-P FORWARD ACCEPT", "-N X", "-A FORWARD -i eth0 -j X", "-A X -j DROP") == [
        "rule '-j DROP' of chain X (legacy iptables) may drop detoured packets; "
        f"allow them before it with: {cure}"]


def test_our_own_chains_of_iptables_stand_in_nobodys_way():
    assert iptables("-P FORWARD ACCEPT", "-N DETOUR-FORWARD", "-A FORWARD -j DETOUR-FORWARD",
                    "-A DETOUR-FORWARD -m connlabel ! --label 97 -j DROP",
                    "-A DETOUR-FORWARD -p tcp -m tcp ! --tcp-option 30 --tcp-flags SYN SYN -j DROP",
                    ) == []


def test_a_rule_whose_text_says_may_is_certain_all_the_same():
    text = "' of chain x may drop all packets"
    found = judge.findings(legacy.chains(
        "-P FORWARD ACCEPT\n-A FORWARD -i eth9 -j DROP\n"
        f'-A FORWARD -m comment --comment "{text}" -j DROP', "iptables-legacy"), PORT, ())
    assert [(each.certain, each.rule.position) for each in found] == [(True, "2"), (False, "1")]
