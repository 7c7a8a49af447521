# SPDX-License-Identifier: GPL-2.0-or-later
"""detour-client netlink: the kernel's detour path manager by hand."""

import argparse
import json
import sys
from typing import Any

from detour_tools.cli import common
from detour_tools.endpoint import Endpoint, parse_endpoint, unmapped
from detour_tools.errors import UserError
from detour_tools.pathmanager.detour_codec import Entry, Name, NatName, VpnName
from detour_tools.pathmanager.detour_family import DetourFamily, told

SUMMARY = "speak to the kernel's detour path manager by hand"

_LONGEST_LIFETIME = 7 * 24 * 3600

EPILOG = """\
The kernel keeps a list of entries in each network namespace. A NAT entry says that a detour's
port leads to a remote: the kernel joins its connections to that remote there. A VPN entry names
an interface: all connections are joined at the remote's own address by that interface. Needs the
project's kernel (kernel/README.md). The daemon looks after the entries of its own detours; those
that you add for others it leaves alone.

examples:
  detour-client netlink list
  detour-client netlink add --detour 192.0.2.1:80 --remote 203.0.113.5:80 --lifetime 600
  detour-client netlink add --detour [2001:db8::1]:80 --remote [2001:db8::5]:80
  detour-client netlink add --interface tun0
  detour-client netlink stat
  detour-client netlink monitor --count 1        wait for a connection that wants a detour
  detour-client netlink del --detour 192.0.2.1:80 --remote 203.0.113.5:80
  detour-client netlink echo && dmesg | tail     the entries as the kernel sees them

A detour port leads somewhere once its detour has a mapping: see detour-client request.
"""


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Add echo, list, add, del, stat and monitor to the parser of ``netlink``."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, call: object, summary: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:] + ".",
            allow_abbrev=False)
        made.set_defaults(call=call)
        return made

    command("echo", _echo, "have the kernel write its entries to the kernel log, for dmesg")
    listing = command("list", _list, "list the kernel's entries")
    adding = command("add", _add, "add an entry, or renew the lifetime of one that is there")
    deleting = command("del", _delete, "delete an entry; subflows that were made by it live on")
    stat = command("stat", _stat, "show what was made of the entries: subflows, bytes, "
                   "round-trip time; name one, or none for all")
    for naming in (adding, deleting, stat):
        naming.add_argument("--detour", metavar="IP:PORT",
                            help="the detour's address and port; IPv6 as [ADDRESS]:PORT")
        naming.add_argument("--remote", metavar="IP:PORT", help="where that port leads")
        naming.add_argument("--interface", metavar="NAME",
                            help="a VPN entry, instead: the interface to leave by")
    adding.add_argument("--lifetime", type=common.whole_number(1, _LONGEST_LIFETIME),
                        metavar="SECONDS",
                        help="how long it lasts, a week at most (default: for ever)")
    monitor = command("monitor", _monitor, "show the kernel's requests for detours as they come, "
                      "one a line, until Ctrl-C")
    monitor.add_argument("--count", type=common.whole_number(1, 1 << 31), metavar="N",
                         help="end after so many")
    monitor.add_argument("--timeout", type=common.number(0, 1e9), metavar="SECONDS",
                         help="end after so long; exit status 1 if --count were not reached")
    for printing in (listing, stat, monitor):
        printing.add_argument("--json", action="store_true", help="print it for programs")


def _echo(_: argparse.Namespace) -> None:
    DetourFamily().echo()
    print("the kernel wrote its entries to its log: see dmesg | tail")


def _list(arguments: argparse.Namespace) -> None:
    entries = DetourFamily().entries()
    if arguments.json:
        common.print_json({"entries": [_as_json(entry) for entry in entries]})
        return
    if not entries:
        print("no entries")
        return
    print(f"{'DETOUR':<24} {'REMOTE':<24} LIFETIME")
    for entry in entries:
        print(f"{_columns(entry.name)} {_lifetime(entry)}")


def _add(arguments: argparse.Namespace) -> None:
    name = _name(arguments)
    DetourFamily().add(name, arguments.lifetime)
    print(f"added: {told(name)}"
          + (f", for {arguments.lifetime} s" if arguments.lifetime else ", for ever"))


def _delete(arguments: argparse.Namespace) -> None:
    name = _name(arguments)
    DetourFamily().delete(name)
    print(f"deleted: {told(name)}")


def _stat(arguments: argparse.Namespace) -> None:
    family = DetourFamily()
    if (arguments.detour, arguments.remote, arguments.interface) == (None, None, None):
        entries = family.stats()
    else:
        entries = [family.stat(_name(arguments))]
    if arguments.json:
        common.print_json({"entries": [_as_json(entry) | _stats_as_json(entry)
                                       for entry in entries]})
        return
    if not entries:
        print("no entries")
        return
    print(f"{'DETOUR':<24} {'REMOTE':<24} {'MADE':>6} {'FAILED':>6} {'LIVE':>6} {'SENT':>13} "
          f"{'RECEIVED':>13} {'RTT':>9}")
    for entry in entries:
        stats = _stats_as_json(entry)
        rtt = "-" if stats["srtt_ms"] is None else f"{stats['srtt_ms']:.1f} ms"
        print(f"{_columns(entry.name)} {stats['made']:>6} {stats['failed']:>6} "
              f"{stats['live']:>6} {stats['bytes_sent']:>13,} {stats['bytes_received']:>13,} "
              f"{rtt:>9}")


def _monitor(arguments: argparse.Namespace) -> int:
    heard = 0
    for remote in DetourFamily().requests(arguments.timeout):
        if remote is None:
            print("detour-client: requests came too fast: some were missed", file=sys.stderr)
            continue
        print(json.dumps({"remote": str(remote)}) if arguments.json
              else f"a connection to {remote} wants detours", flush=True)
        heard += 1
        if heard == arguments.count:
            return 0
    if arguments.count is not None:
        raise UserError(f"{heard} of {arguments.count} requests came within "
                        f"{arguments.timeout:g} s")
    return 0


def _name(arguments: argparse.Namespace) -> Name:
    if arguments.interface is not None and arguments.detour is None and arguments.remote is None:
        return VpnName(arguments.interface)
    if arguments.interface is None and arguments.detour and arguments.remote:
        return NatName(_endpoint(arguments.detour), _endpoint(arguments.remote))
    raise UserError("which entry?", "give --detour IP:PORT and --remote IP:PORT, or --interface "
                    "NAME alone", status=2)


def _endpoint(text: str) -> Endpoint:
    address, port = parse_endpoint(text)
    return Endpoint(unmapped(address), port)


def _columns(name: Name) -> str:
    if isinstance(name, VpnName):
        return f"{'interface ' + name.interface:<24} {'any':<24}"
    return f"{name.detour!s:<24} {name.remote!s:<24}"


def _lifetime(entry: Entry) -> str:
    return "for ever" if entry.lifetime is None else f"{entry.lifetime} s"


def _as_json(entry: Entry) -> dict[str, Any]:
    nat = entry.name if isinstance(entry.name, NatName) else None
    return {"detour": str(nat.detour) if nat else None,
            "remote": str(nat.remote) if nat else None,
            "interface": entry.name.interface if isinstance(entry.name, VpnName) else None,
            "lifetime_s": entry.lifetime}


def _stats_as_json(entry: Entry) -> dict[str, Any]:
    stats = entry.stats
    if stats is None:
        raise UserError(f"the kernel told no figures of {told(entry.name)}")
    return {"made": stats.made, "failed": stats.failed, "live": stats.live,
            "bytes_sent": stats.bytes_sent, "bytes_received": stats.bytes_received,
            "srtt_ms": None if stats.srtt_us is None else stats.srtt_us / 1000}
