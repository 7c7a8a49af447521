# SPDX-License-Identifier: GPL-2.0-or-later
"""Comparing the results of the kernel's selftests on two kernels."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "kernel" / "selftests"


def results(path: Path, kernel: str, *lines: str, program: str = "a.sh",
            end: str = "status 0, 61 s, log clean") -> Path:
    path.write_text("\n".join([f"# kernel: {kernel}", "# selftests: these", f"# program: {program}",
                               "TAP version 13", *lines, f"# end: {end}", ""]))
    return path


def compare(*words: object) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, PROGRAM, "compare", *words], capture_output=True,
                          text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_equal_results_are_counted_by_kind(tmp_path: Path) -> None:
    lines = ["ok 1 - a: one # time=12ms", "ok 2 - a: two # SKIP time=1ms",
             "ok 3 - a: three # IGNORE Flaky time=1ms", "not ok 4 - a: four # time=1ms",
             "ok 5 - a: one # time=12ms"]
    status, out, _ = compare(results(tmp_path / "1", "old", *lines),
                             "--with", results(tmp_path / "2", "new", *lines))
    assert status == 0
    assert "| `a.sh` | 5 | 2 / 1 / 1 / 1 | 2 / 1 / 1 / 1 | 1:01, 1:01 | clean, clean |" in out
    assert "No subtest differs." in out


@pytest.mark.parametrize("other", ["not ok 1 - a: one # time=1ms", "ok 1 - a: one # SKIP time=1ms",
                                   "ok 1 - a: one # IGNORE Flaky time=1ms"])
def test_a_difference_is_listed_and_told_by_the_status(tmp_path: Path, other: str) -> None:
    status, out, _ = compare(results(tmp_path / "1", "old", "ok 1 - a: one # time=1ms"),
                             "--with", results(tmp_path / "2", "new", other))
    assert status == 2
    assert "**differs**" in out


def test_flaky_is_what_differs_on_one_kernel_and_is_listed(tmp_path: Path) -> None:
    good, bad = "ok 1 - a: one # time=1ms", "not ok 1 - a: one # time=1ms"
    first = results(tmp_path / "1", "old", good)
    second, third = results(tmp_path / "2", "new", bad), results(tmp_path / "3", "new", good)
    status, out, _ = compare(first, "--with", second, third)
    assert status == 0
    assert "| `a.sh` one | ok | not ok, ok | flaky |" in out
    assert "| 1 / 0 / 0 / 0 | 0 / 0 / 0 / 1 |" in out  # the first run, not the best one
    status, out, _ = compare(first, "--with", second, results(tmp_path / "3", "new", bad))
    assert status == 2  # it never passed


def test_what_was_ended_and_what_the_kernel_said_is_told(tmp_path: Path) -> None:
    line = "ok 1 - a: one # time=1ms"
    status, out, _ = compare(
        results(tmp_path / "1", "old", line, program="a.sh -f",
                end="ended after 9 s, 9 s, log clean"), "--with",
        results(tmp_path / "2", "new", line, program="a.sh -f",
                end="status 0, 9 s, log 1 complaints: WARNING: here"))
    assert "(a.sh -f ended early)" in out
    assert "clean, 1 with complaints" in out
    assert status == 2


def test_files_of_two_kernels_are_not_mixed(tmp_path: Path) -> None:
    line = "ok 1 - a: one # time=1ms"
    one, two = results(tmp_path / "1", "old", line), results(tmp_path / "2", "new", line)
    status, _, err = compare(one, two, "--with", two)
    assert status == 1
    assert err == f"selftests: {two} is of new, and {one} of old\n"


def test_what_one_side_alone_ran_is_named_and_no_success(tmp_path: Path) -> None:
    one = results(tmp_path / "1", "old", "ok 1 - a: one # time=1ms", program="a.sh -f")
    more = results(tmp_path / "2", "old", "ok 1 - a: two # time=1ms", program="a.sh -e")
    new = results(tmp_path / "3", "new", "ok 1 - a: one # time=1ms", program="a.sh -f")
    status, out, _ = compare(one, more, "--with", new)
    assert status == 2
    assert "Not run on new: `a.sh -e`." in out
    assert "**differs**" not in out
