# SPDX-License-Identifier: GPL-2.0-or-later
"""Asks the host for its rules, and has them judged. It never changes one, nor loads a table."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterable
from ipaddress import IPv4Network
from pathlib import Path

from detour_tools.endpoint import Network
from detour_tools.firewall import judge, legacy, nft
from detour_tools.netlink.nf_tables import NfTables

_LEGACY_TABLES = Path("/proc/net/ip_tables_names")
# Where a packet may be dropped, or left untracked; NAT's chains do neither.
_TABLES = ("raw", "mangle", "filter", "security")
_SECONDS = 30


def warnings(port: int, sources: Iterable[Network] = ()) -> list[str]:
    """One line for each thing of the host's firewall that stands in the detour's way. Blocks.

    What cannot be read is one of these. Of ``sources`` only those of IPv4 count, as requests do.
    """
    unread = []
    try:
        objects = nft.parse(_nft())
    except (OSError, ValueError) as error:
        objects = []
        unread.append(f"cannot tell whether nftables rules drop detoured packets: {error}")
    by_iptables = {table: text for table in nft.xtables(objects)
                   if table in _TABLES and (text := _iptables("iptables-nft", table)) is not None}
    chains = nft.chains(objects, without=list(by_iptables))
    for table, text in by_iptables.items():
        chains += legacy.chains(text, "iptables-nft", table)
    try:
        loaded = _loaded()
    except PermissionError:
        loaded = []
        unread.append(
            "only root may look whether legacy iptables rules drop detoured packets here")
    for table in loaded:
        if (text := _iptables("iptables-legacy", table)) is not None:
            chains += legacy.chains(text, "iptables-legacy", table)
    clients = [source for source in sources if isinstance(source, IPv4Network)]
    return judge.warnings(chains, port, clients) + unread


def _nft() -> bytes:
    """The rules without the contents of sets, in JSON: with any number of mappings it is short.

    The program, as libnftables' Python binding takes no text that is not UTF-8.
    """
    try:
        NfTables().close()
    except OSError:
        return b""  # no nftables, no chains of it
    if shutil.which("nft") is None:
        raise FileNotFoundError("the program nft is missing: apt install nftables")
    return _run(["nft", "-j", "-t", "list", "ruleset"])


def _loaded() -> list[str]:
    # Without this a mere look would load the legacy tables into the kernel.
    with contextlib.suppress(FileNotFoundError):
        names = _LEGACY_TABLES.read_text(encoding="ascii").split()
        return [table for table in _TABLES if table in names]
    return []


def _iptables(tool: str, table: str) -> str | None:
    """None where the tool is missing, or cannot show the table."""
    command = shutil.which(tool) or (shutil.which("iptables") if "legacy" in tool else None)
    if command is None:
        return None
    try:
        printed = _run([command, "-w", "5", "-t", table, "-S"])
    except OSError:
        return None
    return printed.decode("utf-8", "replace")


def _run(command: list[str]) -> bytes:
    try:
        done = subprocess.run(command, capture_output=True, check=False, timeout=_SECONDS,
                              stdin=subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C"})
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]} did not answer in {_SECONDS} s") from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().partition("\n")[0]
        raise OSError(f"{command[0]}: {said or 'it failed'}")
    return done.stdout
