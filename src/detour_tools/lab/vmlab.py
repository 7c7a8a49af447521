# SPDX-License-Identifier: GPL-2.0-or-later
"""A lab inside a VM: the same lab, built by the same program, on a kernel of our choice."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from detour_tools.endpoint import IPAddress
from detour_tools.errors import UserError
from detour_tools.lab import session, state
from detour_tools.lab.network import Host, Lab, environment, need_root
from detour_tools.lab.topology import Topology
from detour_tools.lab.vm import Machine, Settings, lab_machine

# How 'exec' calls the VM itself, outside the lab's hosts.
VM_HOST = "vm"


class VmHost(Host):
    """A VM, or a namespace in it, to run programs on like on any host of a lab.

    What runs there is stood for by a process on this machine: outputs, signals and status are
    its own.
    """

    def __init__(self, name: str, folder: Path, address: IPAddress, namespace: str = "") -> None:
        super().__init__(name, namespace, address)
        self._folder = folder

    def argv(self, command: Sequence[object]) -> list[str]:
        """The command line that runs ``command`` on this host."""
        return [sys.executable, "-m", "detour_tools.lab.session", str(self._folder),
                *inside_vm(self.namespace, command)]


def inside_vm(namespace: str, command: Sequence[object]) -> list[str]:
    """The command line within the VM that runs ``command`` in the namespace ("": in none)."""
    return [*(["ip", "netns", "exec", namespace] if namespace else []), *map(str, command)]


class VmLab:
    """A lab that runs, or shall run, in a VM of its own."""

    def __init__(self, topology: Topology, name: str) -> None:
        state.check_name(name)
        self.topology = topology
        self.name = name
        self.machine = lab_machine(name)

    @classmethod
    def attach(cls, name: str) -> "VmLab | None":
        """The lab of that name when it is up in a VM, None when it is no such lab.

        Raises UserError when its VM has died.
        """
        known = state.load(name)
        if known is None or not (known.complete and known.vm):
            return None
        lab = cls(known.topology, name)
        if not lab.machine.alive():
            raise UserError(f"the VM of the lab '{name}' has died",
                            f"{session.last_words(lab.machine.folder)}; take it down and up again")
        return lab

    def up(self, settings: Settings, options: Sequence[str]) -> bool:
        """Start the VM and build the lab in it with ``detour-lab up OPTIONS``.

        Returns False when it was already up just so. What a crash left of a lab of this name is
        removed first. On any failure nothing is left. Raises
        UserError.
        """
        need_root()
        with state.locked(self.name):
            known = state.load(self.name)
            if known is not None and known.complete:
                if not known.vm:
                    raise UserError(f"the lab '{self.name}' is already up, not in a VM",
                                    "take it down first, or use --name")
                if self.machine.alive():
                    if known.topology != self.topology:
                        raise UserError(
                            f"the lab '{self.name}' is already up as another network "
                            f"({known.topology.title})", "take it down first, or use --name")
                    return False
            remains = Lab(self.topology, self.name)
            remains.clean()
            state.save(self.name, state.State(self.topology, complete=False, vm=True))
            try:
                self._build(settings, options)
            except BaseException:  # also Ctrl-C: nothing may stay half built
                remains.clean()
                raise
            return True

    def _build(self, settings: Settings, options: Sequence[str]) -> None:
        settings = dataclasses.replace(settings, hostname=self.machine.name)
        Machine.start(settings, self.machine.name, detached=True)
        built = self.machine.run(["detour-lab", "--name", self.name, "up", *options],
                                 env=environment())
        if built.returncode:
            raise UserError("the lab could not be built in the VM",
                            built.stderr.strip().removeprefix("detour-lab: "))
        inner = json.loads(self.machine.run(["cat", state.path(self.name)]).stdout)
        state.save(self.name, state.State(self.topology, complete=True, netem=inner["netem"],
                                          vm=True))

    def down(self) -> None:
        """End the lab's programs, the VM, and what is known of both."""
        need_root()
        with state.locked(self.name):
            self.machine.power_off()
            Lab(self.topology, self.name).clean()

    def namespace(self, host: str) -> str:
        """The host's namespace in the VM; "" for the VM itself. Raises UserError."""
        if host == VM_HOST:
            return ""
        return f"{self.name}-{self.topology.host(host).name}"

    def host(self, name: str) -> VmHost:
        """A host; raises UserError when there is none of that name."""
        return VmHost(name, self.machine.folder, self.topology.address(name), self.namespace(name))
