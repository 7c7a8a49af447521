# SPDX-License-Identifier: GPL-2.0-or-later
"""The wire: golden bytes, and that nothing a stranger sends does more than raise."""

from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detour_tools import mproxy
from detour_tools.endpoint import Endpoint
from detour_tools.mproxy import MalformedMessageError, v1

PORTS = st.integers(0, 65535)
REMOTES = st.builds(Endpoint, st.ip_addresses(v=4), PORTS)

# A request for 130.104.230.45:80 that proposes port 80, and the answer 49152.
REQUEST = bytes.fromhex("01 00 0000 8268e62d 0050 0050")
RESPONSE = bytes.fromhex("01 01 0000 8268e62d 0050 c000")
REMOTE = Endpoint(IPv4Address("130.104.230.45"), 80)


def test_golden_bytes():
    assert v1.encode(v1.Request(REMOTE, 80)) == REQUEST
    assert v1.encode(v1.Response(REMOTE, 49152)) == RESPONSE
    assert mproxy.decode(REQUEST) == v1.Request(REMOTE, 80)
    assert mproxy.decode(RESPONSE) == v1.Response(REMOTE, 49152)


def test_facts_of_the_protocol():
    assert mproxy.PORT == 45672
    assert v1.LENGTH == len(REQUEST) == 12
    assert mproxy.MAX_DATAGRAM >= v1.LENGTH


@given(REMOTES, PORTS, st.sampled_from([v1.Request, v1.Response]))
def test_what_is_encoded_decodes_to_the_same(remote, port, kind):
    message = kind(remote, port)
    assert mproxy.decode(v1.encode(message)) == message


@given(st.binary(min_size=2, max_size=2))
def test_the_reserved_field_is_ignored(reserved):
    assert mproxy.decode(REQUEST[:2] + reserved + REQUEST[4:]) == v1.Request(REMOTE, 80)


@pytest.mark.parametrize(("datagram", "words"), [
    (b"", "empty"),
    (REQUEST[:-1], "11 bytes"),
    (REQUEST + b"\0", "13 bytes"),
    (b"\x02" + REQUEST[1:], "version 2"),
    (b"\x00" + REQUEST[1:], "version 0"),
    (b"\x01\x02" + REQUEST[2:], "op 2"),
])
def test_what_is_no_message(datagram, words):
    with pytest.raises(MalformedMessageError, match=words):
        mproxy.decode(datagram)


@given(st.binary(max_size=600))
def test_anything_decodes_or_is_malformed(datagram):
    try:
        message = mproxy.decode(datagram)
    except MalformedMessageError:
        return
    again = v1.encode(message)
    assert again[:2] + again[4:] == datagram[:2] + datagram[4:]


@given(st.integers(0, 11), st.integers(0, 7))
def test_one_flipped_bit_never_passes_for_the_same_request(position, bit):
    mutated = bytearray(REQUEST)
    mutated[position] ^= 1 << bit
    try:
        message = mproxy.decode(bytes(mutated))
    except MalformedMessageError:
        return
    assert message != v1.Request(REMOTE, 80) or position in (2, 3)
