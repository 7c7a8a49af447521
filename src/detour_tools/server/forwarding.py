# SPDX-License-Identifier: GPL-2.0-or-later
"""The host's IPv4 forwarding switch, while a server needs it on."""

import json
import logging
import os
import re

from detour_tools import runtime, sysctl
from detour_tools.errors import UserError
from detour_tools.firewall import look
from detour_tools.sysctl import BorrowedSysctls

FORWARDING = "net.ipv4.ip_forward"

_PER_INTERFACE = "/proc/sys/net/ipv4/conf"
_NAMES = re.compile(r"net\.ipv4\.ip_forward|net/ipv4/conf/all/accept_redirects"
                    r"|net/ipv4/conf/[^/]+/forwarding")
# Who switches it off so many times in so many seconds means it.
_TIMES = 3
_WITHIN_SECONDS = 60.0
# How long the status tells that it was switched off.
_TOLD_SECONDS = 600.0

log = logging.getLogger(__name__)


class ForwardingSwitch:
    """``net.ipv4.ip_forward``, and what the kernel changes along with it.

    What it was when the first server came, killed ones among them, says whether the host is a
    router, and is put back. Others may switch it off and on meanwhile: once it is on again by us
    nobody can tell whether they have switched it on, too.
    """

    def __init__(self, program: str) -> None:
        self._sysctls = BorrowedSysctls(runtime.directory(program) / f"{program}.sysctls", _NAMES)
        # Who relied on forwarding when it was off, so that a server after us knows, too.
        self._before = runtime.directory(program) / f"{program}.before"
        # When it was switched on again, seconds of the monotonic clock.
        self._again: list[float] = []
        self._given_up = False
        self._was_on = (self._sysctls.found(FORWARDING) or sysctl.read(FORWARDING)) == "1"

    def was_on(self) -> bool:
        """Whether it was on, before this server or those before it that were killed."""
        return self._was_on

    def on(self) -> None:
        """Switch it on, remembering what was; raises UserError."""
        if self._was_on:
            # So that a server after us does not take what others did meanwhile for what was.
            self._sysctls.set(FORWARDING, "1", was="1")
            return
        if self._sysctls.found(FORWARDING) is None and sysctl.read(FORWARDING) == "0":
            self._remember()
        # See inet_forward_change() in the kernel's net/ipv4/devinet.c.
        self._sysctls.set(FORWARDING, "1", resets={
            f"net/ipv4/conf/{name}/forwarding": "0" for name in os.listdir(_PER_INTERFACE)
            if name != "all"} | {"net/ipv4/conf/all/accept_redirects": "1"})

    def tend(self, now: float) -> list[str]:
        """Switch it on again if somebody else has switched it off; what there is to warn of.

        ``now`` is in seconds of the monotonic clock. Nothing is raised.
        """
        if sysctl.read(FORWARDING) == "1":
            self._given_up = False
            told = [f"somebody else switched {FORWARDING} off while this server ran, which "
                    "switched it on again"]
            return [*(told if self._again and now - self._again[-1] < _TOLD_SECONDS else ()),
                    *map(_off, _interfaces_off())]
        self._again = self._again[-_TIMES:]
        often = [at for at in self._again if now - at < _WITHIN_SECONDS]
        if self._given_up or len(often) >= _TIMES:
            self._given_up = True
            return [f"somebody else switches {FORWARDING} off again and again: it is left off, "
                    f"and no flow is detoured; end that, then: sysctl -w {FORWARDING}=1"]
        try:
            self.on()
        except (UserError, OSError) as error:
            return [f"somebody else switched {FORWARDING} off, and it cannot be switched on "
                    f"again: {error}"]
        self._again.append(now)
        log.warning("%s was switched off by somebody else: switched on again", FORWARDING)
        return self.tend(now) if sysctl.read(FORWARDING) == "1" else []

    def put_back(self) -> None:
        """Leave it as it was found, unless somebody else has changed it, or relies on it, since."""
        found = self._sysctls.found(FORWARDING) if sysctl.read(FORWARDING) == "1" else None
        if found == "1":
            log.warning("%s stays 1, as it was when the server came, though somebody else switched "
                        "it off since", FORWARDING)
        came = self._came() if found == "0" else []
        if came:
            log.warning("%s stays 1, though it was 0 before: since then others came who rely on "
                        "it (chain %s)", FORWARDING, ", ".join(came))
            self._sysctls.forget()
        else:
            self._sysctls.restore()
        self._before.unlink(missing_ok=True)

    def _remember(self) -> None:
        try:
            sysctl.write_file(self._before, json.dumps(sorted(look.relying())))
        except Exception as error:  # other people's rules may be anything
            self._before.unlink(missing_ok=True)
            log.debug("cannot tell who relies on forwarding: %s", error)

    def _came(self) -> list[str]:
        """The chains of others who rely on forwarding now and did not when it was off."""
        try:
            before = json.loads(sysctl.read_file(self._before))
            return sorted(look.relying() - set(before))
        except FileNotFoundError:
            return []
        except Exception as error:
            log.warning("cannot tell whether others rely on %s by now: %s", FORWARDING, error)
            return []


def _interfaces_off() -> list[str]:
    """The interfaces that do not forward what they receive."""
    return sorted(name for name in os.listdir(_PER_INTERFACE)
                  if name not in ("all", "default", "lo")
                  and sysctl.read(f"net/ipv4/conf/{name}/forwarding") == "0")


def _off(interface: str) -> str:
    setting = f"net/ipv4/conf/{interface}/forwarding"
    return (f"{setting} is 0: what comes in on {interface} is not detoured; "
            f"mend it with: sysctl -w {setting}=1")
