# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures for tests that run inside a virtual machine, on a kernel of ours.

``vm`` is one VM for the whole session, with the fixtures' ``Vm`` around it:

    def test_pm_type(vm: Vm):
        assert vm.run("sysctl -n net.mptcp.pm_type").stdout == "0\\n"   # a shell's line,
        vm.run(["detour-client", "netlink", "list"], status=1)   # or words; status is checked
        with vm.start(["tcpdump", "-ni", "lo"]) as tcpdump:      # in the background: a Daemon
            tcpdump.wait_line("listening")
        (vm.results / "file").write_text(...)   # a folder host and VM share, by the same path

The VM sees the host's files (this tree, too), read-only; what it writes elsewhere than in
``vm.results`` stays in its memory for the session. It has no NIC but ``lo``: make namespaces
(``vm.run("ip netns add ...")``), or a whole lab with ``vm_lab``:

    def test_joins(vm: Vm, vm_lab: MakeVmLab):
        lab = vm_lab("--detours", "2")                  # options of 'detour-lab up'; shaped, netem
        lab.host("client").run(["ping", "-c1", "server"])       # a Host as in tests/netns
        with Daemon(lab.host("detour"), ["detour-server", ...]) as server: ...

After each test that used the VM, what its kernel logged meanwhile is looked through, and a splat
(BUG, WARNING, KASAN, lockdep, RCU, leaks, hung tasks...) fails the test; ``vm.splats(...)`` lets a
test expect some. A VM that died fails its test, and the next test gets a new one.

The kernel: ``pytest --kernel IMAGE``, or ``DETOUR_TEST_KERNEL=IMAGE``, or one that 'make kernel'
built, by name: ``--kernel debug`` is ~/.cache/detour-tools/kernel/debug/bzImage. Default: ``vm``.
Memory in MiB: ``--vm-memory`` (a debug kernel wants 2048 and more).
"""

import contextlib
import itertools
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_address
from pathlib import Path

import pytest

from detour_tools.errors import UserError
from detour_tools.lab import vm as machines
from detour_tools.lab.daemons import Daemon
from detour_tools.lab.network import environment
from detour_tools.lab.topology import Topology, reference_topology
from detour_tools.lab.vmlab import VmHost

MakeVmLab = Callable[..., "GuestLab"]

# What a kernel says when something is wrong with it.
SPLAT = re.compile(
    r"BUG:|WARNING:|KASAN|UBSAN|Oops|general protection fault|Kernel panic|"
    r"possible (recursive|circular) locking|inconsistent lock state|bad unlock balance|"
    r"suspicious RCU usage|refcount_t:|unreferenced object|new suspected memory leak|"
    r"blocked for more than \d+ seconds|list_(add|del) corruption|ODEBUG:|"
    r"scheduling while atomic|sleeping function called|unregister_netdevice: waiting for|"
    r"reference already released|leaked reference|still has \d+ .*users")
_numbers = itertools.count()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernel", default=os.environ.get("DETOUR_TEST_KERNEL", "vm"),
                     help="the VM's kernel: an image, or a name such as vm or debug")
    parser.addoption("--vm-memory", type=int, default=1536, help="the VM's memory in MiB")


class Vm:
    """A VM to run tests in."""

    def __init__(self, machine: machines.Machine, results: Path) -> None:
        self.machine = machine
        self.results = results
        self._expected: list[str] = []

    def run(self, command: str | Sequence[object], *, status: int | None = 0,
            timeout: float = 120, stdin: str | None = None) -> "subprocess.CompletedProcess[str]":
        """Run to the end; a string is a line of shell. Fails unless it ends with ``status``.

        A negative status is a signal; None takes any.
        """
        argv = ["sh", "-c", command] if isinstance(command, str) else list(command)
        done = self.machine.run(argv, env=environment(), timeout=timeout,
                                stdin=None if stdin is None else stdin.encode())
        assert status is None or done.returncode == status, (
            f"{command if isinstance(command, str) else shlex.join(map(str, command))} in the VM: "
            f"status {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def start(self, command: str | Sequence[object]) -> Daemon:
        """Run in the background; stop it yourself, or use it as a context manager."""
        return Daemon(self.host(), ["sh", "-c", command] if isinstance(command, str) else command)

    def host(self, namespace: str = "") -> VmHost:
        """The VM, or a network namespace in it, as a Host: for Daemon and Capture."""
        return VmHost(namespace or "vm", self.machine.folder, ip_address("127.0.0.1"), namespace)

    def dmesg(self) -> list[str]:
        """The kernel's log, from its beginning."""
        return self.run(["dmesg"]).stdout.splitlines()

    def splats(self, *expected: str) -> None:
        """Regular expressions of log lines that this test brings about on purpose."""
        self._expected += expected

    def check_log(self, since: int) -> None:
        """Fail when the kernel said from line ``since`` on that something is wrong with it."""
        expected, self._expected = self._expected, []
        lines = self.dmesg()[since:]
        for number, line in enumerate(lines):
            if SPLAT.search(line) and not any(re.search(each, line) for each in expected):
                pytest.fail("the kernel complained:\n" + "\n".join(lines[number:number + 60]),
                            pytrace=False)


class GuestLab:
    """A lab inside the VM, made by ``detour-lab up`` there."""

    def __init__(self, vm: Vm, name: str, topology: Topology) -> None:
        self.vm = vm
        self.name = name
        self.topology = topology

    def host(self, name: str) -> VmHost:
        """A host of the lab."""
        self.topology.host(name)
        return VmHost(name, self.vm.machine.folder, self.topology.address(name),
                      f"{self.name}-{name}")


@pytest.fixture(scope="session")
def vm_kernel(request: pytest.FixtureRequest) -> Path:
    """The image that ``--kernel`` names."""
    name = str(request.config.getoption("--kernel"))
    try:
        return Path(name).resolve() if "/" in name else machines.default_kernel(name)
    except UserError as error:
        pytest.exit(str(error), 1)


@pytest.fixture(scope="session")
def vm_holder(request: pytest.FixtureRequest, vm_kernel: Path,
              tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Vm]]:
    """The session's VM, or a new one when that has died."""
    results = tmp_path_factory.mktemp("results")
    settings = machines.Settings(vm_kernel, writable=(results,),
                                 memory=request.config.getoption("--vm-memory"))
    with contextlib.ExitStack() as stack:
        current: list[Vm] = []

        def get() -> Vm:
            if not current or not current[0].machine.alive():
                current[:] = [Vm(stack.enter_context(machines.Machine.start(settings)), results)]
                current[0].run("true", timeout=300)  # it has booted
            return current[0]

        yield get


@pytest.fixture
def vm(vm_holder: Callable[[], Vm]) -> Iterator[Vm]:
    """The session's VM; see the module's docstring."""
    machine = vm_holder()
    since = len(machine.dmesg())
    yield machine
    machine.check_log(since)


@pytest.fixture
def vm_lab(vm: Vm) -> Iterator[MakeVmLab]:
    """Build a lab in the VM: ``vm_lab("--detours", 2)``, with the options of 'detour-lab up'.

    ``topology`` tells what these options make, where it is not the reference network with as
    many detours as fit.
    """
    made: list[str] = []

    def make(*options: object, topology: Topology | None = None) -> GuestLab:
        made.append(f"v{next(_numbers)}")
        vm.run(["detour-lab", "--name", made[-1], "up", *options])
        return GuestLab(vm, made[-1], topology or reference_topology(detours=16))

    yield make
    for name in made:
        vm.run(["detour-lab", "--name", name, "down"])
