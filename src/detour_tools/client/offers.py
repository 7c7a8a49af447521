# SPDX-License-Identifier: GPL-2.0-or-later
"""What a path manager that joins by itself was offered, as far as we know. Pure."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from detour_tools.endpoint import Endpoint, IPAddress

MAX_OFFERS = 4000
"""The kernel holds 4096 a network namespace; some are left to others."""


@dataclass(slots=True, eq=False)
class Offering:
    """One offer; ``until`` is when the path manager forgets it.

    Identity counts: after it was withdrawn, the same offer is another one, and tried anew.
    """

    remote: Endpoint
    detour: Endpoint
    until: float


class Offers:
    """The offers that stand, at most one for each remote and address of a detour."""

    def __init__(self) -> None:
        self._standing: OrderedDict[tuple[Endpoint, IPAddress], Offering] = OrderedDict()

    def __iter__(self) -> Iterator[Offering]:
        """All, the least used first; they may be removed meanwhile."""
        return iter(list(self._standing.values()))

    def get(self, remote: Endpoint, address: IPAddress) -> Offering | None:
        """The offer of that detour for that remote, which counts as used now."""
        key = (remote, address)
        found = self._standing.get(key)
        if found is not None:
            self._standing.move_to_end(key)
        return found

    def stands(self, offering: Offering | None) -> bool:
        """Whether it was neither withdrawn nor forgotten."""
        return offering is not None and self._standing.get(
            (offering.remote, offering.detour.address)) is offering

    def add(self, offering: Offering) -> Offering | None:
        """Keep it; returns another, the least used, that has to be withdrawn for it."""
        self._standing[offering.remote, offering.detour.address] = offering
        if len(self._standing) <= MAX_OFFERS:
            return None
        return self._standing.popitem(last=False)[1]

    def remove(self, offering: Offering) -> bool:
        """Forget it; whether it still stood."""
        if not self.stands(offering):
            return False
        del self._standing[offering.remote, offering.detour.address]
        return True
