# SPDX-License-Identifier: GPL-2.0-or-later
"""The demo's results drawn: a bar chart in the terminal, and pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.text import Text

from detour_tools.lab.results import (
    BIN_SECONDS,
    DIRECTIONS,
    PATHS,
    WAYS,
    Direction,
    Path_,
    Results,
    Way,
    percent,
)

# Okabe and Ito's colours, which colour-blind people can tell apart; a path keeps its own.
_PICTURE_COLOURS: Final[dict[Path_, str]] = {"direct": "#0072B2", "detour": "#E69F00"}
_TERMINAL_COLOURS: Final[dict[Path_, str]] = {"direct": "blue", "detour": "yellow"}
_LEGENDS: Final[dict[Path_, str]] = {"direct": "direct path (by L2)",
                                     "detour": "path through the detour (by L4, L5)"}
_DIRECTION_TITLES: Final[dict[Direction, str]] = {
    "upload": "Upload: iperf3, client sends for 10 s",
    "download": "Download: curl fetches a file of 8 MB",
}
_SHORT: Final[dict[Way, str]] = {"tcp": "TCP,\ndirect", "tcp_nat": "TCP,\nthrough the detour",
                                 "mptcp_nat": "Multipath TCP,\nboth paths"}
_BAR_CELLS: Final = 38
_INK: Final = "#333333"
_PLATE: Final = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "none"}


def _parts(results: Results, direction: Direction, way: Way) -> dict[Path_, float]:
    """A way's Mbit/s by path."""
    if way == "mptcp_nat":
        return results.path_mbps(direction)
    return {"direct" if way == "tcp" else "detour": results.mbps(direction, way)}


def print_chart(results: Results, console: Console) -> None:
    """Draw the figures as bars in the terminal."""
    most = max(max(results.sum_of_tcp(direction), results.mbps(direction, "mptcp_nat"))
               for direction in DIRECTIONS)
    labels = {way: text.replace("\n", " ") for way, text in _SHORT.items()}
    width = max(map(len, labels.values()))
    for direction in DIRECTIONS:
        console.print(f"\n[bold]{_DIRECTION_TITLES[direction]}[/bold]")
        for way in WAYS:
            line = Text(f"{labels[way]:<{width}}  ")
            for path, mbps in _parts(results, direction, way).items():
                line.append("█" * round(mbps / most * _BAR_CELLS), _TERMINAL_COLOURS[path])
            line.append(f" {results.mbps(direction, way):.2f} Mbit/s")
            console.print(line)
        console.print(f"{'':{width}}  {percent(results.share(direction))} of the sum of the two "
                      f"above, {results.sum_of_tcp(direction):.2f} Mbit/s")
    legend = Text("\n")
    for path in PATHS:
        legend.append("█ ", _TERMINAL_COLOURS[path]).append(f"{_LEGENDS[path]}   ")
    console.print(legend)


def write(results: Results, path: Callable[[str], Path]) -> None:
    """Write results.json and the pictures; ``path`` says where a file of that name goes."""
    results.save(path("results.json"))
    _draw_bars(results).savefig(path("throughput.png"), dpi=150)
    _draw_over_time(results).savefig(path("throughput-over-time.png"), dpi=150)


def _tidy(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_bars(results: Results) -> Figure:
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    figure.suptitle("A second path through a detour adds its throughput", fontweight="bold")
    both = figure.subplots(1, 2, sharey=True)
    for axes, direction in zip(both, DIRECTIONS, strict=True):
        _tidy(axes)
        axes.set_title(_DIRECTION_TITLES[direction], fontsize=11)
        for position, way in enumerate(WAYS):
            bottom = 0.0
            for path, mbps in _parts(results, direction, way).items():
                axes.bar(position, mbps, 0.62, bottom=bottom, color=_PICTURE_COLOURS[path],
                         hatch="//" if path == "detour" else None, edgecolor="white")
                bottom += mbps
            axes.annotate(f"{results.mbps(direction, way):.2f}", (position, bottom), (0, -18),
                          textcoords="offset points", ha="center", fontweight="bold", color=_INK,
                          bbox=_PLATE)
        total = results.sum_of_tcp(direction)
        axes.axhline(total, color=_INK, linestyle="--", linewidth=1.2)
        axes.annotate(f"sum of the two TCP figures: {total:.2f}", (-0.4, total), (0, 4),
                      textcoords="offset points", color=_INK, fontsize=9)
        axes.annotate(f"{percent(results.share(direction))}\nof the sum", (2, total / 4),
                      ha="center", color="white", fontweight="bold")
        axes.set_xticks(range(len(WAYS)), [_SHORT[way] for way in WAYS])
        axes.set_ylim(0, total * 1.18)
    both[0].set_ylabel("Mbit/s")
    handles = [both[0].bar(0, 0, color=_PICTURE_COLOURS[path], edgecolor="white",
                           hatch="//" if path == "detour" else None) for path in PATHS]
    figure.legend(handles, [_LEGENDS[path] for path in PATHS], loc="outside lower center",
                  ncols=2, frameon=False)
    return figure


def _draw_over_time(results: Results) -> Figure:
    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle("The two subflows of Multipath TCP, told apart by remote address",
                    fontweight="bold")
    both = figure.subplots(2, 1)
    for axes, direction in zip(both, DIRECTIONS, strict=True):
        _tidy(axes)
        axes.set_title(f"{_DIRECTION_TITLES[direction]}; subflows stacked", fontsize=11,
                       loc="left")
        series = {path: [count * 8 / 1e6 / BIN_SECONDS for count in counts]
                  for path, counts in results.series[direction].items()}
        times = [index * BIN_SECONDS for index in range(len(series["direct"]) + 1)]
        areas = axes.stackplot(times, *([*series[path], 0.0] for path in PATHS), step="post",
                               colors=[_PICTURE_COLOURS[path] for path in PATHS],
                               labels=[f"subflow on the {_LEGENDS[path]}" for path in PATHS])
        areas[PATHS.index("detour")].set(hatch="//", edgecolor="white", linewidth=0)
        total = results.sum_of_tcp(direction)
        axes.axhline(total, color=_INK, linestyle="--", linewidth=1.2,
                     label="sum of the two TCP figures")
        axes.set_xlim(0, times[-1])
        axes.set_ylim(0, total * 1.18)
        axes.set_ylabel("TCP payload, Mbit/s")
    both[1].set_xlabel(f"seconds since the program started (mean over {BIN_SECONDS:g} s, "
                       "captured at the client)")
    handles, labels = both[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure

