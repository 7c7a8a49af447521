#!/usr/bin/python
# SPDX-License-Identifier: GPL-2.0-or-later
"""Ansible module: close what `detour-server firewall open` opened, also where a run was cut off."""

from __future__ import annotations

import json
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: detour_close
short_description: Closes what 'detour-server firewall' opened
description:
  - By the release in use, or any other that is there. It goes by the rules that stand, and by what
    was noted of them, and not by what a run of Ansible has come to.
options:
  what:
    description: For flows through the detour, or for the requests of clients.
    type: str
    choices: [flows, requests]
    required: true
author: [detour-tools]
"""

EXAMPLES = """
- name: Close the firewall
  detour_close:
    what: requests
"""

RETURN = """
removed:
  description: The rules that were removed, or would be in check mode.
  type: list
  elements: str
  returned: success
"""

RELEASES = Path("/opt/detour-tools")
# Where the program notes what it opened for requests.
NOTED = Path("/etc/detour-tools/firewall.json")


def programs() -> list[Path]:
    """The program, of the release in use first."""
    found = [RELEASES / "current/bin/detour-server",
             *sorted(RELEASES.glob("*/bin/detour-server"))]
    return [path for path in found if path.exists()]


def main() -> None:
    """Run as a module of Ansible."""
    module = AnsibleModule(
        argument_spec={"what": {"type": "str", "choices": ["flows", "requests"],
                                "required": True}},
        supports_check_mode=True)
    what = module.params["what"]
    # What opens the way for flows needs nft, and notes nothing.
    if not (NOTED.exists() if what == "requests" else module.get_bin_path("nft")):
        module.exit_json(changed=False, removed=[])
    if not programs():
        if what == "flows":
            module.exit_json(changed=False, removed=[])
        module.fail_json(msg=f"no detour-server is there to close what {NOTED} says that one "
                         "opened: deploy it again, then remove")
    said = ""
    for program in programs():
        command = [str(program), "firewall", "close", what, "--json"]
        status, output, error = module.run_command(
            command + (["--dry-run"] if module.check_mode else []))
        if not status:
            found = json.loads(output)
            module.exit_json(changed=found["changed"], removed=found["removed"])
        said = said or error.strip() or f"'{' '.join(command)}' ended with {status}"
    module.fail_json(msg=said)


if __name__ == "__main__":
    main()
