# SPDX-License-Identifier: GPL-2.0-or-later
"""``detour-lab``: the emulated network on this machine."""

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from detour_tools.cli import common
from detour_tools.errors import UserError

try:
    from detour_tools.lab import demo, graph, network, state
except ModuleNotFoundError as error:
    sys.exit(f"detour-lab: missing: the Python package {error.name} "
             "(install detour-tools[lab], or use 'make venv')")
from detour_tools.lab.topology import CONFIGS, MAX_DETOURS, Topology, reference_topology

_DESCRIPTION = """\
An emulated network on this machine, made of network namespaces: a client, a server, routers
between them, and a detour beside the direct way. Programs run on its hosts unchanged."""

_EPILOG = """\
examples:
  detour-lab up                                 the reference network
  detour-lab up --l2-loss 1 --rate L4=5         a lossy direct way, a slow detour
  detour-lab graph                              what is connected how
  detour-lab exec detour -- detour-server --allow-remote 10.0.0.0/8
  detour-lab exec client -- detour-client daemon detour
  detour-lab exec server -- python3 -m http.server 80 &
  detour-lab exec client -- curl http://server/
  detour-lab exec client -- bash                a shell on the client
  detour-lab down                               end its programs, remove everything
  detour-lab demo                               all of it by itself, with pictures
"""


def main() -> NoReturn:
    """Entry point of the console script."""
    common.run("detour-lab", _main)


def _main() -> int | None:
    arguments = _parser().parse_args()
    if arguments.name is None:
        arguments.name = "demo" if arguments.call is _demo else network.DEFAULT_NAME
    state.check_name(arguments.name)
    result: int | None = arguments.call(arguments)
    return result


def _parser() -> common.Parser:
    top = common.parser("detour-lab", _DESCRIPTION, _EPILOG)
    top.add_argument("--name", metavar="NAME",
                     help="which lab; several can be up at once (default: "
                          f"{network.DEFAULT_NAME}, for the demo: demo)")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND",
                                  parser_class=common.Parser)

    up = commands.add_parser("up", help="build the lab", allow_abbrev=False,
                             description="Build the lab; fine when it is already up just so.")
    up.set_defaults(call=_up)
    _add_topology_options(up)

    down = commands.add_parser(
        "down", help="remove the lab and end its programs",
        description="Remove the lab: programs on its hosts, namespaces, files. "
                    "Fine when there is none, and after a crash.")
    down.set_defaults(call=_down)

    status = commands.add_parser("status", help="show hosts, links and programs",
                                 description="Show hosts, links and the programs that run.")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(call=_status)

    execute = commands.add_parser(
        "exec", help="run a command on a host", usage="detour-lab exec HOST -- COMMAND...",
        description="Run a command on a host of the lab. Its exit status, terminal and signals "
                    "are the command's own; the lab's hosts are known by their names.")
    execute.add_argument("host", metavar="HOST")
    execute.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND")
    execute.set_defaults(call=_exec)

    draw = commands.add_parser("graph", help="draw the network",
                               description="Draw the network with its addresses and rates: the "
                                           "one that is up, or else the one that the options "
                                           "describe.")
    draw.set_defaults(call=_graph)
    _add_topology_options(draw)

    show = commands.add_parser(
        "demo", help="run the main job on a lab of its own",
        description="Bring a lab up, send data over TCP, over TCP through the detour and over "
                    "Multipath TCP with both paths; show what happens, draw it, check that the "
                    "paths add up, and take everything down.")
    show.add_argument("--output", type=Path, default=Path("demo"), metavar="DIR",
                      help="where pictures, captures and results go (default: %(default)s)")
    show.set_defaults(call=_demo)
    return top


def _add_topology_options(target: argparse.ArgumentParser) -> None:
    target.add_argument("--config", choices=CONFIGS, default="core-limited",
                        help="core-limited: core links 10 Mbit/s, access links 20 (and 10 more "
                             "for each detour beyond the first); symmetric: every link 10 "
                             "(default: %(default)s)")
    target.add_argument("--l2-loss", type=common.number(0, 100), default=0.0, metavar="PERCENT",
                        help="share of packets that the direct link loses at random")
    target.add_argument("--l2-delay", type=common.number(0, 10_000), default=None, metavar="MS",
                        help="delay of the direct link each way (default: 5, as every link)")
    target.add_argument("--detours", type=common.whole_number(1, MAX_DETOURS), default=1,
                        metavar="N", help="how many detours, each behind its own core links")
    target.add_argument("--rate", type=_link_rate, action="append", default=[],
                        metavar="LINK=MBPS", help="another rate for a link, such as L1=50 "
                                                  "(repeatable)")


def _link_rate(text: str) -> tuple[str, float]:
    link, equals, rate = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not LINK=MBPS, such as L1=50")
    return link.upper(), common.number(0.1, 10_000)(rate)


def _topology(arguments: argparse.Namespace) -> Topology:
    delay = {} if arguments.l2_delay is None else {"l2_delay_ms": arguments.l2_delay}
    return reference_topology(arguments.config, arguments.l2_loss, detours=arguments.detours,
                              rates_mbps=dict(arguments.rate), **delay)


def _up(arguments: argparse.Namespace) -> None:
    lab = network.Lab(_topology(arguments), arguments.name)
    built = lab.up()
    print(f"the lab '{lab.name}' {'is up' if built else 'was up already'}: {lab.topology.title}")
    _print_drawing(lab.topology, frozenset())
    if not lab.netem:
        print(f"note: {network.NO_NETEM}")


def _down(arguments: argparse.Namespace) -> None:
    known = state.load(arguments.name)
    topology = known.topology if known else reference_topology()
    network.Lab(topology, arguments.name).down()
    print(f"the lab '{arguments.name}' is down")


def _status(arguments: argparse.Namespace) -> None:
    network.need_root()
    lab = network.Lab.attach(arguments.name)
    hosts = [{
        "name": host.name,
        "namespace": host.namespace,
        "forwards": lab.topology.host(host.name).forwards,
        "addresses": {link.name: str(link.end_of(host.name).interface)
                      for link in lab.topology.links_of(host.name)},
        "processes": [{"pid": pid, "command": command} for pid, command in host.processes()],
    } for host in lab.hosts()]
    cut = lab.cut_links()
    links = [{
        "name": link.name,
        "ends": [{"host": end.host, "address": str(end.interface)} for end in link.ends],
        "rate_mbps": link.rate_mbps,
        "delay_ms": link.delay_ms,
        "delay_emulated": lab.netem,
        "loss_percent": link.loss_percent,
        "up": link.name not in cut,
    } for link in lab.topology.links]
    if arguments.json:
        common.print_json({"name": lab.name, "title": lab.topology.title, "netem": lab.netem,
                           "hosts": hosts, "links": links})
        return
    print(f"the lab '{lab.name}' is up: {lab.topology.title}")
    console = Console(highlight=False)
    console.print(_host_table(hosts))
    console.print(_link_table(lab, links))
    if not lab.netem:
        print(f"note: {network.NO_NETEM}")


def _host_table(hosts: list[dict[str, Any]]) -> Table:
    table = Table("host", "namespace", "addresses", "programs")
    for host in hosts:
        table.add_row(
            host["name"] + (" (router)" if host["forwards"] else ""), host["namespace"],
            "\n".join(f"{link} {address}" for link, address in host["addresses"].items()),
            "\n".join(f"{each['pid']} {each['command']}" for each in host["processes"]))
    return table


def _link_table(lab: network.Lab, links: list[dict[str, Any]]) -> Table:
    table = Table("link", "between", "rate each way", "delay each way", "loss", "state")
    for link, shown in zip(lab.topology.links, links, strict=True):
        delay = f"{link.delay_ms:g} ms" + ("" if lab.netem or not link.delay_ms
                                           else " (not emulated)")
        table.add_row(link.name, f"{link.a.host} - {link.b.host}", graph.rate_text(link), delay,
                      f"{link.loss_percent:g} %", "up" if shown["up"] else "cut")
    return table


def _exec(arguments: argparse.Namespace) -> None:
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        raise UserError("no command given", "detour-lab exec HOST -- COMMAND...", status=2)
    network.need_root()
    host = network.Lab.attach(arguments.name).host(arguments.host)
    if shutil.which(command[0], path=network.search_path()) is None:
        raise UserError(f"there is no command '{command[0]}'", status=127)
    # Replacing this process leaves exit status, terminal and signals to the command itself.
    argv = host.argv(command)
    os.execvpe(argv[0], argv, network.environment())  # noqa: S606


def _graph(arguments: argparse.Namespace) -> None:
    known = state.load(arguments.name)
    if known is None or not known.complete:
        topology = _topology(arguments)
        print(f"(the lab '{arguments.name}' is not up; this is what 'up' would build)")
        cut: frozenset[str] = frozenset()
    else:
        network.need_root()
        lab = network.Lab.attach(arguments.name)
        topology = lab.topology
        cut = lab.cut_links()
    _print_drawing(topology, cut)


def _print_drawing(topology: Topology, cut: frozenset[str]) -> None:
    lines = graph.draw(topology, cut)
    if sys.stdout.isatty() and max(map(len, lines)) > shutil.get_terminal_size().columns:
        lines = graph.link_table(topology, cut)  # it would be wrapped beyond recognition
    print("\n".join(lines))


def _demo(arguments: argparse.Namespace) -> int:
    return demo.run(arguments.output, arguments.name)
