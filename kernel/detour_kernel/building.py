# SPDX-License-Identifier: GPL-2.0-or-later
"""Configuring and compiling, and the cache of what came out, named by a hash of what went in."""

import gzip
import hashlib
import lzma
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from detour_kernel import fragments
from detour_kernel.common import (
    KERNEL,
    Lock,
    Problem,
    cache,
    capture,
    check_space,
    check_tools,
    run_logged,
    say,
)
from detour_kernel.tree import Base, Tree, package_version, read_base, remove, replace_link, series

_OPTION: Final = "MPTCP_PM_DETOUR"
_KEPT: Final = 4  # entries beside those that links name
_ENTRY: Final = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Config:
    """One configuration: whose options it starts from ('' is allnoconfig), and what goes on top."""

    name: str
    start: str
    fragments: tuple[str, ...]
    packages: bool
    gigabytes: float  # of disk while building, the source apart
    about: str


_ALL: Final = ("base", "mptcp", "nat", "lab")
CONFIGS: Final = {config.name: config for config in (
    Config("vm", "", (*_ALL, "vm"), True, 2,
           "for virtual machines, as small as it gets; everything built in"),
    Config("debug", "", (*_ALL, "vm", "debug"), False, 4,
           "vm with KASAN, lockdep, kmemleak, fault injection and KUnit"),
    Config("cloud", "cloud", (*_ALL, "distro"), True, 8,
           "Debian's own for cloud machines, plus ours"),
    Config("host", "host", (*_ALL, "distro"), True, 20,
           "that of the kernel which runs here, plus ours"),
)}


@dataclass(frozen=True)
class Plan:
    """All that a build is made from, and its name in the cache."""

    config: Config
    patched: bool
    base: Base
    patches: tuple[Path, ...]
    start: str
    lines: tuple[fragments.Line, ...]
    hash: str

    @property
    def link(self) -> Path:
        """The stable name of the newest build of this kind."""
        return cache() / (self.config.name if self.patched else f"unpatched-{self.config.name}")

    @property
    def entry(self) -> Path:
        """Where what comes out is, once it is there."""
        return cache() / self.hash

    @property
    def suffix(self) -> str:
        """What 'uname -r' says after the version."""
        return f"-{'detour' if self.patched else 'unpatched'}-{self.config.name}"

    @property
    def packages(self) -> bool:
        """Whether Debian packages are made, too."""
        return self.config.packages and self.patched


def make_plan(name: str, *, patched: bool) -> Plan:
    """Read everything a build depends on; needs neither the tree nor the lock."""
    config = CONFIGS[name]
    base = read_base()
    patches = tuple(series()) if patched else ()
    start, version = _start(config, base)
    texts = [patch.read_text(errors="surrogateescape") for patch in patches]
    lines = wanted(config, detour=any(f"+config {_OPTION}\n" in text for text in texts))
    digest = hashlib.sha256()
    for part in ("1", name, str(patched), base.version, version, start, compiler(),
                 *(patch.name for patch in patches), *texts, *(line.text for line in lines),
                 (KERNEL / "detour_kernel" / "building.py").read_text()):
        digest.update(part.encode(errors="surrogateescape") + b"\0")
    return Plan(config, patched, base, patches, start, tuple(lines), digest.hexdigest()[:16])


def wanted(config: Config, *, detour: bool) -> list[fragments.Line]:
    """The merged lines of a configuration's fragments; with ``detour`` also our own option."""
    names = [*config.fragments, *(["detour"] if detour else [])]
    return fragments.merge(
        fragments.parse((KERNEL / "configs" / f"{name}.config").read_text(),
                        f"kernel/configs/{name}.config")
        for name in names)


def compiler() -> str:
    """What compiles and links."""
    check_tools()
    return "\n".join(capture([tool, "--version"]).splitlines()[0] for tool in ("gcc", "ld"))


def _start(config: Config, base: Base) -> tuple[str, str]:
    if config.start == "cloud":
        version = package_version(base.config_package)
        if not base.config_cloud.exists():
            raise Problem(f"{base.config_package} has no {base.config_cloud}: "
                          "kernel/BASE is out of date")
        return lzma.decompress(base.config_cloud.read_bytes()).decode(), version
    if config.start == "host":
        for path in (Path(f"/boot/config-{os.uname().release}"), Path("/proc/config.gz")):
            if path.exists():
                data = path.read_bytes()
                text = gzip.decompress(data) if path.suffix == ".gz" else data
                return text.decode(), str(path)
        raise Problem("the running kernel's configuration is neither in /boot nor in "
                      "/proc/config.gz; try --config cloud")
    return "", ""


def find(plan: Plan) -> bool:
    """Whether the cache has it; if so it becomes the newest of its kind."""
    if not (plan.entry / "bzImage").exists():
        return False
    os.utime(plan.entry)
    if not plan.link.is_symlink() or os.readlink(plan.link) != plan.hash:
        replace_link(plan.link, plan.hash)
    return True


def build(plan: Plan, lock: Lock, jobs: int) -> None:
    """Compile, and put what comes out into the cache."""
    tree = Tree(plan.base, lock)
    begun = (tree.path / f"build-{plan.config.name}").exists()
    check_space(cache(), 1 if begun else plan.config.gigabytes)
    tree.go_to(tree.commits(list(plan.patches))[-1])
    objects = Objects(tree, plan.config.name, jobs)
    objects.configure(plan.start, plan.lines)
    for left in _packages(tree.path):
        left.unlink()
    began = time.monotonic()
    objects.make(["bindeb-pkg" if plan.packages else "bzImage"], f"building {plan.config.name}",
                 suffix=plan.suffix, version=plan.hash[:8],
                 KDEB_PKGVERSION=f"{plan.base.upstream}-{plan.hash[:8]}", KDEB_COMPRESS="zstd",
                 KDEB_CHANGELOG_DIST="unstable")
    _store(plan, tree, objects, time.monotonic() - began)


class Objects:
    """An object folder within the tree."""

    def __init__(self, tree: Tree, name: str, jobs: int) -> None:
        self.tree = tree
        self.path = tree.path / f"build-{name}"
        self.log = cache() / "logs" / f"{name}.log"
        self._jobs = jobs
        self.path.mkdir(exist_ok=True)
        self._stamp = self.path / ".at-work"
        if self._stamp.exists():
            self._distrust()

    def configure(self, start: str, lines: Sequence[fragments.Line]) -> None:
        """Write .config and see that every line survived."""
        asked = self.path / ".asked"
        text = "".join(f"{line.text}\n" for line in lines)
        if start:
            (self.path / ".config").write_text(fragments.onto(start, list(lines)))
            target, env = "olddefconfig", {}
        else:
            asked.write_text(text)
            target, env = "allnoconfig", {"KCONFIG_ALLCONFIG": str(asked)}
        run_logged(["make", f"O={self.path.name}", target], what="configuring",
                   log=self.log, cwd=self.tree.path, env=env)
        lost = fragments.lost((self.path / ".config").read_text(), list(lines), modules=bool(start))
        if lost:
            more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise Problem(f"{lost[0].where}: '{lost[0].text}' did not survive in "
                          f".config (a dependency is missing, or no such option){more}")

    def make(self, targets: list[str], what: str, *, suffix: str, version: str,
             log: Path | None = None, **variables: str) -> None:
        """Run make for the targets."""
        # The same input gives the same kernel: no clock, no counter, no host name.
        date = time.strftime("%Y-%m-%d %H:%M:%S UTC",
                             time.gmtime(self.tree.base.archive.stat().st_mtime))
        env = {"KBUILD_BUILD_TIMESTAMP": date, "KBUILD_BUILD_USER": "detour-tools",
               "KBUILD_BUILD_HOST": "localhost", "KBUILD_BUILD_VERSION": version, **variables}
        run_logged(["make", f"O={self.path.name}", f"-j{self._jobs}", f"LOCALVERSION={suffix}",
                    *targets], what=what, log=log or self.log,
                   cwd=self.tree.path, env=env, stamp=self._stamp)

    def _distrust(self) -> None:
        since = self._stamp.stat().st_mtime
        say(f"the last build in {self.path} was killed: dropping what it wrote")
        for folder, _, names in os.walk(self.path):
            for name in names:
                path = Path(folder, name)
                if (name.endswith((".o", ".a", ".ko", ".cmd")) or name.startswith("vmlinux")) and (
                        path.lstat().st_mtime >= since):
                    path.unlink()
        self._stamp.unlink()


def _packages(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix in {".deb", ".buildinfo", ".changes"}]


def _store(plan: Plan, tree: Tree, objects: Objects, seconds: float) -> None:
    aside = cache() / f"new.{plan.hash}"
    remove(aside)
    aside.mkdir()
    shutil.copy2(objects.path / "arch/x86/boot/bzImage", aside)
    shutil.copy2(objects.path / "System.map", aside)
    shutil.copy2(objects.path / ".config", aside / "config")
    (aside / "about").write_text(
        f"configuration: {plan.config.name}\nrelease: {plan.base.upstream}{plan.suffix}\n"
        f"base: {plan.base.package} {plan.base.version}\ncompiler: {compiler().splitlines()[0]}\n"
        f"seconds: {seconds:.0f}\n" + "".join(f"patch: {patch.name}\n" for patch in plan.patches))
    for path in _packages(tree.path):
        # linux-libc-dev would replace the distribution's, for no gain.
        if path.name.startswith(("linux-image-", "linux-headers-")) and path.suffix == ".deb":
            shutil.move(path, aside)
        else:
            path.unlink()
    for staged in (objects.path / "debian").glob("linux-*"):
        remove(staged)
    remove(plan.entry)
    aside.rename(plan.entry)
    replace_link(plan.link, plan.hash)
    prune()


def prune() -> None:
    """Drop what was begun and not ended, and all but the newest entries."""
    for left in cache().glob("new.*"):
        remove(left)
    named = {os.readlink(link) for link in cache().iterdir() if link.is_symlink()}
    rest = [entry for entry in cache().iterdir()
            if _ENTRY.fullmatch(entry.name) and entry.name not in named]
    for entry in sorted(rest, key=lambda path: path.stat().st_mtime, reverse=True)[_KEPT:]:
        remove(entry)
