# SPDX-License-Identifier: GPL-2.0-or-later
"""The roles' modules on a real kernel: what they change, and that they put it back.

Run by Ansible itself, with its connection 'local' inside a network namespace. What needs a whole
system (units, network managers, boot) is molecule/roles' part.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from detour_tools.lab.network import Host, Lab
from tests.netns.conftest import StartServer

_ROLES = Path(__file__).parents[2] / "roles"

Module = Callable[..., dict[str, Any]]


@pytest.fixture
def host(lab: Lab) -> Host:
    return lab.host("detour")


@pytest.fixture
def module(host: Host, tmp_path: Path) -> Module:
    """Run a module of a role: ``module("ip_forward/library/detour_sysctls.py", path=...)``."""
    def run(path: str, /, *, check: bool = False, **arguments: object) -> dict[str, Any]:
        library = (_ROLES / path).parent
        done = host.run(
            ["env", "LC_ALL=C.UTF-8", f"HOME={tmp_path}",
             Path(sys.executable).with_name("ansible"), "localhost", "--connection=local",
             f"--module-path={library}", f"--module-name={Path(path).stem}",
             f"--args={json.dumps(arguments)}", "--diff", *(["--check"] if check else [])],
            check=False, cwd=tmp_path)  # away from the project's ansible.cfg
        diff, _, result = done.stdout.partition("localhost | ")
        found: dict[str, Any] = json.loads(result.partition("=>")[2])
        return found | {"diff": diff}
    return run


# sysctls

_SYSCTLS = "ip_forward/library/detour_sysctls.py"
_FORWARD = "net/ipv4/conf/all/send_redirects", "net/ipv4/conf/all/rp_filter"


def _values(host: Host) -> list[str]:
    return host.run(["cat", *(f"/proc/sys/{each}" for each in _FORWARD)]).stdout.split()


def test_sysctls_are_set_and_put_back(host: Host, module: Module, tmp_path: Path) -> None:
    path = tmp_path / "90-ours.conf"
    host.run(["sysctl", "-qw", "net.ipv4.conf.all.send_redirects=1",
              "net.ipv4.conf.all.rp_filter=2"])
    wanted = {"path": str(path), "values": {"net.ipv4.conf.all.send_redirects": 0,
                                            "net.ipv4.conf.all.rp_filter": 0}}

    assert module(_SYSCTLS, check=True, **wanted)["changed"]
    assert _values(host) == ["1", "2"]
    assert not path.exists()

    assert module(_SYSCTLS, **wanted)["changed"]
    assert _values(host) == ["0", "0"]
    # As systemd does at boot.
    host.run(["sysctl", "-qw", "net.ipv4.conf.all.rp_filter=1"])
    host.run(["sysctl", "-qp", path])
    assert _values(host) == ["0", "0"]
    assert not module(_SYSCTLS, **wanted)["changed"]

    # One is no longer wanted, and somebody else has set the other since.
    assert module(_SYSCTLS, path=str(path), values={"net.ipv4.conf.all.rp_filter": 0})["changed"]
    assert _values(host) == ["1", "0"]
    host.run(["sysctl", "-qw", "net.ipv4.conf.all.rp_filter=1"])
    assert module(_SYSCTLS, path=str(path), state="absent")["changed"]
    assert _values(host) == ["1", "1"]
    assert not path.exists()
    assert not module(_SYSCTLS, path=str(path), state="absent")["changed"]


def test_a_value_that_the_kernel_refuses_leaves_no_file(
        host: Host, module: Module, tmp_path: Path) -> None:
    path = tmp_path / "90-ours.conf"
    done = module(_SYSCTLS, path=str(path), values={"net.ipv4.conf.all.rp_filter": "much"})
    assert done["msg"] == "cannot set net.ipv4.conf.all.rp_filter to much: Invalid argument"
    assert not path.exists()


def test_what_the_running_server_has_borrowed_waits_for_it(
        host: Host, module: Module, start_server: StartServer, tmp_path: Path) -> None:
    path = tmp_path / "90-ours.conf"
    host.run(["sysctl", "-qw", "net.ipv4.ip_forward=0"])
    server = start_server(host)
    done = module(_SYSCTLS, path=str(path), values={"net.ipv4.ip_forward": 0})
    assert (done["changed"], done["borrowed"]) == (True, ["net.ipv4.ip_forward"])
    assert host.run(["cat", "/proc/sys/net/ipv4/ip_forward"]).stdout == "1\n"
    # Not what the server has set: that it puts back itself.
    assert "#was net.ipv4.ip_forward = 0" in path.read_text(encoding="utf-8")
    server.stop()
    assert host.run(["cat", "/proc/sys/net/ipv4/ip_forward"]).stdout == "0\n"


# The firewall; in check mode, as the rest needs systemd.

_FIREWALL = "detour_server/library/detour_firewall.py"

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


def test_the_port_is_opened_where_the_host_drops(host: Host, module: Module) -> None:
    host.run(["nft", "-f", "-"], input="\n".join(
        _TABLE.format(name=f"case{number}", policy=policy, rules=rules)
        for number, (policy, rules, _) in enumerate(_INPUT)))
    done = module(_FIREWALL, check=True, kind="nftables", port=45672,
                  sources=["203.0.113.0/24", "203.0.113.7", "192.0.2.1"])
    assert done["changed"], done
    opened = [f"+['inet case{number} input', 'ip saddr {{ 192.0.2.1/32, 203.0.113.0/24 }} "
              in done["diff"] for number in range(len(_INPUT))]
    assert [(*case[:2], found) for case, found in zip(_INPUT, opened, strict=True)] == list(_INPUT)


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
        host: Host, module: Module, tool: str, policy: str, rules: list[str],
        drops: bool) -> None:
    lines = [f":INPUT {policy}", ":other -", *(f"-A {rule}" for rule in rules)]
    host.run([f"{tool}-restore"], input="\n".join(["*filter", *lines, "COMMIT", ""]))
    done = module(_FIREWALL, check=True, kind="nftables", port=45672, sources=["192.0.2.1"])
    assert not done["changed"]
    assert (f"run '{tool} -I INPUT -p udp --dport 45672 -s 192.0.2.1/32 -j ACCEPT'"
            in done.get("msg", "")) == drops, done


# The forward chains

_FORWARD_CHAIN = """table inet filter {
    chain forward { type filter hook forward priority filter; policy drop; }
}"""
_OPEN = ["python3", _ROLES / "ip_forward/files/detour-forward"]


@pytest.mark.parametrize(("drop", "show"), [
    (["nft", "-f", "-"], ["nft", "list", "ruleset"]),
    (["iptables-legacy-restore"], ["iptables-legacy", "-S"]),
])
def test_mapped_flows_may_pass_and_the_way_back(
        host: Host, drop: list[str], show: list[str]) -> None:
    host.run(drop, input=_FORWARD_CHAIN if drop[0] == "nft" else
             "*filter\n:FORWARD ACCEPT\n-A FORWARD -i eth9 -j DROP\n-A FORWARD -j REJECT\nCOMMIT\n")
    before = host.run(show).stdout
    said = host.run([*_OPEN, "check"]).stdout
    assert host.run(show).stdout == before

    assert host.run([*_OPEN, "open"]).stdout == said != ""
    assert host.run(show).stdout.count("detour-tools: mapped flows") == 1
    assert host.run([*_OPEN, "open"]).stdout == ""

    if drop[0] == "iptables-legacy-restore":  # as another release may have put it
        host.run(["iptables-legacy", "-I", "FORWARD", "-m", "conntrack", "--ctstate", "DNAT", "-m",
                  "comment", "--comment", "detour-tools: mapped flows", "-j", "ACCEPT"])
    host.run([*_OPEN, "close"])
    assert host.run(show).stdout == before
