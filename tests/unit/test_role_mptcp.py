# SPDX-License-Identifier: GPL-2.0-or-later
"""What the variables of role mptcp mean for the kernel."""

from types import ModuleType

import pytest

from tests.unit import role_modules

_UNIT = ("[Unit]\n[Service]\nExecStart=ip mptcp limits set subflows 4\n"
         "ExecStop=ip mptcp limits set add_addr_accepted 0 subflows 2\n")


@pytest.fixture
def filters(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return role_modules.load("mptcp/filter_plugins/detour_mptcp.py", monkeypatch)


@pytest.mark.parametrize(("path_manager", "wanted"), [
    ("", {}),
    ("kernel", {"net.mptcp.path_manager": "kernel", "net.mptcp.pm_type": 0}),
    ("userspace", {"net.mptcp.path_manager": "userspace", "net.mptcp.pm_type": 1}),
    ("detour", {"net.mptcp.pm_type": 2})])
def test_path_managers(filters: ModuleType, path_manager: str, wanted: dict[str, object]) -> None:
    more = {"net.mptcp.scheduler": "default"}
    assert filters.sysctls(path_manager, True, more) == {"net.mptcp.enabled": 1, **wanted, **more}


def test_what_is_wanted_besides_wins(filters: ModuleType) -> None:
    assert filters.sysctls("", True, {"net.mptcp.enabled": 0}) == {"net.mptcp.enabled": 0}


@pytest.mark.parametrize(("subflows", "accepted", "wanted"), [
    (-1, -1, []), (2, "-1", ["subflows", "2"]),
    ("0", 8, ["subflows", "0", "add_addr_accepted", "8"])])
def test_limits(filters: ModuleType, subflows: object, accepted: object,
                wanted: list[str]) -> None:
    assert filters.limits({"subflows": subflows, "add_addr_accepted": accepted}) == wanted


@pytest.mark.parametrize(("looked", "now", "before"), [
    ("", "", ""),
    ("add_addr_accepted 0 subflows 2", "add_addr_accepted 0 subflows 2",
     "add_addr_accepted 0 subflows 2"),
    (_UNIT + "add_addr_accepted 0 subflows 4", "add_addr_accepted 0 subflows 4",
     "add_addr_accepted 0 subflows 2")])
def test_what_was_looked_at(filters: ModuleType, looked: str, now: str, before: str) -> None:
    assert filters.now(looked) == now
    assert filters.before(looked) == before


@pytest.mark.parametrize(("holds", "wanted", "has"), [
    ("add_addr_accepted 0 subflows 2", ["subflows", "2"], True),
    ("add_addr_accepted 2 subflows 0", ["subflows", "2"], False),
    ("add_addr_accepted 0 subflows 20", ["subflows", "2"], False),
    ("add_addr_accepted 0 subflows 2", ["subflows", "2", "add_addr_accepted", "1"], False),
    ("", ["subflows", "2"], False), ("", [], True)])
def test_whether_they_hold(filters: ModuleType, holds: str, wanted: list[str],
                           has: bool) -> None:
    assert filters.has(holds, wanted) is has
