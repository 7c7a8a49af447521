# SPDX-License-Identifier: GPL-2.0-or-later
"""The forwarding switch, between the server and others who want it off, or on."""

import itertools

import pytest

from detour_tools import runtime
from detour_tools.lab import namespaces
from tests.netns import asking
from tests.netns.asking import Flow, WhoAmI
from tests.netns.conftest import PRIVATE


def switch(host, setting, value):
    host.run(["sysctl", "-qw", f"{setting}={value}"])


def until(what, condition, timeout=30.0):
    asking.in_time(what, (condition() for _ in itertools.count()), timeout=timeout)


def is_on(host):
    return asking.forwarding(host) == "1"


def said(host, words):
    return any(words in text for text in asking.status(host)["warnings"])


def test_forwarding_that_somebody_switches_off_comes_back(lab, serve, asker):
    detour = lab.host("detour")
    WhoAmI(lab.host("server"), 80)
    server = serve()
    flow = Flow(lab.host("client"), detour.address, asker.ask("10.0.3.2:80", 80))
    switch(detour, "net.ipv4.ip_forward", 0)
    server.wait_line("ip_forward was switched off by somebody else: switched on again")
    until("forwarding", lambda: is_on(detour))
    assert flow.echo()
    assert said(detour, "somebody else switched net.ipv4.ip_forward off")
    assert asking.status(detour)["policy"]["router"] is False
    assert server.stop() == 0
    assert not is_on(detour), "what stood before the server is put back"


@pytest.mark.parametrize("was", ["0", "1"])
def test_what_others_switch_makes_no_router_and_ends_none(lab, start_server, was):
    """The server's own switching on again is not what it, or the next one, found."""
    detour = lab.host("detour")
    switch(detour, "net.ipv4.ip_forward", was)
    server = start_server(detour, *PRIVATE)
    for _ in range(2):
        switch(detour, "net.ipv4.ip_forward", 0)
        until("forwarding", lambda: is_on(detour))
        switch(detour, "net.ipv4.ip_forward", 1)  # as who restarts the network's service
        server.kill()
        server = start_server(detour, *PRIVATE)
        assert asking.status(detour)["policy"]["router"] is (was == "1")
    switch(detour, "net.ipv4.ip_forward", 0)
    until("forwarding", lambda: is_on(detour))
    assert server.stop() == 0
    assert asking.forwarding(detour) == was
    assert bool(server.matching("ip_forward stays 1, as it was when the server came")) is (
        was == "1")
    with namespaces.inside(detour.namespace):
        folder = runtime.directory("detour-server")
    assert not [path.name for path in folder.glob("*") if path.suffix != ".lock"]


def test_a_router_that_others_ended_between_two_servers_is_none(lab, start_server):
    detour = lab.host("detour")
    switch(detour, "net.ipv4.ip_forward", 1)
    server = start_server(detour, *PRIVATE)
    switch(detour, "net.ipv4.ip_forward", 0)
    until("forwarding", lambda: is_on(detour))
    server.kill()
    switch(detour, "net.ipv4.ip_forward", 0)
    server = start_server(detour, *PRIVATE)
    assert asking.status(detour)["policy"]["router"] is False
    assert server.stop() == 0
    assert not is_on(detour)


@pytest.mark.parametrize("was", ["0", "1"])
def test_who_switches_it_off_again_and_again_has_his_way(lab, start_server, was):
    detour = lab.host("detour")
    switch(detour, "net.ipv4.ip_forward", was)
    server = start_server(detour, *PRIVATE)
    for _ in range(3):
        switch(detour, "net.ipv4.ip_forward", 0)
        until("forwarding", lambda: is_on(detour))
    switch(detour, "net.ipv4.ip_forward", 0)
    server.wait_line("off again and again: it is left off")
    assert not is_on(detour)
    assert said(detour, "off again and again: it is left off")
    switch(detour, "net.ipv4.ip_forward", 1)
    server.wait_line("no longer so: .*again and again")
    assert server.stop() == 0
    assert asking.forwarding(detour) == was, "whoever switches it on does so for the server, too"


def test_an_interface_that_does_not_forward_is_said(lab, start_server):
    detour = lab.host("detour")
    link = detour.run(["ip", "-o", "route", "get", "10.0.1.1"]).stdout.split()
    setting = f"net/ipv4/conf/{link[link.index('dev') + 1]}/forwarding"
    server = start_server(detour, *PRIVATE)
    assert asking.status(detour)["warnings"] == []
    switch(detour, setting, 0)
    server.wait_line(f"{setting} is 0: what comes in on")
    assert said(detour, f"sysctl -w {setting}=1")
    switch(detour, setting, 1)
    server.wait_line("no longer so: ")
    assert asking.status(detour)["warnings"] == []


MASQUERADE = ["-t", "nat", "-A", "POSTROUTING", "-s", "172.17.0.0/16", "-j", "MASQUERADE"]
OTHERS = {
    "iptables-nft": (["iptables-nft", *MASQUERADE], "ip nat POSTROUTING"),
    "iptables-legacy": (["iptables-legacy", *MASQUERADE], "iptables-legacy nat POSTROUTING"),
    "docker's forward chain": (["iptables-nft", "-A", "FORWARD", "-o", "docker0", "-j", "ACCEPT"],
                               "ip filter FORWARD"),
    "nft": (["nft", "add table inet virt; add chain inet virt out { type nat hook postrouting "
             "priority srcnat; }; add rule inet virt out masquerade"], "inet virt out"),
    "nft's map": (["nft", "add table ip fw; add map ip fw m { type ifname : verdict; }; add chain "
                   "ip fw f { type filter hook forward priority 0; }; add rule ip fw f iifname "
                   "vmap @m"], "ip fw f"),
}


@pytest.mark.parametrize("who", OTHERS)
def test_stopping_leaves_forwarding_to_others_who_came(lab, start_server, who):
    command, chain = OTHERS[who]
    detour = lab.host("detour")
    backend = "iptables" if who == "iptables-legacy" else "nftables"
    options = ("--backend", backend, *PRIVATE)
    start_server(detour, *options).kill()
    detour.run(command)
    server = start_server(detour, *options)
    assert server.stop() == 0
    assert is_on(detour)
    assert server.matching(rf"ip_forward stays 1, .*\(chain {chain}\)")
    with namespaces.inside(detour.namespace):
        folder = runtime.directory("detour-server")
    assert not [path.name for path in folder.glob("*") if path.suffix != ".lock"]


@pytest.mark.parametrize("rule", [
    ["iptables-nft", "-A", "FORWARD", "-j", "DROP"],
    ["iptables-nft", "-A", "FORWARD", "-m", "connlabel", "--label", "97", "-j", "ACCEPT"],
    ["iptables-legacy", "-A", "FORWARD", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP"],
    ["nft", "add table ip fw; add chain ip fw f { type filter hook forward priority 0; }; "
            "add rule ip fw f ct state established accept"],
])
def test_a_first_rule_that_lets_nobody_through_keeps_no_forwarding(lab, start_server, rule):
    detour = lab.host("detour")
    server = start_server(detour, *PRIVATE)
    detour.run(rule)
    assert server.stop() == 0
    assert not is_on(detour)
    assert not server.matching("stays 1")


def test_stopping_takes_forwarding_from_those_who_had_none(lab, start_server, backend):
    detour = lab.host("detour")
    for command, _ in OTHERS.values():
        detour.run(command)
    switch(detour, "net.ipv4.ip_forward", 0)
    options = ("--backend", backend, *PRIVATE)
    start_server(detour, *options).kill()
    # Nobody relies on forwarding whose chain is empty.
    detour.run(["iptables-legacy", "-t", "mangle", "-P", "FORWARD", "ACCEPT"])
    detour.run(["nft", "add table ip idle; add chain ip idle f "
                "{ type filter hook forward priority 0; }"])
    server = start_server(detour, *options)
    assert server.stop() == 0
    assert not is_on(detour)
    assert not server.matching("stays 1")
