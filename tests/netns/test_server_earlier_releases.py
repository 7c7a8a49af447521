# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules of earlier releases, saved while a server ran and loaded at boot without one: the next
server takes them over, or removes them.

They stand here as those releases had the kernel take them, whatever this one would write.
"""

import pytest

from detour_tools.lab.network import Host, Lab
from tests.netns import asking
from tests.netns.asking import Asker, Flow, WhoAmI, kernel_mappings, mappings
from tests.netns.conftest import PRIVATE, StartServer
from tests.netns.test_server_saved_rules import ADMINS, load

_TABLE = """
table ip detour-tools {
    comment "detour-server: made, changed and removed by it"
    map mappings {
        type ipv4_addr . inet_service : ipv4_addr . inet_service
        size 100000
        elements = { 10.0.1.1 . 80 : 10.0.3.2 . 80, 10.0.1.1 . 81 : 10.0.3.2 . 81 }
    }
    set mapped {
        type ipv4_addr . inet_service . ipv4_addr . inet_service
        size 100000
        elements = { 10.0.1.1 . 80 . 10.0.3.2 . 80, 10.0.1.1 . 81 . 10.0.3.2 . 81 }
    }
    chain prerouting {
        type nat hook prerouting priority dstnat - 1; policy accept;
        fib daddr type local meta l4proto tcp dnat to ip saddr . tcp dport map @mappings
    }
    chain postrouting {
        type nat hook postrouting priority srcnat - 1; policy accept;
        ct status dnat meta l4proto tcp ip saddr . ct original proto-dst . ip daddr . tcp dport \
@mapped masquerade
    }
"""
_LABELLED = _TABLE + """
    chain input {
        type filter hook input priority filter; policy accept;
        ct status dnat meta l4proto tcp ip saddr . ct original proto-dst . ip daddr . tcp dport \
@mapped drop
    }
    chain forward {
        type filter hook forward priority raw; policy accept;
        ct state new ct status dnat meta l4proto tcp ip saddr . ct original proto-dst . ip daddr \
. tcp dport @mapped ct label set 97
    }
"""
# As iptables-legacy-save wrote them; it has no filter of ours.
_CHAINS = """*nat
:PREROUTING ACCEPT
:POSTROUTING ACCEPT
:DETOUR-POSTROUTING -
:DETOUR-PREROUTING -
-A PREROUTING -p tcp -m addrtype --dst-type LOCAL -j DETOUR-PREROUTING
-A POSTROUTING -p tcp -m conntrack --ctstate DNAT -j DETOUR-POSTROUTING
""" + "".join(f"""\
-A DETOUR-POSTROUTING -s 10.0.1.1/32 -d 10.0.3.2/32 -p tcp -m tcp --dport {port} \
-m conntrack --ctstate DNAT --ctorigdstport {port} -j MASQUERADE
-A DETOUR-PREROUTING -s 10.0.1.1/32 -p tcp -m tcp --dport {port}{{label}} \
-j DNAT --to-destination 10.0.3.2:{port}
""" for port in (80, 81)) + "COMMIT\n"

# Release 0.1.0 as it was on 2026-11-23, and as it was on 2026-11-24: with labels of flows.
RELEASES = {
    "nftables of the 23rd": ("nft -f -", _TABLE + "}\n"),
    "nftables of the 24th": ("nft -f -", _LABELLED + "}\n"),
    "iptables of the 23rd": ("iptables-legacy-restore", _CHAINS.format(label="")),
    "iptables of the 24th": ("iptables-legacy-restore",
                             _CHAINS.format(label=' -m connlabel --label "97" --set')),
}
TWO = {("10.0.1.1", port, f"10.0.3.2:{port}") for port in (80, 81)}


def lines(host: Host) -> list[str]:
    """The host's rules; two mappings are in no order."""
    return sorted(asking.lasting(asking.rules(host)).splitlines())


@pytest.fixture
def detour(lab: Lab) -> Host:
    """A host with rules of its own, in both kinds of tables."""
    detour = lab.host("detour")
    load(detour, ["nft", "-f", "-"], ADMINS)
    load(detour, ["iptables-legacy-restore"],
         "*filter\n-A INPUT -s 192.0.2.3/32 -j DROP\nCOMMIT\n*nat\nCOMMIT\n")
    WhoAmI(lab.host("server"), 80)
    return detour


@pytest.mark.parametrize(("release", "relay"), [
    *zip(RELEASES, ("joins", "tcp", "joins", "tcp"), strict=True)])
def test_the_next_server_takes_over(lab: Lab, detour: Host, start_server: StartServer,
                                    asker: Asker, backend: str, release: str, relay: str):
    """Also one that uses the other back end."""
    arguments = ("--backend", backend, "--relay", relay, *PRIVATE)
    before = asking.rules(detour)
    # What this release makes of these mappings.
    server = start_server(detour, *arguments)
    for port in (80, 81):
        asker.ask(f"10.0.3.2:{port}", port)
    wanted = lines(detour)
    server.stop()
    assert asking.rules(detour) == before

    tool, text = RELEASES[release]
    load(detour, tool.split(), text)
    assert lines(detour) != wanted
    server = start_server(detour, *arguments)
    server.wait_line("took over 2 mappings")
    assert mappings(detour) == set(kernel_mappings(detour, backend)) == TWO
    assert lines(detour) == wanted
    if relay == "joins":
        assert asking.refuses(lab.host("client"), detour.address, 80)
    else:
        assert Flow(lab.host("client"), detour.address, 80).echo()
    detour.run(["detour-server", "flush", "--remote", "10.0.3.2:80"])
    assert {port for _, port, _ in kernel_mappings(detour, backend)} == {81}
    server.stop()
    assert asking.rules(detour) == before


@pytest.mark.parametrize("release", RELEASES)
def test_the_next_server_removes_what_policy_forbids(detour: Host, start_server: StartServer,
                                                     release: str):
    backend = release.partition(" ")[0]
    before = asking.rules(detour)
    tool, text = RELEASES[release]
    load(detour, tool.split(), text)
    server = start_server(detour, "--backend", backend, "--allow-remote", "192.0.2.0/24")
    assert mappings(detour) == set(kernel_mappings(detour, backend)) == set()
    assert "10.0.3.2" not in asking.rules(detour)
    server.stop()
    assert asking.rules(detour) == before
