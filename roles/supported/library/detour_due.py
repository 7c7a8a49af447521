#!/usr/bin/python
# SPDX-License-Identifier: GPL-2.0-or-later
"""Ansible module: whether a unit runs as its files say, from the times that systemd and they bear.

That goes by the host, not by what this run of Ansible changed: one before it may have failed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: detour_due
short_description: What a unit needs to run as its files say
description:
  - A file that was written in the future, as a clock says that was set back since, gets the time
    of now. It would be due at every run otherwise.
options:
  unit:
    description: The systemd unit.
    type: str
    required: true
  restarts:
    description: The file that the unit must have been started after.
    type: path
    required: true
  reloads:
    description: The file that it must have been started or reloaded after.
    type: path
  keep:
    description: A folder that gets both files if the unit runs as they say; root's.
    type: path
author: [detour-tools]
"""

EXAMPLES = """
- name: See whether it runs with them
  detour_due:
    unit: detour-server.service
    restarts: /etc/systemd/system/detour-server.service
    reloads: /etc/detour-tools/server.toml
"""

RETURN = """
needs:
  description: What it needs; nothing in check mode, which has written no files.
  type: str
  choices: ['', start, restart, reload]
  returned: success
"""


def show(unit: str, name: str) -> str:
    """A property of the unit; '' where it has none. Times are in whole seconds."""
    return subprocess.run(["systemctl", "show", "--timestamp=unix", "-P", name, unit],
                          stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def is_before(timestamp: str, path: str) -> bool:
    """Whether the time is before the file was written, or tells nothing."""
    then, now = int(timestamp.lstrip("@") or 0), time.time()
    written = int(os.stat(path).st_mtime)
    if written > now:
        os.utime(path)
        written = int(now)
    # A time that is still to come is of a clock that was set back since.
    return then < written or then > now


def needs(unit: str, restarts: str, reloads: str | None) -> str:
    """What the unit needs to run as its files say."""
    if show(unit, "ActiveState") != "active":
        return "start"
    if not all(map(os.path.exists, (restarts, reloads or restarts))):
        return "restart"
    # Without a main process, as of a SysV script, there is no such time.
    started = show(unit, "ExecMainStartTimestamp") or show(unit, "ActiveEnterTimestamp")
    if show(unit, "NeedDaemonReload") == "yes" or is_before(started, restarts):
        return "restart"
    # A reload changes this time, too.
    if reloads is not None and is_before(show(unit, "StateChangeTimestamp"), reloads):
        return "reload"
    return ""


def keep(folder: str, files: list[str]) -> None:
    """Copy the files into the folder, whole or not at all, with their owners and times."""
    os.makedirs(folder, 0o700, exist_ok=True)
    for path in files:
        copy = os.path.join(folder, os.path.basename(path))
        shutil.copy2(path, copy + ".new")
        found = os.stat(path)
        os.chown(copy + ".new", found.st_uid, found.st_gid)
        os.replace(copy + ".new", copy)


def main() -> None:
    """Run as a module of Ansible."""
    module = AnsibleModule(
        argument_spec={
            "unit": {"type": "str", "required": True},
            "restarts": {"type": "path", "required": True},
            "reloads": {"type": "path"},
            "keep": {"type": "path"},
        },
        supports_check_mode=True)
    given = module.params
    if module.check_mode:
        module.exit_json(changed=False, needs="")
    try:
        found = needs(given["unit"], given["restarts"], given["reloads"])
        if given["keep"] and not found:
            keep(given["keep"], [each for each in (given["restarts"], given["reloads"]) if each])
        module.exit_json(changed=False, needs=found)
    except (OSError, subprocess.CalledProcessError) as error:
        module.fail_json(msg=f"cannot tell what {given['unit']} needs: {error}")


if __name__ == "__main__":
    main()
