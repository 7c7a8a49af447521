# SPDX-License-Identifier: GPL-2.0-or-later
"""(g) Very many mappings, each with a flow: expiry, listing, a reload, and a start after a kill.

The flows are entries of the kernel's connection tracking, put there by ctnetlink: what a hundred
thousand connections would leave in it, without the connections. How long the detour is deaf is
what a client sees that asks every few milliseconds.
"""

import contextlib
import itertools
import select
import signal
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv4Address
from pathlib import Path

from detour_tools.endpoint import Endpoint
from detour_tools.lab import namespaces
from detour_tools.mapping import Mapping, flow_key
from detour_tools.netlink import codec
from detour_tools.netlink.socket import NETLINK_NETFILTER
from tests.bench.bed import Bed, Program, pause
from tests.bench.figures import Figure
from tests.bench.requests import ask, distinct

NAME = "g"
TITLE = "very many mappings with flows"

_MAPPINGS_A_CLIENT = 15000
_IDLE_SECONDS = 60
_ASK_EVERY = 0.005
_PAGE_KIB = 4

_CONNTRACK_NEW = 1 << 8 | 0
_CREATE = 0x400 | 0x200
_BATCH = 200
_SNDBUFFORCE = 32


def _flow(number: int, mapping: Mapping, detour: bytes) -> bytes:
    """A request for an established flow through the mapping, as the kernel would have made it."""
    attribute, nested = codec.attribute, codec.nested
    client, remote = mapping.client.packed, mapping.remote.address.packed
    port = struct.pack("!H", mapping.detour_port)
    remote_port, source = struct.pack("!H", mapping.remote.port), struct.pack("!H", 40000)

    def ends(kind: int, *, reply: bool) -> bytes:
        addresses, ports = (client, detour), (source, port)
        if reply:
            addresses, ports = (detour, client), (port, source)
        return nested(kind, nested(1, attribute(1, addresses[0]), attribute(2, addresses[1])),
                      nested(2, attribute(1, b"\x06"), attribute(2, ports[0]),
                             attribute(3, ports[1])))

    return codec.message(
        _CONNTRACK_NEW, codec.NLM_F_REQUEST | codec.NLM_F_ACK | _CREATE, number,
        struct.pack("=BBH", socket.AF_INET, 0, 0)
        + ends(1, reply=False) + ends(2, reply=True)  # CTA_TUPLE_ORIG, CTA_TUPLE_REPLY
        + attribute(3, struct.pack("!I", 0xE))        # CTA_STATUS: seen reply, assured, confirmed
        + attribute(7, struct.pack("!I", 86400))      # CTA_TIMEOUT
        + nested(4, nested(1, attribute(1, b"\x03")))  # CTA_PROTOINFO: TCP, established
        # CTA_NAT_DST, which makes the reply come from the remote
        + nested(13, attribute(1, remote), attribute(2, remote),
                 nested(3, attribute(1, remote_port), attribute(2, remote_port))))


def _make_flows(bed: Bed, mappings: Sequence[Mapping]) -> None:
    host = bed.host("detour")
    detour = host.address.packed
    with namespaces.inside(host.namespace):
        raw = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
    with raw:
        raw.setsockopt(socket.SOL_SOCKET, _SNDBUFFORCE, 1 << 20)
        for start in range(0, len(mappings), _BATCH):
            some = mappings[start:start + _BATCH]
            raw.send(b"".join(_flow(number, each, detour) for number, each in enumerate(some, 1)))
            for _ in some:
                for answer in codec.messages(raw.recv(1 << 16)):
                    error = codec.error_of(answer)
                    if error is not None:
                        raise error


class _Listener:
    """A client that asks for what it has every few milliseconds; notes when answers came."""

    def __init__(self, sock: socket.socket, request: bytes) -> None:
        self._socket = sock
        self._request = request
        self._answers: list[float] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(OSError):  # nobody listens
                self._socket.send(self._request)
            if select.select([self._socket], [], [], _ASK_EVERY)[0]:
                with contextlib.suppress(OSError):
                    # All that wait: what was asked while it was deaf is answered at once later.
                    while self._socket.recv(64):
                        self._answers.append(time.monotonic())
                time.sleep(_ASK_EVERY)

    def __enter__(self) -> "_Listener":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def answered(self, since: float) -> bool:
        """Whether an answer came since then."""
        return bool(self._answers) and self._answers[-1] > since

    def longest_silence(self, since: float) -> float:
        """The longest time between two answers since then, in seconds."""
        times = [since, *(each for each in self._answers if each > since), time.monotonic()]
        return max(b - a for a, b in itertools.pairwise(times))


def _wait(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {seconds:g} s: {what}")
        time.sleep(0.005)


def _memory_mib(server: Program) -> float:
    """What the process holds in memory."""
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * _PAGE_KIB / 1024


def run(say: Callable[[str], None], *, quick: bool, load: Path) -> Iterator[Figure]:
    del load
    count = 10_000 if quick else 100_000
    with contextlib.ExitStack() as stack:
        bed = stack.enter_context(Bed("g"))
        scale = _Scale(bed, count)
        say(f"{count:,} mappings with flows made")
        # The narrower policy last, as it removes many.
        for figures in (scale.listing(), scale.kill(), scale.expiry(10 if quick else 60),
                        scale.reload()):
            for each in figures:
                say(f"{each.name}: {each.value:.3g} {each.unit}")
                yield each


class _Scale:
    def __init__(self, bed: Bed, count: int) -> None:
        self.bed = bed
        self.count = count
        self.config = bed.lab.folder() / "server.toml"
        self._allow("10.0.0.0/8")
        self.server = self._start()
        self.server.wait_control_socket()
        fillers = -(-count // _MAPPINGS_A_CLIENT)
        self.client, *others = bed.client_addresses(1 + fillers)
        made = []
        for n, other in enumerate(others):
            share = min(_MAPPINGS_A_CLIENT, count - n * _MAPPINGS_A_CLIENT)
            answers = ask(bed.udp(other), bed.detour, distinct(share))
            if answers.lost or len(answers.ports) != share:
                raise RuntimeError(f"{answers.lost} of {share} requests were not answered")
            made += [Mapping(other, port, Endpoint(IPv4Address(remote[:4]),
                                                   int.from_bytes(remote[4:], "big")))
                     for remote, port in answers.ports.items()]
        assert len({flow_key(each) for each in made}) == count
        _make_flows(bed, made)
        self.others = others
        self.socket = bed.udp(self.client)
        self.socket.connect(bed.detour)
        self.request = distinct(1, start=1 << 20)[0]

    def _start(self) -> Program:
        return self.bed.start("detour", "detour-server", "--config", self.config,
                              "--idle-timeout", _IDLE_SECONDS, "--rate", 0,
                              "--max-per-client", 65535, "--max-mappings", 131072,
                              "--allow-remote", "10.0.0.0/8")

    def _allow(self, *clients: object) -> None:
        listed = ", ".join(f'"{each}"' for each in clients)
        self.config.write_text(f"allow-client = [{listed}]\n", encoding="ascii")

    def _mappings(self) -> int:
        return int(self.server.call("status")["mappings"])

    def expiry(self, seconds: float) -> Iterator[Figure]:
        """What it takes to expire mappings of which some are always due."""
        fresh = iter(distinct(1 << 16, start=1 << 21))

        def expired() -> int:
            return int(self.server.call("status")["expired"])

        def next_time() -> tuple[float, float, int]:
            """Until something has expired again: so that whole turns are measured."""
            before, deadline = expired(), time.monotonic() + 600
            while (now := expired()) == before:
                if time.monotonic() > deadline:
                    raise RuntimeError("nothing expires")
                self.socket.send(next(fresh))
                time.sleep(5.0)  # what it asks costs the server, too
            return self.server.cpu_seconds(), time.monotonic(), now

        start = end = next_time()
        while end is start or end[1] - start[1] < seconds:
            end = next_time()
        a_minute = (end[0] - start[0]) / (end[1] - start[1]) * 60
        left = self._mappings()
        while select.select([self.socket], [], [], 0)[0]:
            self.socket.recv(64)
        yield Figure(bench=NAME, name=f"steady expiry at {self.count:,} with flows, processor time",
                     value=a_minute, unit="s/min", target="<= 0.5 s/min",
                     met=a_minute <= 0.5 and left >= self.count,
                     details={"expired": end[2] - start[2], "left": left,
                              "seconds": end[1] - start[1]})

    def listing(self) -> Iterator[Figure]:
        """How long ``detour-server list`` takes, the program's start included."""
        times = []
        for _ in range(3):
            began = time.monotonic()
            printed = self.bed.run("detour", "detour-server", "list")
            times.append(time.monotonic() - began)
            if printed.count("\n") <= self.count:
                raise RuntimeError("the list is not whole")
        took = statistics.median(times)
        yield Figure(bench=NAME, name=f"list of {self.count:,}", value=took, unit="s",
                     target="<= 1 s", met=took <= 1, details={"times": times})

    def kill(self) -> Iterator[Figure]:
        """How long the next one is deaf after SIGKILL, and what memory it keeps."""
        before, present = _memory_mib(self.server), self._mappings()
        with _Listener(self.socket, self.request) as listener:
            began = time.monotonic()
            _wait(lambda: listener.answered(began), "an answer")
            self.server.process.send_signal(signal.SIGKILL)
            self.server.process.wait()
            killed = time.monotonic()
            self.server = self._start()
            _wait(lambda: listener.answered(killed + 0.05), "an answer of the next server")
            pause(2.0)
            deaf = listener.longest_silence(killed)
        self.server.wait_control_socket()
        memory = _memory_mib(self.server)
        kept = self._mappings()
        yield Figure(bench=NAME, name="deaf after SIGKILL and a start", value=deaf, unit="s",
                     target="<= 1 s", met=deaf <= 1 and kept >= min(present, self.count),
                     details={"mappings": kept})
        yield Figure(bench=NAME, name="memory of the next server", value=memory, unit="MiB",
                     baseline=before, baseline_name="before", ratio=memory / before,
                     target="<= 1.3 x", met=memory <= 1.3 * before)

    def reload(self) -> Iterator[Figure]:
        """How long SIGHUP with a narrower policy makes it deaf to those that it still serves."""
        half = len(self.others) // 2 + 1
        self._allow(f"{self.client}/32", *(f"{each}/32" for each in self.others[:half]))
        present = self._mappings()
        with _Listener(self.socket, self.request) as listener:
            began = time.monotonic()
            _wait(lambda: listener.answered(began), "an answer")
            pause(1.0)
            undisturbed = listener.longest_silence(began)
            began = time.monotonic()
            self.server.process.send_signal(signal.SIGHUP)
            self.server.wait_output("reloaded")
            deaf = listener.longest_silence(began)
            took = time.monotonic() - began
        yield Figure(bench=NAME, name="deaf at SIGHUP with a narrower policy", value=deaf * 1000,
                     unit="ms", baseline=undisturbed * 1000, baseline_name="undisturbed",
                     target="<= 50 ms", met=deaf <= 0.05,
                     details={"seconds": took, "removed": present - self._mappings()})
