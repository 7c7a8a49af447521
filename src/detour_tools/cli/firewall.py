# SPDX-License-Identifier: GPL-2.0-or-later
"""detour-server firewall check, open, close: the host's own rules, where they stand in the way."""

import argparse
import os
from collections.abc import Callable
from ipaddress import IPv4Network

from detour_tools import mproxy, runtime
from detour_tools.cli import common
from detour_tools.errors import UserError
from detour_tools.firewall import flows, look, requests
from detour_tools.firewall.managers import KINDS
from detour_tools.firewall.opening import Change


def add_to(commands: "argparse._SubParsersAction[common.Parser]", prog: str) -> None:
    """Add the command to the parser of the program ``prog``."""
    firewall = commands.add_parser(
        "firewall", help="whether the host's rules stand in the way, and opening them"
    ).add_subparsers(title="commands", metavar="COMMAND", required=True)

    check = firewall.add_parser("check", help="look at the host's rules", description=(
        "Say which rules of this host drop detoured packets or clients' requests, with the "
        "command that lets them through. Nothing is changed, and no server needs to run. "
        "The exit status is 1 when something drops, 0 when nothing does, or only may."))
    _add_port(check)
    check.add_argument("--client", metavar="CIDR", action="append", type=common.network,
                       default=[], help="requests from here; repeatable (default: not known)")
    check.add_argument("--json", action="store_true", help="print JSON")

    opened = firewall.add_parser("open", help="add rules that let the detour's packets through",
                                 description=(
        "Add rules of our own to what of this host's firewall drops the detour's packets; what "
        "is open stays as it is. Prints what was changed, a line each.")
    ).add_subparsers(title="what to let through", metavar="WHAT", required=True)
    for_flows = opened.add_parser("flows", help="mapped flows, in forward chains", description=(
        "Add a rule for mapped flows to each forward chain that drops them, of nftables and of "
        "both kinds of iptables. It lasts until the host's rules are loaded again."))
    for_requests = opened.add_parser("requests", help="clients' requests", description=(
        "Let requests from these clients in, now and at boot, and take away what an earlier "
        "call opened for others."))
    _add_port(for_requests)
    for_requests.add_argument("--client", metavar="CIDR", action="append", type=common.network,
                              required=True, help="from here; repeatable")
    for_requests.add_argument("--by", metavar="FIREWALL", choices=["auto", *KINDS],
                              default="auto", help="auto (which one runs here; default), "
                              + ", ".join(KINDS))
    closed = firewall.add_parser("close", help="remove what 'open' added", description=(
        "Remove the rules that 'open' added, and no other. Prints what was changed."))
    closed.add_argument("what", metavar="WHAT", nargs="?", choices=["flows", "requests"],
                        help="flows or requests (default: both)")
    for changing in (for_flows, for_requests, closed):
        changing.add_argument("-n", "--dry-run", action="store_true",
                              help="only print what would be changed")
        changing.add_argument("--json", action="store_true", help="print JSON")

    for command, act in ((check, _check), (for_flows, _open_flows),
                         (for_requests, _open_requests), (closed, _close)):
        command.set_defaults(run=lambda arguments, act=act: _run(act, arguments, prog))


def _add_port(command: argparse.ArgumentParser) -> None:
    command.add_argument("--port", metavar="PORT", type=common.whole_number(1, 65535),
                         default=mproxy.PORT,
                         help=f"UDP port of the requests (default {mproxy.PORT})")


def _run(act: Callable[[argparse.Namespace], Change | int], arguments: argparse.Namespace,
         prog: str) -> int:
    runtime.need_capability("CAP_NET_ADMIN", prog)
    os.umask(0o022)  # whatever root's is: users may look at what systemd reads
    done = act(arguments)
    if isinstance(done, int):
        return done
    if arguments.json:
        common.print_json({"changed": bool(done.added or done.removed), "added": done.added,
                           "removed": done.removed})
    else:
        for line in [*(f"added: {each}" for each in done.added),
                     *(f"removed: {each}" for each in done.removed)] or ["nothing to change"]:
            print(line)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    found, unread = look.findings(arguments.port, arguments.client)
    texts = [each.text for each in found] + unread
    # What cannot be read may drop everything.
    drops = bool(unread) or any(each.certain for each in found)
    if arguments.json:
        common.print_json({"drops": drops, "warnings": texts})
    else:
        for text in texts or ["no rule of this host stands in the way"]:
            print(text)
    return int(drops)


def _open_flows(arguments: argparse.Namespace) -> Change:
    return flows.open_way(only_say=arguments.dry_run)


def _open_requests(arguments: argparse.Namespace) -> Change:
    clients = [each for each in arguments.client if isinstance(each, IPv4Network)]
    if len(clients) < len(arguments.client):
        raise UserError("requests come by IPv4", "give --client IPv4 addresses or networks")
    return requests.open_way(arguments.by, arguments.port, clients, only_say=arguments.dry_run)


def _close(arguments: argparse.Namespace) -> Change:
    done = Change()
    for what, close in (("flows", flows.close_way), ("requests", requests.close_way)):
        if arguments.what in (None, what):
            done += close(only_say=arguments.dry_run)
    return done
