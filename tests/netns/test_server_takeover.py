# SPDX-License-Identifier: GPL-2.0-or-later
"""After a kill our nftables table stays as it stands if it is what we would make; only then."""

import contextlib
import itertools
import json
import re
import sys
from ipaddress import IPv4Address

import pytest

from detour_tools.endpoint import Endpoint
from detour_tools.lab import namespaces
from detour_tools.lab.network import Host, Lab
from detour_tools.netlink.conntrack import Conntrack
from tests.netns import asking
from tests.netns.asking import Asker, Flow, WhoAmI, kernel_mappings, mappings
from tests.netns.conftest import PRIVATE, StartServer

ARGUMENTS = ("--backend", "nftables", "--relay", "tcp", *PRIVATE)


def rules_of(host: Host) -> str:
    """The rules, without clients whose flows a remote has answered."""
    return " ".join(asking.lasting(re.sub(r"\n\s*elements = {[^}]* expires [^}]*}", "",
                                          asking.rules(host))).split())


def handle(host: Host) -> int:
    """The number that the kernel gave our table: another one when it was made anew."""
    listed = json.loads(host.run(["nft", "-j", "list", "tables", "ip"]).stdout)["nftables"]
    return next(each["table"]["handle"] for each in listed
                if each.get("table", {}).get("name") == "detour-tools")


@pytest.fixture
def flow(lab: Lab, start_server: StartServer, asker: Asker):
    """A flow through a mapping of a server that was killed; one more mapping stands beside."""
    server = start_server(lab.host("detour"), *ARGUMENTS)
    WhoAmI(lab.host("server"), 80)
    flow = Flow(lab.host("client"), "10.0.6.2", asker.ask("10.0.3.2:80", 80))
    asker.ask("10.0.3.2:81", 81)
    assert flow.echo()
    server.kill()
    yield flow
    flow.close()


def test_a_table_as_we_make_it_is_taken_over_in_place(lab, start_server, asker, flow):
    detour = lab.host("detour")
    before, rules = handle(detour), rules_of(detour)
    for _ in range(2):
        server = start_server(detour, *ARGUMENTS)
        server.wait_line("took over 2 mappings")
        assert handle(detour) == before
        assert rules_of(detour) == rules
        assert set(kernel_mappings(detour, "nftables")) == mappings(detour)
        assert flow.echo()
        # It is ours to change, to tend and to remove.
        asker.ask("10.0.3.2:82", 82)
        assert ("10.0.1.1", 82, "10.0.3.2:82") in kernel_mappings(detour, "nftables")
        detour.run(["detour-server", "flush", "--remote", "10.0.3.2:82"])
        assert ("10.0.1.1", 82, "10.0.3.2:82") not in kernel_mappings(detour, "nftables")
        assert asking.status(detour)["repairs"] == 0
        server.kill()
    server = start_server(detour, *ARGUMENTS)
    detour.run(["nft", "flush", "ruleset"])
    server.wait_line("made them anew, with 2 mappings")
    assert flow.echo()
    assert server.stop() == 0
    assert "DETOUR" not in asking.rules(detour).upper()


@pytest.mark.parametrize("change", [
    "insert rule ip detour-tools forward drop",
    "flush chain ip detour-tools input",
    "add chain ip detour-tools theirs",
    "add set ip detour-tools theirs { type ipv4_addr; }",
    "add table ip detour-tools { flags dormant; }",
    "add element ip detour-tools mapped { 10.0.1.1 . 99 . 10.0.3.2 . 99 }",
    "delete element ip detour-tools mapped { 10.0.1.1 . 80 . 10.0.3.2 . 80 }",
    # As many as before.
    "add element ip detour-tools mapped { 10.0.1.1 . 99 . 10.0.3.2 . 99 };"
    "delete element ip detour-tools mapped { 10.0.1.1 . 80 . 10.0.3.2 . 80 }",
])
def test_a_table_that_somebody_changed_is_made_anew(lab, start_server, asker, flow, change):
    detour = lab.host("detour")
    before, rules = handle(detour), rules_of(detour)
    detour.run(["nft", change])
    assert rules_of(detour) != rules
    server = start_server(detour, *ARGUMENTS)
    server.wait_line("took over 2 mappings")
    assert handle(detour) != before
    assert rules_of(detour) == rules
    assert flow.echo()
    assert Flow(lab.host("client"), "10.0.6.2", 80).echo()


def test_who_has_a_mapping_is_answered_while_it_is_taken_over(lab, start, start_server, asker):
    """Unless policy refuses it now; and nobody gets a new one before all are known."""
    detour = lab.host("detour")
    killed = start_server(detour, *ARGUMENTS)
    for port in (80, 81, 82):
        asker.ask(f"10.0.3.2:{port}", port)
    killed.kill()
    code = ("import time\n"
            "from detour_tools.nat.nftables import NftablesBackend\n"
            "whole = NftablesBackend.whole\n"
            "def slow(self): time.sleep(3.0); return whole(self)\n"
            "NftablesBackend.whole = slow\n"
            "from detour_tools.cli.server import main; main()")
    WhoAmI(detour, 82)
    server = start(detour, [sys.executable, "-c", code, *ARGUMENTS, "--deny-port", "81"])
    wanted = [(Endpoint(IPv4Address("10.0.3.2"), port), port) for port in (83, 82, 81, 80)]
    answered: list[int] = []
    while 80 not in answered:
        for remote, port in wanted:
            asker.send_request(remote, port)
        answered += [answer.remote.port for answer in asker.answers(0.1)]
    assert set(answered) == {80}
    assert not server.matching("took over")
    server.wait_line("serving")
    server.wait_line("took over 3 mappings")
    assert mappings(detour) >= {("10.0.1.1", 80, "10.0.3.2:80")}
    for answer in asker.answers(0.5):
        answered.append(answer.remote.port)
    assert asker.ask("10.0.3.2:83", 83) == 83
    assert 81 not in answered
    assert asker.ask("10.0.3.2:82", 82) != 82
    assert {found[2] for found in kernel_mappings(detour, "nftables")} == {
        f"10.0.3.2:{port}" for port in (80, 82, 83)}


def test_other_settings_make_another_table(lab, start_server, flow):
    detour = lab.host("detour")
    before = handle(detour)
    start_server(detour, *ARGUMENTS, "--max-mappings", 77)
    assert handle(detour) != before
    assert len(kernel_mappings(detour, "nftables")) == 2
    assert flow.echo()


def test_a_flow_in_a_zone_of_its_own_is_seen(lab, start_server, asker):
    """The kernel lays such a flow out otherwise; its mapping must not expire either."""
    detour = lab.host("detour")
    detour.run(["nft", "-f", "-"], input="""table ip zones {
        chain first {
            type filter hook prerouting priority raw; policy accept;
            ip saddr 10.0.1.1 tcp dport 80 ct original zone set 5
        }
    }""")
    start_server(detour, *ARGUMENTS, "--idle-timeout", 1)
    WhoAmI(lab.host("server"), 80)
    flow = Flow(lab.host("client"), "10.0.6.2", asker.ask("10.0.3.2:80", 80))
    with namespaces.inside(detour.namespace), contextlib.closing(Conntrack()) as conntrack:
        assert len(conntrack.flows()) == len(conntrack.live()) == 1
    asker.ask("10.0.3.2:81", 81)
    asking.in_time("the idle one is gone", (
        asking.status(detour)["mappings"] == 1 for _ in itertools.count()))
    assert flow.echo()
    assert len(kernel_mappings(detour, "nftables")) == 1
