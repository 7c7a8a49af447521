# SPDX-License-Identifier: GPL-2.0-or-later
"""Detours with two uplinks, and behind NAT, as docs/server.md has it."""

import re
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

import pytest

from detour_tools.lab.topology import End, Host, Link, Route, Topology
from tests.netns.asking import Asker, Flow, WhoAmI
from tests.netns.conftest import PLAIN, PRIVATE

HOW = ("without", "strict", "by the recipe")
RECIPE = Path(__file__).parents[2] / "docs/server.md"


def link(name: str, a: str, b: str, net: int) -> Link:
    return Link(name, End(a, ip_interface(f"10.0.{net}.1/24")),
                End(b, ip_interface(f"10.0.{net}.2/24")), None, 0.0)


def route(host: str, to: str, gateway: str) -> Route:
    return Route(host, ip_network(to), ip_address(gateway))


# The detour's default route is by rb, which drops what has an address of A, as providers do.
UPLINKS = Topology(
    "a detour with two uplinks", (Host("client"), Host("server"), Host("detour"), Host("ra", True),
                                  Host("rb", True)),
    (link("C", "ra", "client", 1), link("A", "ra", "detour", 2), link("B", "rb", "detour", 3),
     link("S", "rb", "server", 4), link("M", "ra", "rb", 5)),
    (route("client", "10.0.0.0/16", "10.0.1.1"), route("detour", "10.0.0.0/16", "10.0.3.1"),
     route("server", "10.0.0.0/16", "10.0.4.1"), route("rb", "10.0.1.0/24", "10.0.5.1")))


@pytest.mark.parametrize("how", HOW)
def test_answers_leave_by_the_uplink_that_the_flow_came_by(make_lab, start_server, how):
    lab = make_lab(UPLINKS)
    detour = lab.host("detour")
    lab.host("rb").run(["nft", "add table ip f; add chain ip f f { type filter hook forward "
                        "priority 0; }; add rule ip f f iifname B ip saddr 10.0.2.0/24 drop"])
    WhoAmI(lab.host("server"), 80)
    if how != "without":
        text = RECIPE.read_text(encoding="utf-8")
        rules = re.search(r"```\n(table inet uplinks .*?)```", text, re.DOTALL)
        assert rules
        detour.run(["nft", "-f", "-"], input=rules[1])
        detour.run(["ip", "route", "add", "default", "via", "10.0.2.1", "dev", "A", "table", "97"])
        detour.run(["ip", "rule", "add", "fwmark", "0x61", "table", "97"])
        detour.run(["sysctl", "-qw", "net.ipv4.conf.all.rp_filter=1"])
        detour.run(["sysctl", "-qw", f"net.ipv4.conf.A.rp_filter={1 if how == 'strict' else 2}"])
    start_server(detour, *PRIVATE, *PLAIN)
    asker = Asker(lab.host("client"), "10.0.2.2")
    if how == "by the recipe":
        flow = Flow(lab.host("client"), "10.0.2.2", asker.ask("10.0.4.2:80", 80))
        assert flow.seen_as == "10.0.3.2"
        assert flow.echo()
    else:
        with pytest.raises(AssertionError, match="no answer"):
            asker.ask("10.0.4.2:80", 80, tries=1)


def test_a_detour_behind_nat(lab, start_server):
    detour, client, public = lab.host("detour"), lab.host("client"), "203.0.113.7"
    WhoAmI(lab.host("server"), 80)
    towards_r3 = lab.host("r1").run(["ip", "-o", "route", "get", "10.0.6.2"]).stdout.split()
    lab.host("r1").run(["ip", "route", "add", public, "via", towards_r3[2]])
    lab.host("r3").run(["nft", "-f", "-"], input=f"""table ip provider {{ chain in {{
        type nat hook prerouting priority dstnat; ip daddr {public} dnat to 10.0.6.2; }}; }}""")
    start_server(detour, *PRIVATE, *PLAIN, "--own-address", public)
    asker = Asker(client, public)
    assert Flow(client, public, asker.ask("10.0.3.2:80", 80)).seen_as == "10.0.6.2"
    assert asker.is_refused(f"{public}:22", 0)
