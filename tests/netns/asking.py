# SPDX-License-Identifier: GPL-2.0-or-later
"""A well-behaved MPROXY client, a TCP server that says who called, and a look at the rules."""

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator

from detour_tools import mproxy
from detour_tools.endpoint import Endpoint, parse_endpoint
from detour_tools.lab import namespaces
from detour_tools.lab.network import Host, Lab
from detour_tools.mproxy import v1

# Always allowed, never contacted: what comes after a request that gets no answer.
SENTINEL = parse_endpoint("130.104.230.45:7")

_SO_RCVBUFFORCE = 33  # include/uapi/asm-generic/socket.h


class Asker:
    """Asks a detour from a host; blocking, with a plain retransmission."""

    def __init__(self, host: Host, detour: object, source: str = "", port: int = mproxy.PORT):
        with namespaces.inside(host.namespace):
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        # Hundreds of answers may wait while more is asked.
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 20)
        self._socket.bind((source, 0))
        self._detour = (str(detour), port)

    def send(self, datagram: bytes) -> None:
        self._socket.sendto(datagram, self._detour)

    def send_request(self, remote: Endpoint | str, proposed: int) -> None:
        self.send(v1.encode(v1.Request(_endpoint(remote), proposed)))

    def answers(self, timeout: float) -> Iterator[v1.Response]:
        """Answers as they come, until none came for so long. They must come from the detour."""
        self._socket.settimeout(timeout)
        while True:
            try:
                data, sender = self._socket.recvfrom(2048)
            except TimeoutError:
                return
            assert sender == self._detour, f"answered from {sender}, asked {self._detour}"
            message = mproxy.decode(data)
            assert isinstance(message, v1.Response)
            yield message

    def answers_within(self, seconds: float) -> Iterator[v1.Response]:
        """Answers as they come, for so long in all."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            answer = next(self.answers(left), None)
            if answer is not None:
                yield answer

    def ask(self, remote: Endpoint | str, proposed: int, tries: int = 5) -> int:
        """The detour port; AssertionError when no answer comes."""
        wanted = _endpoint(remote)
        for _ in range(tries):
            self.send_request(wanted, proposed)
            for answer in self.answers(1.0):
                if answer.remote == wanted:
                    return answer.detour_port
        raise AssertionError(f"no answer for {wanted}")

    def is_refused(self, remote: Endpoint | str, proposed: int) -> bool:
        """Whether a request gets no answer, while one after it does."""
        self.send_request(remote, proposed)
        self.send_request(SENTINEL, 0)
        got = []
        for answer in self.answers(10.0):
            got.append(answer.remote)
            if answer.remote == SENTINEL:
                return _endpoint(remote) not in got
        raise AssertionError("the server answers nobody")

    def close(self) -> None:
        self._socket.close()


def _endpoint(remote: Endpoint | str) -> Endpoint:
    return parse_endpoint(remote) if isinstance(remote, str) else remote


class WhoAmI:
    """A TCP server that tells each caller the address it sees, then echoes."""

    def __init__(self, host: Host, port: int):
        with namespaces.inside(host.namespace):
            self._listener = socket.create_server(("0.0.0.0", port))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, peer = self._listener.accept()
                threading.Thread(target=self._talk, args=(connection, peer), daemon=True).start()

    @staticmethod
    def _talk(connection: socket.socket, peer: tuple[str, int]) -> None:
        with connection, contextlib.suppress(OSError):
            connection.sendall(f"{peer[0]}\n".encode())
            while data := connection.recv(4096):
                connection.sendall(data)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


class Flow:
    """A TCP connection from a host, to a WhoAmI at its far end."""

    def __init__(self, host: Host, address: object, port: int, timeout: float = 5.0):
        with namespaces.inside(host.namespace):
            self._socket = socket.create_connection((str(address), port), timeout)
        self._stream = self._socket.makefile("rwb", buffering=0)
        self.seen_as = self._stream.readline().decode().strip()

    def echo(self, text: bytes = b"hello\n") -> bool:
        """Whether the far end still echoes; raises OSError when the connection is dead."""
        self._stream.write(text)
        return self._stream.readline() == text

    def close(self) -> None:
        self._socket.close()


def is_cut(flow: Flow) -> bool:
    """Whether a flow is reset: its packets end at the detour, which knows no such connection."""
    try:
        return not flow.echo()
    except ConnectionError:
        return True


def refuses(host: Host, address: object, port: int) -> bool:
    """Whether a TCP connection is refused."""
    try:
        Flow(host, address, port).close()
    except ConnectionRefusedError:
        return True
    return False


def rules(host: Host) -> str:
    """All NAT and filter rules of a host, without counters."""
    texts = [host.run(command).stdout for command in (
        ["nft", "list", "ruleset"],
        ["iptables-legacy", "-t", "nat", "-S"], ["iptables-legacy", "-t", "filter", "-S"])]
    return re.sub(r"packets \d+ bytes \d+", "", "\n".join(texts))


def lasting(rules: str) -> str:
    """Rules without what the kernel counts and notes in sets by itself, and when that expires."""
    return re.sub(r" expires [0-9a-z]+", "", re.sub(
        r"\n\s*elements = {[^}]* (ct count|limit rate) over [^}]*}", "", rules))


def mappings(host: Host) -> set[tuple[str, int, str]]:
    """What ``detour-server list`` says."""
    listed = json.loads(host.run(["detour-server", "list", "--json"]).stdout)["mappings"]
    found = [(each["client"], each["detour_port"], each["remote"]) for each in listed]
    assert len(found) == len(set(found))
    return set(found)


def _parts(element: dict) -> list:
    """What a concatenation is made of; an element with a comment is wrapped."""
    return element.get("elem", {}).get("val", element)["concat"]


def kernel_mappings(host: Host, backend: str) -> list[tuple[str, int, str]]:
    """What the kernel's rules say, as nft and iptables show them; DNAT and SNAT must agree."""
    if backend == "nftables":
        table = json.loads(host.run(["nft", "-j", "list", "table", "ip", "detour-tools"]).stdout)
        parts = {part.get("name"): part for item in table["nftables"] for part in item.values()}
        dnat = [(*_parts(key), "{}:{}".format(*_parts(value)))
                for key, value in parts["mappings"].get("elem", ())]
        snat = [(client, port, f"{address}:{remote_port}") for client, port, address, remote_port
                in map(_parts, parts["mapped"].get("elem", ()))]
    else:
        text = host.run(["iptables-legacy", "-t", "nat", "-S"]).stdout
        dnat = [(client, int(port), remote) for client, port, remote in re.findall(
            r"-A DETOUR-PREROUTING -s (\S+)/32 -p tcp -m tcp --dport (\d+) "
            r'-m connlabel --label "97" --set '
            r"-j DNAT --to-destination (\S+)", text)]
        snat = [(client, int(port), f"{address}:{remote_port}")
                for client, address, remote_port, port in re.findall(
                    r"-A DETOUR-POSTROUTING -s (\S+)/32 -d (\S+)/32 -p tcp -m tcp --dport (\d+) "
                    r"-m conntrack --ctstate DNAT --ctorigdstport (\d+) -j MASQUERADE", text)]
        assert text.count("-j DETOUR-PREROUTING") <= 1
        assert text.count("-j DETOUR-POSTROUTING") <= 1
    assert sorted(dnat) == sorted(snat)
    return sorted(dnat)


def status(host: Host) -> dict:
    """What ``detour-server status`` says."""
    return json.loads(host.run(["detour-server", "status", "--json"]).stdout)


def forwarding(host: Host) -> str:
    """The host's net.ipv4.ip_forward."""
    return host.run(["cat", "/proc/sys/net/ipv4/ip_forward"]).stdout.strip()


@contextlib.contextmanager
def listening(host: Host, address: str, port: int, family: int = socket.AF_INET,
              protocol: int = 0) -> Iterator[None]:
    """A TCP socket that listens on a host for the length of the block."""
    with namespaces.inside(host.namespace):
        listener = socket.socket(family, socket.SOCK_STREAM, protocol)
    with listener:
        listener.bind((address, port))
        listener.listen()
        yield


def route_through_the_detour(lab: Lab) -> None:
    """Have the client's packets to 10.0.3.2 pass through the detour; answers go another way."""
    r1, r3 = lab.host("r1"), lab.host("r3")
    towards_r3 = r1.run(["ip", "-o", "route", "get", "10.0.6.2"]).stdout.split()
    gateway, link = towards_r3[2], towards_r3[4]
    r1.run(["ip", "route", "add", "10.0.3.2/32", "via", gateway, "dev", link])
    r3.run(["ip", "rule", "add", "iif", link, "to", "10.0.3.2", "table", "100"])
    r3.run(["ip", "route", "add", "default", "via", "10.0.6.2", "table", "100"])


def in_time(what: str, conditions: Iterable[object], timeout: float = 30.0) -> None:
    """Look again and again (each look is an item) until one is true."""
    deadline = time.monotonic() + timeout
    for found in conditions:
        if found:
            return
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.02)
    raise AssertionError(f"not after so many looks: {what}")
