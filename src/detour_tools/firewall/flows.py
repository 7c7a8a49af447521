# SPDX-License-Identifier: GPL-2.0-or-later
"""Lets mapped flows pass the host's forward chains, where these drop them, and takes that back.

Mapped flows bear a conntrack label that detour-server gives them; what the host translates by rules
of its own (published ports, containers) does not, and stays as it is. Rules are known by their
comment, so that nothing has to be remembered.
"""

import shlex
from collections.abc import Iterable

from detour_tools.errors import UserError
from detour_tools.firewall import look, nft, opening
from detour_tools.firewall.opening import Change


def open_way(*, only_say: bool = False) -> Change:
    """Add a rule to each forward chain that drops mapped flows. Blocks. Raises UserError."""
    stopped = opening.flows_stopped(look.chains(to_change=True)[0])
    for found in stopped:
        if found.chain.owned:
            raise UserError(
                f"the chain {found.chain.name} drops mapped flows, and belongs to a program that "
                "lets nobody change it",
                "tell that one to accept them (firewalld: StrictForwardPorts=no)")
    commands = [opening.to_let_flows_pass(found) for found in stopped]
    if only_say:
        return Change(added=_lines(commands))
    for command in commands:
        _run(command)
    if commands and (left := opening.flows_stopped(look.chains(to_change=True)[0])):
        raise UserError(f"mapped flows are dropped all the same: {left[0].text}")
    return Change(added=_lines(commands))


def close_way(*, only_say: bool = False) -> Change:
    """Remove these rules. Blocks. Raises UserError."""
    try:
        objects = nft.parse(look.ruleset())
        listings = list(look.listings(objects, everything=True))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the firewall: {error}") from None
    commands = list(opening.to_take_flows_rules(objects, listings))
    for command in commands if not only_say else ():
        _run(command)
    return Change(removed=_lines(commands))


def _lines(commands: Iterable[list[str]]) -> tuple[str, ...]:
    return tuple(map(shlex.join, commands))


def _run(command: list[str]) -> None:
    try:
        look.run(command)
    except OSError as error:
        raise UserError(f"'{shlex.join(command)}' failed: {error}") from None
