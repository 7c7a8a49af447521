# SPDX-License-Identifier: GPL-2.0-or-later
"""What ``detour-client status`` shows."""

import io
from typing import Any

import pytest
from rich.console import Console

from detour_tools.client.view import render

_STATUS: dict[str, Any] = {
    "path_manager": "userspace", "warnings": [], "counters": {"requests": 2, "joins": 0},
    "detours": [{"address": "198.51.100.10", "port": 45672, "state": "up", "rtt_ms": 37.3,
                 "mappings": 1, "joins": 1, "joins_established": 1, "joins_refused": 0}],
    "connections": [{
        "token": "7c4d9cea", "local": "192.168.7.107:59966", "remote": "203.0.113.250:44380",
        "no_detour_because": None, "subflows": [
            {"local": "192.168.7.107:59966", "remote": "203.0.113.250:44380", "via": None,
             "state": "established", "bytes_sent": 82, "bytes_received": 3_600_000,
             "rtt_ms": 21.3, "retransmissions": 0},
            {"local": "192.168.7.107:44661", "remote": "198.51.100.10:44380",
             "via": "198.51.100.10", "state": "established", "bytes_sent": 0,
             "bytes_received": 999_900_000, "rtt_ms": 130.8, "retransmissions": 12}]}]}


def shown(width: int, **changes: Any) -> str:
    """The status in a terminal of that width, without styles."""
    console = Console(file=io.StringIO(), width=width)
    console.print(render(_STATUS | changes))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 100, 200])
def test_nothing_is_cut(width: int) -> None:
    lines = shown(width).splitlines()
    after = lines.index(next(line for line in lines if "token" in line))
    cells = [line.split() for line in lines[after + 1:-1]]
    assert cells == [
        ["7c4d9cea"], [">", "203.0.113.250:44380"],
        ["192.168.7.107:59966", "direct", "estab", "82", "B", "3.6", "MB", "21.3", "ms", "0"],
        [">", "203.0.113.250:44380"],
        ["192.168.7.107:44661", "198.51.100.10", "estab", "0", "B", "999.9", "MB", "130.8", "ms",
         "12"], [">", "198.51.100.10:44380"]]


def test_what_is_zero_is_not_counted() -> None:
    assert "since the start: requests 2\n" in shown(100)


def test_warnings_come_first() -> None:
    told = shown(100, warnings=["detour 'web1' is not used yet: [why]"], detours=[]).splitlines()
    assert told[0] == "warning: detour 'web1' is not used yet: [why]"
    assert [line.strip() for line in told[1:4]] == [
        "Detours", "address  state  rtt  mappings  joins  made  refused", "none"]
