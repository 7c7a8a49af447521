# SPDX-License-Identifier: GPL-2.0-or-later
"""What the demo measured, and what it claims."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

from detour_tools.endpoint import IPAddress
from detour_tools.lab.captures import bytes_by_peer
from detour_tools.lab.transfers import Transfer

Way = Literal["tcp", "tcp_nat", "mptcp_nat"]
Direction = Literal["upload", "download"]
Path_ = Literal["direct", "detour"]

WAYS: Final[tuple[Way, ...]] = get_args(Way)
DIRECTIONS: Final[tuple[Direction, ...]] = get_args(Direction)
PATHS: Final[tuple[Path_, ...]] = get_args(Path_)
TITLES: Final[dict[Way, str]] = {
    "tcp": "TCP, direct",
    "tcp_nat": "TCP, through the detour",
    "mptcp_nat": "Multipath TCP, direct and through the detour",
}
# The two paths have no link of the core in common, so Multipath TCP should carry what they carry
# together, less its own options (some 20 bytes in a packet of 1500).
WANTED_SHARE: Final = 0.95
BIN_SECONDS: Final = 0.2


def percent(share: float) -> str:
    """A share as people read it."""
    return f"{share * 100:.1f} %"


@dataclass
class Results:
    """Transfers by way, and the bytes that Multipath TCP sent on each path over time."""

    netem: bool
    transfers: dict[Direction, dict[Way, Transfer]] = field(
        default_factory=lambda: {direction: {} for direction in DIRECTIONS})
    # TCP payload a bin of BIN_SECONDS, as captured at the client
    series: dict[Direction, dict[Path_, list[int]]] = field(default_factory=dict)

    def mbps(self, direction: Direction, way: Way) -> float:
        """What was reached, in Mbit/s."""
        return self.transfers[direction][way].mbps

    def sum_of_tcp(self, direction: Direction) -> float:
        """What the two plain TCP transfers reached together."""
        return self.mbps(direction, "tcp") + self.mbps(direction, "tcp_nat")

    def share(self, direction: Direction) -> float:
        """Multipath TCP's figure in relation to that sum."""
        return self.mbps(direction, "mptcp_nat") / self.sum_of_tcp(direction)

    @property
    def holds(self) -> bool:
        """Whether the paths add up, and both were used."""
        return self.share("upload") >= WANTED_SHARE and all(
            all(self.path_bytes(direction).values()) for direction in self.series)

    def claim(self) -> str:
        """The claim with its figures, in one line."""
        idle = [f"{path} path unused in the {direction}" for direction in self.series
                for path, count in self.path_bytes(direction).items() if not count]
        return "; ".join([
            f"Multipath TCP sent {self.mbps('upload', 'mptcp_nat'):.2f} Mbit/s, "
            f"{percent(self.share('upload'))} of what plain TCP reached on the two paths together "
            f"({self.mbps('upload', 'tcp'):.2f} + {self.mbps('upload', 'tcp_nat'):.2f}; "
            f"at least {percent(WANTED_SHARE)} is wanted)", *idle])

    def path_bytes(self, direction: Direction) -> dict[Path_, int]:
        """Multipath TCP's payload by path."""
        return {path: sum(bins) for path, bins in self.series[direction].items()}

    def path_mbps(self, direction: Direction) -> dict[Path_, float]:
        """Multipath TCP's figure, split as its payload was split over the paths."""
        counts = self.path_bytes(direction)
        total = sum(counts.values()) or 1
        return {path: self.mbps(direction, "mptcp_nat") * count / total
                for path, count in counts.items()}

    def count_paths(self, capture: Path, client: IPAddress,
                    paths: Mapping[IPAddress, Path_]) -> None:
        """Read from the client's capture what Multipath TCP moved on each path."""
        for direction in DIRECTIONS:
            transfer = self.transfers[direction]["mptcp_nat"]
            found = bytes_by_peer(capture, client, transfer.started, transfer.ended, BIN_SECONDS,
                                  sent=direction == "upload")
            none = [0] * max(1, math.ceil((transfer.ended - transfer.started) / BIN_SECONDS))
            self.series[direction] = {path: found.get(address, none)
                                      for address, path in paths.items()}

    def to_json(self) -> dict[str, Any]:
        """All figures as plain data; speeds in Mbit/s."""
        return {
            "unit": "Mbit/s",
            "delay_emulated": self.netem,
            **{direction: {
                **{way: round(self.mbps(direction, way), 3) for way in WAYS},
                "sum_of_tcp": round(self.sum_of_tcp(direction), 3),
                "mptcp_share_of_sum": round(self.share(direction), 4),
                "mptcp_bytes_by_path": self.path_bytes(direction),
            } for direction in DIRECTIONS},
            "wanted_share": WANTED_SHARE,
            "holds": self.holds,
            "over_time": {"bin_seconds": BIN_SECONDS, "bytes": self.series},
        }

    def save(self, path: Path) -> None:
        """Write to_json() to a file."""
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
