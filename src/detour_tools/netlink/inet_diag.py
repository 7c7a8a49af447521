# SPDX-License-Identifier: GPL-2.0-or-later
"""This network namespace's MPTCP connections and their subflows, from inet_diag.

Sources: include/uapi/linux/inet_diag.h, struct mptcp_info and the MPTCP_SUBFLOW_ATTR_* of
include/uapi/linux/mptcp.h, struct tcp_info of include/uapi/linux/tcp.h. Needs CAP_NET_ADMIN:
without it the kernel does not say to which connection a subflow belongs.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from detour_tools.endpoint import Endpoint, unmapped
from detour_tools.errors import UserError
from detour_tools.netlink import codec
from detour_tools.netlink.socket import NETLINK_SOCK_DIAG, NetlinkSocket

_SOCK_DIAG_BY_FAMILY = 20
_AF_INET = 2
_AF_INET6 = 10
_IPPROTO_TCP = 6
_IPPROTO_MPTCP = 262

_REQ_PROTOCOL = 3
_DIAG_INFO = 2
_DIAG_ULP_INFO = 19
_ULP_INFO_MPTCP = 3
_SUBFLOW_TOKEN_LOC = 2
_SUBFLOW_FLAGS = 8

_FLAG_JOIN_REM = 1 << 2
_FLAG_JOIN_LOC = 1 << 3
_FLAG_FULLY_ESTABLISHED = 1 << 6
_INFO_FLAG_FALLBACK = 1 << 0

_STATES = ("", "established", "syn-sent", "syn-recv", "fin-wait-1", "fin-wait-2", "time-wait",
           "closed", "close-wait", "last-ack", "listening", "closing")
_LISTEN = 10
_ALL_BUT_TIME_WAIT = 0xFFF & ~(1 << 6)

_REQUEST = struct.Struct("=BBBBI48s")
# struct inet_diag_msg: family, state, timer, retrans; sport, dport, src, dst, interface, cookie
_MESSAGE = struct.Struct("=BBBB2s2s16s16sIII5I")
_U32 = struct.Struct("=I")
_U64 = struct.Struct("=Q")

# Offsets in struct tcp_info and struct mptcp_info; both only ever grow at their end.
_TCP_RTT = 68
_TCP_TOTAL_RETRANS = 100
_TCP_BYTES_RECEIVED = 128
_TCP_BYTES_SENT = 200
_MPTCP_FLAGS = 8
_MPTCP_TOKEN = 12


@dataclass(frozen=True, slots=True)
class Subflow:
    """One TCP flow of a connection; ``rtt_ms`` is smoothed, bytes are payload, both ways.

    ``bytes_sent`` counts retransmitted bytes too (RFC 4898).
    """

    local: Endpoint
    remote: Endpoint
    state: str
    joined: bool
    fully_established: bool
    rtt_ms: float
    bytes_sent: int
    bytes_received: int
    retransmissions: int


@dataclass(frozen=True, slots=True)
class Connection:
    """One MPTCP connection. ``passive``: it came in, as far as listening sockets tell."""

    token: int
    local: Endpoint
    remote: Endpoint
    passive: bool
    subflows: tuple[Subflow, ...]

    @property
    def established(self) -> bool:
        """Whether further subflows may be added."""
        return any(subflow.fully_established for subflow in self.subflows)


class InetDiag(NetlinkSocket):
    """Looks at sockets of this network namespace."""

    def __init__(self) -> None:
        super().__init__(NETLINK_SOCK_DIAG)

    def connections(self) -> list[Connection]:
        """The MPTCP connections that are alive and have not fallen back to TCP.

        Raises UserError where the kernel cannot tell.
        """
        subflows: dict[int, list[Subflow]] = {}
        for _, endpoints, attributes in self._dump(_IPPROTO_TCP):
            ulp = codec.attributes(attributes.get(_DIAG_ULP_INFO, b""))
            mptcp = codec.attributes(ulp.get(_ULP_INFO_MPTCP, b""))
            if _SUBFLOW_TOKEN_LOC not in mptcp:
                continue
            flags = _u32(mptcp.get(_SUBFLOW_FLAGS, b""), 0)
            info = attributes.get(_DIAG_INFO, b"")
            subflows.setdefault(_u32(mptcp[_SUBFLOW_TOKEN_LOC], 0), []).append(Subflow(
                *endpoints,
                state=_STATES[info[0]] if info and info[0] < len(_STATES) else "unknown",
                joined=bool(flags & (_FLAG_JOIN_REM | _FLAG_JOIN_LOC)),
                fully_established=bool(flags & _FLAG_FULLY_ESTABLISHED),
                rtt_ms=_u32(info, _TCP_RTT) / 1000,
                bytes_sent=_u64(info, _TCP_BYTES_SENT),
                bytes_received=_u64(info, _TCP_BYTES_RECEIVED),
                retransmissions=_u32(info, _TCP_TOTAL_RETRANS)))
        alive = list(self._dump(_IPPROTO_MPTCP))
        listening = {endpoints[0].port for state, endpoints, _ in alive if state == _LISTEN}
        found = []
        for state, (local, remote), attributes in alive:
            info = attributes.get(_DIAG_INFO, b"")
            token = _u32(info, _MPTCP_TOKEN)
            if state == _LISTEN or not token or _u32(info, _MPTCP_FLAGS) & _INFO_FLAG_FALLBACK:
                continue
            found.append(Connection(token, local, remote, local.port in listening,
                                    tuple(subflows.get(token, ()))))
        return found

    def listening(self) -> list[Endpoint]:
        """Where TCP sockets listen, MPTCP ones among them."""
        return [local for _, (local, _), _ in self._dump(_IPPROTO_TCP, 1 << _LISTEN, 0)]

    def _dump(self, protocol: int, states: int = _ALL_BUT_TIME_WAIT,
              extensions: int = 1 << (_DIAG_INFO - 1)) -> Iterator[
            tuple[int, tuple[Endpoint, Endpoint], dict[int, bytes]]]:
        for family in (_AF_INET, _AF_INET6):
            request = _REQUEST.pack(family, protocol & 0xFF, extensions, 0, states, b"")
            request += codec.attribute(_REQ_PROTOCOL, _U32.pack(protocol))
            try:
                answers = self.request(_SOCK_DIAG_BY_FAMILY, request, dump=True)
            except codec.NetlinkError as error:
                if family == _AF_INET6:
                    continue  # a kernel without IPv6
                raise UserError(
                    f"this kernel does not list its sockets: {error.strerror}",
                    "CONFIG_INET_DIAG and CONFIG_INET_MPTCP_DIAG are needed") from None
            for answer in answers:
                if len(answer.payload) < _MESSAGE.size:
                    continue
                _, state, _, _, sport, dport, source, target, *_ = _MESSAGE.unpack_from(
                    answer.payload)
                yield (state, (_endpoint(family, source, sport), _endpoint(family, target, dport)),
                       codec.attributes(answer.payload[_MESSAGE.size:]))


def _endpoint(family: int, address: bytes, port: bytes) -> Endpoint:
    number = int.from_bytes(port, "big")
    if family == _AF_INET:
        return Endpoint(IPv4Address(address[:4]), number)
    return Endpoint(unmapped(IPv6Address(address)), number)


def _u32(data: bytes, offset: int) -> int:
    return int(_U32.unpack_from(data, offset)[0]) if len(data) >= offset + 4 else 0


def _u64(data: bytes, offset: int) -> int:
    return int(_U64.unpack_from(data, offset)[0]) if len(data) >= offset + 8 else 0
