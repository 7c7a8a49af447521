# SPDX-License-Identifier: GPL-2.0-or-later
"""What a detour relays: joins of MPTCP connections and nothing else, unless told otherwise."""

import contextlib
import signal
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest

from detour_tools.lab import namespaces
from detour_tools.lab.daemons import wait_for
from detour_tools.lab.network import Host, Lab
from tests.netns import asking
from tests.netns.asking import Asker, Flow, WhoAmI, mappings
from tests.netns.conftest import PRIVATE, Start, StartClient, StartServer
from tests.netns.test_client import hold, program, sink, subflows  # noqa: F401 - fixtures

_SYN, _RST, _ACK = 2, 4, 16
# Options, as a client's kernel sends them: MP_JOIN of a SYN (RFC 8684, section 3.2) with a token
# that no server knows, and MP_CAPABLE.
_MP_JOIN = bytes((30, 12, 0x10, 1)) + bytes(8)
_MP_CAPABLE = bytes((30, 4, 0x01, 0x01))


class Forger:
    """Sends SYNs of its own making from a host, whose kernel is kept from answering for it."""

    def __init__(self, host: Host, detour: object) -> None:
        self._host, self._detour = host, IPv4Address(str(detour))
        with namespaces.inside(host.namespace):
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
        host.run(["nft", "add table ip forger; add chain ip forger out "
                         "{ type filter hook output priority 0; }; "
                         "add rule ip forger out tcp flags & rst == rst drop"])

    def syn(self, sport: int, dport: int, options: bytes, flags: int = _SYN) -> None:
        length = 20 + len(options)
        header = struct.pack("!HHIIBBHHH", sport, dport, 1, 0, length << 2, flags, 65535, 0, 0)
        pseudo = self._host.address.packed + self._detour.packed + struct.pack("!HH", 6, length)
        data = pseudo + header + options
        total = sum(struct.unpack(f"!{len(data) // 2}H", data))
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        segment = header[:16] + struct.pack("!H", ~total & 0xFFFF) + header[18:] + options
        self._socket.sendto(segment, (str(self._detour), 0))

    def answer(self, sport: int, timeout: float) -> str:
        """What the detour answers within so many seconds: "syn-ack", "rst" or "nothing"."""
        self._socket.settimeout(timeout)
        with contextlib.suppress(TimeoutError):
            while True:
                packet = self._socket.recv(2048)
                segment = packet[(packet[0] & 15) * 4:]
                if struct.unpack_from("!H", segment, 2)[0] == sport:
                    return "rst" if segment[13] & _RST else "syn-ack"
        return "nothing"


@pytest.fixture
def detour(lab: Lab) -> Host:
    return lab.host("detour")


@pytest.fixture
def forger(lab: Lab, detour: Host) -> Iterator[Forger]:
    yield Forger(lab.host("client"), detour.address)
    lab.host("client").run(["nft", "delete", "table", "ip", "forger"])


def test_plain_tcp_is_refused(lab: Lab, detour: Host, start_server: StartServer, asker: Asker,
                              backend: str):
    WhoAmI(lab.host("server"), 80)
    start_server(detour, "--backend", backend, *PRIVATE)
    assert asker.ask("10.0.3.2:80", 80) == 80
    assert asking.refuses(lab.host("client"), detour.address, 80)
    assert asking.status(detour)["policy"]["relay"] == "joins"


def test_a_join_is_relayed(lab: Lab, detour: Host, start_server: StartServer, sink, hold,  # noqa: F811
                           start_client: StartClient, backend: str):
    client = lab.host("client")
    sink(lab.host("server"))
    start_server(detour, "--backend", backend, *PRIVATE)
    start_client(client, "detour")
    hold(client)
    wait_for(lambda: subflows(client) == [[str(detour.address), "direct"]])


def test_a_forged_join_gets_no_answer(lab: Lab, detour: Host, start_server: StartServer,
                                      asker: Asker, forger: Forger, backend: str):
    """A server that speaks no MPTCP would take it for plain TCP."""
    WhoAmI(lab.host("server"), 80)
    start_server(detour, "--backend", backend, *PRIVATE)
    asker.ask("10.0.3.2:80", 80)
    forger.syn(2000, 80, _MP_JOIN)
    assert forger.answer(2000, 1.0) == "nothing"


@pytest.mark.parametrize("options", [b"", _MP_CAPABLE], ids=["plain", "mp-capable"])
def test_a_join_opens_no_way_for_other_syns(
        lab: Lab, detour: Host, start_server: StartServer, start: Start, asker: Asker,
        forger: Forger, options: bytes):
    """Connection tracking translates what follows a join over the same ports."""
    server = lab.host("server")
    start(server, program("sink", 80)).wait_line("ready")
    # An answer to the join would end the flow that the second SYN is to come through.
    server.run(["nft", "add table ip deaf; add chain ip deaf in "
                       "{ type filter hook input priority 0; }; "
                       "add rule ip deaf in tcp option mptcp subtype 1 drop"])
    start_server(detour, *PRIVATE)
    asker.ask("10.0.3.2:80", 80)
    forger.syn(2000, 80, _MP_JOIN)
    forger.syn(2000, 80, options)
    assert forger.answer(2000, 1.0) == "nothing"


def test_a_mapping_that_made_room_opens_no_way_for_plain_answers(
        lab: Lab, detour: Host, start_server: StartServer, asker: Asker, forger: Forger,
        backend: str):
    """The server sends its SYN/ACK again and again, and the mapping is gone meanwhile."""
    WhoAmI(lab.host("server"), 80)
    start_server(detour, "--backend", backend, "--max-per-client", 1, *PRIVATE)
    asker.ask("10.0.3.2:80", 80)
    forger.syn(2000, 80, _MP_JOIN)
    assert forger.answer(2000, 0.2) == "nothing"
    assert asker.ask("10.0.3.2:81", 81) == 81
    assert mappings(detour) == {("10.0.1.1", 81, "10.0.3.2:81")}
    assert forger.answer(2000, 4.0) == "nothing"


def test_a_forged_join_proves_no_mapping(lab: Lab, detour: Host, start_server: StartServer,
                                         asker: Asker, forger: Forger, backend: str):
    """Whoever forges requests can forge joins, too, and would keep what it got for ever."""
    start_server(detour, "--backend", backend, "--max-per-client", 1, *PRIVATE)
    WhoAmI(lab.host("server"), 80)
    for remote in ("10.0.3.77:80", "10.0.3.2:80"):  # nobody answers there; or is not heard
        asker.ask(remote, 80)
        forger.syn(2000, 80, _MP_JOIN)
        forger.answer(2000, 0.2)
        assert len(mappings(detour)) == 1, "and to list is to look at the flows"
    assert asker.ask("10.0.3.2:81", 80) == 80
    assert asking.status(detour)["requests"]["evicted"] == 2


def test_any_tcp_where_that_is_wanted(lab: Lab, detour: Host, start_server: StartServer,
                                      asker: Asker, backend: str, tmp_path):
    """And on a reload joins alone again."""
    client = lab.host("client")
    WhoAmI(lab.host("server"), 80)
    config = tmp_path / "server.toml"
    config.write_text('relay = "tcp"\n')
    server = start_server(detour, "--backend", backend, *PRIVATE, "--config", config)
    asker.ask("10.0.3.2:80", 80)
    flow = Flow(client, detour.address, 80)
    assert flow.seen_as == str(detour.address)
    config.write_text("")
    server.process.send_signal(signal.SIGHUP)
    server.wait_line("reloaded$")
    assert asking.refuses(client, detour.address, 80)
    assert flow.echo(), "what was opened before goes on"
