# SPDX-License-Identifier: GPL-2.0-or-later
"""The base source and the series: which ones, and a git tree of them that kbuild can trust.

The tree goes from one state to another by git, which touches files that differ and no others,
so kbuild compiles again what depends on those. Object folders lie within the tree: then all
paths are relative, and objects stay good when the whole is copied elsewhere.
"""

import contextlib
import fnmatch
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from detour_kernel.common import KERNEL, SETUP, Lock, Problem, cache, capture, check_space, say

PATCHES: Final = KERNEL / "patches"
# Commits that we make are the same wherever and whenever they are made.
_WHO: Final = {
    f"GIT_{role}_{what}": value for role in ("AUTHOR", "COMMITTER") for what, value in (
        ("NAME", "detour-tools"), ("EMAIL", "detour-tools@localhost"),
        ("DATE", "2000-01-01T00:00:00Z"))}
_OURS: Final = ("/build-*/", "/*.deb", "/*.buildinfo", "/*.changes")


@dataclass(frozen=True)
class Base:
    """What kernel/BASE says, and the version that is installed."""

    package: str
    version: str
    archive: Path
    config_package: str
    config_cloud: Path

    @property
    def upstream(self) -> str:
        """6.12.117 of 6.12.117-1~deb12u1."""
        return self.version.split("-")[0]


def read_base() -> Base:
    """The base; a Problem when its package is missing or of another series."""
    pairs = dict(re.findall(r"^([\w-]+) = (.*)$", (KERNEL / "BASE").read_text(), re.MULTILINE))
    try:
        package, pattern = pairs["package"], pairs["version"]
        base = Base(package, package_version(package), Path(pairs["archive"]),
                    pairs["config-package"], Path(pairs["config-cloud"]))
    except KeyError as error:
        raise Problem(f"kernel/BASE does not say '{error.args[0]} = ...'") from None
    if not fnmatch.fnmatch(base.version, pattern):
        raise Problem(f"{package} is of version {base.version}, and kernel/BASE wants {pattern}")
    if not base.archive.exists():
        raise Problem(f"{base.archive} is missing though {package} is installed: "
                      f"run 'apt-get install --reinstall {package}'")
    return base


def package_version(package: str) -> str:
    """The installed version of a Debian package; a Problem when there is none."""
    done = subprocess.run(["dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", package],
                          capture_output=True, text=True, check=False)
    status, _, version = done.stdout.partition(" ")
    if status != "installed":
        raise Problem(f"the package {package} is not installed: {SETUP} "
                      "(it is in Debian 12's updates and security archive)")
    return version


def series() -> list[Path]:
    """The patches in order; a Problem when series and folder do not agree."""
    listing = PATCHES / "series"
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    there = {path.name for path in PATCHES.glob("*.patch")}
    for name in names:
        if name not in there:
            raise Problem(f"kernel/patches/series names {name}, which is not in kernel/patches")
    if extra := sorted(there - set(names)):
        raise Problem(f"kernel/patches/{extra[0]} is not in kernel/patches/series")
    return [PATCHES / name for name in names]


class Tree:
    """The cache's git tree of the base source. Use it under the lock only."""

    def __init__(self, base: Base, _lock: Lock) -> None:
        self.base = base
        self.path = cache() / "source"
        # Git processes that were killed may have left their lock files; we hold the real one.
        for left in (self.path / ".git").glob("*.lock"):
            left.unlink()
        if self._unpacked() != base.version:
            self._unpack()
        self.root = self.git("rev-parse", "base").strip()

    def git(self, *words: str, env: Mapping[str, str] | None = None) -> str:
        """The output of a git command in the tree."""
        return git(self.path, *words, env=env)

    def _unpacked(self) -> str:
        marker = self.path / ".git" / "detour-base"
        return marker.read_text().strip() if marker.exists() else ""

    def _unpack(self) -> None:
        aside = cache() / "source.new"
        shutil.rmtree(aside, ignore_errors=True)
        check_space(cache(), 4)
        say(f"unpacking {self.base.archive} ({self.base.version}), half a minute")
        aside.mkdir()
        capture(["tar", "-xf", self.base.archive, "-C", aside, "--strip-components=1"])
        make_repository(aside, self.base)
        shutil.rmtree(self.path, ignore_errors=True)
        aside.rename(self.path)

    def commits(self, patches: list[Path]) -> list[str]:
        """The base and the state after each patch, made without touching a file of the tree."""
        commits = [self.root]
        for patch, state in zip(patches, states(self.path, self.root, patches), strict=True):
            commits.append(self.git("commit-tree", "-p", commits[-1], "-m", patch.name, state,
                                    env=_WHO).strip())
        return commits

    def go_to(self, commit: str) -> None:
        """Make the files those of ``commit``, touching those that differ only."""
        # Without this a file that was copied or touched counts as changed, and is written again.
        with contextlib.suppress(Problem):  # what its exit status says of files that do differ
            self.git("update-index", "-q", "--refresh")
        self.git("checkout", "-q", "--force", "--detach", commit)
        # Files of patches that were never recorded, for example after a kill.
        self.git("clean", "-fdq")


def git(folder: Path, *words: str, env: Mapping[str, str] | None = None) -> str:
    """The output of a git command in a folder."""
    return capture(["git", "-c", "gc.auto=0", "-c", "core.pager=cat",
                    "-C", folder, *words], env=env)


def make_repository(folder: Path, base: Base) -> None:
    """Record a freshly unpacked source as the commit 'base'."""
    git(folder, "init", "-q", "-b", "base")
    (folder / ".git" / "info" / "exclude").write_text("\n".join(_OURS) + "\n")
    # Also what the kernel's own .gitignore names: the archive has it, so it is source.
    git(folder, "add", "--all", "--force", ".")
    git(folder, "commit", "-q", "-m", f"{base.package} {base.version}", env=_WHO)
    (folder / ".git" / "detour-base").write_text(f"{base.version}\n")


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def replace_link(link: Path, target: str) -> None:
    """Make ``link`` a symbolic link, at once."""
    aside = link.with_name(f".{link.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    aside.replace(link)


def states(folder: Path, root: str, patches: list[Path]) -> list[str]:
    """The git tree objects after each patch on ``root``; a Problem for one that does not apply."""
    made = []
    with tempfile.TemporaryDirectory(dir=folder / ".git") as aside:
        env = {"GIT_INDEX_FILE": f"{Path(aside).resolve()}/index"}
        git(folder, "read-tree", root, env=env)
        for patch in patches:
            try:
                git(folder, "apply", "--cached", "--whitespace=nowarn", str(patch.resolve()),
                    env=env)
            except Problem as problem:
                raise Problem(f"{patch.name} does not apply: {problem}") from None
            made.append(git(folder, "write-tree", env=env).strip())
    return made


def am(folder: Path, patch: Path) -> None:
    """Apply one patch file with 'git am', as a commit."""
    # The committer is nobody in particular; the author is the patch's.
    env = {name: value for name, value in _WHO.items() if "COMMITTER" in name}
    try:
        git(folder, "am", "-q", "--no-3way", "--keep-cr", str(patch.resolve()), env=env)
    except Problem:
        with contextlib.suppress(Problem):
            git(folder, "am", "--abort")
        raise
