# SPDX-License-Identifier: GPL-2.0-or-later
"""Small programs that tests run on the lab's hosts: python -m tests.netns.programs NAME ARGUMENT...

``sink PORT``             an MPTCP server: reads to the end, answers with the SHA-256 of it
``upload HOST PORT SIZE`` sends SIZE bytes over MPTCP in 64 KiB pieces and prints both SHA-256
``hold HOST PORT N``      opens N MPTCP connections, says so, and keeps them until stdin ends
``dual-stack HOST PORT``  as hold, one connection, from an IPv6 socket
"""

import hashlib
import random
import socket
import sys
import threading

IPPROTO_MPTCP = 262


def sink(port: str) -> None:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("0.0.0.0", int(port)))
    listener.listen(4096)
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_digest, args=(connection,), daemon=True).start()


def _digest(connection: socket.socket) -> None:
    digest = hashlib.sha256()
    with connection:
        try:
            while piece := connection.recv(1 << 16):
                digest.update(piece)
            connection.sendall(digest.hexdigest().encode())
        except OSError:
            pass


def upload(host: str, port: str, size: str) -> None:
    with _connect(host, port) as connection:
        digest, left = hashlib.sha256(), int(size)
        source = random.Random(1)
        while left:
            piece = source.randbytes(min(left, 1 << 16))
            digest.update(piece)
            connection.sendall(piece)
            left -= len(piece)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while more := connection.recv(100):
            received += more
    print(digest.hexdigest(), received.decode(), flush=True)


def hold(host: str, port: str, count: str) -> None:
    connections = [_connect(host, port) for _ in range(int(count))]
    for connection in connections:
        connection.sendall(b"x")  # the server's acknowledgement makes it fully established
    print("ready", flush=True)
    sys.stdin.read()


def dual_stack(host: str, port: str) -> None:
    connection = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, IPPROTO_MPTCP)
    connection.connect((f"::ffff:{host}", int(port)))
    connection.sendall(b"x")
    print("ready", flush=True)
    sys.stdin.read()


def _connect(host: str, port: str) -> socket.socket:
    connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP)
    connection.connect((host, int(port)))
    return connection


if __name__ == "__main__":
    globals()[sys.argv[1].replace("-", "_")](*sys.argv[2:])
