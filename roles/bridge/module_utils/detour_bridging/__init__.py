# SPDX-License-Identifier: GPL-2.0-or-later
"""What the module detour_bridges is made of. A file imports only from files above it here.

    host            the host's commands and files
    bridge          one that is wanted, checked
    dnsmasq         DHCP servers for managers that have none
    manager         what networkd, ifupdown and networkmanager have in common
    networkd, ifupdown, networkmanager
    detection       which of them manages this host
    way_back        the change, and the timer that undoes it unless it is confirmed
    qemu_acl        QEMU's list of bridges
"""

from __future__ import annotations
