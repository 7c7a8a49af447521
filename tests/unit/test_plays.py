# SPDX-License-Identifier: GPL-2.0-or-later
"""The playbooks do the same whatever configuration of Ansible their caller has."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
_PLAYBOOK = Path(sys.executable).with_name("ansible-playbook")
_INVENTORY = {"detours": {"hosts": {"here": {
    "ansible_connection": "local", "ansible_python_interpreter": "/usr/bin/python3",
    "ansible_become": False, "detour_common_wheels": "/nowhere"}}}}
PLAYS = [(path, play) for path in sorted(ROOT.glob("playbooks/*.yml"))
         for play in yaml.safe_load(path.read_text(encoding="utf-8")) if "hosts" in play]


@pytest.mark.parametrize(("path", "play"), PLAYS, ids=lambda each: getattr(each, "name", ""))
def test_a_play_says_itself_what_it_needs(path: Path, play: dict[str, Any]) -> None:
    assert play["strategy"] == "linear", "hosts go on together, restarts one after the other"
    assert play["gather_facts"] is ("gather_subset" in play)


@pytest.mark.parametrize(("path", "play"), PLAYS, ids=lambda each: getattr(each, "name", ""))
def test_what_is_refused_is_refused_before_anything_changes(path: Path,
                                                            play: dict[str, Any]) -> None:
    refusing = [role for role in play.get("roles", ())
                if (ROOT / "roles" / role / "tasks/preflight.yml").exists()]
    asked = [(each["ansible.builtin.import_role"]["name"],
              each["ansible.builtin.import_role"]["tasks_from"])
             for each in play.get("pre_tasks", ())]
    # A play's only role refuses by itself before it changes anything.
    assert asked == ([(role, "preflight.yml") for role in refusing]
                     if len(play.get("roles", ())) > 1 else [])


@pytest.mark.parametrize(("setting", "value"), [
    ("ANSIBLE_GATHERING", "explicit"), ("ANSIBLE_STRATEGY", "free"), ("", "")])
def test_preflight_elsewhere(tmp_path: Path, setting: str, value: str) -> None:
    """In another folder, with another configuration: what is wrong is wrong here on purpose."""
    inventory = tmp_path / "inventory.yml"
    inventory.write_text(yaml.safe_dump(_INVENTORY), encoding="utf-8")
    config = tmp_path / "ansible.cfg"
    config.write_text("[defaults]\nretry_files_enabled = false\n", encoding="utf-8")
    environment = {**os.environ, "ANSIBLE_CONFIG": str(config), "LC_ALL": "C.UTF-8",
                   "ANSIBLE_HOME": str(tmp_path / "home")}
    if setting:
        environment[setting] = value
    done = subprocess.run(
        [_PLAYBOOK, "-i", inventory, "--tags", "preflight", ROOT / "playbooks/detours.yml"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120)
    # Where tests run there may be no systemd.
    assert "/nowhere" in done.stdout or "needs Python 3.11 or newer and systemd" in done.stdout, (
        done.stdout + done.stderr)
    assert "failed=1" in done.stdout
    assert "object of type" not in done.stdout, "facts are missing"
