# SPDX-License-Identifier: GPL-2.0-or-later
"""A load of MPROXY requests: so many outstanding, each answer replaced by a new request."""

import contextlib
import select
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from detour_tools.server.garbage import no_collections

_REQUEST = struct.Struct("!BBHIHH")
_TIMEOUT = 1.0  # above what the naive baseline needs for 64 requests
_BENCHMARK_NET = 0x2D000000  # 45.0.0.0/8: public addresses, nothing is ever sent there


def distinct(count: int, port: int = 443, start: int = 0) -> list[bytes]:
    """Requests for different remotes that propose the remote's port, as clients do."""
    return [_REQUEST.pack(1, 0, 0, _BENCHMARK_NET + start + n, port, port)
            for n in range(1, count + 1)]


def for_remotes(remotes: Sequence[tuple[int, int]]) -> list[bytes]:
    """Requests for these remotes (address as a number, port)."""
    return [_REQUEST.pack(1, 0, 0, address, port, port) for address, port in remotes]


@dataclass
class Load:
    """What a load came to; latencies in seconds, from the first sending to the answer."""

    seconds: float
    client_share: float  # of one processor, that the load itself took
    retransmissions: int = 0
    lost: int = 0
    latencies: list[float] = field(default_factory=list)
    ports: dict[bytes, int] = field(default_factory=dict)  # remote as in the datagram -> port

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.latencies) / self.seconds


def ask(sock: socket.socket, detour: tuple[str, int], requests: Sequence[bytes],
        outstanding: int = 64, seconds: float = 60.0) -> Load:
    """Send the requests; begin none after ``seconds``. No answer within 5 s is a loss."""
    with no_collections():  # which would show as latency
        return _ask(sock, detour, requests, outstanding, seconds)


def _ask(sock: socket.socket, detour: tuple[str, int], requests: Sequence[bytes],
         outstanding: int, seconds: float) -> Load:
    sock.connect(detour)
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    send, receive, clock = sock.send, sock.recv_into, time.perf_counter
    answer = bytearray(64)
    pending: dict[bytes, tuple[float, bytes]] = {}
    load = Load(0.0, 0.0)
    latencies, ports = load.latencies, load.ports
    queue = iter(requests)
    cpu, start = time.thread_time(), clock()
    stop = start + seconds
    check = start + _TIMEOUT

    def send_next() -> None:
        request = next(queue, None)
        if request is not None:
            pending[request[4:10]] = (clock(), request)
            send(request)

    for _ in range(outstanding):
        send_next()
    while pending:
        if poll.poll(200):
            with contextlib.suppress(BlockingIOError):
                while True:
                    receive(answer)
                    remote = bytes(answer[4:10])
                    sent = pending.pop(remote, None)
                    if sent is None:
                        continue
                    now = clock()
                    latencies.append(now - sent[0])
                    ports[remote] = answer[10] << 8 | answer[11]
                    if now < stop:
                        send_next()
        now = clock()
        if now >= check:
            check = now + _TIMEOUT
            for remote, (sent_at, request) in list(pending.items()):
                if now - sent_at > 5 * _TIMEOUT:
                    del pending[remote]
                    load.lost += 1
                elif now - sent_at > _TIMEOUT:
                    send(request)
                    load.retransmissions += 1
    load.seconds = clock() - start
    load.client_share = (time.thread_time() - cpu) / load.seconds
    return load


def ask_one(sock: socket.socket, request: bytes) -> float:
    """Seconds that one request takes (on a connected socket); raises TimeoutError."""
    start = time.perf_counter()
    sock.send(request)
    while True:
        if not select.select([sock], [], [], 5.0)[0]:
            raise TimeoutError("the detour does not answer")
        with contextlib.suppress(BlockingIOError):
            if sock.recv(64)[4:10] == request[4:10]:
                return time.perf_counter() - start
