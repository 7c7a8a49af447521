# SPDX-License-Identifier: GPL-2.0-or-later
"""Packet captures: tcpdump on a host of the lab, and what the files say."""

import functools
import math
import signal
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Self

from detour_tools.endpoint import Endpoint, IPAddress
from detour_tools.errors import UserError
from detour_tools.lab.daemons import Daemon
from detour_tools.lab.network import Host

_FILE_HEADER = struct.Struct("<IHHiIII")
_RECORD_HEADER = struct.Struct("<IIII")
_MAGIC_MICROSECONDS = 0xA1B2C3D4
_LINK_TYPE_ETHERNET = 1
_ETHERNET_BYTES = 14
_TCP = 6


class Capture:
    """tcpdump on an interface of a host, from construction to stop().

    When the constructor returns, packets are being captured.
    """

    def __init__(self, host: Host, interface: str, path: Path, *, expression: str = "",
                 snaplen: int = 0) -> None:
        command = ["tcpdump", "-n", "-U", "--immediate-mode", "-i", interface, "-w", path,
                   "-s", snaplen, "-Z", "root", *([expression] if expression else [])]
        self.path = path
        self._tcpdump = Daemon(host, command)
        try:
            self._tcpdump.wait_line("listening on")
        except BaseException:
            self._tcpdump.kill()
            raise

    def stop(self) -> None:
        """End the capture; the file is whole afterwards."""
        self._tcpdump.stop(signal.SIGINT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@dataclass(frozen=True)
class Segment:
    """A TCP segment as captured: ``time`` in seconds since 1970, ``payload`` in bytes."""

    time: float
    source: Endpoint
    destination: Endpoint
    flags: int
    payload: int
    options: bytes


def segments(path: Path) -> Iterator[Segment]:
    """The TCP segments in a capture file of an Ethernet-like interface.

    Raises UserError when the file is no such capture.
    """
    with path.open("rb") as stream:
        header = stream.read(_FILE_HEADER.size)
        fields = _FILE_HEADER.unpack(header) if len(header) == _FILE_HEADER.size else (0,) * 7
        if fields[0] != _MAGIC_MICROSECONDS or fields[6] != _LINK_TYPE_ETHERNET:
            raise UserError(f"{path} is not a capture of an Ethernet interface")
        while len(record := stream.read(_RECORD_HEADER.size)) == _RECORD_HEADER.size:
            seconds, microseconds, captured, _length = _RECORD_HEADER.unpack(record)
            frame = stream.read(captured)
            segment = _parse(seconds + microseconds / 1e6, frame)
            if segment is not None:
                yield segment


def bytes_by_peer(path: Path, host: IPAddress, start: float, end: float, width: float,
                  *, sent: bool) -> dict[IPAddress, list[int]]:
    """TCP payload that ``host`` sent (or received), by the other end's address, over time.

    From ``start`` to ``end`` (seconds since 1970), one number for each ``width`` seconds.
    """
    bins = max(1, math.ceil((end - start) / width))
    found: dict[IPAddress, list[int]] = {}
    for segment in segments(path):
        ours, theirs = ((segment.source, segment.destination) if sent
                        else (segment.destination, segment.source))
        if segment.payload and ours.address == host and start <= segment.time < end:
            series = found.setdefault(theirs.address, [0] * bins)
            series[int((segment.time - start) / width)] += segment.payload
    return found


_address = functools.lru_cache(maxsize=1024)(ip_address)


def _parse(time: float, frame: bytes) -> Segment | None:
    packet = frame[_ETHERNET_BYTES:]
    if frame[12:14] == b"\x08\x00" and len(packet) >= 20 and packet[9] == _TCP:
        start = (packet[0] & 15) * 4
        end = int.from_bytes(packet[2:4])
        source, destination = packet[12:16], packet[16:20]
    elif frame[12:14] == b"\x86\xdd" and len(packet) >= 40 and packet[6] == _TCP:
        start = 40
        end = start + int.from_bytes(packet[4:6])
        source, destination = packet[8:24], packet[24:40]
    else:
        return None
    tcp = packet[start:]
    if len(tcp) < 20:
        return None
    header = (tcp[12] >> 4) * 4
    return Segment(
        time,
        Endpoint(_address(source), int.from_bytes(tcp[0:2])),
        Endpoint(_address(destination), int.from_bytes(tcp[2:4])),
        tcp[13], max(0, end - start - header), tcp[20:header])
