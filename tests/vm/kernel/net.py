# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of the kernel's path manager have in common: a network in the VM, and programs."""

import contextlib
import itertools
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from detour_tools.lab.daemons import Daemon, wait_for
from tests.vm.conftest import Vm

HERE = Path(__file__).parent
SPEC_CLIENT = HERE.parent / "spec_client.py"
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all",
          "--bounding-set=-all"]
SERVERS, DETOURS = 8000, 5000  # the first port of each, see kernel/network
REMOTE, REMOTE6 = "10.0.2.1", "dead:beef:2::1"
DETOUR, DETOUR6 = "10.0.1.2", "dead:beef:1::2"
# A kernel with all its checks on, on an emulated processor.
PATIENCE = 60.0
_numbers = itertools.count()


def is_debug(vm: Vm) -> bool:
    """Whether the VM's kernel is the one that checks itself."""
    return vm.run("test -e /sys/kernel/debug/kmemleak", status=None).returncode == 0


def build(vm: Vm) -> Path:
    """Compile the C programs; the folder with them, in the VM and here."""
    folder = vm.results / "programs"
    if not folder.exists():
        folder.mkdir()
        for source in HERE.glob("*.c"):
            subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-o",
                            folder / source.stem, source], check=True)
    return folder


class Net:
    """A client that reaches a server by a detour; see the script ``network``."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.programs = build(vm)
        self.name = f"k{next(_numbers)}"
        self._then: dict[str, dict[str, int]] = {}
        vm.run([HERE / "network", "up", self.name])

    def reset(self) -> None:
        """Use it for another test: no entries, sysctls as they were, counters from 0."""
        self.run("c", self.programs / "messages", "flush")
        self.set("pm_type=2", "detour_subflows=2", "detour_upgrade_tcp=0")
        self._then = {host: self._counters(host) for host in "cs"}

    def down(self) -> None:
        self.vm.run([HERE / "network", "down", self.name])

    def inside(self, host: str, command: Sequence[object]) -> list[object]:
        """The command line in the VM for a command on a host: c, d or s."""
        return ["ip", "netns", "exec", f"{self.name}-{host}", *command]

    def run(self, host: str, *command: object, status: int | None = 0) -> str:
        return self.vm.run(self.inside(host, command), status=status).stdout

    def start(self, host: str, *command: object) -> Daemon:
        return self.vm.start(self.inside(host, command))

    def serve(self) -> Daemon:
        """A server on its four ports."""
        server = self.start("s", self.programs / "load", "serve", SERVERS, 4)
        server.wait_line("serving", PATIENCE)
        return server

    @contextlib.contextmanager
    def held(self, address: str = REMOTE, count: int = 1, port: int = SERVERS) -> Iterator[Daemon]:
        """Connections that stay, with something to say."""
        with self.start("c", self.programs / "load", "hold", address, port, count) as load:
            load.wait_line("ready", PATIENCE)
            yield load

    def set(self, *settings: str) -> None:
        """Sysctls of the client, below net.mptcp: "pm_type=2"."""
        self.run("c", "sysctl", "-q", *(f"net.mptcp.{each}" for each in settings))

    def counters(self, host: str = "c") -> dict[str, int]:
        """How the MIB of MPTCP grew since the last reset, without prefixes: "DetourNatJoin"."""
        then = self._then.get(host, {})
        return {name: value - then.get(name, 0) for name, value in self._counters(host).items()}

    def _counters(self, host: str) -> dict[str, int]:
        lines = self.run(host, "nstat", "-asz", "MPTcpExt*").splitlines()[1:]
        return {words[0].removeprefix("MPTcpExt"): int(words[1])
                for words in map(str.split, lines)}

    def wait_counter(self, name: str, value: int, timeout: float = PATIENCE) -> None:
        """Wait until a counter of the client is not less."""
        wait_for(lambda: self.counters()[name] >= value, timeout, f"{name} {value}")

    def wait_closed(self) -> None:
        """Wait until no connection of the client is established."""
        wait_for(lambda: not self._counters("c")["MPCurrEstab"], PATIENCE, "the end of connections")

    def entries(self, host: str = "c") -> int:
        return int(self.run(host, self.programs / "messages", "list"))

    def spec(self, *lines: str, host: str = "c", prefix: Sequence[str] = ()) -> list[str]:
        """What the client that was written by the description answers, a line each."""
        command = self.inside(host, [*prefix, *SPEC])
        return self.vm.run(command, stdin="\n".join(lines) + "\n").stdout.splitlines()

    def add(self, *entries: str) -> None:
        """Add entries as the spec client names them; lines with a colon as the churn does."""
        assert self.spec(*(f"add {each}" for each in entries)) == ["ok"] * len(entries)


# Without site packages it starts in half the time.
SPEC = [sys.executable, "-I", "-S", str(SPEC_CLIENT)]


def nat(port: int = 0, number: int = 0) -> str:
    """One of the four NAT detours to one of the four ports of the server."""
    return f"{DETOUR} {DETOURS + 4 * port + number} {REMOTE} {SERVERS + port}"
