# SPDX-License-Identifier: GPL-2.0-or-later
"""Which back end to use, and what the others have left in the kernel."""

import logging
from collections.abc import Callable
from typing import NamedTuple

from detour_tools.errors import UserError
from detour_tools.nat.base import NatBackend, NatError
from detour_tools.nat.iptables import IptablesBackend
from detour_tools.nat.nftables import NftablesBackend

log = logging.getLogger(__name__)

# In order of preference.
_BACKENDS: dict[str, Callable[[], NatBackend]] = {
    "nftables": NftablesBackend,
    "iptables": IptablesBackend,
}

AUTO = "auto"
CHOICES = (AUTO, *_BACKENDS)


class Left(NamedTuple):
    """A back end with rules of ours in the kernel, and the keys of their mappings."""

    backend: NatBackend
    found: list[bytes]


def choose(wanted: str) -> Left:
    """Open the back end that was asked for (``auto``: the first that works here).

    Raises UserError when it cannot be used.
    """
    backend = _open(wanted)
    return Left(backend, _leftovers(backend) or [])


def others(used: NatBackend) -> list[Left]:
    """What the other back ends have left in the kernel."""
    made = [make() for name, make in _BACKENDS.items() if name != used.name]
    return [Left(other, found) for other in made if (found := _leftovers(other)) is not None]


def _open(wanted: str) -> NatBackend:
    reasons = []
    for name, make in _BACKENDS.items():
        if wanted not in (name, AUTO):
            continue
        backend = make()
        try:
            backend.open()
        except UserError as error:
            if wanted == name:
                raise
            reasons.append(error.message)
        else:
            return backend
    raise UserError("no NAT back end can be used: " + "; ".join(reasons),
                    "apt install python3-nftables")


def _leftovers(backend: NatBackend) -> list[bytes] | None:
    try:
        return backend.leftovers()
    except (NatError, UserError) as error:
        log.warning("cannot read what %s rules were left from before: %s", backend.name, error)
        return None
