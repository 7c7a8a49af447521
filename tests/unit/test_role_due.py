# SPDX-License-Identifier: GPL-2.0-or-later
"""due: whether a unit runs as its files say, from the times that systemd and they bear."""

import os
import time
from pathlib import Path

import pytest

from tests.unit.role_modules import load

_NOW = int(time.time())
_STARTED = {"ActiveState": "active", "NeedDaemonReload": "no",
            "ExecMainStartTimestamp": f"@{_NOW - 100}", "StateChangeTimestamp": f"@{_NOW - 90}"}


def due(monkeypatch: pytest.MonkeyPatch, folder: Path, properties: dict[str, str],
        unit_age: int = 200, settings_age: int | None = 200) -> str:
    """What a unit with these properties needs, whose files were written so many seconds ago."""
    (folder / "systemctl").write_text(
        "#!/bin/sh\ncase \"$*\" in\n" + "".join(
            f"'show --timestamp=unix -P {name} a.service') echo '{value}';;\n"
            for name, value in properties.items()) + "*) echo;;\nesac\n")
    (folder / "systemctl").chmod(0o755)
    files = []
    for name, age in (("unit", unit_age), ("settings", settings_age)):
        if age is not None:
            (folder / name).touch()
            os.utime(folder / name, (_NOW - age, _NOW - age))
            files.append(str(folder / name))
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    unit, settings = [*files, None][:2]
    return str(load("supported/library/detour_due.py", monkeypatch).needs(
        "a.service", unit, settings))


@pytest.mark.parametrize(("properties", "unit_age", "settings_age", "wanted"), [
    ({}, 200, 200, ""),
    ({}, 100, 90, ""),  # the second it was started in
    ({"ActiveState": "inactive"}, 200, 200, "start"),
    ({"ActiveState": "failed"}, 50, 50, "start"),
    ({"NeedDaemonReload": "yes"}, 200, 200, "restart"),
    ({}, 99, 200, "restart"),
    ({}, 50, 50, "restart"),
    ({}, 200, 89, "reload"),
    ({}, 200, 95, ""),  # it was reloaded since
    ({}, 200, None, ""),
    # Without a main process.
    ({"ExecMainStartTimestamp": "", "ActiveEnterTimestamp": f"@{_NOW - 100}"}, 200, None, ""),
    ({"ExecMainStartTimestamp": "", "ActiveEnterTimestamp": f"@{_NOW - 100}"}, 50, None, "restart"),
    # Started when the clock was wrong.
    ({"ExecMainStartTimestamp": f"@{_NOW + 7200}"}, 50, 50, "restart"),
    ({"StateChangeTimestamp": f"@{_NOW + 7200}"}, 200, 50, "reload"),
])
def test_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, properties: dict[str, str],
             unit_age: int, settings_age: int | None, wanted: str) -> None:
    assert due(monkeypatch, tmp_path, _STARTED | properties, unit_age, settings_age) == wanted


def test_a_file_of_the_future_is_due_once(tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    assert due(monkeypatch, tmp_path, _STARTED, unit_age=-7200) == "restart"
    assert (tmp_path / "unit").stat().st_mtime <= time.time()
    assert due(monkeypatch, tmp_path, _STARTED, settings_age=-7200) == "reload"
    assert (tmp_path / "settings").stat().st_mtime <= time.time()


def test_a_file_that_somebody_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    due(monkeypatch, tmp_path, _STARTED)
    module = load("supported/library/detour_due.py", monkeypatch)
    unit, settings = str(tmp_path / "unit"), str(tmp_path / "settings")
    assert module.needs("a.service", unit, settings) == ""
    for gone in (settings, unit):
        Path(gone).unlink()
        assert module.needs("a.service", unit, settings) == "restart"


def test_what_is_kept_has_its_mode_and_time(tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("supported/library/detour_due.py", monkeypatch)
    path = tmp_path / "server.toml"
    path.write_text("rate = 1.0\n", encoding="utf-8")
    path.chmod(0o640)
    os.utime(path, (_NOW - 500, _NOW - 500))
    for _ in range(2):
        module.keep(str(tmp_path / "kept/server"), [str(path)])
    found = tmp_path / "kept/server/server.toml"
    assert [found] == list(found.parent.iterdir())
    assert found.read_text(encoding="utf-8") == "rate = 1.0\n"
    assert (found.stat().st_mode, int(found.stat().st_mtime)) == (path.stat().st_mode, _NOW - 500)
    assert found.parent.stat().st_mode & 0o777 == 0o700
