# SPDX-License-Identifier: GPL-2.0-or-later
"""Asks the host for its rules, and has them judged. It never changes one, nor loads a table."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Collection, Iterable, Iterator
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

from detour_tools.endpoint import Network
from detour_tools.errors import UserError
from detour_tools.firewall import forwarders, judge, legacy, nft
from detour_tools.firewall.judge import Chain, Finding
from detour_tools.netlink.nf_tables import NfTables

_LEGACY_TABLES = Path("/proc/net/ip_tables_names")
# Where a packet may be dropped, or left untracked; NAT's chains do neither.
_TABLES = ("raw", "mangle", "filter", "security")
_SECONDS = 30


def warnings(port: int, sources: Iterable[Network] = ()) -> list[str]:
    """One line for each of findings(), and for what cannot be read. Blocks."""
    found, unread = findings(port, sources)
    return [each.text for each in found] + unread


def findings(port: int, sources: Iterable[Network] = ()) -> tuple[list[Finding], list[str]]:
    """What of the host's firewall stands in the detour's way, and what cannot be read. Blocks.

    Of ``sources`` only those of IPv4 count, as requests do.
    """
    found, unread = chains()
    clients = [source for source in sources if isinstance(source, IPv4Network)]
    return judge.findings(found, port, clients), unread


def chains(*, to_change: bool = False) -> tuple[list[Chain], list[str]]:
    """All base chains of this host, and a line for each thing that cannot be read.

    ``to_change``: as of chains_of().
    """
    try:
        objects = nft.parse(ruleset())
    except (OSError, ValueError) as error:
        unread = f"cannot tell whether nftables rules drop detoured packets: {error}"
        if to_change:
            raise UserError(unread) from None
        found, more = chains_of([])
        return found, [unread, *more]
    return chains_of(objects, to_change=to_change)


def chains_of(objects: list[dict[str, Any]], *, to_change: bool = False
              ) -> tuple[list[Chain], list[str]]:
    """The same, where ``objects`` are the rules of nftables.

    ``to_change``: rules that nft can show are asked of iptables-nft as well, if those are its own,
    as it has numbers for them; and what cannot be read raises UserError.
    """
    unread = []
    found = []
    read = []
    try:
        for tool, table, text in listings(objects, everything=to_change):
            found += legacy.chains(text, tool, table)
            read += [table] if tool == "iptables-nft" else []
    except PermissionError:
        unread.append(
            "only root may look whether legacy iptables rules drop detoured packets here")
    if to_change and unread:
        raise UserError(unread[0])
    return nft.chains(objects, without=read) + found, unread


def relying() -> set[str]:
    """The chains of others that rely on this host's forwarding. Blocks; raises OSError, ValueError.
    """
    objects = nft.parse(ruleset())
    found = (forwarders.letting_through(chains_of(objects)[0]) | forwarders.steering(objects)
             | forwarders.translating(objects))
    with contextlib.suppress(PermissionError):
        for tool, table, text in listings(objects, ("nat",)):
            found |= forwarders.translating_by_iptables(text, tool, table)
    return found


def listings(objects: list[dict[str, Any]], wanted: Collection[str] = _TABLES, *,
             everything: bool = False) -> Iterator[tuple[str, str, str]]:
    """Each ``wanted`` table that a variant of iptables has here: variant, table, ``-S`` of it.

    ``everything``: also the tables of iptables-nft without any rule that nft cannot show.
    """
    def each(tool: str, tables: list[str]) -> Iterator[tuple[str, str, str]]:
        for table in wanted:
            if table in tables and (text := _iptables(tool, table)) is not None:
                yield tool, table, text
    yield from each("iptables-nft", nft.xtables(objects, everything=everything))
    yield from each("iptables-legacy", _loaded())


def ruleset() -> bytes:
    """The rules without the contents of sets, in JSON: with any number of mappings it is short.

    The program, as libnftables' Python binding takes no text that is not UTF-8.
    """
    try:
        NfTables().close()
    except OSError:
        return b""  # no nftables, no chains of it
    if shutil.which("nft") is None:
        raise FileNotFoundError("the program nft is missing: apt install nftables")
    return run(["nft", "-j", "-a", "-t", "list", "ruleset"])


def _loaded() -> list[str]:
    # Without this a mere look would load the legacy tables into the kernel.
    with contextlib.suppress(FileNotFoundError):
        return _LEGACY_TABLES.read_text(encoding="ascii").split()
    return []


def _iptables(tool: str, table: str) -> str | None:
    """None where the tool is missing, or cannot show the table."""
    command = shutil.which(tool) or (shutil.which("iptables") if "legacy" in tool else None)
    if command is None:
        return None
    try:
        printed = run([command, "-w", "5", "-t", table, "-S"])
    except OSError:
        return None
    return printed.decode("utf-8", "replace")


def run(command: list[str]) -> bytes:
    """What the command printed. Raises OSError, which says why, when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=_SECONDS,
                              stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"})
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]} did not answer in {_SECONDS} s") from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().partition("\n")[0]
        raise OSError(f"{command[0]}: {said or 'it failed'}")
    return done.stdout
