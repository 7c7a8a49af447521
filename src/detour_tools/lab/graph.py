# SPDX-License-Identifier: GPL-2.0-or-later
"""The topology drawn with text. Pure.

The first row is the way from client to server; each detour hangs below with its router, whose
links go up to the two core routers. A topology of another shape is listed link by link.
"""

from detour_tools.lab.topology import Link, Topology

_GAP = 3  # of a rule on either side of what stands on it


def draw(topology: Topology, cut: frozenset[str] = frozenset()) -> list[str]:
    """The lines of the drawing; links named in ``cut`` are marked as cut."""
    try:
        return _draw_reference(topology, cut)
    except _OtherShapeError:
        return link_table(topology, cut)


def link_table(topology: Topology, cut: frozenset[str] = frozenset()) -> list[str]:
    """One line a link: ends with addresses, rate, delay and loss."""
    rows = [(link.name,
             f"{link.a.host} {link.a.interface}", f"{link.b.host} {link.b.interface}",
             describe(link) + ("  CUT" if link.name in cut else ""))
            for link in topology.links]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}} -- {row[2]:<{widths[2]}}  {row[3]}"
            for row in rows]


def rate_text(link: Link) -> str:
    """The link's rate in words."""
    return "unshaped" if link.rate_mbps is None else f"{link.rate_mbps:g} Mbit/s"


def describe(link: Link) -> str:
    """Rate, delay and loss of a link in words."""
    parts = [rate_text(link)]
    if link.delay_ms:
        parts.append(f"{link.delay_ms:g} ms")
    if link.loss_percent:
        parts.append(f"{link.loss_percent:g} % loss")
    return ", ".join(parts)


class _OtherShapeError(Exception):
    """Not the reference network's shape."""


def _between(topology: Topology, a: str, b: str) -> Link:
    for link in topology.links:
        if {link.a.host, link.b.host} == {a, b}:
            return link
    raise _OtherShapeError


def _draw_reference(topology: Topology, cut: frozenset[str]) -> list[str]:
    def label(link: Link) -> str:
        return f"{link.name} {rate_text(link)}" + (" CUT" if link.name in cut else "")

    first = _between(topology, "client", "r1")
    core = _between(topology, "r1", "r2")
    last = _between(topology, "r2", "server")
    branches = []
    for detour in topology.detours():
        spur = topology.links_of(detour)
        if len(spur) != 1:
            raise _OtherShapeError
        router = spur[0].peer_of(detour).host
        branches.append((detour, router, _between(topology, "r1", router),
                         _between(topology, "r2", router), spur[0]))

    # The core is as wide as its widest row, so that all rows meet the same two routers.
    core_width = max(
        len(label(core)) + 2 * _GAP,
        len(f"{core.end_of('r1').address}{core.end_of('r2').address}") + 4,
        *(len(label(left)) + len(router) + len(label(right)) + 4 * _GAP + 2
          for _, router, left, right, _ in branches),
        *(len(f"{left.end_of('r1').address}{left.end_of(router).address}"
              f"{right.end_of(router).address}{right.end_of('r2').address}") + len(router) + 8
          for _, router, left, right, _ in branches))
    canvas = _Canvas()
    column = canvas.text(0, 0, "client ")
    column = _rule(canvas, 0, column, label(first), first, "client", "r1", 0)
    r1 = column + 1
    column = canvas.text(0, column, " r1 ")
    left_edge = column
    column = _rule(canvas, 0, column, label(core), core, "r1", "r2", core_width)
    r2 = column + 1
    right_edge = column
    column = canvas.text(0, column, " r2 ")
    column = _rule(canvas, 0, column, label(last), last, "r2", "server", 0)
    canvas.text(0, column, " server")

    row = 2
    for number, (detour, router, left, right, spur_link) in enumerate(branches):
        final = number == len(branches) - 1
        for column in (r1, r2):
            canvas.text(row, column, "│")
        row += 1
        canvas.text(row, r1, "└──" if final else "├──")
        canvas.text(row, r2 - 1, "─┘" if final else "─┤")
        if not final:
            for below in range(1, 5):
                canvas.text(row + below, r1, "│")
                canvas.text(row + below, r2, "│")
        # One share of the width for each of the two core links.
        half = (right_edge - left_edge - len(router) - 2) // 2
        column = _rule(canvas, row, left_edge, label(left), left, "r1", router, half)
        at_router = column + 1
        column = canvas.text(row, column, f" {router} ")
        _rule(canvas, row, column, label(right), right, router, "r2", right_edge - column)
        canvas.text(row + 2, at_router, f"│ {spur_link.end_of(router).address}")
        canvas.text(row + 3, at_router, f"│ {label(spur_link)}")
        canvas.text(row + 4, at_router, f"{detour} {spur_link.end_of(detour).address}")
        row += 5
    return canvas.lines()


class _Canvas:
    """Text placed by row and column; later text replaces earlier."""

    def __init__(self) -> None:
        self._cells: dict[tuple[int, int], str] = {}

    def text(self, row: int, column: int, text: str) -> int:
        """Put ``text``; returns the column behind it."""
        for offset, character in enumerate(text):
            self._cells[row, column + offset] = character
        return column + len(text)

    def lines(self) -> list[str]:
        height = max(row for row, _ in self._cells) + 1
        rows = [""] * height
        for (row, column), character in sorted(self._cells.items()):
            rows[row] = rows[row].ljust(column) + character
        return [row.rstrip() for row in rows]


def _rule(canvas: _Canvas, row: int, column: int, label: str, link: Link, left: str, right: str,
          width: int) -> int:
    """A link as a rule with its label on it and its two addresses below."""
    addresses = str(link.end_of(left).address), str(link.end_of(right).address)
    width = max(width, len(label) + 2 * _GAP, len("".join(addresses)) + 2)
    canvas.text(row, column, f" {label} ".center(width, "─"))
    canvas.text(row + 1, column, addresses[0])
    canvas.text(row + 1, column + width - len(addresses[1]), addresses[1])
    return column + width
