# SPDX-License-Identifier: GPL-2.0-or-later
"""detour-client: opens further subflows of this host's MPTCP connections through detours."""

import sys

try:
    import argparse
    import asyncio
    import time
    from pathlib import Path
    from typing import NoReturn

    from rich.console import Console, RenderableType
    from rich.live import Live

    from detour_tools import config, control, log, mproxy
    from detour_tools.cli import common, netlink
    from detour_tools.client.check import check_host
    from detour_tools.client.given import GivenDetours
    from detour_tools.client.lookup import resolve
    from detour_tools.client.request import request_mapping
    from detour_tools.client.service import PROGRAM, ClientService
    from detour_tools.client.settings import ClientSettings
    from detour_tools.client.view import render
    from detour_tools.client.wrap import exec_over_mptcp
    from detour_tools.errors import UserError
    from detour_tools.pathmanager.choose import choose
except KeyboardInterrupt:  # too early for common.run()
    sys.exit(130)

_EPILOG = """\
examples:
  detour-client check detour.example.net         is everything there?
  detour-client daemon detour.example.net        use this detour, until Ctrl-C
  detour-client run -- curl https://example.com  an unmodified program over MPTCP
  detour-client status --watch                   see the subflows at work
  detour-client request 192.0.2.1 203.0.113.5:80 a mapping by hand
  detour-client netlink --help                   the kernel's own path manager, by hand
"""

_DAEMON_EPILOG = """\
A DETOUR is a name or an IPv4 address of a host that runs detour-server, :PORT if that is not
45672. One that cannot be used is named in the log and in "detour-client status", and the others
are used; names are looked up until they are known. Settings may stand in a TOML file (--config),
under the options' long names, such as
  detours = ["detour.example.net"]
  max-subflows = 2
and the command line overrides them. On the project's own kernel the kernel joins by itself, and
with --upgrade-tcp programs need no "detour-client run"; on any other the daemon joins. MPTCP
connections made before the daemon started keep the path manager they were born with. At exit
connections keep the subflows they have.
"""


def main() -> NoReturn:
    """The console script."""
    common.run("detour-client", _main)


def _main() -> int | None:
    arguments = _parser().parse_args()
    status: int | None = arguments.call(arguments)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = common.parser(
        "detour-client",
        "Give this host's MPTCP connections further subflows, through detour hosts.", _EPILOG)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, call: object, summary: str, epilog: str = ""
                ) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".",
            epilog=epilog, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter)
        made.set_defaults(call=call)
        return made

    daemon = command("daemon", _daemon, "watch connections and open subflows through detours",
                     _DAEMON_EPILOG)
    daemon.add_argument("detours", nargs="*", metavar="DETOUR", help="name or address[:port]")
    daemon.add_argument("--config", type=Path, metavar="FILE", help="TOML file of settings")
    daemon.add_argument("--check-config", action="store_true",
                        help="check the settings and exit: 0 good, 2 not")
    daemon.add_argument("--path-manager", choices=("auto", "userspace", "kernel"),
                        help="who joins: this daemon by any kernel's userspace path manager, the "
                             "project's kernel, or that where it runs (default auto)")
    daemon.add_argument("--upgrade-tcp", action="store_true", default=None,
                        help="have the project's kernel make MPTCP sockets of programs' TCP "
                             "sockets, as long as the daemon runs")
    daemon.add_argument("--max-subflows", type=common.whole_number(1, 8), metavar="N",
                        help="subflows through detours a connection at most (default 2)")
    daemon.add_argument("--prefer", choices=("rtt", "order"),
                        help="which detours first: the nearest, or as given (default rtt)")
    daemon.add_argument("--include", action="append", type=common.network, metavar="CIDR",
                        help="use detours for these remotes even though they are on link; "
                             "repeatable")
    daemon.add_argument("--exclude", action="append", type=common.network, metavar="CIDR",
                        help="use no detour for these remotes; repeatable")
    daemon.add_argument("--probe-interval", type=common.number(1, 86400), metavar="SECONDS",
                        help="how often to ask a silent detour again (default 30)")
    daemon.add_argument("--control-group", metavar="GROUP",
                        help="members of this group may ask for the status, besides root")
    common.add_verbosity(daemon)

    request = command("request", _request, "ask a detour for one mapping and print it",
                      "Then TCP to the detour's port reaches the remote: of any kind where the "
                      "detour runs\nwith --relay tcp, for example\n"
                      "  curl --connect-to ::DETOUR:PORT http://REMOTE/\n"
                      "By default a detour relays joins of MPTCP connections only, and this is "
                      "refused.")
    request.add_argument("detour", metavar="DETOUR", help="name or address[:port]")
    request.add_argument("remote", metavar="REMOTE:PORT", help="where the mapping leads")
    request.add_argument("--port", type=common.whole_number(0, 65535), metavar="N",
                         help="detour port to propose, 0 for any (default: the remote's)")
    request.add_argument("--json", action="store_true", help="print it for programs")

    status = command("status", _status, "show detours, connections and their subflows")
    how = status.add_mutually_exclusive_group()
    how.add_argument("--watch", action="store_true", help="keep showing, until Ctrl-C")
    how.add_argument("--json", action="store_true", help="print it for programs")

    run = command("run", _run, "run a dynamically linked program over MPTCP",
                  "Go programs, which are not dynamically linked, are reached by GODEBUG.")
    run.add_argument("words", nargs=argparse.REMAINDER, metavar="-- CMD...", help="the program")

    by_hand = command("netlink", None, netlink.SUMMARY, netlink.EPILOG)
    netlink.add_commands(by_hand)

    check = command("check", _check, "say whether this host has what is needed, line by line")
    check.add_argument("detours", nargs="*", metavar="DETOUR",
                       help="detours to ask (default: the running daemon's)")
    check.add_argument("--remote", metavar="REMOTE:PORT",
                       help="connect to this server and say whether it speaks Multipath TCP, and "
                       "whether joins get to it through each detour (default: only ask detours "
                       "for a mapping)")
    check.add_argument("--json", action="store_true", help="print it for programs")
    return parser


def _daemon(arguments: argparse.Namespace) -> None:
    settings = config.load(ClientSettings, arguments.config, {
        "detours": tuple(arguments.detours) or None,
        "path_manager": arguments.path_manager,
        "upgrade_tcp": arguments.upgrade_tcp,
        "max_subflows": arguments.max_subflows,
        "prefer": arguments.prefer,
        "include": None if arguments.include is None else tuple(arguments.include),
        "exclude": None if arguments.exclude is None else tuple(arguments.exclude),
        "probe_interval": arguments.probe_interval,
        "control_group": arguments.control_group,
    })
    if not settings.detours:
        raise UserError("no detour is given", "detour-client daemon DETOUR", status=2)
    detours = GivenDetours(settings.detours)
    # Who has just written a wrong one is told; who starts with it has the others used.
    if detours.wrong and (arguments.check_config or not detours.hopeful):
        raise UserError("; ".join(detours.wrong), status=2)
    if arguments.check_config:
        print("the settings are good")
        return
    log.configure(arguments.verbosity)
    path_manager = choose(settings.path_manager, settings.max_subflows,
                          upgrade_tcp=settings.upgrade_tcp)
    asyncio.run(ClientService(detours, settings, path_manager).run())


def _request(arguments: argparse.Namespace) -> None:
    detour = resolve(arguments.detour, mproxy.PORT)
    remote = resolve(arguments.remote)
    proposed = remote.port if arguments.port is None else arguments.port
    port, seconds = request_mapping(detour, remote, proposed)
    if arguments.json:
        common.print_json({"detour": str(detour.address), "detour_port": port,
                           "remote": str(remote), "proposed_port": proposed,
                           "rtt_ms": round(seconds * 1000, 3)})
    else:
        print(f"{detour.address}:{port} leads to {remote}")


def _status(arguments: argparse.Namespace) -> None:
    if arguments.json:
        common.print_json(control.call(PROGRAM, "status"))
        return
    console = Console()
    if not console.is_terminal:
        console.width = 200  # piped: let no column be cut
    if arguments.watch and console.is_terminal:
        with Live(_shown(), auto_refresh=False) as live:
            while True:
                time.sleep(1)
                live.update(_shown(), refresh=True)
    else:
        console.print(_shown())
        while arguments.watch:
            time.sleep(1)
            console.print(_shown())


def _shown() -> RenderableType:
    found = control.call(PROGRAM, "status")
    with control.understood(PROGRAM):
        return render(found)


def _run(arguments: argparse.Namespace) -> NoReturn:
    words = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
    if not words:
        raise UserError("no program is given", "detour-client run -- CMD...", status=2)
    exec_over_mptcp(words)


def _check(arguments: argparse.Namespace) -> int:
    remote = resolve(arguments.remote) if arguments.remote else None
    findings = []
    for finding in check_host(tuple(arguments.detours), remote):
        findings.append(finding)
        if not arguments.json:
            mark = "ok  " if finding.ok else "FAIL" if finding.needed else "note"
            mend = f" -> {finding.mend}" if finding.mend and not finding.ok else ""
            print(f"{mark}  {finding.what}: {finding.found}{mend}")
            sys.stdout.flush()
    good = all(finding.ok or not finding.needed for finding in findings)
    if arguments.json:
        common.print_json({"ok": good, "findings": [
            {"what": f.what, "ok": f.ok, "needed": f.needed, "found": f.found, "mend": f.mend}
            for f in findings]})
    return 0 if good else 1
