# SPDX-License-Identifier: GPL-2.0-or-later
"""Every unit that a role writes has bounds: a fault of ours shall not take the host along."""

import re
from pathlib import Path

import pytest

ROLES = Path(__file__).parents[2] / "roles"
# In templates, and in modules' texts; a drop-in is for others' units.
SOURCES = sorted(path for path in [*ROLES.glob("*/templates/*.service.j2"),
                                   *ROLES.glob("*/files/*"), *ROLES.glob("*/library/*.py"),
                                   *ROLES.glob("*/module_utils/*/*.py")]
                 if "[Service]" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_units_are_bounded(path: Path) -> None:
    for unit in path.read_text(encoding="utf-8").split("[Service]")[1:]:
        service = unit.split("[Install]")[0].split("[Timer]")[0]
        if "LIMITS" in service:  # detour_bridges' own, see the test below
            continue
        assert re.search(r"^MemoryMax=(\d+[MG]|\{\{ \w+_memory_max \}\})$", service, re.M)
        assert re.search(r"^TasksMax=\d+$", service, re.M)


def test_what_changes_the_network_is_bounded() -> None:
    text = (ROLES / "bridge/module_utils/detour_bridging/way_back.py").read_text(encoding="utf-8")
    assert 'LIMITS = ("MemoryMax=1G", "TasksMax=512")' in text
    assert len(re.findall(r"for each in LIMITS", text)) == 2


def test_there_are_units() -> None:
    assert len(SOURCES) > 3
