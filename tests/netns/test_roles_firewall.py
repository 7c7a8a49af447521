# SPDX-License-Identifier: GPL-2.0-or-later
"""The roles' tasks that open and close firewalls, run by Ansible on real rules.

Those alone, as the others need systemd, in a mount namespace where /etc and /opt are folders of the
test's.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from detour_tools.lab.network import Host, Lab

_ROOT = Path(__file__).parents[2]
_BIN = Path(sys.executable).parent
_SANDBOX = """set -eu
for each in etc opt; do
    mount -t overlay over -o "lowerdir=/$each,upperdir=$1/$each,workdir=$1/work-$each" "/$each"
done
cd "$1/.." && shift && exec "$@"
"""
_DROPS = """table inet filter {
    chain input { type filter hook input priority filter; policy drop; }
    chain forward { type filter hook forward priority filter; policy drop; }
}"""
_TASKS = {
    ("detour_server", "configure"): ["Open the firewall for the clients", "See that they can ask"],
    ("ip_forward", "configure"): ["See that role detour_common ran before", "Open the forward "
                                  "chains that drop mapped flows", "See that mapped flows pass"],
    ("detour_server", "remove"): ["Close the firewall"],
    ("ip_forward", "remove"): ["Take away what is open without it"],
}


@pytest.fixture
def host(lab: Lab) -> Host:
    detour = lab.host("detour")
    detour.run(["nft", "-f", "-"], input=_DROPS)
    return detour


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """The folder of what is written to the host's, with a release in /opt."""
    folder = tmp_path / "memory"
    folder.mkdir()
    # One overlay cannot be written to another, which the host's folders may lie on.
    subprocess.run(["mount", "-t", "tmpfs", "memory", folder], check=True)
    for each in ("etc", "opt", "work-etc", "work-opt"):
        (folder / each).mkdir(parents=True)
    programs = folder / "opt/detour-tools/r1/bin"
    programs.mkdir(parents=True)
    (programs / "detour-server").symlink_to(_BIN / "detour-server")
    yield folder
    subprocess.run(["umount", folder], check=True)


def _tasks(role: str, file: str, names: list[str]) -> list[dict[str, Any]]:
    """The tasks of a role with these names, for a play that is not within it."""
    def flat(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [one for task in tasks for one in (flat(task["block"]) if "block" in task
                                                  else [task])]
    text = (_ROOT / "roles" / role / "tasks" / file).read_text(encoding="utf-8")
    found = [task for task in flat(yaml.safe_load(text)) if task["name"] in names]
    assert [task["name"] for task in found] == names
    return found


def _play(host: Host, memory: Path, role: str, *options: str, file: str = "configure",
          **variables: object) -> tuple[bool, int, str]:
    """Whether it did well, how many tasks changed something, and what it said."""
    given = {}
    for each in ("defaults", "vars"):
        path = _ROOT / "roles" / role / each / "main.yml"
        given |= yaml.safe_load(path.read_text(encoding="utf-8"))
    play = memory.parent / "play.yml"
    play.write_text(json.dumps([{
        "hosts": "localhost", "connection": "local", "gather_facts": False,
        "tasks": _tasks(role, f"{file}.yml", _TASKS[role, file]),
        "vars": {**given, "detour_common_release": "r1", **variables}}]), encoding="utf-8")
    done = host.run(
        ["unshare", "--mount", "sh", "-c", _SANDBOX, "sh", memory, "env", "LC_ALL=C.UTF-8",
         f"HOME={memory.parent}", f"PATH={_BIN}:{os.environ['PATH']}",
         f"ANSIBLE_LIBRARY={_ROOT}/roles/supported/library", "ansible-playbook", play,
         *options], check=False)
    said = " ".join((done.stdout + done.stderr).split())
    changed = re.search(r"changed=(\d+)", said)
    assert changed, said
    return done.returncode == 0, int(changed[1]), said


def _listed(host: Host) -> str:
    return host.run(["nft", "list", "ruleset"]).stdout


def test_requests_of_the_clients_and_of_nobody_else(host: Host, memory: Path) -> None:
    before = _listed(host)
    clients = {"detour_server_allow_client": ["192.0.2.1", "198.51.100.0/24"]}

    assert _play(host, memory, "detour_server", "--check", **clients)[:2] == (True, 1)
    assert _listed(host) == before
    assert _play(host, memory, "detour_server", **clients)[:2] == (True, 1)
    assert "ip saddr { 192.0.2.1, 198.51.100.0/24 } udp dport 45672 accept" in _listed(host)
    assert _play(host, memory, "detour_server", **clients)[:2] == (True, 0)

    # Nobody is let in.
    assert _play(host, memory, "detour_server", detour_server_allow_client=[])[:2] == (True, 1)
    assert _listed(host) == before
    assert _play(host, memory, "detour_server", detour_server_allow_client=[])[:2] == (True, 0)

    # By no firewall of ours.
    _play(host, memory, "detour_server", **clients, detour_server_listen="0.0.0.0:7")
    assert "udp dport 7 accept" in _listed(host)
    assert _play(host, memory, "detour_server", detour_server_firewall="none", **clients)[:2] == (
        True, 1)
    assert _listed(host) == before


def test_what_is_wrong_is_said(host: Host, memory: Path) -> None:
    before = _listed(host)
    well, changed, said = _play(host, memory, "detour_server",
                                detour_server_allow_client=["192.0.2.1/8"])
    assert (well, changed) == (False, 0)
    assert "192.0.2.1/8" in said
    assert _listed(host) == before


def test_all_goes_with_the_role(host: Host, memory: Path) -> None:
    before = _listed(host)
    _play(host, memory, "detour_server", detour_server_allow_client=["192.0.2.1"])
    assert _listed(host) != before
    opened = _listed(host)
    assert _play(host, memory, "detour_server", "--check", file="remove")[:2] == (True, 1)
    assert _listed(host) == opened
    assert _play(host, memory, "detour_server", file="remove")[:2] == (True, 1)
    assert _listed(host) == before
    assert [path for path in (memory / "etc").rglob("*") if path.is_file()] == []
    assert _play(host, memory, "detour_server", file="remove")[:2] == (True, 0)


def test_without_a_program_to_close_it_is_said(host: Host, memory: Path) -> None:
    _play(host, memory, "detour_server", detour_server_allow_client=["192.0.2.1"])
    shutil.rmtree(memory / "opt/detour-tools")
    well, _, said = _play(host, memory, "detour_server", file="remove")
    assert not well
    assert "deploy it again, then remove" in said


def test_another_release_closes_it_where_that_in_use_does_not_run(host: Host, memory: Path
                                                                  ) -> None:
    """As after an upgrade of the host, whose Python is another then."""
    before = _listed(host)
    _play(host, memory, "detour_server", detour_server_allow_client=["192.0.2.1"])
    broken = memory / "opt/detour-tools/current/bin/detour-server"
    broken.parent.mkdir(parents=True)
    broken.write_text("#!/bin/sh\necho no module named detour_tools >&2\nexit 1\n", "ascii")
    broken.chmod(0o755)
    assert _play(host, memory, "detour_server", file="remove")[:2] == (True, 1)
    assert _listed(host) == before


def test_mapped_flows_pass(host: Host, memory: Path) -> None:
    assert _play(host, memory, "ip_forward", "--check")[:2] == (True, 1)
    assert "ct label" not in _listed(host)
    assert _play(host, memory, "ip_forward")[:2] == (True, 1)
    assert "ct label 97 accept" in _listed(host)
    assert _play(host, memory, "ip_forward")[:2] == (True, 0)


def test_what_a_run_opened_that_was_cut_off_goes_with_the_role(host: Host, memory: Path) -> None:
    """It had written no unit yet."""
    before = _listed(host)
    _play(host, memory, "ip_forward")
    opened = _listed(host)
    assert opened != before
    assert _play(host, memory, "ip_forward", "--check", file="remove")[:2] == (True, 1)
    assert _listed(host) == opened
    assert _play(host, memory, "ip_forward", file="remove")[:2] == (True, 1)
    assert _listed(host) == before
    assert _play(host, memory, "ip_forward", file="remove")[:2] == (True, 0)
    shutil.rmtree(memory / "opt/detour-tools")
    assert _play(host, memory, "ip_forward", file="remove")[:2] == (True, 0)


@pytest.mark.parametrize("which", ["detour_server", "ip_forward"])
def test_check_mode_on_a_host_without_the_program(host: Host, memory: Path, which: str) -> None:
    variables = {"detour_server_allow_client": ["192.0.2.1"]}
    shutil.rmtree(memory / "opt/detour-tools")
    assert _play(host, memory, which, "--check", **variables)[:2] == (True, 0)
    assert not _play(host, memory, which, **variables)[0], "it is needed otherwise"
