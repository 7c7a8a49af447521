# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon's status as a person reads it."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_STATE_STYLE = {"up": "green", "estab": "green", "down": "red"}


def render(status: dict[str, Any]) -> RenderableType:
    """Warnings, detours, connections with their subflows, and counters."""
    counters = ", ".join(f"{name.replace('_', ' ')} {value}"
                         for name, value in status["counters"].items() if value)
    return Group(*(Text(f"warning: {text}", style="yellow") for text in status["warnings"]),
                 _detours(status["detours"]), _connections(status["connections"]),
                 Text(f"path manager: {status['path_manager']}; since the start: "
                      f"{counters or 'nothing yet'}", style="dim"))


def _detours(detours: list[dict[str, Any]]) -> Table:
    table = Table(title="Detours", title_justify="left", box=None, header_style="bold")
    for heading in ("address", "state", "rtt", "mappings", "joins", "made", "refused"):
        table.add_column(heading, justify="left" if heading in ("address", "state") else "right")
    for detour in detours:
        table.add_row(f"{detour['address']}:{detour['port']}", _state(detour["state"]),
                      _milliseconds(detour["rtt_ms"]), str(detour["mappings"]),
                      str(detour["joins"]), str(detour["joins_established"]),
                      str(detour["joins_refused"]))
    if not detours:
        table.add_row("none")
    return table


def _connections(connections: list[dict[str, Any]]) -> Table:
    # Two ends on two lines, and ss(8)'s word for established: IPv4 fits in 80 columns.
    table = Table(title="Connections", title_justify="left", box=None, header_style="bold",
                  padding=(0, 1, 0, 0))
    for heading in ("token, subflows", "via", "state", "sent", "received", "rtt", "retrans"):
        table.add_column(heading, overflow="fold", justify="right" if heading in (
            "sent", "received", "rtt", "retrans") else "left")
    for connection in connections:
        reason = connection["no_detour_because"]
        table.add_row(f"{connection['token']}\n> {connection['remote']}",
                      f"no detour: {reason}" if reason else "", style="bold")
        for subflow in connection["subflows"]:
            table.add_row(f"  {subflow['local']}\n  > {subflow['remote']}",
                          str(subflow["via"] or "direct"),
                          _state(subflow["state"].replace("established", "estab")),
                          _size(subflow["bytes_sent"]), _size(subflow["bytes_received"]),
                          _milliseconds(subflow["rtt_ms"]), str(subflow["retransmissions"]))
    if not connections:
        table.add_row("none")
    return table


def _state(state: str) -> Text:
    return Text(state, style=_STATE_STYLE.get(state, "yellow"))


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} ms"


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
