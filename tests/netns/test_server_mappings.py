# SPDX-License-Identifier: GPL-2.0-or-later
"""What a detour does with requests, on both back ends: rules, ports, packets, refusals."""

import contextlib
import errno
import itertools
import signal
import socket

import pytest

from detour_tools.lab import namespaces
from tests.netns import asking
from tests.netns.asking import SENTINEL, Asker, Flow, WhoAmI, kernel_mappings, listening, mappings

IPPROTO_MPTCP = 262


def test_transcript(lab, serve, asker):
    server = serve()
    assert server.lines[0] == "net.ipv4.ip_forward = 1"
    assert asking.forwarding(lab.host("detour")) == "1"
    assert asker.ask("10.0.3.2:80", 80) == 80
    assert asker.ask("10.0.3.2:80", 81) == 80
    moved = asker.ask("10.0.3.3:80", 80)
    assert asker.is_refused("127.0.0.1:80", 80)
    refusal = server.wait_line("^refused")
    assert [line for line in server.lines if line.startswith(("new", "existing", "moved"))][:3] == [
        "new      client 10.0.1.1 remote 10.0.3.2:80 detour port 80 proposed 80",
        "existing client 10.0.1.1 remote 10.0.3.2:80 detour port 80 proposed 81",
        f"moved    client 10.0.1.1 remote 10.0.3.3:80 detour port {moved} proposed 80",
    ]
    assert refusal == ("refused  client 10.0.1.1 remote 127.0.0.1:80 proposed 80: "
                       "the remote is loopback")


def test_the_four_rules_and_what_the_kernel_holds(lab, serve, backend, asker):
    serve()
    detour = lab.host("detour")
    assert asker.ask("10.0.3.2:80", 80) == 80
    assert asker.ask("10.0.3.2:80", 8080) == 80, "existing"
    assert asker.ask("10.0.3.2:80", 0) == 80, "existing"
    picked = asker.ask("10.0.3.2:81", 0)
    moved = asker.ask("10.0.3.3:80", 80)
    assert 49152 <= picked <= 65535
    assert 49152 <= moved <= 65535
    assert len({80, picked, moved}) == 3
    other = Asker(lab.host("r1"), detour.address)
    assert other.ask("10.0.3.3:80", 80) == 80, "ports are the client's own"
    expected = {("10.0.1.1", 80, "10.0.3.2:80"), ("10.0.1.1", picked, "10.0.3.2:81"),
                ("10.0.1.1", moved, "10.0.3.3:80")}
    assert expected < mappings(detour)
    assert set(kernel_mappings(detour, backend)) == mappings(detour)


@pytest.mark.parametrize(("address", "family", "protocol", "counts"), [
    ("0.0.0.0", socket.AF_INET, 0, True),
    ("10.0.6.2", socket.AF_INET, 0, True),
    ("::", socket.AF_INET6, 0, True),
    ("0.0.0.0", socket.AF_INET, IPPROTO_MPTCP, True),
    ("127.0.0.1", socket.AF_INET, 0, False),
    ("127.0.0.53", socket.AF_INET, 0, False),
    ("::1", socket.AF_INET6, 0, False),
])
def test_ports_that_the_detour_listens_on(lab, serve, asker, address, family, protocol, counts):
    serve()
    with listening(lab.host("detour"), address, 8080, family, protocol):
        port = asker.ask("10.0.3.2:8080", 8080)
    assert (port != 8080) == counts


def test_a_listening_port_is_not_picked_either(lab, serve, asker):
    detour = lab.host("detour")
    taken = range(50000, 54000)
    with contextlib.ExitStack() as stack:
        with namespaces.inside(detour.namespace):
            for port in taken:
                stack.enter_context(socket.create_server(("", port)))
        serve("--rate", "0")
        # By chance alone, one time in 10^12 none of them would be picked.
        assert not {asker.ask(f"10.0.3.2:{port}", 0) for port in range(1001, 1101)} & set(taken)


def test_a_burst_of_retransmissions_makes_one_mapping(lab, serve, backend, asker):
    serve("--rate", "0")
    for _ in range(200):
        asker.send_request("10.0.3.2:80", 0)
        asker.send_request("10.0.3.3:80", 0)
    answers = []
    for answer in asker.answers(2.0):
        answers.append(answer)
        if len(answers) == 400:
            break
    assert len({(answer.remote, answer.detour_port) for answer in answers}) == 2
    assert len(answers) == 400
    assert len(kernel_mappings(lab.host("detour"), backend)) == 2


def test_a_flow_is_translated_when_the_answer_is_there(lab, serve, backend, asker):
    serve("--rate", "0")
    client, detour = lab.host("client"), lab.host("detour")
    web = WhoAmI(lab.host("server"), 80)
    for proposed in (80, 0):
        asking_once = Asker(client, detour.address)
        port = asking_once.ask("10.0.3.2:80", proposed)
        flow = Flow(client, detour.address, port)
        assert flow.seen_as == "10.0.6.2", "the far end must see the detour"
        assert flow.echo()
        flow.close()
        detour.run(["detour-server", "flush"])
    # At once after each of many answers: the mapping is live before it is answered.
    for number in range(30):
        remote = "10.0.3.2:80" if number == 0 else f"10.0.3.2:{1000 + number}"
        port = asker.ask(remote, 0)
        if number:
            with pytest.raises(ConnectionRefusedError) as caught:
                Flow(client, detour.address, port)
            assert caught.value.errno == errno.ECONNREFUSED
    assert len(kernel_mappings(detour, backend)) == 30
    web.close()


def test_a_mapping_is_its_clients_only(lab, serve, asker):
    serve()
    WhoAmI(lab.host("server"), 80)
    port = asker.ask("10.0.3.2:80", 80)
    assert not asking.refuses(lab.host("client"), "10.0.6.2", port)
    assert asking.refuses(lab.host("r1"), "10.0.6.2", port)
    assert asking.refuses(lab.host("client"), "10.0.6.2", 81), "no mapping, no translation"


def test_plain_forwarding_through_the_detour_is_left_alone(lab, serve, asker):
    """A client's own flow that is routed by way of the detour keeps its address.

    Also when it goes to a mapped remote at a port that is a detour port.
    """
    lab.host("detour").run(["sysctl", "-qw", "net.ipv4.ip_forward=1"])  # it is a router already
    serve()
    WhoAmI(lab.host("server"), 80)
    assert asker.ask("10.0.3.2:80", 80) == 80
    asking.route_through_the_detour(lab)
    detour = lab.host("detour")
    before = _forwarded(detour)
    flow = Flow(lab.host("client"), "10.0.3.2", 80)
    assert flow.seen_as == "10.0.1.1"
    assert _forwarded(detour) > before, "the test's routes do not lead through the detour"


def _forwarded(host) -> int:
    names, values = (line.split()[1:] for line in host.run(
        ["grep", "^Ip:", "/proc/net/snmp"]).stdout.splitlines())
    return int(dict(zip(names, values, strict=True))["ForwDatagrams"])


def test_the_answer_comes_from_the_address_that_was_asked(lab, serve):
    serve()
    detour = lab.host("detour")
    detour.run(["ip", "address", "add", "10.0.6.77/24", "dev", "L6"])
    for address in ("10.0.6.77", "10.0.6.2"):
        assert Asker(lab.host("client"), address).ask("10.0.3.2:80", 80) == 80


def test_another_address_and_port(lab, serve):
    detour = lab.host("detour")
    serve("--listen", "10.0.6.2:1234")
    assert Asker(lab.host("client"), detour.address, port=1234).ask("10.0.3.2:80", 80) == 80
    assert asking.status(detour)["listen"] == "10.0.6.2:1234"


def test_what_is_refused_makes_nothing(lab, serve, backend, asker):
    server = serve("--allow-remote", "127.0.0.0/8", "--rate", "0")
    detour = lab.host("detour")
    detour.run(["ip", "address", "add", "10.9.9.9/32", "dev", "lo"])
    detour.run(["ip", "route", "add", "local", "10.8.0.0/24", "dev", "lo"])
    reasons = {
        "10.0.6.2:80": "detour", "10.9.9.9:80": "detour", "10.8.0.7:80": "detour",
        "10.0.6.255:80": "broadcast", "255.255.255.255:80": "broadcast",
        "127.0.0.1:80": "loopback", "127.1.2.3:80": "loopback", "0.0.0.0:80": "unspecified",
        "169.254.1.1:80": "link-local", "224.0.0.5:80": "multicast", "0.1.1.1:80": "reserved",
        "250.0.0.1:80": "reserved", "192.168.1.1:80": "private",
    }
    for remote in reasons:
        assert asker.is_refused(remote, 80), remote
    assert asker.is_refused(SENTINEL._replace(port=0), 80)
    counts: dict[str, int] = {"port": 1}
    for reason in reasons.values():
        counts[reason] = counts.get(reason, 0) + 1
    found = asking.status(detour)
    assert found["refused"] == counts
    assert found["requests"]["refused"] == len(reasons) + 1
    assert [remote for _, _, remote in kernel_mappings(detour, backend)] == [str(SENTINEL)]
    server.wait_line("^refused .* 192.168.1.1:80 .*--allow-remote")


def test_refusals_are_printed_at_a_bounded_rate(lab, serve, asker):
    server = serve("--rate", "0")
    for port in range(1001, 1201):
        asker.send_request(f"192.168.0.1:{port}", 80)
    assert asker.ask("10.0.3.2:80", 80) == 80
    server.wait_line("^new")
    assert asking.status(lab.host("detour"))["refused"] == {"private": 200}
    assert 1 <= len(server.matching("^refused")) <= 10


def test_clients_that_may_not_ask(lab, serve, asker):
    serve("--allow-client", "10.0.1.0/24")
    stranger = Asker(lab.host("r1"), lab.host("detour").address)
    stranger.send_request("10.0.3.2:80", 80)
    assert asker.ask("10.0.3.2:80", 80) == 80
    detour = lab.host("detour")
    asking.in_time("the stranger is counted",
                   (asking.status(detour)["refused"] == {"client": 1} for _ in itertools.count()))
    assert {client for client, _, _ in mappings(detour)} == {"10.0.1.1"}


def test_only_private_clients_by_default(lab, serve):
    client, detour = lab.host("client"), lab.host("detour")
    server = serve()
    client.run(["ip", "address", "add", "8.1.1.1/32", "dev", "lo"])
    for host, gateway in (("detour", "10.0.6.1"),):
        lab.host(host).run(["ip", "route", "replace", "8.1.1.1/32", "via", gateway])
    Asker(client, detour.address, source="8.1.1.1").send_request("10.0.3.2:80", 80)
    server.wait_line(r"^refused  client 8.1.1.1 .*--allow-client")
    assert not mappings(detour)


def test_rate(lab, serve, asker):
    serve("--rate", "10")
    for port in range(1001, 1101):
        asker.send_request(f"10.0.3.2:{port}", 0)
    answered = len(list(asker.answers(0.5)))
    assert 10 <= answered <= 16
    detour = lab.host("detour")
    assert len(mappings(detour)) == answered
    assert asking.status(detour)["refused"] == {"rate": 100 - answered}
    assert Asker(lab.host("r1"), detour.address).ask("10.0.3.2:80", 80) == 80


def test_caps(lab, serve, asker):
    server = serve("--max-per-client", "3", "--max-mappings", "4")
    detour, client, neighbour = lab.host("detour"), lab.host("client"), lab.host("r1")
    other = Asker(neighbour, detour.address)
    webs = [WhoAmI(lab.host("server"), port) for port in (1, 2, 3)]
    assert [asker.ask(f"10.0.3.2:{port}", port) for port in (1, 2, 3)] == [1, 2, 3]
    assert other.ask("10.0.3.2:1", 1) == 1
    flows = [Flow(client, detour.address, port) for port in (1, 2, 3)]
    flows.append(Flow(neighbour, detour.address, 1))
    assert len(mappings(detour)) == len(webs) + 1, "and to list is to look at the flows"
    asker.send_request("10.0.3.2:4", 4)
    assert asker.ask("10.0.3.2:3", 3) == 3, "what is there is still answered"
    other.send_request("10.0.3.2:2", 2)
    assert other.ask("10.0.3.2:1", 1) == 1
    assert asking.status(detour)["refused"] == {"client-full": 1, "full": 1}
    assert len(mappings(detour)) == 4
    assert all(flow.echo() for flow in flows)
    assert not server.matching("removed")


def test_malformed_datagrams_get_no_answer(lab, serve, asker):
    server = serve()
    for datagram in (b"", b"\x01", b"x" * 12, bytes(12), b"\x02" + bytes(11), bytes(13),
                     b"\x01\x01" + bytes(10), b"\x01\x02" + bytes(10), b"\x01\x00" + bytes(498),
                     b"\x01\x00" + bytes(1400)):
        asker.send(datagram)
    assert asker.ask("10.0.3.2:80", 80) == 80, "and nothing else was answered before it"
    assert asking.status(lab.host("detour"))["requests"]["malformed"] == 10
    server.wait_line("malformed datagram from 10.0.1.1: empty")


def test_a_thousand_mappings_in_the_kernel(lab, serve, backend, asker):
    serve("--rate", "0")
    wanted = {f"10.0.3.{2 + number // 250}:{101 + number % 250}" for number in range(1000)}
    left = set(wanted)
    while left:
        batch = sorted(left)[:64]
        for remote in batch:
            asker.send_request(remote, 0)
        for answer in asker.answers(1.0):
            left.discard(str(answer.remote))
            if not left & set(batch):
                break
    found = kernel_mappings(lab.host("detour"), backend)
    assert {remote for _, _, remote in found} == wanted
    assert len({port for _, port, _ in found}) == 1000
    assert set(found) == mappings(lab.host("detour"))


def test_a_remote_that_becomes_the_detours_own_is_out_of_reach(lab, serve, backend, asker):
    """Whether it is running then or taking over later."""
    detour, client = lab.host("detour"), lab.host("client")
    server = serve()
    asker.ask("10.0.3.2:80", 80)
    asker.ask("10.0.3.77:80", 81)
    asker.ask("10.0.3.3:80", 82)
    stays = {("10.0.1.1", 82, "10.0.3.3:80")}
    detour.run(["ip", "address", "add", "10.0.3.2/32", "dev", "lo"])
    WhoAmI(detour, 80)
    if backend == "nftables":  # at once
        with pytest.raises(OSError, match=r"timed out|refused"):
            Flow(client, "10.0.6.2", 80, timeout=0.5).close()
    asking.in_time("the mapping is gone", (("10.0.1.1", 80, "10.0.3.2:80") not in mappings(detour)
                                           for _ in itertools.count()))
    server.wait_line("removed 1 mappings that are not allowed")
    server.kill()
    detour.run(["ip", "address", "add", "10.0.3.77/32", "dev", "lo"])
    serve()
    assert mappings(detour) == set(kernel_mappings(detour, backend)) == stays
    assert asking.refuses(client, "10.0.6.2", 81)


def test_forbidden_ports_are_given_to_nobody(lab, serve, backend, asker, tmp_path):
    detour = lab.host("detour")
    config = tmp_path / "server.toml"
    config.write_text('forbid-port = ["8080", "9000-9100"]\n')
    server = serve("--config", config, "--rate", "0")
    assert asker.ask("10.0.3.2:8080", 8080) >= 49152
    assert asker.ask("10.0.3.2:9050", 9050) >= 49152
    assert asker.ask("10.0.3.2:9101", 9101) == 9101
    assert asker.ask("10.0.3.2:80", 80) == 80
    config.write_text('forbid-port = ["9101", "49152-65000"]\n')
    server.process.send_signal(signal.SIGHUP)
    server.wait_line("reloaded$")
    assert mappings(detour) == set(kernel_mappings(detour, backend))
    assert {port for _, port, _ in mappings(detour) if port <= 65000} == {80}
    assert asker.ask("10.0.3.2:8081", 8080) == 8080
    assert all(asker.ask(f"10.0.3.2:{port}", 0) > 65000 for port in range(1, 21))
    assert "9101, 49152-65000" in detour.run(["detour-server", "status"]).stdout


def test_forbidden_ports_on_the_command_line(lab, serve):
    serve("--forbid-port", "8080", "--forbid-port", "9000-9100")
    assert asking.status(lab.host("detour"))["policy"]["forbid_port"] == ["8080", "9000-9100"]
    done = lab.host("detour").run(["detour-server", "--forbid-port", "http"], check=False)
    assert done.returncode == 2
    assert done.stderr == ("detour-server: forbid-port: 'http' is not a port or range "
                           "(write PORT or PORT-PORT, of 1 to 65535)\n")
