# SPDX-License-Identifier: GPL-2.0-or-later
"""How many flows there may be at a time: of a client, and in all."""

import itertools
import signal
import sys

import pytest

from detour_tools.lab.network import Host, Lab
from tests.netns import asking
from tests.netns.asking import Asker, Flow, WhoAmI
from tests.netns.conftest import PLAIN, PRIVATE, Serve, Start


@pytest.fixture
def detour(lab: Lab) -> Host:
    WhoAmI(lab.host("server"), 80)
    return lab.host("detour")


def test_of_one_client(lab: Lab, detour: Host, serve: Serve, asker: Asker):
    client, other = lab.host("client"), lab.host("r1")
    serve("--max-flows-per-client", 5)
    asker.ask("10.0.3.2:80", 80)
    Asker(other, detour.address).ask("10.0.3.2:80", 80)
    flows = [Flow(client, detour.address, 80) for _ in range(5)]
    assert asking.refuses(client, detour.address, 80)
    assert asking.refuses(client, detour.address, 80)
    assert Flow(other, detour.address, 80).echo(), "others are served"
    assert all(flow.echo() for flow in flows), "what was there goes on"
    found = asking.status(detour)
    assert found["refused_flows"] == 2
    assert found["policy"]["max_flows_per_client"] == 5
    flows.pop().close()
    asking.in_time("a flow that ended makes room", (
        not asking.refuses(client, detour.address, 80) for _ in itertools.count()))


def test_on_a_reload(lab: Lab, detour: Host, serve: Serve, asker: Asker, tmp_path):
    client = lab.host("client")
    config = tmp_path / "server.toml"
    config.write_text("max-flows-per-client = 1\n")
    server = serve("--config", config)
    asker.ask("10.0.3.2:80", 80)
    flows = [Flow(client, detour.address, 80)]
    assert asking.refuses(client, detour.address, 80)
    config.write_text("max-flows-per-client = 0\n")
    server.process.send_signal(signal.SIGHUP)
    server.wait_line("reloaded$")
    flows += [Flow(client, detour.address, 80) for _ in range(20)]
    assert all(flow.echo() for flow in flows)
    assert asking.status(detour)["refused_flows"] == 1, "those of before count on"


@pytest.mark.parametrize("backend", ["nftables"])
def test_the_count_goes_never_back(lab: Lab, detour: Host, serve: Serve, asker: Asker):
    """Nor below nothing, when the next server's table is removed that has counted for this one."""
    client = lab.host("client")

    def refused() -> int:
        assert asking.refuses(client, detour.address, 80)
        return int(asking.status(detour)["refused_flows"])

    server = serve("--max-flows-per-client", 1)
    asker.ask("10.0.3.2:80", 80)
    flow = Flow(client, detour.address, 80)
    assert (refused(), refused()) == (1, 2)
    server.kill()
    server = serve("--max-flows-per-client", 1)
    assert asking.status(detour)["refused_flows"] == 0
    assert refused() == 1
    detour.run(["nft", "flush", "ruleset"])
    server.wait_line("made them anew")
    assert asking.status(detour)["refused_flows"] == 1
    assert flow.echo()


@pytest.mark.parametrize("backend", ["nftables"])
@pytest.mark.parametrize("most", [10, 300, 2000])
def test_in_all(lab: Lab, detour: Host, serve: Serve, asker: Asker, most: int):
    """Never more, and not much less: they are counted in shares."""
    hosts = [lab.host("client"), lab.host("r1")]
    serve("--max-flows", most, "--max-flows-per-client", 0)
    for host in hosts:
        Asker(host, detour.address).ask("10.0.3.2:80", 80)
    flows: list[Flow] = []
    refused = 0
    for number in range(most + 100):
        try:
            flows.append(Flow(hosts[number % 2], detour.address, 80))
        except ConnectionRefusedError:
            refused += 1
    assert most * 0.7 < len(flows) <= most
    assert asking.status(detour)["refused_flows"] == refused
    assert all(flow.echo() for flow in flows[:10])


def test_where_the_kernel_tracks_very_few(lab: Lab, detour: Host, start: Start, asker: Asker,
                                          tmp_path):
    """Three quarters of it, which is too few for shares. (The real limit is the whole machine's.)
    """
    (tmp_path / "nf_conntrack_max").write_text("20\n")
    code = ("from pathlib import Path; from detour_tools.nat import base\n"
            f"base._TRACKED = Path({str(tmp_path / 'nf_conntrack_max')!r})\n"
            "from detour_tools.cli.server import main; main()")
    server = start(detour, [sys.executable, "-c", code, *PRIVATE, *PLAIN])
    server.wait_line("serving")
    asker.ask("10.0.3.2:80", 80)
    flows = [Flow(lab.host("client"), detour.address, 80) for _ in range(15)]
    assert asking.refuses(lab.host("client"), detour.address, 80)
    assert all(flow.echo() for flow in flows)
    found = asking.status(detour)
    assert (found["policy"]["max_flows"], found["refused_flows"]) == (15, 1)


def test_by_default_the_host_keeps_a_quarter(detour: Host, serve: Serve):
    serve()
    tracked = int(detour.run(["cat", "/proc/sys/net/netfilter/nf_conntrack_max"]).stdout)
    policy = asking.status(detour)["policy"]
    assert (policy["max_flows"], policy["max_flows_per_client"]) == (tracked * 3 // 4, 2000)
