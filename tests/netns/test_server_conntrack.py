# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests leave no more in the host's connection tracking than it can bear."""

import itertools
import re
import sys

from detour_tools.lab.network import Host
from tests.netns import asking
from tests.netns.asking import Asker


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


def test_a_kernel_without_time_outs_of_ours(lab, start):
    """Said, and all else is as ever."""
    detour = lab.host("detour")
    code = ("from detour_tools.nat import nftables\n"
            "nftables._ASKED = 'ct timeout asked { protocol 300; }'\n"
            "from detour_tools.cli.server import main; main()")
    server = start(detour, [sys.executable, "-c", code])
    server.wait_line("CONFIG_NF_CONNTRACK_TIMEOUT")
    server.wait_line("serving")
    assert Asker(lab.host("client"), detour.address).ask("45.0.0.1:443", 443) == 443
    table = detour.run(["nft", "list", "table", "ip", "detour-tools"]).stdout
    assert "ct timeout" not in table
    assert "ct count over 2000" in table
    assert "ct label set" in table
