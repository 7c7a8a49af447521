# SPDX-License-Identifier: GPL-2.0-or-later
"""Lets clients' requests in through whichever firewall the host runs, and takes that back.

What was added, and the host did not have, stands in a file, so that a later call removes exactly
that, also when port, clients or firewall are others.
"""

import json
from collections.abc import Iterable
from ipaddress import IPv4Network, collapse_addresses
from pathlib import Path
from typing import Any

from detour_tools.errors import UserError
from detour_tools.firewall import look, opening
from detour_tools.firewall.managers import KINDS, detect, write
from detour_tools.firewall.opening import Change, Rule

_STATE = Path("/etc/detour-tools/firewall.json")
_Rules = dict[str, list[Rule]]


def open_way(kind: str, port: int, sources: Iterable[IPv4Network], *,
             only_say: bool = False) -> Change:
    """Let requests from ``sources`` to the UDP ``port`` in, and nobody else whom this let in.

    ``kind`` is one of managers.KINDS, or "auto". Blocks. Raises UserError, also when something of
    the host's own drops them all the same.
    """
    kind = detect() if kind == "auto" else kind
    merged = list(collapse_addresses(sources))  # nft takes no overlaps
    change = _apply({kind: KINDS[kind]().wanted(port, merged)}, only_say=only_say)
    if not only_say and (left := opening.requests_left(look.chains()[0], port, merged)):
        raise UserError(f"{left[0].text.rpartition('; ')[0]} all the same",
                        "what was opened stands, but that is not ours to change")
    return change


def close_way(*, only_say: bool = False) -> Change:
    """Remove what open_way() added. Blocks. Raises UserError."""
    return _apply({}, only_say=only_say)


def _apply(wanted: _Rules, *, only_say: bool) -> Change:
    stored = _stored()
    missing = {kind: KINDS[kind]().missing(rules) for kind, rules in wanted.items()}
    gone, ours = opening.changes(stored, wanted, missing)
    if not only_say:
        if any(missing.values()):  # before they are added, as this may be interrupted
            _remember({kind: stored.get(kind, []) + missing.get(kind, [])
                       for kind in {**stored, **missing}})
        for kind, rules in gone.items():
            if rules:
                KINDS[kind]().remove(rules)
        for kind, rules in wanted.items():
            if missing[kind] or gone.get(kind):
                KINDS[kind]().add(rules)
        _remember(ours)
    return Change(_lines(missing), _lines(gone))


def _stored() -> _Rules:
    try:
        return _checked(json.loads(_STATE.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"cannot read {_STATE}: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{_STATE} is not what was written there",
                        "remove it, and the rules of ours by hand") from None


def _checked(read: Any) -> _Rules:
    found = {kind: [(str(where), str(what)) for where, what in rules]
             for kind, rules in read.items()}
    if not found.keys() <= KINDS.keys():
        raise ValueError(found.keys())
    return {kind: KINDS[kind]().understood(rules) for kind, rules in found.items()}


def _remember(rules: _Rules) -> None:
    if any(rules.values()):
        write(_STATE, json.dumps(rules, indent=1) + "\n")
    elif _STATE.exists():
        _STATE.unlink()  # its folder is for settings, too


def _lines(rules: _Rules) -> tuple[str, ...]:
    return tuple(f"{kind}: {where} {what}" for kind, each in rules.items() for where, what in each)
