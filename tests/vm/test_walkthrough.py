# SPDX-License-Identifier: GPL-2.0-or-later
"""The walk-through: with either path manager, interrupted, and with something broken."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from detour_tools.errors import UserError
from detour_tools.lab import vm, walkthrough
from detour_tools.lab.captures import segments
from detour_tools.lab.network import Lab
from detour_tools.lab.topology import reference_topology
from tests.detour_lab import running
from tests.netns.conftest import traces, unique_lab_name

_before: dict[str, set[str]] = {}


def _folders() -> set[str]:
    """The folders of the VMs there are, that of the tests' own VM among them."""
    return {str(path) for path in vm.root_folder().glob("vm-*")}


@pytest.fixture
def name() -> Iterator[str]:
    """A name for a lab; it is gone after the test."""
    made = unique_lab_name()
    _before[made] = _folders()
    yield made
    Lab(reference_topology(), made).down()


def left(name: str) -> list[str]:
    """Everything that the walk-through of that name left."""
    vm.remove_leftovers()
    return traces(name) + sorted(_folders() - _before[name])


@pytest.fixture(params=["kernel", "userspace"])
def path_manager(request: pytest.FixtureRequest) -> str:
    """Each path manager in turn."""
    return str(request.param)


def test_from_end_to_end(vm_kernel: Path, name: str, path_manager: str, tmp_path: Path,
                         capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "out"
    try:
        status = walkthrough.run(output, vm.Settings(vm_kernel), name, path_manager=path_manager)
    finally:
        story = capsys.readouterr().out
        print(story)
    assert status == 0
    assert left(name) == []
    assert "✗" not in story
    assert story.count("✓") == (20 if path_manager == "kernel" else 10)
    assert ("mptcpize run nc" in story) == (path_manager == "userspace")
    assert {each.name for each in output.iterdir()} == {
        "client.pcap", "detour.pcap", "server.pcap", "dmesg.txt"}
    log = (output / "dmesg.txt").read_text(encoding="utf-8")
    assert ("Checking detour=10.0.6.2:" in log) == (path_manager == "kernel")
    ends = {str(segment.source.address) for segment in segments(output / "client.pcap")}
    assert {"10.0.3.2", "10.0.6.2"} < ends


def shown(name: str, vm_kernel: Path, folder: Path) -> list[object]:
    return ["--name", name, "walkthrough", "--output", folder / "out", "--kernel", vm_kernel,
            "--path-manager", "userspace"]


@pytest.mark.parametrize(("moment", "signum", "status"), [
    ("$ detour-lab vm", signal.SIGINT, 130),
    ("| mptcpize run nc", signal.SIGINT, 130),
    ("| mptcpize run nc", signal.SIGTERM, 143),
])
def test_interrupted(vm_kernel: Path, name: str, tmp_path: Path, moment: str, signum: int,
                     status: int):
    with running(moment, *shown(name, vm_kernel, tmp_path)) as process:
        os.killpg(process.pid, signum)
        os.killpg(process.pid, signum)
        _, complaint = process.communicate(timeout=60)
    assert (process.returncode, complaint) == (status, "")
    assert left(name) == []
    assert not (tmp_path / "out").exists()


def test_after_sigkill_the_next_start_cleans_up(vm_kernel: Path, name: str, tmp_path: Path):
    with running("| mptcpize run nc", *shown(name, vm_kernel, tmp_path)) as process:
        process.kill()
        process.communicate(timeout=10)
    assert traces(name)
    with running("$ detour-lab vm", *shown(name, vm_kernel, tmp_path)) as process:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert left(name) == []


def test_a_detour_that_refuses_is_a_cross(vm_kernel: Path, name: str, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]):
    """Without a mapping there is one subflow, and that is said."""
    monkeypatch.setattr(walkthrough, "ALLOWED", "192.0.2.0/24")
    monkeypatch.setattr(walkthrough, "PAGE_BYTES", 1_000_000)
    with pytest.raises(UserError, match=r"not seen: .*the connection has two subflows"):
        walkthrough.run(tmp_path / "out", vm.Settings(vm_kernel), name,
                        path_manager="userspace")
    story = capsys.readouterr().out
    assert re.search("✓ the page came whole", story)
    assert re.search("✗ at the detour there are two TCP flows", story)
    assert left(name) == []
