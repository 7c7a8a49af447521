# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m tests.bench``: run the benchmarks, print a table, write results.json."""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

from detour_tools.errors import UserError
from detour_tools.lab.network import need_root
from detour_tools.lab.story import Output
from tests.bench import (
    adding,
    bed,
    bulk,
    connections,
    joins,
    kernel_manager,
    mappings,
    relay,
    scale,
)
from tests.bench.figures import Figure

BENCHES = {bench.NAME: bench
           for bench in (mappings, adding, connections, bulk, joins, kernel_manager, scale,
                       relay)}


def main() -> int:
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, _end)  # so that labs come down then, too
    console = Console(stderr=arguments.json)
    if not console.is_terminal:
        console.width = 160
    try:
        need_root()
        if "d" in arguments.only and shutil.which("haproxy") is None:
            raise UserError("(d) needs haproxy", "scripts/setup bench, or leave it out by --only")
        output = Output(arguments.output)
        bed.remove_leftovers()
        figures = _run(arguments.only, quick=arguments.quick, console=console)
    except UserError as error:
        print(f"bench: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return 130
    results = {"machine": _machine(), "quick": arguments.quick, "only": arguments.only,
               "figures": [dataclasses.asdict(each) for each in figures]}
    text = json.dumps(results, indent=1)
    path = output.add("results.json")
    path.write_text(text + "\n", encoding="utf-8")
    console.print(_table(figures))
    output.hand_over()
    console.print(f"written: {path}")
    if arguments.quick:
        console.print("with --quick no target is judged")
    if arguments.json:
        print(text)
    missed = [each.name for each in figures if each.met is False and not arguments.quick]
    if missed:
        console.print(f"targets missed: {', '.join(missed)}", style="red")
    return 1 if missed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("bench-results"), metavar="DIR",
                        help="where results.json goes (default %(default)s)")
    parser.add_argument("--only", type=_names, default=list(BENCHES), metavar="a,b,..",
                        help="; ".join(f"{name}: {bench.TITLE}"
                                       for name, bench in BENCHES.items()))
    parser.add_argument("--quick", action="store_true",
                        help="few and short rounds: to see that it works, not how fast it is")
    parser.add_argument("--json", action="store_true", help="print results.json, too")
    return parser


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in BENCHES:
            raise argparse.ArgumentTypeError(
                f"there is no benchmark '{name}', there are {','.join(BENCHES)}")
    return names


def _run(names: list[str], *, quick: bool, console: Console) -> list[Figure]:
    figures: list[Figure] = []
    with contextlib.ExitStack() as stack:
        load = stack.enter_context(bed.load_program())
        for name in names:
            bench = BENCHES[name]
            console.print(f"[bold]({name}) {bench.TITLE}[/bold]")
            _look_around(console)
            start = time.monotonic()
            figures += bench.run(lambda text: console.print(f"    {text}", highlight=False),
                                 quick=quick, load=load)
            console.print(f"    {time.monotonic() - start:.0f} s", style="dim", highlight=False)
    return figures


def _look_around(console: Console) -> None:
    """Say when something else uses the processors: the figures will be worse than they are."""
    busy, start = bed.busy_seconds(), time.monotonic()
    time.sleep(0.5)
    share = (bed.busy_seconds() - busy) / (time.monotonic() - start)
    if share > 0.2:
        console.print(f"    warning: before it began, {share:.1f} of {os.cpu_count()} processors "
                      "were busy with something else", style="yellow", highlight=False)


def _table(figures: list[Figure]) -> Table:
    table = Table(title="Benchmarks")
    for heading, justify in (("", "left"), ("figure", "left"), ("value", "right"),
                             ("baseline", "right"), ("ratio", "right"), ("target", "left"),
                             ("met", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    last = ""
    for each in figures:
        if last and each.bench != last:
            table.add_section()
        last = each.bench
        table.add_row(
            each.bench, each.name, f"{_number(each.value)} {each.unit}",
            "" if each.baseline is None else f"{_number(each.baseline)} ({each.baseline_name})",
            "" if each.ratio is None else f"{_number(each.ratio)} x",
            each.target, {None: "", True: "[green]yes[/green]", False: "[red]NO[/red]"}[each.met])
    return table


def _number(value: float) -> str:
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 20 else f"{value:.3g}"


def _machine() -> dict[str, Any]:
    processor = next((line.partition(":")[2].strip() for line
                      in Path("/proc/cpuinfo").read_text().splitlines()
                      if line.startswith("model name")), platform.machine())
    return {
        "processor": processor, "processors": os.cpu_count(),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
        "kernel": platform.release(), "python": platform.python_version(),
        "iptables": _first_line("iptables", "-V"), "nft": _first_line("nft", "-v"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_average": os.getloadavg(), "command": " ".join(["python -m tests.bench",
                                                              *sys.argv[1:]]),
    }


def _first_line(*command: str) -> str:
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True,
                              check=False).stdout.strip().partition("\n")[0]
    return ""


def _end(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
