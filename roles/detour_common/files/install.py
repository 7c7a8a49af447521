# SPDX-License-Identifier: GPL-2.0-or-later
"""Installs an archive of wheels as a release, and removes old ones.

install.py ARCHIVE RELEASE SHA256 runs on the host, as root. The archive must be the one that the
controller has summed up, and each wheel the one that its requirements.txt names. Nothing that is in
use changes: the release has a folder of its own, and bears the mark '.complete' when all is there.
Of a release that cannot be installed nothing is left.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/opt/detour-tools")
UNITS = Path("/etc/systemd/system")
# What the roles keep of units that ran, to go back to.
KEPT = Path("/var/lib/detour-tools")
MARK = ".complete"
# So long a release may be there before another run, which installs another one, removes it.
UNUSED_SECONDS = 3600


def main(archive: Path, release: str, sha256: str) -> None:
    """Make the release's folder, then remove all but it and those in use."""
    with locked():
        if not (ROOT / release / MARK).exists():  # else another run was first
            install(archive, ROOT / release, sha256)
        tidy(archive, release)


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Wait until no other run is in here."""
    folder = os.open(ROOT, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def install(archive: Path, target: Path, sha256: str) -> None:
    """Make the release's folder, whole or not at all."""
    # Before anything of it is run, pip among it.
    if hashlib.sha256(archive.read_bytes()).hexdigest() != sha256:
        archive.unlink()
        sys.exit(f"{archive} is not what the controller sent: it was removed, run again; if this "
                 "comes back, find out who changes it")
    shutil.rmtree(target, ignore_errors=True)  # what an interrupted run has left
    os.umask(0o022)
    try:
        unpack(archive, target)
        (target / MARK).touch()
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def unpack(archive: Path, target: Path) -> None:
    """Make the release's folder, and see that its programs run."""
    run("/usr/bin/python3", "-m", "venv", "--system-site-packages", "--without-pip", target)
    python = target / "bin/python"
    # Beside it: where temporary files usually go may be small, or full.
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".new-") as folder:
        with zipfile.ZipFile(archive) as wheels:
            wheels.extractall(folder)
        pip = next(Path(folder).glob("pip-*.whl"))
        # --ignore-installed: what the distribution has besides may go with its next upgrade.
        run(python, pip / "pip", "install", "--isolated", "--quiet", "--no-index", "--no-cache-dir",
            "--ignore-installed", "--disable-pip-version-check", "--root-user-action=ignore",
            "--find-links", folder, "--require-hashes",
            "--requirement", Path(folder) / "requirements.txt", TMPDIR=folder)
    for program in ("detour-client", "detour-server"):
        run(target / "bin" / program, "--version")


def tidy(archive: Path, release: str) -> None:
    """Remove releases that nobody uses, and other archives."""
    for old in ROOT.iterdir():
        if old.is_dir() and not old.is_symlink() and old.name not in (
                release, "wheels", *in_use()) and not recent(old / MARK):
            shutil.rmtree(old)
    for old in (ROOT / "wheels").iterdir():
        if old != archive and not recent(old):
            old.unlink()


def recent(path: Path) -> bool:
    """Whether another run has just written it, and is about to use it."""
    try:
        return abs(time.time() - path.stat().st_mtime) < UNUSED_SECONDS
    except OSError:
        return False


def in_use() -> set[str]:
    """The release that the commands lead to, and those that units run or go back to."""
    found = {os.path.basename(os.path.realpath(ROOT / "current"))}
    for unit in (*UNITS.glob("detour-*.service"), *KEPT.glob("*/detour-*.service")):
        found.update(re.findall(rf"{ROOT}/([^/\s]+)/", unit.read_text(encoding="utf-8")))
    return found


def run(*command: object, **environment: str) -> None:
    """Run a command; when it fails, end with the last line it said."""
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False,
                              env={**os.environ, **environment})
    except PermissionError:
        sys.exit(f"{command[0]} cannot be run: {ROOT} must not be on a file system that is mounted "
                 "noexec")
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        sys.exit(f"{' '.join(map(str, command[:3]))}: {said[-1]}")


try:
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
except OSError as error:
    sys.exit(f"cannot install in {ROOT}: {error.filename or ''}: {error.strerror}; nothing of the "
             "release is left, what ran goes on")
