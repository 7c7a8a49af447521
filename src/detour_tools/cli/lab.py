# SPDX-License-Identifier: GPL-2.0-or-later
"""``detour-lab``: the emulated network on this machine."""

import argparse
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from detour_tools.cli import common
from detour_tools.errors import UserError

try:
    from detour_tools.lab import (
        demo,
        graph,
        network,
        session,
        signals,
        state,
        tools,
        vm,
        vmlab,
        walkthrough,
    )
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
  detour-lab vm                                 a shell on a kernel of our own, in a VM
"""

_VM_DESCRIPTION = """\
Boot a kernel in a virtual machine on this machine's own files, and run a command there, or a
shell. Output, errors and exit status are the command's own; when it ends, so does the VM.

The VM sees all files of this machine as they are, and what it changes is forgotten with it; only
in the folders named with --rw is really written. /run is empty. Each --bridge gives it a NIC in
that bridge, with an address by DHCP."""

_VM_EPILOG = """\
examples:
  detour-lab vm                                     a shell; Ctrl-D ends it
  detour-lab vm -- uname -r                         the kernel that 'make kernel' built
  detour-lab vm --kernel ./bzImage -- dmesg
  detour-lab vm --bridge br0 -- ip address          a NIC, and the address it got
  detour-lab vm --rw . -- sh -c 'dmesg >log'        leave a file here
  detour-lab vm --append 'dyndbg="file net/mptcp/* +p"'
  detour-lab vm --memory 4G --timeout 60 -- make check
  ip netns exec lab-client detour-lab vm --bridge br0      a bridge of a host of the lab

exit status: the command's; 124 after --timeout, 125 and more as of a shell, 1 when the VM fails
"""


def main() -> NoReturn:
    """Entry point of the console script."""
    common.run("detour-lab", _main)


def _main() -> int | None:
    arguments = _parser().parse_args()
    if arguments.name is None:
        arguments.name = {_demo: "demo", _walkthrough: walkthrough.DEFAULT_NAME}.get(
            arguments.call, network.DEFAULT_NAME)
    state.check_name(arguments.name)
    result: int | None = arguments.call(arguments)
    return result


def _parser() -> common.Parser:
    top = common.parser("detour-lab", _DESCRIPTION, _EPILOG)
    top.add_argument("--name", metavar="NAME",
                     help="which lab; several can be up at once (default: "
                          f"{network.DEFAULT_NAME}; demo and walkthrough have their own)")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND",
                                  parser_class=common.Parser)

    up = commands.add_parser("up", help="build the lab", allow_abbrev=False,
                             description="Build the lab; fine when it is already up just so.")
    up.set_defaults(call=_up)
    _add_topology_options(up)
    up.add_argument("--vm", action="store_true",
                    help="in a VM, on a kernel with netem; 'exec', 'status' and 'down' reach it, "
                         "and 'exec vm' is the VM itself")
    _add_vm_options(up)

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

    walk = commands.add_parser(
        "walkthrough", allow_abbrev=False, help="the path manager in the kernel, step by step",
        description="A client in a VM, on a kernel with our path manager, fetches a page by an "
                    "unmodified program; its second subflow goes through a detour. Tells what "
                    "happens, and checks that all is seen that should be.")
    walk.add_argument("--output", type=Path, default=Path("walkthrough"), metavar="DIR",
                      help="where captures and the kernel's log go (default: %(default)s)")
    walk.add_argument("--path-manager", choices=("kernel", "userspace"), default="kernel",
                      help="userspace: for a kernel without our path manager; the program is "
                           "wrapped by mptcpize then, and there is no trace")
    _add_vm_options(walk)
    walk.set_defaults(call=_walkthrough)

    machine = commands.add_parser(
        "vm", help="run a command, or a shell, on a kernel of our own in a VM",
        usage="detour-lab vm [options] [-- COMMAND...]", description=_VM_DESCRIPTION,
        epilog=_VM_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    machine.add_argument("--bridge", action="append", default=[], metavar="BR",
                         help="a NIC in this bridge of the network namespace the command is "
                              "called in (repeatable: eth0, eth1, ...)")
    _add_vm_options(machine)
    machine.add_argument("--rw", action="append", default=[], type=Path, metavar="DIR",
                         help="let the VM write to this folder (repeatable)")
    machine.add_argument("--timeout", type=common.number(1, 1e6), metavar="SECONDS",
                         help="end the VM after this time, with status 124")
    machine.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND",
                         help="what to run (default: your shell)")
    machine.set_defaults(call=_vm)
    return top


def _add_vm_options(target: argparse.ArgumentParser) -> None:
    target.add_argument("--kernel", type=Path, metavar="IMAGE",
                        help="the kernel's bzImage (default: what 'make kernel' built last)")
    target.add_argument("--cpus", type=common.whole_number(1, 64), metavar="N",
                        help="CPUs of the VM (default: 2)")
    target.add_argument("--memory", type=_memory, metavar="M",
                        help="its memory in MiB, or in GiB such as 2G (default: 1024)")
    target.add_argument("--append", action="append", metavar="PARAMETER",
                        help="a parameter for the kernel's command line (repeatable)")
    target.add_argument("--no-kvm", action="store_true",
                        help="emulate the CPU even where it could run the VM itself")


def _memory(text: str) -> int:
    found = re.fullmatch(r"(\d+)([MG]?)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"'{text}' is not MiB such as 1024, or GiB such as 2G")
    return common.whole_number(128, 1 << 20)(
        str(int(found[1]) * (1024 if found[2] == "G" else 1)))


def _vm_settings(arguments: argparse.Namespace) -> vm.Settings:
    for text in arguments.append or ():
        if text in {"--", ""} or "\n" in text or text.startswith(("init=", "root=")):
            raise UserError(f"--append '{text}' would keep the VM from booting", status=2)
    chosen = {name: value for name in ("cpus", "memory")
              if (value := getattr(arguments, name)) is not None}
    return vm.Settings(
        arguments.kernel or vm.default_kernel(), bridges=tuple(getattr(arguments, "bridge", ())),
        writable=tuple(getattr(arguments, "rw", ())), append=tuple(arguments.append or ()),
        accelerate=not arguments.no_kvm, **chosen)


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
    if arguments.vm:
        _up_in_vm(arguments)
        return
    given = [option for option in ("kernel", "cpus", "memory", "append", "no_kvm")
             if getattr(arguments, option)]
    if given:
        raise UserError(f"--{given[0].replace('_', '-')} is for a lab in a VM", "add --vm",
                        status=2)
    lab = network.Lab(_topology(arguments), arguments.name)
    built = lab.up()
    print(f"the lab '{lab.name}' {'is up' if built else 'was up already'}: {lab.topology.title}")
    _print_drawing(lab.topology, frozenset())
    if not lab.netem:
        print(f"note: {network.NO_NETEM}")


def _up_in_vm(arguments: argparse.Namespace) -> None:
    lab = vmlab.VmLab(_topology(arguments), arguments.name)
    with signals.leading_out():
        built = lab.up(_vm_settings(arguments), _topology_options(arguments))
    print(f"the lab '{lab.name}' {'is up' if built else 'was up already'} in a VM: "
          f"{lab.topology.title}")
    _print_drawing(lab.topology, frozenset())


def _topology_options(arguments: argparse.Namespace) -> list[str]:
    options = ["--config", arguments.config, "--l2-loss", str(arguments.l2_loss),
               "--detours", str(arguments.detours)]
    if arguments.l2_delay is not None:
        options += ["--l2-delay", str(arguments.l2_delay)]
    for link, rate in arguments.rate:
        options += ["--rate", f"{link}={rate}"]
    return options


def _in_vm(arguments: argparse.Namespace, *command: str) -> int | None:
    """Run this program's command in the lab's VM; None when the lab is not in a VM."""
    network.need_root()
    lab = vmlab.VmLab.attach(arguments.name)
    if lab is None:
        return None
    return session.attach(lab.machine.folder, ["detour-lab", "--name", lab.name, *command],
                          env=network.environment())


def _vm(arguments: argparse.Namespace) -> int:
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    settings = _vm_settings(arguments)
    if command and shutil.which(command[0], path=tools.search_path()) is None:
        if "/" in command[0] and os.path.exists(command[0]):
            raise UserError(f"{command[0]} is not executable", status=126)
        raise UserError(f"there is no command '{command[0]}'", status=127)
    deadline = None if arguments.timeout is None else time.monotonic() + arguments.timeout

    def check() -> None:
        if deadline is not None and time.monotonic() > deadline:
            raise UserError(f"the VM was ended after {arguments.timeout:g} s", status=124)

    with signals.leading_out(), vm.Machine.start(settings) as machine:
        return session.attach(
            machine.folder, command or [os.environ.get("SHELL") or "/bin/sh"],
            env=network.environment(), on_turn=check,
            on_note=lambda note: print(f"detour-lab: note: {note}", file=sys.stderr))


def _down(arguments: argparse.Namespace) -> None:
    vm.remove_leftovers()
    known = state.load(arguments.name)
    topology = known.topology if known else reference_topology()
    # What is remembered can be lost, or about another one that began and was killed.
    kind = vmlab.VmLab if vm.lab_machine(arguments.name).alive() else network.Lab
    kind(topology, arguments.name).down()
    print(f"the lab '{arguments.name}' is down")


def _status(arguments: argparse.Namespace) -> int | None:
    status = _in_vm(arguments, "status", *(["--json"] if arguments.json else []))
    if status is not None:
        return status
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
        return None
    print(f"the lab '{lab.name}' is up: {lab.topology.title}")
    console = Console(highlight=False)
    console.print(_host_table(hosts))
    console.print(_link_table(lab, links))
    if not lab.netem:
        print(f"note: {network.NO_NETEM}")
    return None


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


def _exec(arguments: argparse.Namespace) -> int:
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        raise UserError("no command given", "detour-lab exec HOST -- COMMAND...", status=2)
    program = command[0]
    network.need_root()
    inner = vmlab.VmLab.attach(arguments.name)
    if inner is not None:
        command = vmlab.inside_vm(inner.namespace(arguments.host), command)
    else:
        host = network.Lab.attach(arguments.name).host(arguments.host)
    if shutil.which(program, path=tools.search_path()) is None:
        raise UserError(f"there is no command '{program}'", status=127)
    if inner is not None:
        return session.attach(inner.machine.folder, command, env=network.environment())
    # Replacing this process leaves exit status, terminal and signals to the command itself.
    argv = host.argv(command)
    os.execvpe(argv[0], argv, network.environment())  # noqa: S606


def _graph(arguments: argparse.Namespace) -> int | None:
    known = state.load(arguments.name)
    if known is not None and known.complete and known.vm:
        return _in_vm(arguments, "graph")
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
    return None


def _print_drawing(topology: Topology, cut: frozenset[str]) -> None:
    lines = graph.draw(topology, cut)
    if sys.stdout.isatty() and max(map(len, lines)) > shutil.get_terminal_size().columns:
        lines = graph.link_table(topology, cut)  # it would be wrapped beyond recognition
    print("\n".join(lines))


def _demo(arguments: argparse.Namespace) -> int:
    return demo.run(arguments.output, arguments.name)


def _walkthrough(arguments: argparse.Namespace) -> int:
    return walkthrough.run(arguments.output, _vm_settings(arguments), arguments.name,
                           path_manager=arguments.path_manager)
