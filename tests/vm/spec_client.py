# SPDX-License-Identifier: GPL-2.0-or-later
"""A client of the DETOUR netlink family, written from its description alone and nothing of ours.

It stands for the client of the first kernel path manager, whose names and numbers (below) ours
keeps. It does what each line of its input says, and prints a line for each:

    add|del ADDRESS PORT ADDRESS PORT   a NAT detour: of the detour, of the remote
    add|del INTERFACE                   a VPN detour
    echo                                the kernel writes its lists to its log
    join                                into the group detour_req
    hear SECONDS                        the next REQ that comes: "req ADDRESS PORT", or "nothing"
    send COMMAND [TYPE:HEX]...          any command with any attributes
    bytes HEX                           a message as it is, its family and sequence number put in
    fill COUNT ADDRESS PORT             NAT detours, 64 for each port from PORT on of that remote:
                                        says how many were taken, and the last answer
    family                              "VERSION HEADER GROUP..." of the family

The answer is ``ok``, or ``ERRNO TEXT`` with the kernel's explanation.
"""

import errno
import select
import socket
import struct
import sys
from collections.abc import Iterator

# The family, by its description.
FAMILY, GROUP, VERSION = "DETOUR", "detour_req", 1
ECHO, ADD, DEL, REQ = 1, 2, 3, 4
DETOUR_IP, DETOUR_PORT, REMOTE_IP, REMOTE_PORT, IFNAME = 1, 2, 3, 4, 5

# linux/netlink.h, linux/genetlink.h
GENERIC, SOL_NETLINK, ADD_MEMBERSHIP, EXT_ACK = 16, 270, 1, 11
REQUEST, ACK, CAPPED, ACK_TLVS = 0x1, 0x4, 0x100, 0x200
ERROR, ERROR_TEXT = 2, 1
CONTROLLER, GET_FAMILY = 16, 3
FAMILY_ID, FAMILY_NAME, FAMILY_VERSION, FAMILY_HEADER, FAMILY_GROUPS = 1, 2, 3, 4, 7
GROUP_NAME, GROUP_ID = 1, 2

Attributes = dict[int, bytes]


class Refused(Exception):  # noqa: N818 - an answer, not a fault
    def __init__(self, number: int, text: str) -> None:
        super().__init__(f"{errno.errorcode.get(number, number)} {text}".rstrip())


class Client:
    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, GENERIC)
        self.socket.setsockopt(SOL_NETLINK, EXT_ACK, 1)
        self.socket.bind((0, 0))
        self.sequence = 0
        name = attribute(FAMILY_NAME, FAMILY.encode() + b"\0")
        answer = self.ask(CONTROLLER, struct.pack("=BBH", GET_FAMILY, 1, 0) + name, ACK)
        self.about = parse(answer[4:])
        self.family, = struct.unpack("=H", self.about[FAMILY_ID])
        self.groups = {}
        for each in parse(self.about.get(FAMILY_GROUPS, b"")).values():
            group = parse(each)
            self.groups[text(group[GROUP_NAME])], = struct.unpack("=I", group[GROUP_ID])

    def command(self, command: int, attributes: list[tuple[int, bytes]]) -> None:
        self.ask(self.family, struct.pack("=BBH", command, VERSION, 0) +
                 b"".join(attribute(*each) for each in attributes), ACK)

    def ask(self, kind: int, body: bytes, flags: int) -> bytes:
        """Send a message, and give what was answered to it, without header."""
        self.sequence += 1
        self.socket.send(struct.pack("=IHHII", 16 + len(body), kind, REQUEST | flags,
                                     self.sequence, 0) + body)
        return self.answer()

    def answer(self) -> bytes:
        got = b""
        while True:
            for kind, flags, sequence, body in messages(self.socket.recv(1 << 16)):
                if sequence != self.sequence:
                    continue
                if kind != ERROR:
                    got = body
                    continue
                number = -struct.unpack_from("=i", body)[0]
                if not number:
                    return got
                # The text stands behind our message, or its header only.
                start = 4 + (16 if flags & CAPPED else struct.unpack_from("=I", body, 4)[0])
                rest = parse(body[start + -start % 4:]) if flags & ACK_TLVS else {}
                raise Refused(number, text(rest.get(ERROR_TEXT, b"")))

    def hear(self, seconds: float) -> str:
        """The next request for detours."""
        while select.select([self.socket], [], [], seconds)[0]:
            for kind, _, _, body in messages(self.socket.recv(1 << 16)):
                if kind == self.family and body[0] == REQ:
                    given = parse(body[4:])
                    port, = struct.unpack("!H", given[REMOTE_PORT])
                    return f"req {socket.inet_ntoa(given[REMOTE_IP])} {port}"
        return "nothing"


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def parse(data: bytes) -> Attributes:
    found, at = {}, 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        found[kind & 0x3FFF] = data[at + 4:at + length]
        at += length + -length % 4
    return found


def messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    at = 0
    while at + 16 <= len(data):
        length, kind, flags, sequence, _ = struct.unpack_from("=IHHII", data, at)
        yield kind, flags, sequence, data[at + 16:at + length]
        at += length + -length % 4


def text(data: bytes) -> str:
    return data.rstrip(b"\0").decode()


def entry(words: list[str]) -> list[tuple[int, bytes]]:
    if len(words) == 1:
        return [(IFNAME, words[0].encode() + b"\0")]
    detour, detour_port, remote, remote_port = words
    return [(DETOUR_IP, socket.inet_aton(detour)),
            (DETOUR_PORT, struct.pack("!H", int(detour_port))),
            (REMOTE_IP, socket.inet_aton(remote)),
            (REMOTE_PORT, struct.pack("!H", int(remote_port)))]


def fill(client: Client, count: int, remote: str, port: int) -> str:
    for number in range(count):
        try:
            client.command(ADD, entry([f"10.{number >> 8}.{number & 255}.77", "5000", remote,
                                       str(port + number // 64)]))
        except Refused as answer:
            return f"{number} {answer}"
    return f"{count} ok"


def do(client: Client, words: list[str]) -> str:
    match words:
        case ["add", *name]:
            client.command(ADD, entry(name))
        case ["del", *name]:
            client.command(DEL, entry(name))
        case ["echo"]:
            client.command(ECHO, [])
        case ["join"]:
            client.socket.setsockopt(SOL_NETLINK, ADD_MEMBERSHIP, client.groups[GROUP])
        case ["hear", seconds]:
            return client.hear(float(seconds))
        case ["send", command, *attributes]:
            pairs = [each.split(":") for each in attributes]
            client.command(int(command), [(int(kind), bytes.fromhex(value))
                                          for kind, value in pairs])
        case ["bytes", data]:
            client.ask(client.family, bytes.fromhex(data), ACK)
        case ["fill", count, remote, port]:
            return fill(client, int(count), remote, int(port))
        case ["family"]:
            version, header = (struct.unpack("=I", client.about[each])[0]
                               for each in (FAMILY_VERSION, FAMILY_HEADER))
            return f"{version} {header} {' '.join(client.groups)}"
        case _:
            return f"what is {words}?"
    return "ok"


def main() -> None:
    client = Client()
    for line in sys.stdin:
        if words := line.split():
            try:
                answer = do(client, words)
            except Refused as refusal:
                answer = str(refusal)
            except OSError as error:
                answer = f"{errno.errorcode[error.errno or 0]} {error.strerror}"
            print(answer, flush=True)


if __name__ == "__main__":
    main()
