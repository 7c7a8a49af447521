# SPDX-License-Identifier: GPL-2.0-or-later
"""What the benchmarks stand on: labs, programs in them, sockets and addresses in namespaces."""

import contextlib
import os
import re
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Self

from detour_tools import control, sysctl
from detour_tools.lab import namespaces, state
from detour_tools.lab.daemons import wait_for
from detour_tools.lab.network import Host, Lab, environment
from detour_tools.lab.topology import reference_topology
from detour_tools.netlink.socket import NetlinkSocket

_PREFIX = "bench"
_NETLINK_NETFILTER = 12
_CONNTRACK_DELETE = 1 << 8 | 2  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE: all of them
_PATIENCE = 60.0  # Python takes seconds to start where the processor is emulated
_SOURCE = Path(__file__).with_name("load.c")


class Program:
    """A program on a host, its output in a file.

    Not a Daemon of the lab: that one reads every line in this process, which would slow the
    load that this process makes.
    """

    def __init__(self, host: Host, command: Sequence[object], output: Path) -> None:
        self.host = host
        self.name = str(command[0])
        self.output = output
        with output.open("wb") as stream:
            self.process = host.popen(command, stdin=subprocess.DEVNULL, stdout=stream,
                                      stderr=stream, env=environment(), start_new_session=True)

    def wait_control_socket(self) -> None:
        """Wait until the program, one of ours, answers."""
        with namespaces.inside(self.host.namespace):
            path = control.socket_path(self.name)

        def answers() -> bool:
            self._check()
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                return probe.connect_ex(str(path)) == 0
        wait_for(answers, _PATIENCE, f"{self.name} to serve")

    def wait_output(self, text: str) -> None:
        """Wait until the program has said ``text``."""
        def said() -> bool:
            self._check()
            return text in self.output.read_text(errors="replace")
        wait_for(said, _PATIENCE, f"{self.name} to say {text!r}")

    def call(self, command: str, **arguments: Any) -> Any:
        """Ask it over its control socket."""
        with namespaces.inside(self.host.namespace):
            return control.call(self.name, command, **arguments)

    def cpu_seconds(self) -> float:
        """Processor time it has used, all threads, user and system."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """End it, in order if it lets us."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _check(self) -> None:
        if self.process.poll() is not None:
            said = self.output.read_text(errors="replace").strip().splitlines()
            raise RuntimeError(f"{self.name} on {self.host.name} ended with status "
                               f"{self.process.returncode}: {said[-1] if said else 'no word'}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Bed:
    """An unshaped reference lab, and all that a benchmark starts in it."""

    def __init__(self, tag: str) -> None:
        self.lab = Lab(reference_topology(rates_mbps=None), f"{_PREFIX}{os.getpid()}{tag}")
        self._stack = contextlib.ExitStack()
        self._programs = 0

    def __enter__(self) -> Self:
        self._stack.enter_context(self.lab)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def host(self, name: str) -> Host:
        """A host of the lab."""
        return self.lab.host(name)

    @property
    def detour(self) -> tuple[str, int]:
        """Where the detour answers."""
        return str(self.host("detour").address), 45672

    def start(self, host: str, *command: object) -> Program:
        """Start a program that runs until the bed is left."""
        self._programs += 1
        output = self.lab.folder() / f"output{self._programs}"
        return self._stack.enter_context(Program(self.host(host), command, output))

    def start_server(self, *arguments: object) -> Program:
        """Start detour-server without limits that a benchmark would meet."""
        server = self.start("detour", "detour-server", "--allow-remote", "10.0.0.0/8",
                            "--rate", 0, "--max-per-client", 65535,
                            "--max-mappings", 131072, "--max-flows-per-client", 0, *arguments)
        server.wait_control_socket()
        return server

    def start_client(self, *arguments: object) -> Program:
        """Start the client daemon, as it runs by default."""
        client = self.start("client", "detour-client", "daemon", self.host("detour").address,
                            *arguments)
        client.wait_control_socket()
        return client

    def run(self, host: str, *command: object, timeout: float = 60) -> str:
        """Run a command to its end; its output."""
        return str(self.host(host).run(command, timeout=timeout).stdout)

    def set_sysctls(self, host: str, **values: object) -> None:
        """Set sysctls of a host; '__' in a name stands for a dot."""
        with namespaces.inside(self.host(host).namespace):
            for name, value in values.items():
                sysctl.write(name.replace("__", "."), str(value))

    def udp(self, address: object) -> socket.socket:
        """A non-blocking UDP socket of the client, on one of its addresses."""
        with namespaces.inside(self.host("client").namespace):
            made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._stack.callback(made.close)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        made.bind((str(address), 0))
        return made

    def client_addresses(self, count: int) -> list[IPv4Address]:
        """Give the client further addresses: they are further clients to the detour."""
        addresses = [IPv4Address("10.0.1.10") + n for n in range(count)]
        batch = "".join(f"address add {address}/24 dev L1\n" for address in addresses)
        self.host("client").run(["ip", "-batch", "-"], input=batch)
        return addresses

    def forget_flows(self) -> None:
        """Empty the detour's conntrack table, which is bounded."""
        with namespaces.inside(self.host("detour").namespace), \
                contextlib.closing(NetlinkSocket(_NETLINK_NETFILTER)) as netlink:
            netlink.request(_CONNTRACK_DELETE, struct.pack("=BBH", socket.AF_UNSPEC, 0, 0))


@contextlib.contextmanager
def load_program() -> Iterator[Path]:
    """load.c, compiled."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="detour-bench-")))
        target = folder / "load"
        subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-o", target, _SOURCE], check=True)
        yield target


def remove_leftovers() -> None:
    """Take down labs of benchmarks that were killed."""
    for name in state.names():
        match = re.fullmatch(_PREFIX + r"(\d+)[a-z]+", name)
        if match and not Path(f"/proc/{match[1]}").exists():
            Lab(reference_topology(rates_mbps=None), name).down()


def busy_seconds() -> float:
    """Processor time used on this machine since boot, all processors."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def pause(seconds: float) -> None:
    """Let the machine come to rest between measurements."""
    time.sleep(seconds)
