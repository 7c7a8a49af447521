# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/wheels.txt pins what pyproject.toml asks for, each wheel by its hash."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"([a-z0-9.-]+)==(\S+) --hash=sha256:[0-9a-f]{64}")


def test_all_that_hosts_get_is_pinned() -> None:
    lines = [line for line in (ROOT / "scripts/wheels.txt").read_text("utf-8").splitlines()
             if not line.startswith("#")]
    pinned = {}
    for line in lines:
        found = LINE.fullmatch(line)
        assert found, line
        pinned[found[1]] = found[2]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    needed = [*project["project"]["dependencies"], *project["build-system"]["requires"], "pip"]
    for requirement in map(Requirement, needed):
        assert requirement.specifier.contains(pinned[requirement.name]), requirement


def test_a_controller_that_reaches_no_registry_is_told_what_to_do(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/wheels"], capture_output=True, text=True, check=False,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PIP_RETRIES": "0",
             "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_NO_CACHE_DIR": "1"})
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "PIP_INDEX_URL" in done.stderr
    assert f"bring {tmp_path}/detour-tools/wheels from there" in done.stderr
    assert not list((tmp_path / "detour-tools/wheels").glob("new-*"))
