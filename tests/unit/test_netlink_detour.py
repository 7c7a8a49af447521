# SPDX-License-Identifier: GPL-2.0-or-later
"""Bytes of the DETOUR family, as docs/protocols.md has them."""

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detour_tools.endpoint import parse_endpoint
from detour_tools.netlink import codec
from detour_tools.pathmanager.detour_codec import (
    Entry,
    MalformedDetourMessageError,
    NatName,
    Stats,
    VpnName,
    decode_entry,
    decode_request,
    encode_name,
)

V4 = NatName(parse_endpoint("192.168.0.2:80"), parse_endpoint("130.104.230.45:8080"))
V6 = NatName(parse_endpoint("[2001:db8::2]:443"), parse_endpoint("[2001:db8::3]:443"))


def test_the_name_of_a_nat_entry():
    assert encode_name(V4).hex(" ", 4) == (
        "08000100 c0a80002 06000200 00500000 08000300 8268e62d 06000400 1f900000")


def test_the_name_of_an_ipv6_entry_with_a_lifetime():
    assert encode_name(V6, 600).hex(" ", 4) == (
        "14000600 20010db8 00000000 00000000 00000002 06000200 01bb0000 "
        "14000700 20010db8 00000000 00000000 00000003 06000400 01bb0000 "
        "08000800 58020000")


def test_the_name_of_a_vpn_entry():
    assert encode_name(VpnName("tun0")).hex(" ", 4) == "09000500 74756e30 00000000"
    assert encode_name(VpnName("x" * 15)) == codec.attribute(5, b"x" * 15 + b"\0")


@pytest.mark.parametrize("lifetime", [None, 0])
def test_no_lifetime_is_for_ever(lifetime):
    assert encode_name(V4, lifetime) == encode_name(V4)


@pytest.mark.parametrize(("name", "lifetime"), [
    (VpnName(""), None),
    (VpnName("x" * 16), None),
    (VpnName("ä" * 8), None),
    (VpnName("a\0b"), None),
    (NatName(V4.detour, V6.remote), None),
    (V4, 1 << 32),
    (V4, -1),
])
def test_what_cannot_be_an_entry(name, lifetime):
    with pytest.raises(MalformedDetourMessageError):
        encode_name(name, lifetime)


def test_requests():
    assert decode_request({3: bytes([10, 0, 3, 2]), 4: b"\x00\x50"}) == parse_endpoint(
        "10.0.3.2:80")
    assert decode_request({7: V6.remote.address.packed, 4: b"\x01\xbb"}) == V6.remote


def test_entries():
    assert decode_entry(codec.attributes(encode_name(V4))) == Entry(V4, None, None)
    assert decode_entry(codec.attributes(encode_name(V6, 7))) == Entry(V6, 7, None)
    assert decode_entry({5: b"tun0\0"}) == Entry(VpnName("tun0"), None, None)
    assert decode_entry({5: b"tun0"}).name == VpnName("tun0")


def test_figures():
    stats = b"".join((codec.attribute(1, struct.pack("=I", 3)),
                      codec.attribute(2, struct.pack("=I", 2)),
                      codec.attribute(3, struct.pack("=I", 1)),
                      codec.attribute(7, b""),  # the kernel aligns eight bytes with such
                      codec.attribute(4, struct.pack("=Q", 1 << 40)),
                      codec.attribute(7, b""),
                      codec.attribute(5, struct.pack("=Q", 99))))
    entry = decode_entry(codec.attributes(encode_name(V4) + codec.attribute(9, stats)))
    assert entry.stats == Stats(3, 2, 1, 1 << 40, 99, None)
    stats += codec.attribute(6, struct.pack("=I", 20_500))
    entry = decode_entry(codec.attributes(encode_name(V4) + codec.nested(9, stats)))
    assert entry.stats.srtt_us == 20_500


@pytest.mark.parametrize("attributes", [
    {},
    {3: b"\0\0\0", 4: b"\0\x50"},
    {3: b"\0\0\0\1", 4: b"\0\0\x50"},
    {3: b"\0\0\0\1"},
    {7: b"\0" * 4, 4: b"\0\x50"},
])
def test_a_damaged_request(attributes):
    with pytest.raises(MalformedDetourMessageError):
        decode_request(attributes)


@pytest.mark.parametrize("missing", [1, 2, 3, 4])
def test_an_entry_lacking_a_part(missing):
    attributes = codec.attributes(encode_name(V4))
    del attributes[missing]
    with pytest.raises(MalformedDetourMessageError):
        decode_entry(attributes)


@pytest.mark.parametrize("more", [
    {5: b""}, {5: b"\0tun"}, {5: b"x" * 16}, {8: b"\0"}, {9: b""}, {9: codec.attribute(1, b"\0")}])
def test_an_entry_with_a_damaged_part(more):
    with pytest.raises(MalformedDetourMessageError):
        decode_entry(codec.attributes(encode_name(V4)) | more)


@given(st.dictionaries(st.integers(0, 12), st.one_of(
    st.binary(max_size=20), st.binary(min_size=4, max_size=4), st.binary(min_size=2, max_size=2))))
def test_no_attributes_make_the_decoders_fail_otherwise(attributes):
    for decode in (decode_entry, decode_request):
        with contextlib.suppress(MalformedDetourMessageError):
            decode(attributes)


_v4 = st.builds(lambda address, port: parse_endpoint(f"{address}:{port}"),
                st.ip_addresses(v=4), st.integers(1, 65535))
_v6 = st.builds(lambda address, port: parse_endpoint(f"[{address}]:{port}"),
                st.ip_addresses(v=6), st.integers(1, 65535))


@given(st.one_of(st.builds(NatName, _v4, _v4), st.builds(NatName, _v6, _v6),
                 st.builds(VpnName, st.text("abc0.-", min_size=1, max_size=15))),
       st.one_of(st.none(), st.integers(1, (1 << 32) - 1)))
def test_entries_round_trip(name, lifetime):
    assert decode_entry(codec.attributes(encode_name(name, lifetime))) == Entry(
        name, lifetime, None)
