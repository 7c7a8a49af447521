# SPDX-License-Identifier: GPL-2.0-or-later
"""detour-server firewall open and close: what they add to real rules, and that they take it back.

In a mount namespace where /etc is a folder of the test's.
"""

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from detour_tools.lab.network import Host, Lab

_CLIENTS = ("203.0.113.0/24", "203.0.113.7", "192.0.2.1")


@pytest.fixture
def host(lab: Lab) -> Host:
    return lab.host("detour")


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    folder = tmp_path / "etc"
    folder.mkdir()
    return folder


def _firewall(host: Host, etc: Path, *words: str) -> dict[str, Any]:
    """What the command prints as JSON, or its error as ``msg``."""
    done = host.run(
        ["unshare", "--mount", "sh", "-c", 'umask 077; mount --bind "$1" /etc; shift; exec "$@"',
         "sh", etc, "detour-server", "firewall", *words, "--json"], check=False)
    if done.returncode:
        assert done.returncode == 1, done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
        return {"changed": False, "msg": done.stderr}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _requests(host: Host, etc: Path, *words: str, clients: tuple[str, ...] = _CLIENTS
              ) -> dict[str, Any]:
    return _firewall(host, etc, "open", "requests", "--by", "nftables", *words,
                     *(f"--client={each}" for each in clients))


def _listed(host: Host) -> str:
    return host.run(["nft", "list", "ruleset"]).stdout


_TABLE = """table inet {name} {{
    set blocked {{ type ipv4_addr; elements = {{ 192.0.2.1 }}; }}
    chain refuse {{ tcp dport 22 accept; return; }}
    chain refuse_all {{ jump refuse; drop; }}
    chain let_in {{ udp dport 45672 accept; }}
    chain input {{ type filter hook input priority filter; policy {policy}; {rules} }}
}}"""

# Policy and rules of a chain, and whether it drops what some client asks.
_INPUT = (
    ("accept", "", False),
    ("drop", "", True),
    ("drop", "ct state established accept; tcp dport 22 accept;", True),
    ("accept", "iif lo accept; counter drop;", True),
    ("accept", "iifname eth9 drop;", False),
    ("accept", "log prefix \"no \" drop;", True),
    ("drop", "udp dport { 53, 45672 } accept;", False),
    ("drop", "udp dport 4567 accept;", True),
    ("accept", "reject with icmpx admin-prohibited;", True),
    # All clients must come in, whoever else may.
    ("drop", "ip saddr 198.51.100.5 udp dport 45672 accept;", True),
    ("drop", "ip saddr 203.0.113.0/24 udp dport 45672 accept;", True),
    ("drop", "ip saddr { 203.0.113.0/24, 192.0.2.0-192.0.2.9 } udp dport 45000-46000 accept;",
     False),
    ("drop", "ip saddr { 203.0.113.0/28, 192.0.2.1 } udp dport 45672 accept;", True),
    ("accept", "ip saddr 192.0.2.0/24 drop;", True),
    ("accept", "ip saddr @blocked drop;", False),
    # Conditions, known or not.
    ("accept", "meta l4proto udp drop;", True),
    ("accept", "meta l4proto != { tcp, icmp } drop;", True),
    ("accept", "iif != lo udp dport != { 53, 45672 } drop;", False),
    ("accept", "iifname != eth9 drop;", False),
    ("accept", "iif != lo drop;", True),
    ("accept", "ct state new drop;", True),
    ("drop", "udp dport 45672 limit rate 1/second accept;", True),
    # Other chains.
    ("accept", "jump refuse_all;", True),
    ("accept", "tcp dport 22 jump refuse_all;", False),
    ("accept", "jump refuse; jump let_in; jump refuse_all;", False),
    ("drop", "goto refuse; accept;", True),
    ("accept", "ct state vmap { established : accept, new : goto refuse_all };", True),
)


def test_the_port_is_opened_where_the_host_drops(host: Host, etc: Path) -> None:
    host.run(["nft", "-f", "-"], input="\n".join(
        _TABLE.format(name=f"case{number}", policy=policy, rules=rules)
        for number, (policy, rules, _) in enumerate(_INPUT)))
    before = _listed(host)
    done = _requests(host, etc, "--dry-run")
    opened = [any(f"inet case{number} input ip saddr {{ 192.0.2.1/32, 203.0.113.0/24 }} " in each
                  for each in done["added"]) for number in range(len(_INPUT))]
    assert [(*case[:2], found) for case, found in zip(_INPUT, opened, strict=True)] == list(_INPUT)
    assert (_listed(host), list(etc.iterdir())) == (before, [])


_DROPS = """table inet filter {
    chain input { type filter hook input priority filter; policy drop; iif "lo" accept; }
    chain forward { type filter hook forward priority filter; policy drop; }
}"""


def test_requests_are_let_in_and_the_way_back(host: Host, etc: Path) -> None:
    host.run(["nft", "-f", "-"], input=_DROPS)
    before = _listed(host)
    said = _requests(host, etc, "--dry-run")
    assert _listed(host) == before

    assert _requests(host, etc) == said
    assert "ip saddr { 192.0.2.1, 203.0.113.0/24 } udp dport 45672 accept" in _listed(host)
    # Whatever root's umask: users may look at what systemd reads.
    assert {stat.S_IMODE(path.stat().st_mode) for path in etc.rglob("*")} == {0o644, 0o755}
    again = _requests(host, etc)
    assert (again["changed"], again["added"], again["removed"]) == (False, [], [])

    # As nftables.service does it: the host's rules, then ours.
    opened = _listed(host)
    host.run(["nft", "flush", "ruleset"])
    host.run(["nft", "-f", "-"], input=_DROPS)
    host.run(["nft", "-f", etc / "nftables.d/detour-tools.nft"])
    assert _listed(host) == opened

    # Others, at another port: those of before are shut out.
    done = _requests(host, etc, "--port", "7", clients=("198.51.100.0/24",))
    assert (len(done["added"]), len(done["removed"])) == (1, 1)
    assert "198.51.100.0/24 udp dport 7 accept" in _listed(host)
    assert "203.0.113" not in _listed(host)

    # Flows are another matter.
    assert not _firewall(host, etc, "close", "flows")["changed"]
    assert _firewall(host, etc, "close", "--dry-run")["changed"]
    assert _firewall(host, etc, "close")["changed"]
    assert _listed(host) == before
    assert [path for path in etc.rglob("*") if path.is_file()] == []
    assert not _firewall(host, etc, "close")["changed"]


def test_what_lets_them_in_already_is_the_hosts(host: Host, etc: Path) -> None:
    host.run(["nft", "-f", "-"], input=_DROPS.replace(
        'iif "lo" accept', "udp dport 45672 accept"))
    before = _listed(host)
    assert not _requests(host, etc)["changed"]
    assert not _firewall(host, etc, "close")["changed"]
    assert (_listed(host), list(etc.iterdir())) == (before, [])


def test_what_drops_them_all_the_same_is_said(host: Host, etc: Path) -> None:
    host.run(["nft", "-f", "-"], input=_DROPS)
    before = _listed(host)
    host.run(["nft", "-f", "-"], input="""table ip early {
        chain c { type filter hook prerouting priority raw; udp dport 45672 drop; }
    }""")
    said = _requests(host, etc)["msg"]
    assert "rule 'udp dport 45672 drop' of chain ip early c drops clients' requests from" in said
    assert "all the same (what was opened stands" in said
    host.run(["nft", "delete", "table", "ip", "early"])
    assert not _requests(host, etc)["changed"], "they are opened"
    assert _firewall(host, etc, "close")["changed"]
    assert _listed(host) == before


def test_open_again_after_the_host_took_our_rule_away(host: Host, etc: Path) -> None:
    host.run(["nft", "-f", "-"], input=_DROPS)
    _requests(host, etc)
    opened = _listed(host)
    host.run(["nft", "flush", "ruleset"])
    host.run(["nft", "-f", "-"], input=_DROPS)
    assert len(_requests(host, etc)["added"]) == 1
    assert _listed(host) == opened


@pytest.mark.parametrize("text", ["{", "[]", '{"pf": []}', '{"ufw": [1]}'])
def test_a_memory_that_is_none_is_said(host: Host, etc: Path, text: str) -> None:
    (etc / "detour-tools").mkdir()
    (etc / "detour-tools/firewall.json").write_text(text)
    assert "firewall.json is not what was written there" in _firewall(host, etc, "close")["msg"]


@pytest.mark.parametrize("client", ["2001:db8::/32", "203.0.113.7/24"])
def test_clients_are_checked(host: Host, etc: Path, client: str) -> None:
    host.run(["nft", "-f", "-"], input=_DROPS)
    before = _listed(host)
    done = host.run(["detour-server", "firewall", "open", "requests", "--client", client],
                    check=False)
    assert done.returncode in (1, 2)
    assert len(done.stderr.splitlines()) == 1
    assert _listed(host) == before


@pytest.mark.parametrize("tool", ["iptables-nft", "iptables-legacy"])
@pytest.mark.parametrize(("policy", "rules", "drops"), [
    ("DROP", ["INPUT",
              "INPUT -s 198.51.100.1 -p udp -j ACCEPT", "INPUT -p udp --dport 53 -j ACCEPT",
              "INPUT -p udp -m limit --limit 1/s -j ACCEPT", "INPUT ! -p udp -j ACCEPT",
              "INPUT -m state --state ESTABLISHED -j ACCEPT", "INPUT -g other",
              "INPUT -j ACCEPT"], True),
    ("ACCEPT", ["INPUT -m conntrack --ctstate NEW -j other", "other -p tcp -j ACCEPT",
                "INPUT -j REJECT"], True),
    ("DROP", ["INPUT -p tcp -j DROP", "INPUT ! -p udp -j DROP", "INPUT -i eth9 -j DROP",
              "INPUT ! -s 192.0.2.0/24 -j DROP", "INPUT -m conntrack --ctstate NEW -g other",
              'other -p udp -m comment --comment "for us" -m multiport --dports 53,45000:46000 '
              "-j ACCEPT"], False),
])
def test_iptables_is_left_to_its_owner(
        host: Host, etc: Path, tool: str, policy: str, rules: list[str], drops: bool) -> None:
    lines = [f":INPUT {policy}", ":other -", *(f"-A {rule}" for rule in rules)]
    host.run([f"{tool}-restore"], input="\n".join(["*filter", *lines, "COMMIT", ""]))
    done = _requests(host, etc, clients=("192.0.2.1",))
    assert not done["changed"]
    assert (f"run '{tool} -I INPUT -p udp --dport 45672 -s 192.0.2.1/32 -j ACCEPT'"
            in done.get("msg", "")) == drops, done


@pytest.mark.parametrize(("drop", "show"), [
    (["nft", "-f", "-"], ["nft", "list", "ruleset"]),
    (["iptables-legacy-restore"], ["iptables-legacy", "-S"]),
    (["iptables-nft-restore"], ["iptables-nft", "-S"]),
])
def test_mapped_flows_may_pass_and_the_way_back(
        host: Host, etc: Path, drop: list[str], show: list[str]) -> None:
    host.run(drop, input=_DROPS if drop[0] == "nft" else
             "*filter\n:FORWARD ACCEPT\n-A FORWARD -i eth9 -j DROP\n-A FORWARD -j REJECT\nCOMMIT\n")
    before = host.run(show).stdout
    said = _firewall(host, etc, "open", "flows", "--dry-run")
    assert host.run(show).stdout == before

    assert _firewall(host, etc, "open", "flows") == said
    assert len(said["added"]) == 1
    opened = host.run(show).stdout
    assert opened.count("detour-tools: mapped flows") == 1
    if drop[0] != "nft":  # what the host singles out stays dropped
        assert opened.index("eth9") < opened.index("detour-tools") < opened.index("REJECT")
    assert not _firewall(host, etc, "open", "flows")["changed"]

    if drop[0] != "nft":  # as another release may have put it
        host.run([drop[0].removesuffix("-restore"), "-I", "FORWARD", "-m", "conntrack",
                  "--ctstate", "DNAT", "-m", "comment", "--comment", "detour-tools: mapped flows",
                  "-j", "ACCEPT"])
    assert _firewall(host, etc, "close", "flows")["changed"]
    assert host.run(show).stdout == before
    assert list(etc.iterdir()) == []
