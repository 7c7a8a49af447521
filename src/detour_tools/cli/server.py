# SPDX-License-Identifier: GPL-2.0-or-later
"""detour-server: serve, or ask the server that runs here."""

import sys

try:
    import argparse
    import asyncio
    import dataclasses
    import signal
    from pathlib import Path
    from typing import Any, NoReturn

    from rich.console import Console
    from rich.table import Table

    from detour_tools import config, control, log
    from detour_tools.cli import common, firewall
    from detour_tools.nat.choose import CHOICES
    from detour_tools.server.commands import COLUMNS
    from detour_tools.server.service import PROGRAM, Server
    from detour_tools.server.settings import Settings
    from detour_tools.server.status import Status
except KeyboardInterrupt:  # too early for common.run()
    sys.exit(130)

_DESCRIPTION = """\
Be a detour: answer clients that ask for a mapping, and translate their TCP flows.

Without a command it serves, in the foreground, until SIGINT or SIGTERM; then it removes its NAT
rules and puts the forwarding switch back. Each request is a line on standard output; warnings
and errors go to standard error."""

_EPILOG = """\
examples:
  detour-server                                  clients with private addresses, to public remotes
  detour-server --allow-remote 10.0.0.0/8        remotes of a private network, too
  detour-server --allow-client 198.51.100.0/24   these clients, and no others
  detour-server --config /etc/detour-tools/server.toml
                                                 option names are the keys: rate = 50
                                                 SIGHUP reads who, where to, rates and limits again
  detour-server status                           how is it?
  detour-server list --json                      its mappings, for a program
  detour-server flush --client 10.0.1.1          drop a client's mappings and cut their flows
  detour-server firewall check                   do rules of this host stand in the way?
  detour-server firewall open flows              then let detoured flows through
  detour-server firewall close                   take away what was opened
"""


def main() -> NoReturn:
    """Run the console script."""
    common.run(PROGRAM, _main)


def _main() -> int | None:
    arguments = _parser().parse_args()
    result: int | None = arguments.run(arguments)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = common.parser(PROGRAM, _DESCRIPTION, _EPILOG)
    parser.set_defaults(run=_serve)
    default = Settings()
    where = parser.add_argument_group("serving")
    where.add_argument("--listen", metavar="ADDRESS[:PORT]",
                       help=f"UDP address and port to listen on (default {default.listen})")
    where.add_argument("--backend", choices=CHOICES,
                       help="what translates: nftables, iptables (legacy), or the first that "
                            f"works (default {default.backend})")
    where.add_argument("--relay", choices=("joins", "tcp"),
                       help="what is translated: TCP subflows that join an MPTCP connection, or "
                            f"any TCP (default {default.relay})")
    where.add_argument("--router", choices=("auto", "yes", "no"),
                       help="are IPv4 packets forwarded that are not of mapped flows? auto: where "
                            "net.ipv4.ip_forward was on before; no: never; yes: as the host's "
                            f"own rules say (default {default.router})")
    where.add_argument("--control-group", metavar="GROUP",
                       help="group that may use status, list and flush, besides root")
    where.add_argument("--config", metavar="FILE", type=Path,
                       help="TOML file with any of these options; the command line overrides it")
    where.add_argument("--check-config", action="store_true",
                       help="check the options and the file, and exit")
    common.add_verbosity(parser)
    policy = parser.add_argument_group("policy")
    policy.add_argument("--allow-client", metavar="CIDR", action="append", type=common.network,
                        help="serve these clients only; repeatable (default: private addresses)")
    policy.add_argument("--allow-remote", metavar="CIDR", action="append", type=common.network,
                        help="private remotes, and those on this host's links, that clients may "
                             "reach; repeatable (default: none)")
    policy.add_argument("--deny-remote", metavar="CIDR", action="append", type=common.network,
                        help="remotes that no client may reach, even where --allow-remote has "
                             "them; repeatable (default: none)")
    policy.add_argument("--deny-port", metavar="PORT[-PORT]", action="append",
                        help="ports of remotes that no client may reach; repeatable "
                             f"(default: {', '.join(default.deny_port)}, so that no spam leaves)")
    policy.add_argument("--own-address", metavar="CIDR", action="append", type=common.network,
                        help="public addresses that a router or provider before this host "
                             "translates to it: no remotes, as its own; repeatable "
                             "(default: none)")
    policy.add_argument("--forbid-port", metavar="PORT[-PORT]", action="append",
                        help="detour ports that no client gets, such as those that this host "
                             "forwards by rules of its own; repeatable (default: none)")
    policy.add_argument("--rate", metavar="REQUESTS_PER_SECOND", type=common.number(0, 1e6),
                        help=f"of one client, 0 is no limit (default {default.rate:g})")
    policy.add_argument("--max-per-client", metavar="N", type=common.whole_number(1, 65535),
                        help=f"mappings of one client (default {default.max_per_client})")
    policy.add_argument("--max-mappings", metavar="N", type=common.whole_number(1, 10_000_000),
                        help=f"mappings in all (default {default.max_mappings})")
    policy.add_argument("--max-flows-per-client", metavar="N",
                        type=common.whole_number(0, 10_000_000),
                        help="flows of one client at a time, 0 is no limit "
                             f"(default {default.max_flows_per_client})")
    policy.add_argument("--max-flows", metavar="N", type=common.whole_number(0, 100_000_000),
                        help="flows at a time in all, 0 is no limit (default: three quarters of "
                             "net.netfilter.nf_conntrack_max)")
    policy.add_argument("--idle-timeout", metavar="SECONDS", type=common.number(1, 1e9),
                        help="remove a mapping without flow and request for so long "
                             f"(default {default.idle_timeout:g})")

    commands = parser.add_subparsers(title="commands, to the server that runs here",
                                     metavar="COMMAND")
    status = commands.add_parser("status", help="how the server is", description=(
        "Show what the running server does, has done and has refused."))
    status.set_defaults(run=_status)
    listing = commands.add_parser("list", help="its mappings", description=(
        "List the mappings of the running server."))
    listing.set_defaults(run=_list)
    flush = commands.add_parser("flush", help="drop mappings", description=(
        "Drop mappings of the running server and cut their flows: all, or those given."))
    flush.add_argument("--client", metavar="ADDRESS", help="of this client only")
    flush.add_argument("--remote", metavar="ADDRESS:PORT", help="to this remote only")
    flush.set_defaults(run=_flush)
    firewall.add_to(commands, PROGRAM)
    for command in (status, listing, flush):
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _serve(arguments: argparse.Namespace) -> None:
    def load() -> Settings:
        return config.load(Settings, arguments.config, overrides)

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the server has its own handler
    overrides = {field.name: getattr(arguments, field.name)
                 for field in dataclasses.fields(Settings)}
    overrides = {name: tuple(value) if isinstance(value, list) else value
                 for name, value in overrides.items()}
    settings = load()
    if arguments.check_config:
        print("the configuration is fine")
        return
    log.configure(arguments.verbosity)
    asyncio.run(Server(settings, load).run())


def _status(arguments: argparse.Namespace) -> None:
    found = control.call(PROGRAM, "status")
    if arguments.json:
        common.print_json(found)
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    with control.understood(PROGRAM):
        for name, value in Status.from_json(found).rows():
            table.add_row(name, str(value))
    Console().print(table, markup=False)


def _list(arguments: argparse.Namespace) -> None:
    mappings = _all_mappings()
    if arguments.json:
        with control.understood(PROGRAM):
            named = [dict(zip(COLUMNS, mapping, strict=True)) for mapping in mappings]
        common.print_json({"mappings": named})
        return
    if not mappings:
        print("no mappings")
        return
    # Not a Rich table: it would take a minute for 100,000 rows.
    with control.understood(PROGRAM):
        lines = [f"{client:<16} {detour_port:>11}  {remote:<22} {unused:>6.0f} s"
                 for client, detour_port, remote, unused in mappings]
    print(f"{'CLIENT':<16} {'DETOUR PORT':>11}  {'REMOTE':<22} {'UNUSED':>8}")
    print("\n".join(lines))


def _all_mappings() -> list[list[Any]]:
    mappings: list[list[Any]] = []
    place = {"after": 0}
    while True:
        page = control.call(PROGRAM, "list", **place)
        with control.understood(PROGRAM):
            if not isinstance(page["mappings"], list) or page["columns"] != list(COLUMNS):
                raise TypeError("no list")
            mappings += page["mappings"]
            after, until = page["next"], page["until"]
            if after is None:
                return mappings
            if not place["after"] < after <= until <= place.get("until", until):
                raise ValueError("the pages do not end")
        place = {"after": after, "until": until}


def _flush(arguments: argparse.Namespace) -> None:
    result = control.call(PROGRAM, "flush", client=arguments.client, remote=arguments.remote)
    if arguments.json:
        common.print_json(result)
        return
    with control.understood(PROGRAM):
        text = f"flushed {result['flushed']} mappings"
    print(text)
