# SPDX-License-Identifier: GPL-2.0-or-later
"""nf_tables by hand (include/uapi/linux/netfilter/nf_tables.h): elements, and what stands.

libnftables takes elements as text and gives them as JSON, a hundred times as dear as the kernel's
own work on them, and reads every element of every set to answer what needs no look at any.
"""

import contextlib
import errno
import hashlib
import socket
import struct
import sys
from collections.abc import Iterator, Sequence

from detour_tools.netlink import codec
from detour_tools.netlink.socket import NETLINK_NETFILTER, NetlinkSocket

_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
_GETTABLE = _SUBSYSTEM << 8 | 1
_GETCHAIN = _SUBSYSTEM << 8 | 4
_GETRULE = _SUBSYSTEM << 8 | 7
_GETSET = _SUBSYSTEM << 8 | 10
_NEWSETELEM = _SUBSYSTEM << 8 | 12
_GETSETELEM = _SUBSYSTEM << 8 | 13
_DELSETELEM = _SUBSYSTEM << 8 | 14
_GETGEN = _SUBSYSTEM << 8 | 16
_GETOBJ = _SUBSYSTEM << 8 | 19
_BATCH_BEGIN = 0x10  # NFNL_MSG_BATCH_BEGIN, of include/uapi/linux/netfilter/nfnetlink.h
_BATCH_END = 0x11
_NLM_F_CREATE = 0x400
_NFGENMSG_ANY = struct.pack("=BBH", 0, 0, 0)
_NFGENMSG_IPV4 = struct.pack("=BBH", 2, 0, 0)
_NFGENMSG_BATCH = struct.pack("!BBH", 0, 0, _SUBSYSTEM)
_MESSAGE = 16  # struct nlmsghdr
_NFTA_TABLE_NAME = 1
_NFTA_TABLE_HANDLE = 4
_NFTA_GEN_ID = 1
_NFTA_OBJ_NAME = 2
_NFTA_OBJ_TYPE = 3
_NFTA_OBJ_DATA = 4
_NFT_OBJECT_COUNTER = struct.pack(">I", 1)
_NFTA_COUNTER_PACKETS = 2
_NFTA_CHAIN_COUNTERS = 8
_NFTA_RULE_EXPRESSIONS = 4
_NFTA_EXPR_NAME = 1
_NFTA_SET_COUNT = 20
# NFTA_CHAIN_TABLE, NFTA_RULE_TABLE, NFTA_SET_TABLE, NFTA_SET_ELEM_LIST_TABLE, NFTA_OBJ_TABLE
_TABLE = 1
_NFTA_SET_ELEM_LIST_SET = 2
_NFTA_SET_ELEM_LIST_ELEMENTS = 3
_NFTA_LIST_ELEM = 1
_NFTA_SET_ELEM_KEY = 1
_NFTA_SET_ELEM_DATA = 2
_NFTA_DATA_VALUE = 1
# What of a chain and of a set changes by itself.
_VOLATILE = {_GETCHAIN: _NFTA_CHAIN_COUNTERS, _GETSET: _NFTA_SET_COUNT}
# Expressions that hold a state.
_STATEFUL = (b"counter\0", b"quota\0", b"last\0", b"limit\0", b"connlimit\0")
_SO_SNDBUFFORCE = 32
_SEND_BUFFER = 4 << 20
# Of a message: an attribute's length is 16 bits.
_ELEMENTS_A_MESSAGE = 1000


# An element's key, and the data it is mapped to (empty in a set that is no map).
Element = tuple[bytes, bytes]

class NfTables(NetlinkSocket):
    """This network namespace's nf_tables. Making one raises OSError where the kernel has none."""

    def __init__(self) -> None:
        super().__init__(NETLINK_NETFILTER)

    def table_handle(self, name: str) -> bytes | None:
        """The handle of an IPv4 table, another one when it was made anew; None: no such."""
        request = _NFGENMSG_IPV4 + _text(_NFTA_TABLE_NAME, name)
        try:
            answers = self.request(_GETTABLE, request)
        except OSError:
            return None
        return codec.attributes(answers[0].payload[4:]).get(_NFTA_TABLE_HANDLE, b"")

    def counted(self, table: str, name: str) -> int:
        """The packets that a named counter of an IPv4 table has counted. Raises OSError."""
        request = (_NFGENMSG_IPV4 + _text(_TABLE, table) + _text(_NFTA_OBJ_NAME, name)
                   + codec.attribute(_NFTA_OBJ_TYPE, _NFT_OBJECT_COUNTER))
        answers = self.request(_GETOBJ, request)
        data = codec.attributes(answers[0].payload[4:])[_NFTA_OBJ_DATA]
        return int.from_bytes(codec.attributes(data)[_NFTA_COUNTER_PACKETS], "big")

    def generation(self) -> int:
        """A number that changes with every change of any rule or set. Raises OSError."""
        answers = self.request(_GETGEN, _NFGENMSG_ANY)
        found = codec.attributes(answers[0].payload[4:])
        return int.from_bytes(found[_NFTA_GEN_ID], "big")

    def elements(self, table: str, name: str) -> list[bytes]:
        """The elements of an IPv4 table's set or map: the key and, of a map, the data behind it.

        Raises OSError.
        """
        question = _NFGENMSG_IPV4 + _text(_TABLE, table) + _text(_NFTA_SET_ELEM_LIST_SET, name)
        elements: list[bytes] = []
        for buffer, start, end in self.dump(_GETSETELEM, question):
            found = codec.attributes(bytes(buffer[start + _MESSAGE + len(_NFGENMSG_IPV4):end]))
            elements += _read_elements(found.get(_NFTA_SET_ELEM_LIST_ELEMENTS, b""))
        return elements

    def change(self, table: str, remove: dict[str, Sequence[Element]],
               add: dict[str, Sequence[Element]]) -> None:
        """Remove, then add elements of sets (by name) in one transaction. Raises OSError."""
        messages = [*_element_messages(_DELSETELEM, 0, table, remove),
                    *_element_messages(_NEWSETELEM, _NLM_F_CREATE, table, add)]
        if not messages:
            return
        with contextlib.suppress(PermissionError):
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BUFFER)
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        request = [codec.message(_BATCH_BEGIN, codec.NLM_F_REQUEST, self._sequence,
                                 _NFGENMSG_BATCH)]
        for number, (kind, flags, payload) in enumerate(messages, 1):
            if number == len(messages):
                flags |= codec.NLM_F_ACK  # noqa: PLW2901 - the last one answers for all
            request.append(codec.message(kind, codec.NLM_F_REQUEST | flags, self._sequence,
                                         payload))
        request.append(codec.message(_BATCH_END, codec.NLM_F_REQUEST, self._sequence,
                                     _NFGENMSG_BATCH))
        self._socket.send(b"".join(request))
        # A refusal is told of each message that is refused, and the last one is acknowledged in
        # any case: all of it waits when the kernel is done with the batch.
        answers = 0
        errors: list[OSError] = []
        with contextlib.suppress(BlockingIOError):
            while True:
                for answer in codec.messages(self._receive(socket.MSG_DONTWAIT)):
                    if answer.sequence == self._sequence and answer.type == codec.NLMSG_ERROR:
                        answers += 1
                        error = codec.error_of(answer)
                        errors += [error] if error else []
        if errors:
            raise errors[0]
        if not answers:
            raise codec.NetlinkError(errno.EPROTO)

    def digest(self, table: str) -> bytes | None:
        """Tells an IPv4 table from any other, and from itself once it was changed; None: no such.

        Its chains, rules and sets, by their handles too, but no elements and no counters.
        Raises OSError.
        """
        sought = table.encode() + b"\0"
        found = hashlib.sha256()
        try:
            answers = self.request(_GETTABLE, _NFGENMSG_IPV4 + _text(_NFTA_TABLE_NAME, table))
        except FileNotFoundError:
            return None
        found.update(answers[0].payload[len(_NFGENMSG_IPV4):])
        for kind in (_GETCHAIN, _GETRULE, _GETSET):
            for buffer, start, end in self.dump(kind, _NFGENMSG_IPV4 + _text(_TABLE, table)):
                attributes = codec.attributes(
                    bytes(buffer[start + _MESSAGE + len(_NFGENMSG_IPV4):end]))
                # Kernels differ in whether they leave out others' themselves.
                if attributes.get(_TABLE) == sought:
                    attributes.pop(_VOLATILE.get(kind, 0), None)
                    if kind == _GETRULE:
                        attributes[_NFTA_RULE_EXPRESSIONS] = _stateless(
                            attributes.get(_NFTA_RULE_EXPRESSIONS, b""))
                    found.update(repr((kind, sorted(attributes.items()))).encode())
        return found.digest()


def _text(kind: int, text: str) -> bytes:
    return codec.attribute(kind, text.encode() + b"\0")


def _value(kind: int, value: bytes) -> bytes:
    return codec.nested(kind, codec.attribute(_NFTA_DATA_VALUE, value))


def _element(element: Element) -> bytes:
    key, data = element
    return codec.nested(_NFTA_LIST_ELEM, _value(_NFTA_SET_ELEM_KEY, key),
                        _value(_NFTA_SET_ELEM_DATA, data) if data else b"")


def _template(element: Element) -> tuple[bytes, bytes]:
    """What stands before the key and before the data of elements of the same size."""
    whole = _element(element)
    key, data = element
    head = len(whole) - len(key) - len(data) - (8 if data else 0)
    return whole[:head], whole[head + len(key):len(whole) - len(data)]


def _element_messages(kind: int, flags: int, table: str, sets: dict[str, Sequence[Element]]
                      ) -> Iterator[tuple[int, int, bytes]]:
    for name, elements in sets.items():
        if not elements:
            continue
        # All of a set's elements have the size of the first, in whole words.
        head, middle = _template(elements[0])
        for start in range(0, len(elements), _ELEMENTS_A_MESSAGE):
            listed = b"".join([head + key + middle + data for key, data
                               in elements[start:start + _ELEMENTS_A_MESSAGE]])
            yield kind, flags, (
                _NFGENMSG_IPV4 + _text(_TABLE, table) + _text(_NFTA_SET_ELEM_LIST_SET, name)
                + codec.nested(_NFTA_SET_ELEM_LIST_ELEMENTS, listed))


def _read_elements(listed: bytes) -> list[bytes]:
    if not listed:
        return []
    first = listed[:int.from_bytes(listed[:2], sys.byteorder)]
    key, data = next(_read_slowly(first))
    head, middle = map(len, _template((key, data)))  # in whole words, as all lengths here
    size, data_at = len(first), head + len(key) + middle
    # The kernel sets no NLA_F_NESTED, so that what stands between is taken from the first one.
    if (size % 4 == len(listed) % size == 0 and first[head:head + len(key)] == key
            and first[data_at:] == data
            and _repeats(listed, first, 0, head)
            and _repeats(listed, first, head + len(key), data_at)):
        if not data:
            return [each for each, in struct.iter_unpack(f"{head}x{len(key)}s", listed)]
        usual = f"{head}x{len(key)}s{middle}x{len(data)}s"
        return [key + data for key, data in struct.iter_unpack(usual, listed)]
    # There is an element with more to it: a comment, a time-out.
    return [key + data for key, data in _read_slowly(listed)]


def _repeats(listed: bytes, first: bytes, start: int, end: int) -> bool:
    """Whether all elements have from ``start`` to ``end`` what the first one has, in words."""
    words, size = memoryview(listed).cast("I"), len(first)
    return all(bytes(words[at // 4::size // 4]) == first[at:at + 4] * (len(listed) // size)
               for at in range(start, end, 4))


def _read_slowly(listed: bytes) -> Iterator[Element]:
    for _, found in codec.attribute_list(listed):
        element = codec.attributes(found)
        key, data = (codec.attributes(element.get(kind, b"")).get(_NFTA_DATA_VALUE, b"")
                     for kind in (_NFTA_SET_ELEM_KEY, _NFTA_SET_ELEM_DATA))
        yield key, data


def _stateless(expressions: bytes) -> bytes:
    """A rule's expressions without what those that hold a state have counted."""
    kept = []
    for _, expression in codec.attribute_list(expressions):
        name = codec.attributes(expression).get(_NFTA_EXPR_NAME, b"")
        kept.append(name if name in _STATEFUL else expression)
    return repr(kept).encode()
