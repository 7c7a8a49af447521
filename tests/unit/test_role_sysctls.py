# SPDX-License-Identifier: GPL-2.0-or-later
"""Which file sets a sysctl otherwise after the roles' own."""

from pathlib import Path
from types import ModuleType

import pytest

from tests.unit import role_modules

_FORWARD = {"net.ipv4.ip_forward": "1"}


@pytest.fixture
def sysctls(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return role_modules.load("supported/library/detour_sysctls.py", monkeypatch)


def _later(sysctls: ModuleType, folder: Path, values: dict[str, str] = _FORWARD) -> str:
    (folder / "sysctl.d").mkdir(exist_ok=True)
    said: str = sysctls.later(folder / "sysctl.d/90-detour-forward.conf", values,
                              (str(folder / "sysctl.d"),), str(folder / "sysctl.conf"))
    return said.replace(f"{folder}/", "")


def test_a_file_that_nothing_at_boot_reads_is_read_by_sysctl(
        sysctls: ModuleType, tmp_path: Path) -> None:
    assert _later(sysctls, tmp_path) == ""
    (tmp_path / "sysctl.conf").write_text("net.ipv4.ip_forward=0\n")
    assert _later(sysctls, tmp_path) == (
        "sysctl.conf sets net.ipv4.ip_forward to 0 whenever somebody runs 'sysctl --system' or "
        "'sysctl -p', after sysctl.d/90-detour-forward.conf: take that line away")


@pytest.mark.parametrize(("name", "line", "found"), [
    ("99-theirs.conf", "net.ipv4.ip_forward = 0", True),
    ("99-theirs.conf", "net/ipv4/ip_forward=0", True),
    ("99-theirs.conf", "-net.ipv4.ip_forward=0", True),
    ("99-theirs.conf", "net.ipv4.conf.all.forwarding=0", True),
    ("99-theirs.conf", "net.ipv4.ip_forward=1", False),
    ("99-theirs.conf", "#net.ipv4.ip_forward=0", False),
    ("10-theirs.conf", "net.ipv4.ip_forward=0", False),
])
def test_files_that_systemd_reads_at_boot(sysctls: ModuleType, tmp_path: Path, name: str,
                                          line: str, found: bool) -> None:
    _later(sysctls, tmp_path)
    (tmp_path / "sysctl.d" / name).write_text(line + "\n")
    assert ("at boot, after" in _later(sysctls, tmp_path)) == found
