# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab itself: a topology brought to life in network namespaces of this machine."""

import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pyroute2.netlink.exceptions import NetlinkError

from detour_tools import runtime, sysctl
from detour_tools.endpoint import IPAddress
from detour_tools.errors import UserError
from detour_tools.lab import links, namespaces, state
from detour_tools.lab.tools import search_path
from detour_tools.lab.topology import Topology
from detour_tools.lab.vm import lab_machine

DEFAULT_NAME = "lab"
NO_NETEM = ("this kernel has no netem: link delays are not emulated "
            "(rates are tbf's, loss is a random drop by nftables)")


class Host:
    """A host of a lab that is up."""

    def __init__(self, name: str, namespace: str, address: IPAddress) -> None:
        self.name = name
        self.namespace = namespace
        self.address = address

    def argv(self, command: Sequence[object]) -> list[str]:
        """The command line that runs ``command`` on this host."""
        return ["ip", "netns", "exec", self.namespace, *map(str, command)]

    def run(self, command: Sequence[object], *, check: bool = True,
            **options: Any) -> "subprocess.CompletedProcess[str]":
        """Run ``command`` to its end, with its output captured as text.

        Raises CalledProcessError (what the command said on stderr is in its notes).
        """
        if "stdout" not in options and "stderr" not in options:
            options.setdefault("capture_output", True)
        options.setdefault("env", environment())
        done = subprocess.run(self.argv(command), check=False, text=True, **options)
        if check and done.returncode:
            error = subprocess.CalledProcessError(
                done.returncode, list(map(str, command)), done.stdout, done.stderr)
            error.add_note(f"on {self.name}: {done.stderr or done.stdout}")
            raise error
        return done

    def popen(self, command: Sequence[object], **options: Any) -> "subprocess.Popen[str]":
        """Start ``command``; its process is the command itself, nothing stands between."""
        options.setdefault("env", environment())
        return subprocess.Popen(self.argv(command), text=True, **options)

    def processes(self) -> list[tuple[int, str]]:
        """Id and command line of every process on this host."""
        found = ((pid, namespaces.command_line(pid))
                 for pid in namespaces.processes(self.namespace))
        return [(pid, command) for pid, command in found if command]


def environment() -> dict[str, str]:
    """This process's environment, with this project's programs in the PATH."""
    return {**os.environ, "PATH": search_path()}


class Lab:
    """A network of namespaces; as a context manager it is up inside the block.

    ``up`` and ``down`` need root. Not to be called from a running asyncio loop.
    """

    def __init__(self, topology: Topology, name: str = DEFAULT_NAME) -> None:
        state.check_name(name)
        self.topology = topology
        self.name = name
        self.netem = False
        self.namespaces = {host.name: f"{name}-{host.name}" for host in topology.hosts}

    @classmethod
    def attach(cls, name: str = DEFAULT_NAME) -> Self:
        """The lab that is up under this name; raises UserError when there is none."""
        state.check_name(name)
        known = state.load(name)
        if known is None or not known.complete or known.vm:
            others = [each for each in state.names() if each != name]
            hint = "start it: detour-lab " + ("" if name == DEFAULT_NAME else f"--name {name} ")
            raise UserError(f"the lab '{name}' is not up", hint + "up" + (
                f"; there is: {', '.join(others)}" if others else ""))
        lab = cls(known.topology, name)
        lab.netem = known.netem
        if not lab._whole():
            raise UserError(f"the lab '{name}' is damaged: namespaces are missing",
                            "take it down and up again")
        return lab

    def up(self) -> bool:
        """Build the lab; returns False when it was already up just so.

        What a crash left of it is removed first. Raises UserError when another topology is up
        under this name. On any failure nothing is left.
        """
        need_root()
        with state.locked(self.name):
            known = state.load(self.name)
            if known is not None and known.vm and known.complete and (
                    lab_machine(self.name).alive()):
                raise UserError(f"the lab '{self.name}' is already up, in a VM",
                                "take it down first, or use --name")
            if known is not None and known.complete and self._whole(known.topology):
                if known.topology != self.topology:
                    raise UserError(
                        f"the lab '{self.name}' is already up as another network "
                        f"({known.topology.title})", "take it down first, or use --name")
                self.netem = known.netem
                return False
            self.clean()
            state.save(self.name, state.State(self.topology, complete=False))
            try:
                self._build()
            except BaseException as error:  # also Ctrl-C: nothing may stay half built
                self.clean()
                if isinstance(error, OSError | NetlinkError):
                    raise UserError(f"this machine cannot build the lab: {error}",
                                    "network namespaces and veth are needed") from error
                raise
            state.save(self.name, state.State(self.topology, complete=True, netem=self.netem))
            return True

    def down(self) -> None:
        """Remove the lab: its processes, namespaces and files; fine when there is none."""
        need_root()
        with state.locked(self.name):
            self.clean()

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.down()

    def host(self, name: str) -> Host:
        """A host; raises UserError when there is none of that name."""
        self.topology.host(name)
        return Host(name, self.namespaces[name], self.topology.address(name))

    def hosts(self) -> list[Host]:
        """All hosts."""
        return [self.host(name) for name in self.namespaces]

    def folder(self) -> Path:
        """A folder for files that go with the lab when it goes down."""
        folder = state.folder(self.name)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def set_link(self, name: str, *, up: bool) -> None:
        """Cut a link (every packet is lost, silently; interfaces stay up) or mend it."""
        link = self.topology.link(name)
        (links.mend if up else links.cut)(self.topology, link, self.namespaces)

    def cut_links(self) -> frozenset[str]:
        """The names of the links that are cut."""
        return links.cut_links(self.topology, self.namespaces)

    def link_is_up(self, name: str) -> bool:
        """Whether the link is not cut."""
        return self.topology.link(name).name not in self.cut_links()

    def _whole(self, topology: Topology | None = None) -> bool:
        hosts = (topology or self.topology).hosts
        return all(namespaces.usable(f"{self.name}-{host.name}") for host in hosts)

    def _build(self) -> None:
        for host in self.topology.hosts:
            namespace = self.namespaces[host.name]
            namespaces.create(namespace)
            namespaces.write_etc(namespace, "hosts", self._hosts_file())
            if Path("/etc/resolv.conf").exists():
                # No name server: a wrong name fails at once instead of waiting for one.
                namespaces.write_etc(namespace, "resolv.conf", "# names stand in /etc/hosts\n")
            with namespaces.inside(namespace):
                _set_sysctls(forwards=host.forwards)
        self.netem = links.kernel_has_netem(self.namespaces[self.topology.hosts[0].name])
        links.connect(self.topology, self.namespaces, with_netem=self.netem)

    def _hosts_file(self) -> str:
        lines = [f"{self.topology.address(host.name)}\t{host.name}"
                 for host in self.topology.hosts]
        lines += ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
        machine = socket.gethostname()
        if machine not in self.namespaces:
            lines.append(f"127.0.1.1\t{machine}")  # sudo looks it up
        return "\n".join(lines) + "\n"

    def clean(self) -> None:
        """Remove everything of this lab, whatever state it is in; its lock must be held."""
        lab_machine(self.name).stop()
        known = state.load(self.name)
        wanted = set(self.namespaces.values())
        if known is not None:
            wanted |= {f"{self.name}-{host.name}" for host in known.topology.hosts}
        for folder in (namespaces.RUN, namespaces.ETC):
            if folder.is_dir():
                wanted |= {each.name for each in folder.iterdir()
                           if state.is_namespace_of(self.name, each.name)}
        namespaces.end_processes(sorted(wanted))
        for namespace in sorted(wanted):
            namespaces.remove(namespace)
        state.forget(self.name)


def need_root() -> None:
    """Raise UserError unless this process may make namespaces."""
    runtime.need_capability("CAP_SYS_ADMIN", "the lab")
    runtime.need_capability("CAP_NET_ADMIN", "the lab")


def _set_sysctls(*, forwards: bool) -> None:
    """Sysctls of the namespace this thread is in, before it has interfaces but loopback.

    New namespaces take some from the machine, so each that matters is set.
    """
    for each in ("all", "default", "lo"):
        sysctl.write(f"net.ipv4.conf.{each}.rp_filter", "0")
    sysctl.write("net.ipv4.ip_forward", "1" if forwards else "0")
    if sysctl.read("net.ipv6.conf.all.forwarding") is not None:
        sysctl.write("net.ipv6.conf.all.forwarding", "1" if forwards else "0")
    # A connection must not start with what an earlier one learnt.
    sysctl.write("net.ipv4.tcp_no_metrics_save", "1")
