# SPDX-License-Identifier: GPL-2.0-or-later
"""What the machine remembers of a lab while it exists: one JSON file, and one lock.

The file is written before the first namespace is made, so that whatever a crash leaves can be
found and removed.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from detour_tools import runtime
from detour_tools.errors import UserError
from detour_tools.lab.topology import Topology

# A namespace is called <lab>-<host>, and hosts have no dash: names of labs never run together.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_HOST = re.compile(r"(client|server|detour\d*|r\d+)")


@dataclass(frozen=True)
class State:
    """A lab as it was asked for; ``complete`` once ``up`` went through, ``vm`` when in a VM."""

    topology: Topology
    complete: bool
    netem: bool = False
    vm: bool = False


def folder(name: str) -> Path:
    """Where programs on the lab's hosts may keep files for as long as the lab is up."""
    return runtime.ROOT / f"lab-{name}"


def check_name(name: str) -> None:
    """Raise UserError unless the lab can be called that."""
    if not _NAME.fullmatch(name):
        raise UserError(f"'{name}' is no name for a lab",
                        "letters, digits, '_', '.', '-'; at most 64", status=2)


def path(name: str) -> Path:
    """The state file of the lab."""
    return runtime.ROOT / f"lab-{name}.json"


def lock_path(name: str) -> Path:
    """The lock file of the lab."""
    return runtime.ROOT / f"lab-{name}.lock"


def load(name: str) -> State | None:
    """What is remembered of the lab; None when there is nothing, or nothing readable."""
    try:
        data = json.loads(path(name).read_text(encoding="utf-8"))
        return State(Topology.from_json(data["topology"]), bool(data["complete"]),
                     bool(data["netem"]), bool(data.get("vm", False)))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save(name: str, state: State) -> None:
    """Remember the lab."""
    temporary = path(name).with_suffix(".new")
    temporary.write_text(json.dumps({
        "complete": state.complete, "netem": state.netem, "vm": state.vm,
        "topology": state.topology.to_json(),
    }, indent=1), encoding="utf-8")
    os.replace(temporary, path(name))


def forget(name: str) -> None:
    """Remove the state file and the lab's folder."""
    shutil.rmtree(folder(name), ignore_errors=True)
    path(name).with_suffix(".new").unlink(missing_ok=True)
    path(name).unlink(missing_ok=True)


def is_namespace_of(name: str, namespace: str) -> bool:
    """Whether a namespace bears a name that the lab gives to its hosts."""
    lab, _, host = namespace.rpartition("-")
    return lab == name and _HOST.fullmatch(host) is not None


def names() -> list[str]:
    """The labs that this machine remembers."""
    return sorted(each.stem.removeprefix("lab-") for each in runtime.ROOT.glob("lab-*.json"))


@contextlib.contextmanager
def locked(name: str, *, wait: bool = True) -> Iterator[None]:
    """Be the only one who builds or removes the lab; waits for another to end.

    With ``wait`` false, raises BlockingIOError instead. The lock file goes as soon as nobody
    needs it, and so does an empty runtime folder.
    """
    fd = _take(name, wait=wait)
    try:
        yield
    finally:
        lock_path(name).unlink(missing_ok=True)
        os.close(fd)
        with contextlib.suppress(OSError):
            runtime.ROOT.rmdir()  # only when it is empty


def _take(name: str, *, wait: bool) -> int:
    while True:
        try:
            runtime.ROOT.mkdir(mode=0o755, parents=True, exist_ok=True)
            fd = os.open(lock_path(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW,
                         0o644)
        except FileNotFoundError:  # the folder went in between
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(fd)
            raise
        # Whoever held it has removed the file: then this lock is on nothing, try again.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(fd).st_ino == lock_path(name).stat().st_ino:
                return fd
        os.close(fd)
