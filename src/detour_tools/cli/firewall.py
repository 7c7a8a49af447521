# SPDX-License-Identifier: GPL-2.0-or-later
"""detour-server firewall check: whether the host's own rules stand in the way."""

import argparse

from detour_tools import mproxy, runtime
from detour_tools.cli import common
from detour_tools.firewall import look


def add_to(commands: "argparse._SubParsersAction[common.Parser]", prog: str) -> None:
    """Add the command to the parser of the program ``prog``."""
    firewall = commands.add_parser("firewall", help="whether the host's rules stand in the way")
    check = firewall.add_subparsers(title="commands", metavar="COMMAND", required=True).add_parser(
        "check", help="look at the host's rules", description=(
            "Say which rules of this host drop detoured packets or clients' requests, with the "
            "command that lets them through. Nothing is changed, and no server needs to run. "
            "The exit status is 1 when something drops, 0 when nothing does, or only may."))
    check.add_argument("--port", metavar="PORT", type=common.whole_number(1, 65535),
                       default=mproxy.PORT,
                       help=f"UDP port of the requests (default {mproxy.PORT})")
    check.add_argument("--client", metavar="CIDR", action="append", type=common.network,
                       default=[], help="requests from here; repeatable (default: not known)")
    check.add_argument("--json", action="store_true", help="print JSON")
    check.set_defaults(run=lambda arguments: _check(arguments, prog))


def _check(arguments: argparse.Namespace, prog: str) -> int:
    runtime.need_capability("CAP_NET_ADMIN", prog)
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
