# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules that anything of ours makes load again when an administrator saved them: by this host's
nft, and by Debian 13's. (Our server's table by this host's nft: test_server_saved_rules.py.)
"""

import re
from pathlib import Path

import pytest

from detour_tools.lab import links
from detour_tools.lab.daemons import Daemon
from detour_tools.lab.network import Host, Lab
from detour_tools.lab.topology import reference_topology
from tests.netns import asking, debian13
from tests.netns.asking import Asker, Flow, WhoAmI, lasting
from tests.netns.conftest import PRIVATE, MakeLab, Serve, Start
from tests.netns.debian13 import Nftables
from tests.netns.test_server_saved_rules import ADMINS, at_rest, load

TABLES = """
table inet admins {
    chain input { type filter hook input priority filter; policy drop; iif lo accept; }
    chain forward { type filter hook forward priority filter; policy drop; }
}
table ip other {
    chain forward {
        type filter hook forward priority 10; policy accept;
        ct state established,related accept
        reject
    }
}
"""


@pytest.fixture(scope="session")
def newer() -> Nftables:
    return debian13.get()


@pytest.fixture(params=["host", "debian13"])
def nftables(request: pytest.FixtureRequest) -> Nftables:
    """This host's and Debian 13's in turn."""
    if request.param == "host":
        return Nftables()
    found: Nftables = request.getfixturevalue("newer")
    return found


def listed(host: Host, nftables: Nftables) -> str:
    """The host's rules, without counts."""
    text = host.run([nftables.nft, "list", "ruleset"]).stdout
    return re.sub(r"packets \d+ bytes \d+", "packets 0 bytes 0", lasting(text))


def load_again(host: Host, nftables: Nftables, by: Nftables | None = None) -> str:
    """Save the rules, clear them and load them, as at a boot; what was saved.

    ``by`` loads, if it is another one that does.
    """
    by = by or nftables
    saved = host.run([nftables.nft, "list", "ruleset"]).stdout
    before = listed(host, by)
    load(host, [by.nft, "--check", "-f", "-"], f"flush ruleset\n{saved}")
    host.run([by.nft, "flush", "ruleset"])
    load(host, [by.nft, "-f", "-"], saved)
    assert listed(host, by) == before
    return saved


def test_debian_13s_it_is(newer: Nftables, lab: Lab):
    version = lab.host("detour").run([newer.nft, "--version"]).stdout
    assert re.search(r"v1\.1\.", version), version


@pytest.mark.parametrize("limits", [
    (), ("--max-flows", 0, "--max-flows-per-client", 0), ("--max-flows", 100)], ids=str)
@pytest.mark.parametrize("router", ["yes", "no"])
@pytest.mark.parametrize("relay", ["joins", "tcp"])
def test_of_the_server_on_debian_13(lab: Lab, start: Start, newer: Nftables, asker: Asker,
                                    relay: str, router: str, limits: tuple[object, ...]):
    """Made by Debian 13's library, and seen by the server through Debian 13's nft."""
    detour = lab.host("detour")
    load(detour, [newer.nft, "-f", "-"], ADMINS)
    server = start(detour, [*newer.server, "--backend", "nftables", *PRIVATE, "--relay", relay,
                            "--router", router, *limits])
    server.wait_line("serving on")
    assert asking.status(detour)["warnings"] == []
    _loads_again(lab, asker, relay, server, newer, newer)
    assert not server.matching("cannot|Traceback")


# As on a kernel without conntrack labels, of which there is none here.
_WITHOUT_LABELS = """
from detour_tools.cli.server import main
from detour_tools.nat import nftables
ways = nftables.ways
nftables.ways = lambda *terms: [(able, text) for able, text in ways(*terms) if not able.labels]
main()
"""


@pytest.mark.parametrize("relay", ["joins", "tcp"])
def test_of_the_server_without_labels(lab: Lab, start: Start, nftables: Nftables, asker: Asker,
                                      relay: str):
    server = start(lab.host("detour"), [*nftables.python, "-c", _WITHOUT_LABELS, *PRIVATE,
                                        "--backend", "nftables", "--relay", relay])
    server.wait_line("serving on")
    assert "label" not in listed(lab.host("detour"), nftables)
    _loads_again(lab, asker, relay, server, nftables, nftables)


@pytest.mark.parametrize("router", ["yes", "no"])
@pytest.mark.parametrize("relay", ["joins", "tcp"])
@pytest.mark.parametrize("backend", ["nftables"])
def test_of_the_server_on_a_host_that_becomes_debian_13(
        lab: Lab, serve: Serve, newer: Nftables, asker: Asker, relay: str, router: str):
    """What was saved before an upgrade loads after it."""
    _loads_again(lab, asker, relay, serve("--relay", relay, "--router", router), Nftables(), newer)


def _loads_again(lab: Lab, asker: Asker, relay: str, server: Daemon, nftables: Nftables,
                 by: Nftables) -> None:
    detour, client = lab.host("detour"), lab.host("client")
    WhoAmI(lab.host("server"), 80)
    assert asker.ask("10.0.3.2:80", 80) == 80
    before = Flow(client, detour.address, 80) if relay == "tcp" else None
    with at_rest(server):
        assert "10.0.1.1 . 80 : 10.0.3.2 . 80" in load_again(detour, nftables, by)
        if before is None:
            assert asking.refuses(client, detour.address, 80)
        else:
            assert before.echo()
            assert Flow(client, detour.address, 80).seen_as == str(detour.address)


def test_of_the_lab(make_lab: MakeLab, nftables: Nftables, monkeypatch: pytest.MonkeyPatch):
    """What loses packets where the kernel has no netem, and what cuts links."""
    monkeypatch.setattr(links, "kernel_has_netem", lambda _: False)
    lab = make_lab(reference_topology(l2_loss=10, rates_mbps=None))
    lab.set_link("L3", up=False)
    saved = "".join(load_again(host, nftables) for host in lab.hosts())
    assert "table netdev detour_lab_loss_L2" in saved
    assert "table netdev detour_lab_cut_L3" in saved
    assert lab.cut_links() == {"L3"}
    lab.set_link("L3", up=True)
    assert lab.cut_links() == frozenset()


def test_of_what_opens_a_firewall(lab: Lab, nftables: Nftables, tmp_path: Path):
    detour = lab.host("detour")
    etc = tmp_path / "etc"
    etc.mkdir()

    def firewall(*words: str) -> None:
        detour.run(["unshare", "--mount", "sh", "-c", 'mount --bind "$1" /etc; shift; exec "$@"',
                    "sh", etc, *nftables.server, "firewall", *words])

    load(detour, [nftables.nft, "-f", "-"], TABLES)
    before = listed(detour, nftables)
    firewall("open", "flows")
    firewall("open", "requests", "--by", "nftables", "--client", "203.0.113.0/24",
             "--client", "192.0.2.1")
    opened = listed(detour, nftables)
    assert opened.count("detour-tools") == 3
    load_again(detour, nftables)
    # At a boot the host's own rules may come without ours, which are loaded after them.
    load(detour, [nftables.nft, "-f", "-"], f"flush ruleset\n{TABLES}")
    load(detour, [nftables.nft, "-f", str(etc / "nftables.d/detour-tools.nft")], "")
    firewall("open", "flows")
    assert listed(detour, nftables) == opened
    firewall("close")
    assert listed(detour, nftables) == before


@pytest.mark.parametrize("tool", ["iptables-legacy", "iptables-nft"])
def test_of_what_opens_a_firewall_of_iptables(lab: Lab, tool: str):
    detour = lab.host("detour")

    def saved() -> str:
        text = detour.run([f"{tool}-save"]).stdout
        return re.sub(r"^#.*\n|\[\d+:\d+\]", "", text, flags=re.M)

    load(detour, [f"{tool}-restore"], """*filter
:FORWARD DROP
-A FORWARD -i eth9 -j DROP
-A FORWARD -j REJECT
COMMIT
""")
    before = saved()
    detour.run(["detour-server", "firewall", "open", "flows"])
    opened = saved()
    assert opened.count("detour-tools: mapped flows") == 1
    load(detour, [f"{tool}-restore"], "*filter\n:FORWARD ACCEPT\nCOMMIT\n")
    assert "detour-tools" not in saved()
    load(detour, [f"{tool}-restore", "--test"], opened)
    load(detour, [f"{tool}-restore"], opened)
    assert saved() == opened
    detour.run(["detour-server", "firewall", "close", "flows"])
    assert saved() == before
