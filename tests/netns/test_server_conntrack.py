# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests leave no more in the host's connection tracking than it can bear."""

import itertools
import re
import socket

from detour_tools.lab import namespaces
from detour_tools.lab.network import Host
from tests.netns import asking
from tests.netns.asking import Asker, Flow, WhoAmI
from tests.netns.conftest import PLAIN, PRIVATE


def entries(detour: Host) -> list[int]:
    """For how many seconds each entry about requests still stands."""
    text = detour.run(["cat", "/proc/net/nf_conntrack"]).stdout
    return [int(found[1]) for found in re.finditer(r"udp +17 (\d+) .*dport=45672 .*", text)]


def test_who_asked_is_soon_forgotten(lab, start_server):
    """A flood of forged requests filled the table, as each stayed for 30 s."""
    detour = lab.host("detour")
    start_server(detour, "--backend", "nftables")
    asker = Asker(lab.host("client"), detour.address)
    asker.ask("45.0.0.1:443", 443)
    Asker(lab.host("client"), detour.address).send(b"no request")
    found = entries(detour)
    assert len(found) == 2
    assert max(found) <= 2
    asking.in_time("all are forgotten", (not entries(detour) for _ in itertools.count()))


def flows(detour: Host) -> dict[str, int]:
    """The state of each flow to the detour's port 80, and for how many seconds it still stands."""
    text = detour.run(["cat", "/proc/net/nf_conntrack"]).stdout
    return {found[2]: int(found[1])
            for found in re.finditer(r"tcp +6 (\d+) (\w+) .*? dport=80 ", text)}


def test_flows_that_nobody_answers_are_soon_forgotten(lab, start_server):
    """17 forged joins a second used up what a client may have, as each stayed two minutes."""
    detour, client, server = lab.host("detour"), lab.host("client"), lab.host("server")
    detour.run(["sysctl", "-qw", "net.netfilter.nf_conntrack_tcp_timeout_established=4321"])
    WhoAmI(server, 80)
    start_server(detour, "--backend", "nftables", *PLAIN, *PRIVATE)
    asker = Asker(client, detour.address)
    asker.ask("10.0.3.2:80", 80)
    flow = Flow(client, detour.address, 80)
    assert flow.echo()
    # Until the client has acknowledged what the server said another one holds.
    asking.in_time("as the host has it", (
        4000 < flows(detour).get("ESTABLISHED", 0) <= 4321 for _ in itertools.count()))
    flow.close()
    server.run(["nft", "add table ip deaf; add chain ip deaf in "
                       "{ type filter hook input priority 0; policy drop; }"])
    with namespaces.inside(client.namespace), socket.socket() as beginning:
        beginning.setblocking(False)
        beginning.connect_ex((str(detour.address), 80))
        asking.in_time("it begins", ("SYN_SENT" in flows(detour) for _ in itertools.count()))
        assert flows(detour)["SYN_SENT"] <= 10
