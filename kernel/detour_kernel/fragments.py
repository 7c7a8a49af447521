# SPDX-License-Identifier: GPL-2.0-or-later
"""Configuration fragments: reading, putting onto a base, seeing whether lines survived. Pure.

A line of a fragment is ``CONFIG_NAME=value  # reason`` or ``# CONFIG_NAME is not set  # reason``.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from detour_kernel.common import Problem

_SET: Final = re.compile(r'CONFIG_(\w+)=("[^"]*"|[^\s"#]+)')
_UNSET: Final = re.compile(r"# CONFIG_(\w+) is not set")
_REASON: Final = re.compile(r"\s+#\s+\S")


@dataclass(frozen=True)
class Line:
    """One wish: the symbol, its value ('n' for 'is not set'), and where it stands."""

    symbol: str
    value: str
    where: str

    @property
    def text(self) -> str:
        """As .config spells it."""
        return f"# CONFIG_{self.symbol} is not set" if self.value == "n" else (
            f"CONFIG_{self.symbol}={self.value}")


def parse(text: str, name: str) -> list[Line]:
    """The lines of a fragment; a Problem for one that is none, or that gives no reason."""
    lines = []
    for number, raw in enumerate(text.splitlines(), 1):
        if not raw.strip() or (raw.startswith("#") and not raw.startswith("# CONFIG_")):
            continue
        where = f"{name}:{number}"
        if found := _UNSET.match(raw):
            symbol, value = found[1], "n"
        elif found := _SET.match(raw):
            symbol, value = found[1], found[2]
        else:
            raise Problem(f"{where}: '{raw}' is neither CONFIG_NAME=value "
                          "nor '# CONFIG_NAME is not set'")
        if not _REASON.match(raw[found.end():]):
            raise Problem(f"{where}: CONFIG_{symbol} has no reason; write it after '  # '")
        lines.append(Line(symbol, value, where))
    return lines


def merge(fragments: Iterable[list[Line]]) -> list[Line]:
    """All lines in order; a later fragment overrules an earlier one."""
    merged: dict[str, Line] = {}
    for fragment in fragments:
        for line in fragment:
            merged.pop(line.symbol, None)
            merged[line.symbol] = line
    return list(merged.values())


def values(config: str) -> dict[str, str]:
    """What a .config sets; symbols that are not set are not in it."""
    return {found[1]: found[2] for found in re.finditer(
        r"^CONFIG_(\w+)=(.*)$", config, re.MULTILINE)}


def onto(config: str, lines: list[Line]) -> str:
    """A distribution's configuration with the lines on top. What it has as module stays one."""
    there = values(config)
    added = [line.text for line in lines
             if not (line.value == "y" and there.get(line.symbol) == "m")]
    return config + "\n" + "\n".join(added) + "\n"


def lost(config: str, lines: list[Line], *, modules: bool) -> list[Line]:
    """The lines that the final .config does not have. With ``modules`` 'm' will do for 'y'."""
    there = values(config)

    def survived(line: Line) -> bool:
        value = there.get(line.symbol, "n")
        return value == line.value or (modules and line.value == "y" and value == "m") or (
            # A string of nothing may belong to an option that is gone.
            line.value == '""' and line.symbol not in there)

    return [line for line in lines if not survived(line)]
