# SPDX-License-Identifier: GPL-2.0-or-later
"""A host's rules that an administrator saved while a server ran load again, at boot or by hand."""

import contextlib
import signal
import subprocess
from collections.abc import Iterator

import pytest

from detour_tools.lab.daemons import Daemon
from detour_tools.lab.network import Host, Lab
from tests.netns import asking
from tests.netns.asking import Asker, Flow, WhoAmI, kernel_mappings, lasting, mappings
from tests.netns.conftest import PRIVATE, Serve, Start

ADMINS = """
table inet admins {
    chain input {
        type filter hook input priority filter; policy accept;
        tcp dport 4242 drop
    }
}
"""
# How rules are saved, cleared and loaded.
SAVED = {"nftables": (["nft", "list", "ruleset"], ["nft", "flush", "ruleset"], ["nft", "-f", "-"]),
         "iptables": (["iptables-legacy-save"],
                      ["sh", "-c", "iptables-legacy -t nat -F; iptables-legacy -F"],
                      ["iptables-legacy-restore"])}


def load(host: Host, command: list[str], text: str) -> None:
    """Load saved rules as a host does at boot; what the tool says against it is the failure."""
    done = subprocess.run(["ip", "netns", "exec", host.namespace, *command], input=text, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def at_rest(server: Daemon) -> Iterator[None]:
    """With the server stopped, as it would make its table anew at once."""
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


def save(host: Host, backend: str) -> str:
    """What the host's tool writes down, without iptables' dates and counters."""
    lines = host.run(SAVED[backend][0]).stdout.splitlines(keepends=True)
    return "".join(line.partition(" [")[0].rstrip() + "\n" if line.startswith(":") else line
                   for line in lines if not line.startswith("#"))


@pytest.fixture
def admins(lab: Lab) -> Host:
    """The detour, with a table of its administrator's."""
    detour = lab.host("detour")
    load(detour, ["nft", "-f", "-"], ADMINS)
    return detour


@pytest.mark.parametrize("limits", [
    (), ("--max-flows", 0, "--max-flows-per-client", 0), ("--max-flows", 100),
    ("--allow-client", "0.0.0.0/0"), ("--rate", 0)], ids=str)
@pytest.mark.parametrize("router", ["yes", "no"])
@pytest.mark.parametrize("relay", ["joins", "tcp"])
def test_what_is_listed_loads_again(lab: Lab, serve: Serve, backend: str, admins: Host,
                                    asker: Asker, relay: str, router: str,
                                    limits: tuple[object, ...]):
    server = serve("--relay", relay, "--router", router, *limits)
    WhoAmI(lab.host("server"), 80)
    assert asker.ask("10.0.3.2:80", 80) == 80
    if relay == "tcp":
        before = Flow(lab.host("client"), admins.address, 80)
    saved = save(admins, backend)
    assert "10.0.3.2" in saved
    assert ("10.0.1.1 ct count over" in saved) == (
        backend == "nftables" and relay == "tcp" and "--max-flows-per-client" not in limits)
    assert ("ct timeout set" in saved) == (backend == "nftables")
    host_rules = admins.run(["nft", "list", "table", "inet", "admins"]).stdout

    _, clear, restore = SAVED[backend]
    with at_rest(server):
        admins.run(clear)
        load(admins, restore, saved)

        assert lasting(save(admins, backend)) == lasting(saved)
        if backend == "nftables":
            assert admins.run(["nft", "list", "table", "inet", "admins"]).stdout == host_rules
        if relay == "joins":
            assert asking.refuses(lab.host("client"), admins.address, 80)
            return
        flow = Flow(lab.host("client"), admins.address, 80)
        assert flow.seen_as == str(admins.address)
        assert flow.echo()
        assert before.echo()


def test_rules_that_were_loaded_at_boot_are_taken_over(lab: Lab, serve: Serve, backend: str,
                                                       admins: Host, asker: Asker):
    server = serve()
    WhoAmI(lab.host("server"), 80)
    asker.ask("10.0.3.2:80", 80)
    saved = save(admins, backend)
    server.stop()
    before = asking.rules(admins)
    assert "10.0.3.2" not in before
    load(admins, SAVED[backend][2] if backend == "iptables" else ["nft", "-f", "-"],
         saved if backend == "iptables" else "flush ruleset\n" + saved)
    assert kernel_mappings(admins, backend)

    again = serve()
    assert mappings(admins) == {("10.0.1.1", 80, "10.0.3.2:80")}
    assert Flow(lab.host("client"), admins.address, 80).echo()
    again.stop()
    assert asking.rules(admins) == before


def test_a_host_that_has_no_names_of_protocols(lab: Lab, start: Start, admins: Host):
    """Without netbase nft lists a time-out's protocol as a number, and refuses its own listing."""
    hide = ["unshare", "--mount", "sh", "-c",
            'mount --bind /dev/null /etc/protocols; exec "$@"', "sh"]
    server = start(admins, [*hide, "detour-server", *PRIVATE])
    server.wait_line("serving")
    assert any("install netbase" in line for line in server.lines)
    asking.Asker(lab.host("client"), admins.address).ask("10.0.3.2:80", 80)
    saved = admins.run([*hide, "nft", "list", "ruleset"]).stdout
    assert "10.0.3.2" in saved
    load(admins, [*hide, "nft", "--check", "-f", "-"], saved)
