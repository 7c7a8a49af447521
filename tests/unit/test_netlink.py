# SPDX-License-Identifier: GPL-2.0-or-later
"""Netlink bytes, against what the kernel itself was seen to send (Linux 6.18)."""

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detour_tools.endpoint import parse_endpoint
from detour_tools.netlink import codec
from detour_tools.pathmanager.base import (
    ConnectionClosed,
    ConnectionCreated,
    ConnectionEstablished,
    SubflowClosed,
    SubflowEstablished,
)
from detour_tools.pathmanager.codec import decode_event, subflow_create

# attribute: value, as hex
CREATED = {1: "19c0d2d5", 2: "0200", 5: "0a090101", 7: "0a090202", 9: "8c6e", 10: "1389",
           3: "00", 4: "00"}
JOINED = {1: "19c0d2d5", 2: "0200", 5: "0a090101", 7: "0a090102", 9: "a7a3", 10: "138a",
          3: "00", 4: "00", 11: "00"}
DUAL_STACK = {1: "d9efa365", 2: "0a00", 6: "00000000000000000000ffff0a090101",
              8: "00000000000000000000ffff0a090202", 9: "81ec", 10: "1389"}

LOCAL = parse_endpoint("10.9.1.1:35950")
SERVER = parse_endpoint("10.9.2.2:5001")
DETOUR = parse_endpoint("10.9.1.2:5002")
JOIN_LOCAL = parse_endpoint("10.9.1.1:42915")
TOKEN = 0xD5D2C019


def event(command, attributes, **more):
    values = {kind: bytes.fromhex(value) for kind, value in attributes.items()}
    return decode_event(command, values | {int(k[1:]): v for k, v in more.items()})


def test_events_as_the_kernel_sends_them():
    assert event(1, CREATED) == ConnectionCreated(TOKEN, LOCAL, SERVER)
    assert event(2, CREATED) == ConnectionEstablished(TOKEN, LOCAL, SERVER)
    assert event(3, {1: "19c0d2d5"}) == ConnectionClosed(TOKEN)
    assert event(10, JOINED) == SubflowEstablished(TOKEN, JOIN_LOCAL, DETOUR)
    assert event(11, JOINED, a12=b"\x6f") == SubflowClosed(
        TOKEN, JOIN_LOCAL, DETOUR, errno.ECONNREFUSED)
    assert event(11, JOINED, a16=struct.pack("=I", 3)) == SubflowClosed(
        TOKEN, JOIN_LOCAL, DETOUR, 0, 3)


def test_flags_of_both_spellings():
    assert event(1, CREATED, a13=b"\x01\x00").deny_join
    assert event(1, CREATED, a13=b"\x02\x00").server_side
    assert event(1, CREATED, a18=b"\x01").server_side
    assert not event(1, CREATED, a18=b"\x00").server_side


def test_a_dual_stack_sockets_addresses_are_ipv4():
    created = event(1, DUAL_STACK)
    assert str(created.local) == "10.9.1.1:33260"
    assert created.remote == SERVER


@pytest.mark.parametrize("missing", [1, 5, 7, 9, 10])
def test_an_event_lacking_a_part_is_no_event(missing):
    assert event(1, {k: v for k, v in CREATED.items() if k != missing}) is None


@given(st.integers(0, 255), st.dictionaries(st.integers(0, 30), st.binary(max_size=20)))
def test_no_attributes_make_the_decoder_fail(command, attributes):
    decode_event(command, attributes)


def test_subflow_create_bytes():
    assert subflow_create(TOKEN, LOCAL.address, 0, DETOUR).hex(" ", 4) == (
        "08000400 19c0d2d5 "
        "1c000180 06000100 02000000 08000300 0a090101 05000200 00000000 "
        "1c000680 06000100 02000000 08000300 0a090102 06000500 8a130000")


def test_ipv6_addresses_are_encoded_as_such():
    v6 = parse_endpoint("[2001:db8::2]:443")
    assert bytes.fromhex("20010db8000000000000000000000002") in subflow_create(
        1, parse_endpoint("[2001:db8::1]:1").address, 0, v6)


@given(st.lists(st.tuples(st.integers(1, 0x3FFF), st.binary(max_size=40)),
                unique_by=lambda pair: pair[0]))
def test_attributes_round_trip(pairs):
    data = b"".join(codec.attribute(kind, value) for kind, value in pairs)
    assert codec.attributes(data) == dict(pairs)


@given(st.binary(max_size=200))
def test_no_bytes_make_the_parsers_fail(data):
    codec.attributes(data)
    for message in codec.messages(data):
        codec.error_of(message)


def test_messages_round_trip():
    data = codec.message(28, 5, 7, b"abcd") + codec.message(29, 1, 8, b"")
    assert [(m.type, m.flags, m.sequence, m.payload) for m in codec.messages(data)] == [
        (28, 5, 7, b"abcd"), (29, 1, 8, b"")]


def test_errors_carry_the_kernels_words():
    request = codec.message(28, 5, 7, b"")
    payload = struct.pack("=i", -errno.EINVAL) + request + codec.attribute(1, b"bad token\0")
    flags = codec.NLM_F_ACK_TLVS | codec.NLM_F_CAPPED
    error = codec.error_of(codec.Message(codec.NLMSG_ERROR, flags, 7, 0, payload))
    assert error.errno == errno.EINVAL
    assert error.strerror == "bad token"
    done = codec.Message(codec.NLMSG_ERROR, 0, 7, 0, struct.pack("=i", 0) + request)
    assert codec.error_of(done) is None
