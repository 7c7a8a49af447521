# SPDX-License-Identifier: GPL-2.0-or-later
"""Writing the series back: what would lose it is refused."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

KERNEL = Path(__file__).parents[2] / "kernel"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A git tree with a commit 'base' and one on it; kernel/ is a copy beside it."""
    shutil.copytree(KERNEL, tmp_path / "kernel")
    made = tmp_path / "tree"
    for words in (["init", "-q", "-b", "base", made], ["-C", made, *commit("base")],
                  ["-C", made, "checkout", "-q", "-b", "detour"], ["-C", made, *commit("more")]):
        subprocess.run(["git", *words], check=True)
    return made


def commit(text: str) -> list[str]:
    return ["-c", "user.name=x", "-c", "user.email=x@localhost", "commit", "-q", "--allow-empty",
            "-m", text]


def export(tree: Path) -> tuple[int, str]:
    done = subprocess.run([sys.executable, tree.parent / "kernel" / "export", tree],
                          capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


def there(tree: Path) -> list[str]:
    return sorted(path.name for path in (tree.parent / "kernel" / "patches").iterdir())


def test_a_tree_without_commits_does_not_empty_the_series(tree: Path) -> None:
    before = there(tree)
    subprocess.run(["git", "-C", tree, "checkout", "-q", "base"], check=True)
    status, said = export(tree)
    assert status == 1
    assert said.endswith("is at 'base', without commits; 'git checkout detour' first\n")
    assert there(tree) == before


def test_a_branch_that_does_not_stand_on_base_is_refused(tree: Path) -> None:
    subprocess.run(["git", "-C", tree, "checkout", "-q", "--orphan", "other"], check=True)
    subprocess.run(["git", "-C", tree, *commit("elsewhere")], check=True)
    status, said = export(tree)
    assert status == 1
    assert said.endswith("does not stand on 'base'; rebase onto it\n")


def test_a_tree_of_something_else_is_refused(tree: Path) -> None:
    subprocess.run(["git", "-C", tree, "branch", "-m", "base", "main"], check=True)
    status, said = export(tree)
    assert status == 1
    assert said.endswith("has no branch 'base'; kernel/import makes a tree that has\n")
