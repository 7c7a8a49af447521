# SPDX-License-Identifier: GPL-2.0-or-later
"""Which bridges QEMU's qemu-bridge-helper may use."""

from __future__ import annotations

import re
from pathlib import Path

from ansible.module_utils.detour_bridging import host
from ansible.module_utils.detour_bridging.bridge import Bridge
from ansible.module_utils.detour_bridging.host import BridgeError

QEMU_ACL = Path("/etc/qemu/bridge.conf")
QEMU_HELPER = "/usr/lib/qemu/qemu-bridge-helper"
_ACL_BEGIN, _ACL_END = "# BEGIN detour-tools (role bridge)", "# END detour-tools (role bridge)"
_ACL_SETUID = "# qemu-bridge-helper was made setuid with it"


class QemuAcl:
    """Our lines in QEMU's list of bridges, and the helper's setuid bit."""

    def __init__(self, bridges: list[Bridge], allowed: bool, setuid: bool) -> None:
        setuid = setuid and bool(bridges)
        if setuid and not allowed:
            raise BridgeError("bridge_qemu_helper_setuid needs bridge_qemu_acl, or the helper may "
                              "use no bridge")
        self.before = host.text_of(QEMU_ACL) or ""
        theirs = re.sub(rf"^{re.escape(_ACL_BEGIN)}\n.*?^{re.escape(_ACL_END)}\n", "", self.before,
                        flags=re.MULTILINE | re.DOTALL)
        lines = [_ACL_BEGIN, *([_ACL_SETUID] if setuid else []),
                 *(f"allow {bridge.name}" for bridge in bridges), _ACL_END]
        gap = "" if not theirs or theirs.endswith("\n") else "\n"
        self.after = theirs + gap + "\n".join([*lines, ""]) if allowed and bridges else theirs
        self._add = setuid and _ACL_SETUID not in self.before
        self._remove = not setuid and _ACL_SETUID in self.before
        if self._add and not Path(QEMU_HELPER).exists():
            raise BridgeError(f"there is no {QEMU_HELPER} to make setuid: "
                              "apt install qemu-system-common")
        if self._add and host.run("dpkg-statoverride", "--list", QEMU_HELPER, check=False):
            self._add = False  # somebody else has decided on its mode
            self.after = self.after.replace(f"{_ACL_SETUID}\n", "")

    def write(self) -> None:
        """Make it so."""
        if self._add:
            host.run("dpkg-statoverride", "--update", "--add", "root", "root", "4755", QEMU_HELPER)
        if self._remove:
            host.run("dpkg-statoverride", "--remove", QEMU_HELPER, check=False)
            Path(QEMU_HELPER).chmod(0o755)
        if self.after:
            QEMU_ACL.parent.mkdir(exist_ok=True)
            QEMU_ACL.write_text(self.after, encoding="utf-8")
        elif self.before:
            QEMU_ACL.unlink()
            if not any(QEMU_ACL.parent.iterdir()):
                QEMU_ACL.parent.rmdir()
