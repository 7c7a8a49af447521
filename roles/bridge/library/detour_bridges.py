#!/usr/bin/python
# SPDX-License-Identifier: GPL-2.0-or-later
"""Ansible module: bridges, by whatever manages the host's network, with a way back."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.detour_bridging import host, way_back
from ansible.module_utils.detour_bridging.bridge import Bridge
from ansible.module_utils.detour_bridging.detection import find_manager, managers
from ansible.module_utils.detour_bridging.host import BridgeError, Files
from ansible.module_utils.detour_bridging.qemu_acl import QEMU_ACL, QemuAcl

DOCUMENTATION = """
module: detour_bridges
short_description: Bridges by systemd-networkd, ifupdown or NetworkManager
description:
  - Writes what the host's network manager needs to make bridges, and has it make them.
  - A timer is started before the change; unless I(confirm) stops it in time, it puts back the
    files that stood before and applies them.
options:
  bridges:
    description: The bridges, as the role's argument specification tells.
    type: list
    elements: dict
    default: []
  manager:
    description: Who makes them.
    type: str
    choices: [auto, networkd, ifupdown, networkmanager]
    default: auto
  rollback:
    description: Seconds until all is put back.
    type: int
    default: 120
  unfiltered:
    description: Whether the role is about to switch filtering of bridged frames off.
    type: bool
    default: false
  qemu_acl:
    description: Whether QEMU's qemu-bridge-helper may use the bridges.
    type: bool
    default: false
  qemu_helper_setuid:
    description: Whether qemu-bridge-helper is made setuid root.
    type: bool
    default: false
  confirm:
    description: See that the change is done, and stop the timer.
    type: bool
    default: false
author: [detour-tools]
"""

EXAMPLES = """
- name: Bridge
  detour_bridges:
    bridges:
      - {name: br0, ports: [eth0], mac_from: eth0}
"""

RETURN = """
applied:
  description: Whether the network was changed, so that the change is to be confirmed.
  type: bool
  returned: success
manager:
  description: Who manages the network.
  type: str
  returned: always
"""


def main() -> None:
    """Run the module."""
    module = AnsibleModule({
        "bridges": {"type": "list", "elements": "dict", "default": []},
        "manager": {"type": "str", "default": "auto",
                    "choices": ["auto", "networkd", "ifupdown", "networkmanager"]},
        "rollback": {"type": "int", "default": 120},
        "unfiltered": {"type": "bool", "default": False},
        "qemu_acl": {"type": "bool", "default": False},
        "qemu_helper_setuid": {"type": "bool", "default": False},
        "confirm": {"type": "bool", "default": False},
    }, supports_check_mode=True)
    try:
        bridges = [Bridge(each) for each in module.params["bridges"]]
        if module.params["confirm"]:
            way_back.confirm(bridges, 30)
            module.exit_json(changed=False, manager="")
        names = [port for bridge in bridges for port in bridge.ports]
        names += [bridge.name for bridge in bridges]
        if len(set(names)) != len(names):
            raise BridgeError("bridge_bridges names a bridge or a port twice")
        if bridges and module.params["unfiltered"] and (host.SYS / "docker0").exists():
            raise BridgeError("Docker filters bridged frames on this host: set bridge_unfiltered "
                              "to false")
        acl = QemuAcl(bridges, module.params["qemu_acl"], module.params["qemu_helper_setuid"])
        if not module.check_mode:
            way_back.settle()
        old: Files = {}
        new: Files = {}
        applied = False
        name = ""
        if bridges or any(each.made() for each in managers()):
            manager = find_manager(module.params["manager"], bridges)
            name = manager.name
            old, new = manager.states(bridges)
            applied = old != new or any(bridge.done() for bridge in bridges)
            if applied and not module.check_mode:
                way_back.change(manager, old, new, bridges, module.params["rollback"])
        if not applied and way_back.unconfirmed():
            # It is as it should be, but nobody has confirmed it.
            applied = True
            if not module.check_mode:
                way_back.start_timer(module.params["rollback"])
        if acl.before != acl.after:
            if not module.check_mode:
                acl.write()
            old[str(QEMU_ACL)], new[str(QEMU_ACL)] = (acl.before, 0), (acl.after, 0)
        module.exit_json(changed=old != new or applied, applied=applied, manager=name, diff=[
            {"before_header": path, "after_header": path, "before": old.get(path, ("", 0))[0],
             "after": new.get(path, ("", 0))[0]}
            for path in sorted(old.keys() | new.keys()) if old.get(path) != new.get(path)])
    except BridgeError as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
