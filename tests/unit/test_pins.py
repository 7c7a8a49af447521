# SPDX-License-Identifier: GPL-2.0-or-later
"""scripts/wheels.txt pins what pyproject.toml asks for, each wheel by its hash."""

import re
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
