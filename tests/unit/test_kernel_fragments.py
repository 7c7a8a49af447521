# SPDX-License-Identifier: GPL-2.0-or-later
"""kernel/: configuration fragments, and the series as it stands."""

import os
import re
import sys
from pathlib import Path

import pytest

KERNEL = Path(__file__).parents[2] / "kernel"
sys.path.insert(0, str(KERNEL))

from detour_kernel import building, common, fragments, tree  # noqa: E402


def lines(*texts: str) -> list[fragments.Line]:
    return fragments.parse("".join(f"{text}  # because\n" for text in texts), "some.config")


def test_every_configuration_reads_and_every_line_has_a_reason():
    for config in building.CONFIGS.values():
        merged = building.wanted(config, detour=True)
        assert any(line.symbol == "MPTCP_PM_DETOUR" for line in merged)
        assert len({line.symbol for line in merged}) == len(merged)
    assert not any(line.symbol == "MPTCP_PM_DETOUR"
                   for line in building.wanted(building.CONFIGS["vm"], detour=False))


@pytest.mark.parametrize(("text", "complaint"), [
    ("CONFIG_A=y\n", "some.config:1: CONFIG_A has no reason"),
    ("\nCONFIG_A = y # because\n", "some.config:2: 'CONFIG_A = y # because' is neither"),
    ("A=y  # because\n", "some.config:1: 'A=y  # because' is neither"),
    ("# CONFIG_A is not set\n", "CONFIG_A has no reason"),
])
def test_a_line_that_is_wrong_is_named(text: str, complaint: str):
    with pytest.raises(common.Problem, match=re.escape(complaint)):
        fragments.parse(text, "some.config")


def test_a_later_fragment_overrules():
    merged = fragments.merge([lines("CONFIG_A=y", "CONFIG_B=3"), lines("# CONFIG_A is not set")])
    assert [line.text for line in merged] == ["CONFIG_B=3", "# CONFIG_A is not set"]


def test_lines_that_did_not_survive_are_found():
    wishes = lines("CONFIG_A=y", "CONFIG_B=y", "# CONFIG_C is not set", "# CONFIG_D is not set",
                   'CONFIG_E="x y"', "CONFIG_F=7", 'CONFIG_G=""')
    config = '# CONFIG_A is not set\nCONFIG_B=m\nCONFIG_C=y\nCONFIG_E="x y"\nCONFIG_F=70\n'
    assert [line.symbol for line in fragments.lost(config, wishes, modules=False)] == [
        "A", "B", "C", "F"]
    assert [line.symbol for line in fragments.lost(config, wishes, modules=True)] == ["A", "C", "F"]


def test_what_a_distribution_has_as_module_stays_one():
    config = fragments.onto("CONFIG_A=m\nCONFIG_B=y\n", lines(
        "CONFIG_A=y", "CONFIG_C=y", "# CONFIG_B is not set"))
    assert fragments.values(config)["A"] == "m"
    assert config.endswith("CONFIG_C=y\n# CONFIG_B is not set\n")


def test_series_and_folder_agree():
    assert [path.name for path in tree.series()] == sorted(
        path.name for path in (KERNEL / "patches").glob("*.patch"))


def test_a_patch_that_the_series_does_not_name_is_told(tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tree, "PATCHES", tmp_path)
    assert tree.series() == []
    (tmp_path / "0001-a.patch").write_text("")
    with pytest.raises(common.Problem, match=r"0001-a.patch is not in kernel/patches/series"):
        tree.series()
    (tmp_path / "series").write_text("# first\n0001-a.patch\n0002-b.patch\n")
    with pytest.raises(common.Problem, match=r"names 0002-b.patch, which is not"):
        tree.series()


def test_old_builds_go_and_current_ones_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = common.cache()
    assert cache == tmp_path / "detour-tools" / "kernel"
    cache.mkdir(parents=True)
    for number in range(7):
        entry = cache / f"{number:016x}"
        entry.mkdir()
        os.utime(entry, (number, number))
    (cache / "new.deadbeef").mkdir()
    (cache / "source").mkdir()
    tree.replace_link(cache / "vm", f"{0:016x}")
    building.prune()
    assert sorted(path.name for path in cache.iterdir()) == [
        *(f"{number:016x}" for number in (0, 3, 4, 5, 6)), "source", "vm"]
