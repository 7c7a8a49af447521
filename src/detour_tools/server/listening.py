# SPDX-License-Identifier: GPL-2.0-or-later
"""The ports that must not be given away, because the detour itself listens on them."""

import time

from detour_tools.errors import UserError
from detour_tools.netlink.inet_diag import InetDiag

# Looking may take one part in so many of the time.
_LOOKING_SHARE = 20
_OLDEST_SECONDS = 1.0


class ListeningPorts:
    """The ports that TCP sockets of this host listen on, other than on loopback only.

    Read from inet_diag when a port is about to be granted, unless what is known is younger than
    20 times what reading took (some 50 microseconds with few listeners, so about a millisecond;
    at most a second): a program that just began to listen is seen, and a flood of requests costs
    a twentieth of the time at most. MPTCP listeners are TCP listeners too.
    """

    def __init__(self) -> None:
        """Look once, to find out whether that is possible; raises UserError."""
        try:
            self._diag = InetDiag()
        except OSError as error:
            raise UserError(f"this kernel does not list its sockets: {error.strerror}",
                            "CONFIG_INET_DIAG is needed") from None
        self._ports: frozenset[int] = frozenset()
        self.look()
        self._fresh_until = 0.0

    def look(self) -> frozenset[int]:
        """The ports, read afresh; the next request reads them again all the same."""
        # Also for now(): what was seen must not be given away by what was known before.
        self._ports = frozenset(each.port for each in self._diag.listening()
                                if not each.address.is_loopback)
        return self._ports

    def now(self) -> frozenset[int]:
        """The ports, as of a moment ago at most."""
        now = time.monotonic()
        if now >= self._fresh_until:
            self.look()
            done = time.monotonic()
            self._fresh_until = done + min(_OLDEST_SECONDS, _LOOKING_SHARE * (done - now))
        return self._ports

    def close(self) -> None:
        """Close the socket."""
        self._diag.close()
