# SPDX-License-Identifier: GPL-2.0-or-later
"""The roles' modules on a real kernel: what they change, and that they put it back.

Run by Ansible itself, with its connection 'local' inside a network namespace. What needs a whole
system (units, network managers, boot) is molecule/roles' part.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from detour_tools import runtime
from detour_tools.lab import namespaces
from detour_tools.lab.network import Host, Lab
from tests.netns.conftest import StartServer

_ROLES = Path(__file__).parents[2] / "roles"

Module = Callable[..., dict[str, Any]]


@pytest.fixture
def host(lab: Lab) -> Host:
    return lab.host("detour")


@pytest.fixture
def module(host: Host, tmp_path: Path) -> Module:
    """Run a module of a role: ``module("supported/library/detour_sysctls.py", path=...)``."""
    def run(path: str, /, *, check: bool = False, **arguments: object) -> dict[str, Any]:
        library = (_ROLES / path).parent
        done = host.run(
            ["env", "LC_ALL=C.UTF-8", f"HOME={tmp_path}",
             Path(sys.executable).with_name("ansible"), "localhost", "--connection=local",
             f"--module-path={library}", f"--module-name={Path(path).stem}",
             f"--args={json.dumps(arguments)}", "--diff", *(["--check"] if check else [])],
            check=False, cwd=tmp_path)  # away from the project's ansible.cfg
        diff, _, result = done.stdout.partition("localhost | ")
        found: dict[str, Any] = json.loads(result.partition("=>")[2])
        return found | {"diff": diff}
    return run


# sysctls

_SYSCTLS = "supported/library/detour_sysctls.py"
_FORWARD = "net/ipv4/conf/all/send_redirects", "net/ipv4/conf/all/rp_filter"


def _values(host: Host) -> list[str]:
    return host.run(["cat", *(f"/proc/sys/{each}" for each in _FORWARD)]).stdout.split()


def test_sysctls_are_set_and_put_back(host: Host, module: Module, tmp_path: Path) -> None:
    path = tmp_path / "90-ours.conf"
    host.run(["sysctl", "-qw", "net.ipv4.conf.all.send_redirects=1",
              "net.ipv4.conf.all.rp_filter=2"])
    wanted = {"path": str(path), "values": {"net.ipv4.conf.all.send_redirects": 0,
                                            "net.ipv4.conf.all.rp_filter": 0}}

    assert module(_SYSCTLS, check=True, **wanted)["changed"]
    assert _values(host) == ["1", "2"]
    assert not path.exists()

    assert module(_SYSCTLS, **wanted)["changed"]
    assert _values(host) == ["0", "0"]
    # As systemd does at boot.
    host.run(["sysctl", "-qw", "net.ipv4.conf.all.rp_filter=1"])
    host.run(["sysctl", "-qp", path])
    assert _values(host) == ["0", "0"]
    assert not module(_SYSCTLS, **wanted)["changed"]

    # One is no longer wanted, and somebody else has set the other since.
    assert module(_SYSCTLS, path=str(path), values={"net.ipv4.conf.all.rp_filter": 0})["changed"]
    assert _values(host) == ["1", "0"]
    host.run(["sysctl", "-qw", "net.ipv4.conf.all.rp_filter=1"])
    assert module(_SYSCTLS, path=str(path), state="absent")["changed"]
    assert _values(host) == ["1", "1"]
    assert not path.exists()
    assert not module(_SYSCTLS, path=str(path), state="absent")["changed"]


def test_a_value_that_the_kernel_refuses_leaves_no_file(
        host: Host, module: Module, tmp_path: Path) -> None:
    path = tmp_path / "90-ours.conf"
    done = module(_SYSCTLS, path=str(path), values={"net.ipv4.conf.all.rp_filter": "much"})
    assert done["msg"] == "cannot set net.ipv4.conf.all.rp_filter to much: Invalid argument"
    assert not path.exists()


def test_what_the_running_server_has_borrowed_waits_for_it(
        host: Host, module: Module, start_server: StartServer, tmp_path: Path) -> None:
    path = tmp_path / "90-ours.conf"
    host.run(["sysctl", "-qw", "net.ipv4.ip_forward=0"])
    server = start_server(host)
    done = module(_SYSCTLS, path=str(path), values={"net.ipv4.ip_forward": 0})
    assert (done["changed"], done["borrowed"]) == (True, ["net.ipv4.ip_forward"])
    assert host.run(["cat", "/proc/sys/net/ipv4/ip_forward"]).stdout == "1\n"
    # Not what the server has set: that it puts back itself.
    assert "#was net.ipv4.ip_forward = 0" in path.read_text(encoding="utf-8")
    server.stop()
    assert host.run(["cat", "/proc/sys/net/ipv4/ip_forward"]).stdout == "0\n"


def test_a_journal_adds_no_line_to_what_root_sets_at_boot(
        host: Host, module: Module, start_server: StartServer, tmp_path: Path) -> None:
    path = tmp_path / "90-ours.conf"
    start_server(host).kill()
    with namespaces.inside(host.namespace):
        journal = runtime.directory("detour-server") / "detour-server.sysctls"
    journal.write_text('{"net.ipv4.ip_forward": ["0\\nkernel.core_pattern = |/x", "1"]}')
    module(_SYSCTLS, path=str(path), values={"net.ipv4.ip_forward": 0})
    assert "core_pattern" not in path.read_text(encoding="utf-8")
