# SPDX-License-Identifier: GPL-2.0-or-later
"""Nothing of ours has a fixed name in a folder that everybody may write to.

Whoever comes first owns such a name: what root then reads, runs or removes is theirs.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = (".ci", ".config", "Makefile", "ansible.cfg", "inventories", "kernel", "molecule",
         "playbooks", "pyproject.toml", "roles", "scripts", "site.yml", "src", "tests")
# Code of the kernel's, not ours.
OTHERS = ROOT / "kernel/patches"

# The folders (hier(7), and Debian's /run/lock), and what stands for them. Names that mktemp and
# the like make up are no text, and so not found.
SHARED = re.compile(r"(?<![\w.])/(?:var/)?(?:tmp|dev/shm|run/lock|lock)(?![\w-])"
                    r"|\$\{?TMPDIR|\bgettempdir\b")

# Lines that make no such name, each with a part of it.
HARMLESS = {
    ("kernel/configs/base.config", "CONFIG_TMPFS=y"),
    # It looks for what was left there.
    ("molecule/roles/files/snapshot", "find /etc"),
    ("molecule/roles/files/snapshot", "-not -path"),
    # What a user does there in vain.
    ("tests/netns/test_roles_trust.py", "for folder in"),
    # A full one, in a namespace of its own.
    ("tests/netns/test_roles_trust.py", "mount -t tmpfs -o size=4k"),
    # A VM that begins to boot has nobody yet.
    ("src/detour_tools/lab/guest/init", "busybox mkdir -p"),
    ("src/detour_tools/lab/guest/init", "busybox mount -t tmpfs"),
}


def fixed_names(text: str) -> list[str]:
    """The lines of a file that name something in such a folder."""
    return [line.strip() for line in text.splitlines() if SHARED.search(line)]


def files() -> list[Path]:
    """All that the project consists of, but for this test."""
    found = [path for part in PARTS
             for path in ([ROOT / part] if (ROOT / part).is_file() else (ROOT / part).rglob("*"))]
    return [path for path in found
            if path.is_file() and OTHERS not in path.parents and path != Path(__file__).resolve()
            and "__pycache__" not in path.parts and ".egg-info" not in str(path)]


def test_nothing_has_a_fixed_name_in_a_folder_that_everybody_may_write_to() -> None:
    found, used = [], set()
    for path in files():
        name = str(path.relative_to(ROOT))
        for line in fixed_names(path.read_text(encoding="utf-8", errors="replace")):
            excuse = {(where, part) for where, part in HARMLESS if where == name and part in line}
            used |= excuse
            if not excuse:
                found.append(f"{name}: {line}")
    assert not found, "\n".join(found)
    assert used == HARMLESS, "an excuse that nothing needs any more"


@pytest.mark.parametrize(("line", "told"), [
    ("dest: /var/tmp/nested-kernel", True),
    ('dest: "/var/tmp/{{ item }}"', True),
    ("HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis pytest", True),
    ("temporary=${TMPDIR:-/tmp}/image-$(id -u)", True),
    ("temporary=$TMPDIR/image", True),
    ('Path(tempfile.gettempdir()) / "ours"', True),
    ("exec 9>/run/lock/ours", True),
    ("exec 9>/var/lock/ours", True),
    ("open('/dev/shm/ours')", True),
    ("folder=$(mktemp -d)", False),
    ("TMPDIR=$temporary mmdebstrap", False),
    ("/run/detour-tools/lock", False),
    ("$folder/tmp-1 work/tmp /tmpfs", False),
])
def test_what_is_told(line: str, told: bool) -> None:
    assert bool(fixed_names(line)) == told
