# SPDX-License-Identifier: GPL-2.0-or-later
"""A host that was no router does not become one for the neighbours of a detour."""

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable

import pytest

from detour_tools.lab import namespaces
from detour_tools.lab.network import Host, Lab
from tests.netns import asking
from tests.netns.asking import Asker, Flow, WhoAmI
from tests.netns.conftest import Serve


@pytest.fixture
def neighbour(lab: Lab) -> Host:
    """r3, which sends what is for 10.0.3.2 by way of the detour, and that back to r3."""
    WhoAmI(lab.host("server"), 80)
    asking.route_through_the_detour(lab)
    return lab.host("client")


def gets_through(host: Host, timeout: float = 1.0) -> bool:
    """Whether TCP reaches the server, which is reached through the detour only."""
    try:
        Flow(host, "10.0.3.2", 80, timeout).close()
    except TimeoutError:
        return False
    return True


def _datagrams(source: Host, destination: Host) -> tuple[list[bytes], Callable[[], None]]:
    """Send datagrams all the time: those that arrived, and what ends it and waits for the last."""
    arrived: list[bytes] = []
    ends = threading.Event()
    with namespaces.inside(destination.namespace):
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind((str(destination.address), 0))
    receiver.settimeout(0.2)
    with namespaces.inside(source.namespace):
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def send() -> None:
        while not ends.wait(0.002):
            sender.sendto(b"x", receiver.getsockname())

    def receive() -> None:
        with contextlib.suppress(TimeoutError):
            while not (ends.is_set() and not sending.is_alive()):
                with contextlib.suppress(TimeoutError):
                    arrived.append(receiver.recv(9))
            while True:
                arrived.append(receiver.recv(9))

    sending = threading.Thread(target=send, daemon=True)
    receiving = threading.Thread(target=receive, daemon=True)
    sending.start()
    receiving.start()

    def stop() -> None:
        ends.set()
        receiving.join()
        sender.close()
        receiver.close()

    return arrived, stop


def test_a_neighbour_gets_nothing_through(lab: Lab, serve: Serve, neighbour: Host, asker: Asker):
    detour = lab.host("detour")
    assert asking.forwarding(detour) == "0"
    server = serve()
    asker.ask("10.0.3.2:80", 80)
    assert not gets_through(neighbour)
    assert Flow(lab.host("client"), detour.address, 80).echo(), "mapped flows pass both ways"
    server.kill()
    serve()
    assert not gets_through(neighbour), "what a server that was killed found is remembered"
    assert asking.status(detour)["policy"]["router"] is False


def test_nor_while_a_server_starts_and_stops(lab: Lab, serve: Serve, neighbour: Host):
    arrived, stop = _datagrams(neighbour, lab.host("server"))
    for _ in range(2):
        serve().stop()
    stop()
    assert not arrived, f"{len(arrived)} datagrams of a neighbour got through"


def test_nor_for_long_when_somebody_flushes_the_rules(lab: Lab, serve: Serve, neighbour: Host,
                                                      backend: str):
    server = serve()
    arrived, stop = _datagrams(neighbour, lab.host("server"))
    for times in range(1, 5):
        lab.host("detour").run(["nft", "flush", "ruleset"] if backend == "nftables" else
                               ["iptables-legacy", "-F"])
        asking.in_time("they stand again", (
            len(server.matching("somebody removed our rules")) == times for _ in itertools.count()))
        time.sleep(1.1)  # sooner after a repair there is none
    stop()
    # One each 2 ms: up to 1,000 each time, when it took the two seconds' look.
    assert len(arrived) < 1000, f"{len(arrived)} datagrams of a neighbour got through"


@pytest.mark.parametrize(("was", "options"), [("1", ()), ("0", ("--router", "yes"))])
def test_a_router_stays_one(lab: Lab, serve: Serve, neighbour: Host, was: str,
                            options: tuple[str, ...]):
    lab.host("detour").run(["sysctl", "-qw", f"net.ipv4.ip_forward={was}"])
    serve(*options)
    assert gets_through(neighbour, timeout=30.0)


def test_a_router_stays_none_when_told_so(lab: Lab, serve: Serve, neighbour: Host):
    lab.host("detour").run(["sysctl", "-qw", "net.ipv4.ip_forward=1"])
    serve("--router", "no")
    assert not gets_through(neighbour)


def test_errors_about_mapped_flows_come_back(lab: Lab, serve: Serve, asker: Asker):
    """A narrow link behind the detour says so to the client (RFC 1191)."""
    client, server = lab.host("client"), lab.host("server")
    WhoAmI(server, 80)
    serve()
    asker.ask("10.0.3.2:80", 80)
    r3 = lab.host("r3")
    out = r3.run(["ip", "-o", "route", "get", "10.0.3.2"]).stdout.split()
    narrow = out[out.index("dev") + 1]
    for host in lab.hosts():  # at both ends, as either drops what is too long for it
        if host.run(["ip", "link", "show", narrow], check=False).returncode == 0:
            host.run(["ip", "link", "set", narrow, "mtu", "1000"])
    flow = Flow(client, lab.host("detour").address, 80)
    text = b"x" * 20000 + b"\n"
    assert flow.echo(text)
