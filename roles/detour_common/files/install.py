# SPDX-License-Identifier: GPL-2.0-or-later
"""Installs an archive of wheels as a release, and removes old ones.

install.py ARCHIVE RELEASE SHA256 runs on the host, as root. The archive must be the one that the
controller has summed up, and each wheel the one that its requirements.txt names. Nothing that is in
use changes: the release has a folder of its own, and bears the mark '.complete' when all is there.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path("/opt/detour-tools")
UNITS = Path("/etc/systemd/system")


def main(archive: Path, release: str, sha256: str) -> None:
    """Make the release's folder, then remove all but it and those in use."""
    # Before anything of it is run, pip among it.
    if hashlib.sha256(archive.read_bytes()).hexdigest() != sha256:
        archive.unlink()
        sys.exit(f"{archive} is not what the controller sent: it was removed, run again; if this "
                 "comes back, find out who changes it")
    target = ROOT / release
    shutil.rmtree(target, ignore_errors=True)  # what an interrupted run has left
    os.umask(0o022)
    run("/usr/bin/python3", "-m", "venv", "--system-site-packages", "--without-pip", target)
    python = target / "bin/python"
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(archive) as wheels:
            wheels.extractall(folder)
        pip = next(Path(folder).glob("pip-*.whl"))
        # --ignore-installed: what the distribution has besides may go with its next upgrade.
        run(python, pip / "pip", "install", "--isolated", "--quiet", "--no-index", "--no-cache-dir",
            "--ignore-installed", "--disable-pip-version-check", "--root-user-action=ignore",
            "--find-links", folder, "--require-hashes",
            "--requirement", Path(folder) / "requirements.txt")
    for program in ("detour-client", "detour-server"):
        run(target / "bin" / program, "--version")
    (target / ".complete").touch()
    for old in ROOT.iterdir():
        if old.is_dir() and not old.is_symlink() and old.name not in (
                release, "wheels", *in_use()):
            shutil.rmtree(old)
    for old in (ROOT / "wheels").iterdir():
        if old != archive:
            old.unlink()


def in_use() -> set[str]:
    """The release that the commands lead to, and those that units run."""
    found = {os.path.basename(os.path.realpath(ROOT / "current"))}
    for unit in UNITS.glob("detour-*.service"):
        found.update(re.findall(rf"{ROOT}/([^/\s]+)/", unit.read_text(encoding="utf-8")))
    return found


def run(*command: object) -> None:
    """Run a command; when it fails, end with the last line it said."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        sys.exit(f"{' '.join(map(str, command[:3]))}: {said[-1]}")


main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
