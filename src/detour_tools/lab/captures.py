# SPDX-License-Identifier: GPL-2.0-or-later
"""Packet captures: tcpdump on a host of the lab, and what the files say."""

import functools
import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Self

import dpkt

from detour_tools.endpoint import Endpoint, IPAddress
from detour_tools.errors import UserError
from detour_tools.lab.daemons import Daemon
from detour_tools.lab.network import Host


class Capture:
    """tcpdump on an interface of a host, from construction to stop().

    When the constructor returns, packets are being captured. A ``live`` capture can be read
    while it goes on; any is whole after stop().
    """

    def __init__(self, host: Host, interface: str, path: Path, *, expression: str = "",
                 snaplen: int = 0, live: bool = True) -> None:
        # A file that is whole at any time costs one system call a packet.
        command = ["tcpdump", "-n", "--immediate-mode", *(["-U"] if live else []),
                   "-i", interface, "-w", path, "-s", snaplen, "-Z", "root",
                   *([expression] if expression else [])]
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
        try:
            reader = dpkt.pcap.Reader(stream)
        except (ValueError, dpkt.NeedData):
            raise UserError(f"{path} is not a capture") from None
        if reader.datalink() != dpkt.pcap.DLT_EN10MB:
            raise UserError(f"{path} is not a capture of an Ethernet interface")
        for time, frame in reader:
            segment = _parse(float(time), frame)
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
    packet = dpkt.ethernet.Ethernet(frame).data
    if not isinstance(packet, dpkt.ip.IP | dpkt.ip6.IP6) or not isinstance(
            packet.data, dpkt.tcp.TCP):
        return None
    tcp = packet.data
    # By the headers, as the capture may hold only the beginning of the payload.
    length = packet.len - packet.hl * 4 if isinstance(packet, dpkt.ip.IP) else packet.plen
    return Segment(time, Endpoint(_address(packet.src), tcp.sport),
                   Endpoint(_address(packet.dst), tcp.dport), tcp.flags,
                   max(0, length - tcp.off * 4), tcp.opts)
