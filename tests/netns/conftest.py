# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures for tests on network namespaces; every engineer's tests stand on them.

``lab`` is the reference network, unshaped (fast, and without delay), new for each test.
"""

import contextlib
import itertools
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from detour_tools import runtime
from detour_tools.lab import namespaces
from detour_tools.lab.captures import Capture
from detour_tools.lab.daemons import Daemon
from detour_tools.lab.network import Host, Lab
from detour_tools.lab.topology import Topology, reference_topology
from tests.netns.asking import Asker

MakeLab = Callable[..., Lab]
StartServer = Callable[..., Daemon]
StartClient = Callable[..., Daemon]
StartCapture = Callable[..., Capture]
Start = Callable[..., Daemon]

Serve = Callable[..., Daemon]

# The lab's server has a private address.
PRIVATE = ("--allow-remote", "10.0.0.0/8")

# Most tests look through mappings by plain TCP.
PLAIN = ("--relay", "tcp")

_numbers = itertools.count()

# What a developer's shell may export must not decide what is tested.
os.environ.pop("PYTHONUNBUFFERED", None)
# Some tests hold thousands of sockets; the usual limit is 1024.
_, _hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(_hard_limit, 16384), _hard_limit))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/netns/" in str(item.path) and os.geteuid() != 0:
            pytest.exit("the tests on network namespaces need root: use 'make test'", 1)


def unique_lab_name() -> str:
    """No two tests share a lab, also when several runs share the machine."""
    return f"t{os.getpid()}x{next(_numbers)}"


def traces(name: str) -> list[str]:
    """Everything on this machine that belongs to the lab ``name``."""
    found = [str(path) for folder in (namespaces.RUN, namespaces.ETC, runtime.ROOT)
             for path in folder.glob(f"*{name}*")]
    for pid in filter(str.isdigit, os.listdir("/proc")):
        command = namespaces.command_line(int(pid))
        if f"netns exec {name}-" in command or f"marker-{name}" in command:
            found.append(command)
    return found


@pytest.fixture
def name() -> Iterator[str]:
    """A name for a lab that the test itself takes up; it is gone after the test."""
    made = unique_lab_name()
    yield made
    Lab(reference_topology(), made).down()


@pytest.fixture
def make_lab() -> Iterator[MakeLab]:
    """Bring up a lab of a topology: ``make_lab(reference_topology(detours=3))``."""
    with contextlib.ExitStack() as stack:
        def make(topology: Topology | None = None) -> Lab:
            wanted = topology or reference_topology(rates_mbps=None)
            return stack.enter_context(Lab(wanted, unique_lab_name()))
        yield make


@pytest.fixture
def lab(make_lab: MakeLab) -> Lab:
    """The reference network with one detour, unshaped."""
    return make_lab()


@pytest.fixture
def start() -> Iterator[Start]:
    """Run a program in the background: ``start(host, [program, argument...])``.

    Whatever still runs at the end of the test is stopped.
    """
    started: list[Daemon] = []

    def run(host: Host, command: list[object]) -> Daemon:
        started.append(Daemon(host, command))
        return started[-1]

    yield run
    for daemon in reversed(started):
        daemon.stop()


@pytest.fixture
def start_server(start: Start) -> StartServer:
    """Run ``detour-server`` and wait until it serves: ``start_server(lab.host("detour"))``.

    The lab's server has a private address, so unless ``arguments`` are given, that is allowed.
    """
    def run(host: Host, *arguments: object) -> Daemon:
        daemon = start(host, ["detour-server", *(arguments or PRIVATE)])
        daemon.wait_control_socket()
        return daemon

    return run


@pytest.fixture(params=["nftables", "iptables"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each NAT back end in turn."""
    return str(request.param)


@pytest.fixture
def serve(lab: Lab, start_server: StartServer, backend: str) -> Serve:
    """Run ``detour-server`` with that back end, for any TCP: ``serve("--rate", 5)``."""
    def run(*arguments: object, backend: str = backend) -> Daemon:
        return start_server(lab.host("detour"), "--backend", backend, *PRIVATE, *PLAIN, *arguments)
    return run


@pytest.fixture
def asker(lab: Lab) -> Asker:
    """Asks the detour from the client."""
    return Asker(lab.host("client"), lab.host("detour").address)


@pytest.fixture
def start_client(start: Start) -> StartClient:
    """Run ``detour-client daemon``: ``start_client(lab.host("client"), "detour")``."""
    def run(host: Host, *arguments: object) -> Daemon:
        daemon = start(host, ["detour-client", "daemon", *arguments])
        daemon.wait_control_socket()
        return daemon

    return run


@pytest.fixture
def start_capture(tmp_path: Path) -> Iterator[StartCapture]:
    """Capture: ``with start_capture(host, "L1") as capture: ...``, then ``capture.path``."""
    with contextlib.ExitStack() as stack:
        def run(host: Host, interface: str, expression: str = "") -> Capture:
            path = tmp_path / f"{host.name}-{interface}-{next(_numbers)}.pcap"
            return stack.enter_context(Capture(host, interface, path, expression=expression))
        yield run
