# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian 13's nftables, on whichever Debian the tests run: from its packages, nothing is installed.

apt finds the packages and checks their signatures, in folders of its own and with this host's
mirrors and proxy; what is unpacked is kept for a month in ~/.cache/detour-tools/debian13. Programs
are run by Debian 13's own loader and C library. An older C library's programs run there, too, and
so does our server by this host's Python.
"""

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

_RELEASE = "trixie"
_MIRRORS = Path(__file__).parents[2] / "scripts" / "mirrors"
# Where Debian 12 and 13 have the keys of both; elsewhere apt's own are tried.
_KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_MONTH = 31 * 24 * 3600


class Nftables:
    """An nft, and how to run a Python, and our server, that uses that one and its library."""

    nft = "nft"
    python: tuple[str, ...] = (sys.executable,)

    @property
    def server(self) -> list[str]:
        """The beginning of a command line."""
        return [*self.python, "-c", "from detour_tools.cli.server import main; main()"]


class Unpacked(Nftables):
    """That of packages which were unpacked to a folder."""

    def __init__(self, folder: Path) -> None:
        self.nft = str(folder / "bin/nft")
        self.python = ("env", f"PATH={folder}/bin:{os.environ['PATH']}", *_loader(folder),
                       sys.executable)


def get() -> Nftables:
    """Debian 13's nftables; if it cannot be had, the test fails with one line."""
    sources = _run([_MIRRORS, _RELEASE]).splitlines()[0]
    # Another folder in another month, or when what makes it is another.
    made_of = (sources, time.strftime("%Y-%m", time.gmtime()), Path(__file__).read_bytes())
    digest = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache = (given if given.is_absolute() else Path.home() / ".cache") / "detour-tools/debian13"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (cache / digest).exists():
            for old in cache.iterdir():  # also of a run that was killed; nobody's any more
                if old.is_dir() and time.time() - old.stat().st_mtime > _MONTH:
                    shutil.rmtree(old)
            _make(cache / digest, sources)
    return Unpacked(cache / digest)


def _make(folder: Path, sources: str) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        apt, new = Path(name) / "apt", Path(name) / "new"
        packages = apt / "cache/archives"
        for each in (apt / "lists/partial", packages / "partial", new / "bin"):
            each.mkdir(parents=True)
        kind, where = sources.split(" ", 1)
        (apt / "sources").write_text(
            f"{kind} [signed-by={_KEYS}] {where}\n" if _KEYS.exists() else f"{sources}\n")
        (apt / "status").touch()  # nothing is installed
        settings = (
            f"Dir::State::lists={apt}/lists", f"Dir::State::status={apt}/status",
            f"Dir::Cache={apt}/cache", f"Dir::Etc::sourcelist={apt}/sources",
            "Dir::Etc::sourceparts=/dev/null", "Dir::Etc::preferences=/dev/null",
            "Dir::Etc::preferencesparts=/dev/null", "APT::Sandbox::User=root",
            "APT::Install-Recommends=false", "Acquire::Languages=none", "Acquire::Retries=3")
        apt_get = ["apt-get", "-q=2", *(word for each in settings for word in ("-o", each))]
        _run([*apt_get, "--error-on=any", "update"])
        _run([*apt_get, "--yes", "--download-only", "install", "nftables"])
        for package in packages.glob("*.deb"):
            _run(["dpkg-deb", "-x", package, new])
        command = shlex.join([*_loader(new, folder), f"{folder}/usr/sbin/nft"])
        (new / "bin/nft").write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (new / "bin/nft").chmod(0o755)
        new.rename(folder)


def _loader(folder: Path, later: Path | None = None) -> list[str]:
    """What runs a program with the folder's libraries, when the folder is at ``later``."""
    [found] = folder.glob("usr/lib/*/ld-linux*.so.*")
    path = (later or folder) / found.relative_to(folder)
    return [str(path), "--library-path", str(path.parent)]


def _run(command: Sequence[object]) -> str:
    done = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        pytest.fail("Debian 13's nftables cannot be fetched, which this test is about: "
                    f"{said[0] if said else f'exit status {done.returncode}'}", pytrace=False)
    return done.stdout
