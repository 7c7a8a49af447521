# SPDX-License-Identifier: GPL-2.0-or-later
"""What one client, or many forged ones, cannot take from the others, nor from the detour."""

import itertools
import json
import signal
import socket
import sys
import time

import pytest

from detour_tools.endpoint import Endpoint, parse_endpoint
from detour_tools.lab import namespaces
from detour_tools.lab.daemons import wait_for
from detour_tools.lab.network import Host
from detour_tools.mproxy import PORT, v1
from detour_tools.server.listening import ListeningPorts
from tests.netns import asking
from tests.netns.asking import Asker, Flow, WhoAmI, kernel_mappings, mappings
from tests.netns.conftest import PRIVATE
from tests.netns.test_client import hold, sink, subflows  # noqa: F401 - fixtures
from tests.netns.test_server_takeover import handle

_IP_TRANSPARENT = 19  # include/uapi/linux/in.h


def forge(host: Host, detour: object, sources: list[str], each: int = 1) -> None:
    """Send requests for ``each`` remotes from each of these addresses, that are not the host's."""
    for source in sources:
        with namespaces.inside(host.namespace):
            sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with sender:
            sender.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
            sender.bind((source, 0))
            sender.connect((str(detour), PORT))
            for number in range(each):
                remote = Endpoint(parse_endpoint("45.0.0.1:1").address + number, 443)
                sender.send(v1.encode(v1.Request(remote, 443)))
                if number % 32 == 31:
                    time.sleep(0.002)  # a flood that its own way does not lose


def join_link(detour: Host, address: str) -> None:
    """Give the detour another address on its link."""
    route = json.loads(detour.run(["ip", "-json", "route", "get", "10.0.1.1"]).stdout)
    detour.run(["ip", "address", "add", address, "dev", route[0]["dev"]])


def counts(detour: Host) -> dict[str, int]:
    """What became of the requests."""
    return asking.status(detour)["requests"]


def test_forged_requests_of_a_client_do_not_keep_it_out(lab, serve, asker):
    serve("--rate", "0", "--max-per-client", "100")
    detour, client = lab.host("detour"), lab.host("client")
    WhoAmI(lab.host("server"), 443)
    flow = Flow(client, detour.address, asker.ask("10.0.3.2:443", 443))
    assert mappings(detour), "and to list is to look at the flows"
    forge(client, detour.address, ["10.0.1.1"], each=300)
    asking.in_time("the flood has come", (counts(detour)["evicted"] >= 150
                                          for _ in itertools.count()))
    assert [asker.ask(f"10.0.3.3:{port}", port) for port in range(5001, 5051)] == list(
        range(5001, 5051))
    assert asking.status(detour)["refused"] == {}
    assert flow.echo(), "what is in use makes no room"
    assert ("10.0.1.1", 443, "10.0.3.2:443") in mappings(detour)


def test_forged_clients_do_not_keep_others_out(lab, serve, asker, backend):
    serve("--rate", "0", "--max-mappings", "100")
    detour = lab.host("detour")
    forge(lab.host("r1"), detour.address, [f"10.77.{n // 200}.{1 + n % 200}" for n in range(300)])
    asking.in_time("the flood has come", (counts(detour)["evicted"] >= 150
                                          for _ in itertools.count()))
    wanted = {("10.0.1.1", port, f"10.0.3.3:{port}") for port in range(5001, 5031)}
    for _, port, remote in sorted(wanted):
        assert asker.ask(remote, port) == port
    assert wanted < mappings(detour) == set(kernel_mappings(detour, backend))
    assert asking.status(detour)["mappings"] == 100
    forge(lab.host("r1"), detour.address, [f"10.77.9.{1 + n % 200}" for n in range(60)])
    assert wanted < mappings(detour), "the heavier ones go first"


def served(asker: Asker) -> int:
    """How many of 20 requests get an answer, of a client that waits 0.3 s for it, four times."""
    count = 0
    for number in range(20):
        remote = Endpoint(parse_endpoint("46.0.0.1:1").address + number, 443)
        for _ in range(4):
            asker.send_request(remote, 443)
            if any(answer.remote == remote for answer in asker.answers_within(0.3)):
                count += 1
                break
    return count


@pytest.mark.parametrize(("source", "network", "rate"), [
    ("client", "10.0.1.1/32", 1000), ("r3", "10.128.0.0/10", 8000)])
def test_a_flood_of_forged_requests_keeps_nobody_out(lab, start_server, start, source, network,
                                                     rate):
    """Neither by the rate of the client that they name, nor by the work they make."""
    detour = lab.host("detour")
    start_server(detour)
    start(lab.host(source), [sys.executable, "-m", "tests.netns.forgery", detour.address, network,
                             rate])
    # So long that a queue fills up, and the client's rate is used up.
    asking.in_time("the flood has come",
                   (counts(detour)["received"] >= 3 * rate for _ in itertools.count()),
                   timeout=60.0)
    assert served(Asker(lab.host("client"), detour.address)) >= 19


def test_a_flood_at_full_speed_keeps_no_client_out_that_uses_its_mappings(
        lab, start_server, start, start_client, sink, hold, asker):  # noqa: F811
    """Of four million addresses, which share in what the kernel lets in of strangers."""
    detour, client = lab.host("detour"), lab.host("client")
    sink(lab.host("server"))
    start_server(detour, *PRIVATE)
    start_client(client, "detour")
    hold(client)
    wait_for(lambda: subflows(client) == [[str(detour.address), "direct"]])
    for _ in range(2):
        start(lab.host("r3"), [sys.executable, "-m", "tests.netns.forgery", detour.address,
                               "10.128.0.0/10", 0])
    asking.in_time("the flood has come",
                   (counts(detour)["dropped"] >= 20000 for _ in itertools.count()), timeout=60.0)
    assert served(asker) >= 19
    assert any("flood of requests" in text for text in asking.status(detour)["warnings"])


@pytest.mark.parametrize("network", ["10.200.0.1/32", "10.200.0.0/31", "11.0.0.0/8"])
def test_a_flood_at_full_speed_is_not_read(lab, start_server, start, network):
    """Of one or two addresses, or of some that are not allowed: beyond a little. And those who come
    for the first time are served meanwhile.
    """
    detour = lab.host("detour")
    server = start_server(detour)
    flood = start(lab.host("r3"), [sys.executable, "-m", "tests.netns.forgery", detour.address,
                                   network, 0])
    asking.in_time("the flood has come",
                   (counts(detour)["dropped"] >= 100_000 for _ in itertools.count()), timeout=60.0)
    found = counts(detour)
    assert found["received"] + found["lost"] < found["dropped"]
    assert served(Asker(lab.host("client"), detour.address)) >= 19
    server.wait_line("a flood of requests: the kernel drops what is too much unread")
    flood.stop()
    server.wait_line("no longer so: a flood of requests")


@pytest.mark.parametrize(("lacking", "said", "gone", "stays"), [
    ("_ASKED = 'ct timeout asked { protocol 300; }'", "CONFIG_NF_CONNTRACK_TIMEOUT", "ct timeout",
     ("ct count over 2000", "ct label set")),
    ("_OVER = 'limit nothing over {0} {1}'", "this kernel does not limit how many come",
     "limit rate", ("ct count over 2000", "ct timeout set"))])
def test_a_kernel_that_lacks_something(lab, start, lacking, said, gone, stays):
    """Said, and all else is as ever."""
    detour = lab.host("detour")
    code = ("from detour_tools.nat import ruleset\n"
            f"ruleset.{lacking}\n"
            "from detour_tools.cli.server import main; main()")
    server = start(detour, [sys.executable, "-c", code])
    server.wait_line(said)
    server.wait_line("serving")
    assert Asker(lab.host("client"), detour.address).ask("45.0.0.1:443", 443) == 443
    table = detour.run(["nft", "list", "table", "ip", "detour-tools"]).stdout
    assert gone not in table
    assert all(each in table for each in stays)


def test_who_uses_the_detour_is_known_to_the_next_table(lab, start_server, tmp_path):
    """At a reload that makes one, and when a server comes that wants another."""
    detour = lab.host("detour")
    config = tmp_path / "server.toml"

    def regulars() -> list[object]:
        found = json.loads(detour.run(
            ["nft", "-j", "list", "set", "ip", "detour-tools", "regulars"]).stdout)
        return [each["elem"]["val"] for each in found["nftables"][1]["set"].get("elem", ())]

    config.write_text("max-flows = 1000\n")
    server = start_server(detour, "--config", config)
    detour.run(["nft", "add", "element", "ip", "detour-tools", "regulars",
                "{ 10.0.1.1, 10.0.1.2 timeout 1h }"])
    first = handle(detour)
    config.write_text("max-flows = 2000\n")
    server.process.send_signal(signal.SIGHUP)
    server.wait_line("reloaded")
    assert handle(detour) != first
    assert sorted(regulars()) == ["10.0.1.1", "10.0.1.2"]
    server.process.kill()
    server.process.wait()
    start_server(detour, "--relay", "tcp")
    assert sorted(regulars()) == ["10.0.1.1", "10.0.1.2"]


def test_who_may_ask_is_told_the_kernel(lab, start_server, tmp_path, asker):
    """At a reload, and when a server takes over, without a mapping made anew."""
    detour = lab.host("detour")
    config = tmp_path / "server.toml"

    def allow(client: str) -> None:
        config.write_text(f'allow-client = ["{client}"]\n')

    def allowed() -> list[object]:
        found = json.loads(detour.run(
            ["nft", "-j", "list", "set", "ip", "detour-tools", "allowed"]).stdout)
        return [found["nftables"][1]["set"]["elem"], handle(detour)]

    allow("10.0.1.0/24")
    server = start_server(detour, "--config", config)
    assert asker.ask("45.0.0.1:443", 443) == 443
    before, first = allowed()
    assert before == [{"prefix": {"addr": "10.0.1.0", "len": 24}}]
    allow("0.0.0.0/0")
    server.process.send_signal(signal.SIGHUP)
    server.wait_line("reloaded")
    assert allowed() == [[{"prefix": {"addr": "0.0.0.0", "len": 0}}], first]
    allow("10.0.0.0/15")
    server.process.kill()
    server.process.wait()
    start_server(detour, "--config", config)
    assert allowed() == [[{"prefix": {"addr": "10.0.0.0", "len": 15}}], first]


def test_a_flood_of_malformed_datagrams_is_dropped_unread(lab, start_server, start):
    """And what is malformed is read, and said, once the flood has ended."""
    detour, client = lab.host("detour"), lab.host("client")
    server = start_server(detour)
    flood = start(lab.host("r3"), [sys.executable, "-m", "tests.netns.flood", detour.address, 7])
    server.wait_line("a flood of malformed datagrams")
    before = counts(detour)
    asking.in_time("it counts them", (counts(detour)["lost"] > before["lost"] + 5000
                                      for _ in itertools.count()))
    after = counts(detour)
    # Of this flood two fifths are well-formed, for remotes that are refused.
    assert after["malformed"] - before["malformed"] < 100 < after["refused"] - before["refused"]
    assert any("malformed" in text for text in asking.status(detour)["warnings"])
    asker = Asker(client, detour.address)
    assert asker.ask("45.0.0.1:443", 443) == 443
    flood.stop()
    server.wait_line("no longer so: a flood of malformed datagrams")
    asker.send(b"\x09")
    asking.in_time("it is read again", (
        counts(detour)["malformed"] > after["malformed"] for _ in itertools.count()))
    assert asker.ask("45.0.0.2:444", 444) == 444


def test_a_mapping_that_was_never_used_goes_soon(lab, start):
    detour, client = lab.host("detour"), lab.host("client")
    code = ("from detour_tools.server import policy, upkeep\n"
            "policy._UNPROVEN_SECONDS = 2.0; upkeep._SWEEP_SECONDS = 0.2\n"
            "upkeep._PROVING_SECONDS = 0.5; upkeep._CHECK_SECONDS = 0.2\n"
            "from detour_tools.cli.server import main; main()")
    arguments = ["--allow-remote", "10.0.0.0/8", "--relay", "tcp"]
    server = start(detour, ["python3", "-c", code, *arguments])
    server.wait_line("serving")
    WhoAmI(lab.host("server"), 443)
    asker = Asker(client, detour.address)
    Flow(client, detour.address, asker.ask("10.0.3.2:443", 443)).close()
    asker.ask("10.0.3.3:443", 444)
    server.wait_line("removed 1 idle mappings")
    assert mappings(detour) == {("10.0.1.1", 443, "10.0.3.2:443")}


def test_a_port_that_is_listened_on_later_is_the_hosts_again(lab, serve, asker, backend):
    server = serve()
    detour, client = lab.host("detour"), lab.host("client")
    asker.ask("10.0.3.2:22", 22)
    asker.ask("10.0.3.2:80", 80)
    WhoAmI(detour, 22)
    server.wait_line("removed 1 mappings of ports that this host listens on now")
    left = {("10.0.1.1", 80, "10.0.3.2:80")}
    assert mappings(detour) == set(kernel_mappings(detour, backend)) == left
    assert Flow(client, detour.address, 22).seen_as == "10.0.1.1", "answered by the host itself"


def test_what_was_seen_of_listeners_is_not_given_away_by_what_was_known_before(lab):
    """A look that takes long is good for a while: a port of the two-second look stayed granted."""
    with namespaces.inside(lab.host("detour").namespace):
        listening = ListeningPorts()
        listening.now()
        listening._fresh_until = time.monotonic() + 60
        with socket.create_server(("", 4242)):
            assert 4242 in listening.look()
            assert 4242 in listening.now()
        listening.close()


def test_a_port_that_is_listened_on_when_a_server_takes_over(lab, serve, asker):
    server = serve()
    detour = lab.host("detour")
    asker.ask("10.0.3.2:22", 22)
    server.kill()
    WhoAmI(detour, 22)
    serve()
    assert not mappings(detour)


@pytest.mark.parametrize(("remote", "options", "reason"), [
    ("203.0.113.9:80", (), "on-link"),
    ("203.0.113.9:80", ("--allow-remote", "203.0.113.0/24"), None),
    ("168.63.129.16:80", (), "platform"),
    ("45.0.0.1:25", (), "denied-port"),
    ("45.0.0.1:25", ("--deny-port", "26"), None),
    ("45.0.0.1:80", ("--deny-remote", "45.0.0.0/16"), "denied"),
    ("45.0.0.1:80", ("--own-address", "45.0.0.1"), "detour"),
])
def test_remotes_that_are_nobodys_business(lab, start_server, asker, remote, options, reason):
    detour = lab.host("detour")
    join_link(detour, "203.0.113.1/24")
    start_server(detour, *options)
    assert asker.is_refused(remote, 4000) == (reason is not None)
    assert asking.status(detour)["refused"] == ({reason: 1} if reason else {})


def test_a_remote_that_comes_to_be_on_link(lab, serve, asker):
    server = serve()
    detour = lab.host("detour")
    asker.ask("203.0.113.9:80", 4000)
    asker.ask("45.0.0.1:80", 4001)
    join_link(detour, "203.0.113.1/24")
    server.wait_line("removed 1 mappings that are not allowed any more")
    assert mappings(detour) == {("10.0.1.1", 4001, "45.0.0.1:80")}


@pytest.mark.parametrize("killed", [False, True])
def test_a_remote_that_a_route_puts_on_link(lab, start_server, asker, killed):
    """A VPN's, for example: no address of the host tells of it."""
    detour = lab.host("detour")
    server = start_server(detour)
    asker.ask("203.0.113.9:80", 4000)
    asker.ask("45.0.0.1:80", 4001)
    if killed:
        server.kill()
    route = json.loads(detour.run(["ip", "-json", "route", "get", "10.0.1.1"]).stdout)
    detour.run(["ip", "route", "add", "203.0.113.0/24", "dev", route[0]["dev"]])
    if killed:
        server = start_server(detour)
    server.wait_line("removed 1 mappings whose remotes are elsewhere now")
    assert mappings(detour) == {("10.0.1.1", 4001, "45.0.0.1:80")}
    asker.ask("45.0.0.2:80", 4002)
    detour.run(["ip", "rule", "add", "to", "45.0.0.2", "table", "99"])
    detour.run(["ip", "route", "add", "45.0.0.2", "dev", route[0]["dev"], "table", "99"])
    asking.in_time("by a rule, too", (
        mappings(detour) == {("10.0.1.1", 4001, "45.0.0.1:80")} for _ in itertools.count()))


def test_lines_of_granted_requests_are_bounded(lab, serve, asker):
    server = serve("--rate", "0", backend="nftables")
    for number in range(1001, 1301):
        asker.send_request(f"10.0.3.2:{number}", 0)
    asking.in_time("all are served", (counts(lab.host("detour"))["new"] == 300
                                      for _ in itertools.count()))
    assert 1 <= len(server.matching("^new ")) <= 100


def test_status_says_what_is_denied(lab, start_server):
    detour = lab.host("detour")
    start_server(detour, "--deny-remote", "45.0.0.0/16", "--deny-port", "6660-6669",
                 "--own-address", "198.51.100.7")
    text = detour.run(["detour-server", "status"]).stdout
    assert "45.0.0.0/16, port 6660-6669" in text
    assert "this host's, 198.51.100.7/32" in text
    found = json.loads(detour.run(["detour-server", "status", "--json"]).stdout)["policy"]
    assert (found["deny_remote"], found["deny_port"], found["own_address"]) == (
        ["45.0.0.0/16"], ["6660-6669"], ["198.51.100.7/32"])
