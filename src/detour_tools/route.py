# SPDX-License-Identifier: GPL-2.0-or-later
"""What the routing table says of an address."""

from typing import NamedTuple


class Route(NamedTuple):
    """What the routing table says of an address; all False where it says nothing.

    ``local``: it is one of this host. ``broadcast``: it is a subnet's broadcast address.
    ``on_link``: packets to it need no gateway, by a route that is not the default route.
    """

    local: bool
    broadcast: bool
    on_link: bool


NO_ROUTE = Route(local=False, broadcast=False, on_link=False)
