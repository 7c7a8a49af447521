# SPDX-License-Identifier: GPL-2.0-or-later
"""Netlink sockets: one request at a time, or a group's notifications."""

import errno
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from detour_tools.netlink import codec

NETLINK_ROUTE = 0
NETLINK_GENERIC = 16
NETLINK_SOCK_DIAG = 4
NETLINK_NETFILTER = 12

_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP = 1
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11
_SO_RCVBUFFORCE = 33

# Each socket keeps a buffer: to allocate this much for every small answer takes longer than the
# kernel takes to give it.
_RECEIVE = 1 << 18

_HEADER = struct.Struct("=IHHI")  # of struct nlmsghdr: length, type, flags, sequence
_GENL_HEADER = struct.Struct("=BBH")
_GENL_ID_CTRL = 16
_CTRL_CMD_GETFAMILY = 3
_CTRL_ATTR_FAMILY_ID = 1
_CTRL_ATTR_FAMILY_NAME = 2
_CTRL_ATTR_MCAST_GROUPS = 7
_CTRL_ATTR_MCAST_GRP_NAME = 1
_CTRL_ATTR_MCAST_GRP_ID = 2


class NetlinkSocket:
    """A socket for requests; the kernel does the work within ``send``, so answers do not wait."""

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC,
                                     protocol)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        self._socket.bind((0, 0))
        self._sequence = 0
        # Kept, as making room for a dump would cost more than most requests.
        self._buffer = memoryview(bytearray(_RECEIVE))

    def fileno(self) -> int:
        """The file descriptor, for an event loop."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def request(self, kind: int, payload: bytes, *, dump: bool = False) -> list[codec.Message]:
        """Send a request and return the answers; raises codec.NetlinkError."""
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        flags = codec.NLM_F_REQUEST | (codec.NLM_F_DUMP if dump else codec.NLM_F_ACK)
        self._socket.send(codec.message(kind, flags, self._sequence, payload))
        answers: list[codec.Message] = []
        while True:
            for answer in codec.messages(self._receive()):
                if answer.sequence != self._sequence:
                    continue
                if answer.type in (codec.NLMSG_ERROR, codec.NLMSG_DONE):
                    error = codec.error_of(answer)
                    if error is not None:
                        raise error
                    return answers
                answers.append(answer)

    def dump(self, kind: int, payload: bytes) -> Iterator[tuple[memoryview, int, int]]:
        """The answers to a dump as they come: the buffer, and where in it each starts and ends.

        For dumps of very many entries, of which no objects are made; what the buffer holds is
        others' at the next step. To be read to its end. Raises codec.NetlinkError.
        """
        sequence = self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        self._socket.send(codec.message(kind, codec.NLM_F_REQUEST | codec.NLM_F_DUMP, sequence,
                                        payload))
        buffer, unpack = self._buffer, _HEADER.unpack_from
        ends = (codec.NLMSG_ERROR, codec.NLMSG_DONE)
        while True:
            size = self._socket.recv_into(buffer)
            offset = 0
            while offset + 16 <= size:
                length, answered, _, number = unpack(buffer, offset)
                end = offset + length
                if length < 16 or end > size:
                    break
                if number == sequence:
                    if answered in ends:
                        found = next(codec.messages(bytes(buffer[offset:end])))
                        error = codec.error_of(found)
                        if error is not None:
                            raise error
                        return
                    yield buffer, offset, end
                offset = (end + 3) & ~3

    def _receive(self, flags: int = 0) -> bytes:
        return bytes(self._buffer[:self._socket.recv_into(self._buffer, 0, flags)])


class GenericFamily(NamedTuple):
    """A generic netlink family as the running kernel numbered it."""

    id: int
    groups: dict[str, int]


class GenericNetlink(NetlinkSocket):
    """Commands of one generic netlink family."""

    def __init__(self, family_name: str, version: int = 1) -> None:
        """Resolve the family; raises codec.NetlinkError (ENOENT) when the kernel has none."""
        super().__init__(NETLINK_GENERIC)
        self._version = version
        try:
            self.family = self._resolve(family_name)
        except OSError:
            self.close()
            raise

    def command(self, command: int, *attributes: bytes, dump: bool = False
                ) -> list[dict[int, bytes]]:
        """Run a command; the answers' attributes. Raises codec.NetlinkError."""
        payload = _GENL_HEADER.pack(command, self._version, 0) + b"".join(attributes)
        return [codec.attributes(answer.payload[_GENL_HEADER.size:])
                for answer in self.request(self.family.id, payload, dump=dump)]

    def _resolve(self, name: str) -> GenericFamily:
        payload = _GENL_HEADER.pack(_CTRL_CMD_GETFAMILY, 1, 0) + codec.attribute(
            _CTRL_ATTR_FAMILY_NAME, name.encode() + b"\0")
        answers = self.request(_GENL_ID_CTRL, payload)
        if not answers:
            raise codec.NetlinkError(errno.ENOENT)
        found = codec.attributes(answers[0].payload[_GENL_HEADER.size:])
        groups = {}
        for entry in codec.attributes(found.get(_CTRL_ATTR_MCAST_GROUPS, b"")).values():
            group = codec.attributes(entry)
            group_name = group[_CTRL_ATTR_MCAST_GRP_NAME].rstrip(b"\0").decode()
            groups[group_name] = struct.unpack("=I", group[_CTRL_ATTR_MCAST_GRP_ID])[0]
        return GenericFamily(struct.unpack("=H", found[_CTRL_ATTR_FAMILY_ID])[0], groups)


class Notification(NamedTuple):
    """What the kernel told a multicast group; ``family`` is the number of the group's family."""

    family: int
    command: int
    attributes: dict[int, bytes]


class GroupListener:
    """Notifications of multicast groups in the order they were sent, without blocking."""

    def __init__(self, receive_buffer: int, *groups: int) -> None:
        """Join the groups; ``receive_buffer`` in bytes, beyond the usual limit for root."""
        self._socket = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_GENERIC)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, receive_buffer)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._socket.bind((0, 0))
        try:
            for group in groups:
                self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
        except OSError:
            self.close()
            raise
        self._buffer = memoryview(bytearray(_RECEIVE))

    def fileno(self) -> int:
        """The file descriptor, for an event loop."""
        return self._socket.fileno()

    def close(self) -> None:
        """Leave the groups."""
        self._socket.close()

    def receive(self) -> list[Notification] | None:
        """Pending notifications of one datagram.

        None when nothing is pending. Raises OSError with ENOBUFS when notifications were lost.
        Only the kernel is believed: what another process sends is left out.
        """
        try:
            length, (sender, _) = self._socket.recvfrom_into(self._buffer)
        except BlockingIOError:
            return None
        if sender != 0:
            return []
        data = bytes(self._buffer[:length])
        return [Notification(found.type, found.payload[0],
                             codec.attributes(found.payload[_GENL_HEADER.size:]))
                for found in codec.messages(data) if len(found.payload) >= _GENL_HEADER.size]
