# SPDX-License-Identifier: GPL-2.0-or-later
"""Legacy iptables rules as bytes; pure.

Packed by hand (include/uapi/linux/netfilter_ipv4/ip_tables.h, .../netfilter/xt_*.h, native byte
order and 64-bit alignment): python-iptables' own Rule takes about a millisecond each, and
redirects the whole process's standard output while it formats one.
"""

import struct
from ipaddress import IPv4Address

from detour_tools.endpoint import Endpoint
from detour_tools.mapping import Mapping
from detour_tools.nat.base import LABEL, Relay

_TCP = 6
_HOST = b"\xff" * 4
_ANY = b"\0" * 4

# struct ipt_ip: src, dst, smsk, dmsk, interfaces and masks, proto, flags, invflags
_IP = struct.Struct("=4s4s4s4s64xHBB")
# struct ipt_entry: the above, nfcache, target_offset, next_offset, comefrom, counters
_ENTRY = struct.Struct("=84sIHHI16x")
# struct xt_entry_match and xt_entry_target: size, name, revision
_EXTENSION = struct.Struct("=H29sB")
# struct xt_tcp: source ports, destination ports, option, flag mask and comparison, invflags
_TCP_MATCH = struct.Struct("=HHHH4B4x")
# struct xt_addrtype_info_v1: source, dest, flags
_ADDRTYPE = struct.Struct("=HHI")
# struct xt_conntrack_mtinfo3: addresses, expiry, l4proto, ports (origsrc, origdst, replsrc,
# repldst), match and invert flags, state and status mask, upper ends of the ports
_CONNTRACK = struct.Struct("=128x8xH4H2H2H4H6x")
# struct xt_connlabel_mtinfo: bit, options
_CONNLABEL = struct.Struct("=HH4x")
# struct xt_connlimit_info: mask, limit, flags
_CONNLIMIT = struct.Struct("=16sII8x")
# struct ipt_reject_info
_REJECT = struct.Struct("=I4x")
# struct nf_nat_range2: flags, min and max address, min, max and base port
_DNAT = struct.Struct("=I4s12x4s12x2s2s2x6x")
# struct nf_nat_ipv4_multi_range_compat: rangesize, flags, min and max address, min and max port
_MASQUERADE = struct.Struct("=II4s4s2s2s4x")

_ADDRTYPE_LOCAL = 1 << 2
_CONNTRACK_STATE = 1 << 0
_CONNTRACK_ORIGDST_PORT = 1 << 9
_STATE_NEW = 1 << 3
_STATE_DNAT = 1 << 7
_TCP_RESET = 7
_FIN, _SYN, _RST, _ACK = 1, 2, 4, 16
_TCPOPT_MPTCP = 30
_TCP_INV_OPTION = 1 << 3
_CONNLABEL_INVERT = 1 << 0
_CONNLABEL_SET = 1 << 1
_NAT_RANGE_MAP_IPS = 1
_NAT_RANGE_PROTO_SPECIFIED = 2

_COUNTERS = struct.Struct("=QQ")      # at 96 in struct ipt_entry: packets and bytes
_TARGET_OFFSET = struct.Struct("=H")  # at 88 in struct ipt_entry


def _extension(name: str, revision: int, payload: bytes) -> bytes:
    return _EXTENSION.pack(_EXTENSION.size + len(payload), name.encode(), revision) + payload


def _rule(*, source: bytes = _ANY, destination: bytes = _ANY, matches: bytes,
          target: bytes, protocol: int = _TCP) -> bytes:
    ip = _IP.pack(source, destination, _HOST if source != _ANY else _ANY,
                  _HOST if destination != _ANY else _ANY, protocol, 0, 0)
    target_offset = _ENTRY.size + len(matches)
    return (_ENTRY.pack(ip, 0, target_offset, target_offset + len(target), 0)
            + matches + target)


def _tcp_to(port: int) -> bytes:
    return _extension("tcp", 0, _TCP_MATCH.pack(0, 0xFFFF, port, port, 0, 0, 0, 0))


_SET_LABEL = _extension("connlabel", 0, _CONNLABEL.pack(LABEL, _CONNLABEL_SET))
_MASQUERADE_TARGET = _extension("MASQUERADE", 0, _MASQUERADE.pack(1, 0, _ANY, _ANY, b"", b""))


def jump_for_local(chain: str, relay: Relay) -> bytes:
    """``-p tcp -m addrtype --dst-type LOCAL -j CHAIN``.

    For joins ``--syn --tcp-option 30``: an MPTCP option of any subtype, as it can tell no more.
    """
    local = _extension("addrtype", 1, _ADDRTYPE.pack(0, _ADDRTYPE_LOCAL, 0))
    return _jump(chain, local if relay == "tcp" else local + _extension("tcp", 0, _TCP_MATCH.pack(
        0, 0xFFFF, 0, 0xFFFF, _TCPOPT_MPTCP, _FIN | _SYN | _RST | _ACK, _SYN, 0)))


def jump_for_mapped(chain: str) -> bytes:
    """``-p tcp -m connlabel --label LABEL -j CHAIN``."""
    return _jump(chain, _extension("connlabel", 0, _CONNLABEL.pack(LABEL, 0)))


def drop_plain() -> bytes:
    """``-p tcp --tcp-flags SYN SYN ! --tcp-option 30 -j DROP``: a SYN or SYN/ACK without MPTCP."""
    return _jump("DROP", _extension("tcp", 0, _TCP_MATCH.pack(
        0, 0xFFFF, 0, 0xFFFF, _TCPOPT_MPTCP, _SYN, _SYN, _TCP_INV_OPTION)))


def jump_for_translated(chain: str) -> bytes:
    """``-p tcp -m conntrack --ctstate DNAT -j CHAIN``."""
    return _jump(chain, _extension("conntrack", 3, _CONNTRACK.pack(
        0, 0, 0, 0, 0, _CONNTRACK_STATE, 0, _STATE_DNAT, 0, 0, 0, 0, 0)))


def jump_for_all(chain: str) -> bytes:
    """``-j CHAIN``, for all protocols."""
    return _jump(chain, b"", protocol=0)


def drop_others() -> bytes:
    """``-m connlabel ! --label LABEL -j DROP``, of any protocol; errors about a flow have it."""
    return _jump("DROP", _extension("connlabel", 0, _CONNLABEL.pack(LABEL, _CONNLABEL_INVERT)),
                 protocol=0)


def refuse_above(flows: int) -> bytes:
    """``-p tcp -m conntrack --ctstate NEW -m connlimit --connlimit-above FLOWS -j REJECT``.

    Of one source address; the client gets a reset.
    """
    new = _extension("conntrack", 3, _CONNTRACK.pack(
        0, 0, 0, 0, 0, _CONNTRACK_STATE, 0, _STATE_NEW, 0, 0, 0, 0, 0))
    above = _extension("connlimit", 1, _CONNLIMIT.pack(_HOST + bytes(12), flows, 0))
    return _rule(matches=new + above, target=_extension("REJECT", 0, _REJECT.pack(_TCP_RESET)))


def packets(rule: bytes) -> int:
    """How many packets a rule has met, as the kernel told it."""
    return int(_COUNTERS.unpack_from(rule, 96)[0])


def _jump(chain: str, match: bytes, protocol: int = _TCP) -> bytes:
    # As long as struct xt_standard_target; libiptc turns the name into a verdict.
    return _rule(protocol=protocol, matches=match, target=_extension(chain, 0, bytes(8)))


def dnat(mapping: Mapping, *, label: bool) -> bytes:
    """``-s CLIENT -p tcp --dport DETOUR-PORT -j DNAT --to-destination REMOTE``.

    With ``-m connlabel --set --label LABEL``, unless the kernel has no labels.
    """
    address = mapping.remote.address.packed
    port = mapping.remote.port.to_bytes(2, "big")
    nat_range = _DNAT.pack(_NAT_RANGE_MAP_IPS | _NAT_RANGE_PROTO_SPECIFIED,
                           address, address, port, port)
    matches = _tcp_to(mapping.detour_port) + (_SET_LABEL if label else b"")
    return _rule(source=mapping.client.packed, matches=matches,
                 target=_extension("DNAT", 2, nat_range))


def masquerade(mapping: Mapping) -> bytes:
    """``-s CLIENT -d REMOTE -p tcp --dport PORT -j MASQUERADE``, for flows to the detour port.

    ``-m conntrack --ctstate DNAT --ctorigdstport DETOUR-PORT`` tells our flows from others of the
    client to the same remote.
    """
    port = mapping.detour_port
    flow = _extension("conntrack", 3, _CONNTRACK.pack(
        0, 0, port, 0, 0, _CONNTRACK_STATE | _CONNTRACK_ORIGDST_PORT, 0, _STATE_DNAT, 0,
        0, port, 0, 0))
    return _rule(source=mapping.client.packed, destination=mapping.remote.address.packed,
                 matches=_tcp_to(mapping.remote.port) + flow, target=_MASQUERADE_TARGET)


def read_dnat(rule: bytes) -> Mapping | None:
    """The mapping of a rule that ``dnat`` made; None for any other rule.

    Not by comparing bytes: the kernel leaves its own in the room behind names.
    """
    if len(rule) not in _DNAT_RULES or _name(rule, _ENTRY.size) != b"tcp":
        return None
    target = _TARGET_OFFSET.unpack_from(rule, 88)[0]
    if target != len(rule) - _EXTENSION.size - _DNAT.size or _name(rule, target) != b"DNAT":
        return None
    detour_port = _TCP_MATCH.unpack_from(rule, _ENTRY.size + _EXTENSION.size)[2]
    _, address, _, port, _ = _DNAT.unpack_from(rule, target + _EXTENSION.size)
    return Mapping(IPv4Address(rule[:4]), detour_port,
                   Endpoint(IPv4Address(address), int.from_bytes(port, "big")))


def _name(rule: bytes, offset: int) -> bytes:
    return bytes(_EXTENSION.unpack_from(rule, offset)[1].partition(b"\0")[0])


_DNAT_RULES = [len(dnat(Mapping(IPv4Address(0), 0, Endpoint(IPv4Address(0), 0)), label=label))
               for label in (True, False)]
