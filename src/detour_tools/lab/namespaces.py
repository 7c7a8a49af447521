# SPDX-License-Identifier: GPL-2.0-or-later
"""Network namespaces: make, enter, look who is in, empty and remove.

They are the ones of ``ip netns``: files in /run/netns, with ``/etc/netns/NAME`` for the files
that ``ip netns exec`` shows instead of those in /etc.
"""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from pyroute2 import netns

from detour_tools import runtime
from detour_tools.errors import UserError

RUN = Path("/run/netns")
ETC = Path("/etc/netns")

_TERM_SECONDS = 3.0
_KILL_SECONDS = 5.0
_POLL_SECONDS = 0.02


def exists(name: str) -> bool:
    """Whether there is such a namespace, or what a crash left of one."""
    return (RUN / name).exists()


def usable(name: str) -> bool:
    """Whether the namespace can be entered: its file is really a namespace."""
    try:
        return (RUN / name).stat().st_dev == Path("/proc/self/ns/net").stat().st_dev
    except OSError:
        return False


def create(name: str) -> None:
    """Make a namespace; raises OSError."""
    netns.create(name)
    if not usable(name):  # pyroute2's child process keeps its errors to itself
        raise OSError(f"the namespace {name} could not be made")


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """Move this thread into the namespace for the length of the block; raises OSError."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        netns.setns(name, flags=0)
        try:
            yield
        finally:
            netns.setns(home)
    finally:
        os.close(home)


def write_etc(name: str, file: str, content: str) -> None:
    """Give the namespace its own ``/etc/<file>`` (seen by what ``ip netns exec`` starts)."""
    for attempt in range(10):
        try:
            (ETC / name).mkdir(parents=True, exist_ok=True)
            (ETC / name / file).write_text(content, encoding="utf-8")
            return
        except FileNotFoundError:  # another lab going down removed the empty /etc/netns
            if attempt == 9:
                raise


def processes(name: str) -> list[int]:
    """The ids of the processes in the namespace."""
    try:
        wanted = (RUN / name).stat()
    except OSError:
        return []
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            theirs = os.stat(f"/proc/{entry}/ns/net")
        except OSError:  # ended meanwhile, or a zombie
            continue
        if (theirs.st_dev, theirs.st_ino) == (wanted.st_dev, wanted.st_ino):
            found.append(int(entry))
    return sorted(found)


def command_line(pid: int) -> str:
    """How the process was called, "" when it has ended."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return raw.replace(b"\0", b" ").decode(errors="replace").strip()


def end_processes(names: list[str]) -> None:
    """End every process in the namespaces: SIGTERM, and SIGKILL for those that stay.

    Raises UserError when this very process is in one of them, or one cannot be ended.
    """
    def remaining() -> set[int]:
        return {pid for name in names for pid in processes(name)}

    if os.getpid() in remaining():
        raise UserError("this command runs inside the lab that it should take down",
                        "run it outside")
    for signum, patience in ((signal.SIGTERM, _TERM_SECONDS), (signal.SIGKILL, _KILL_SECONDS)):
        deadline = time.monotonic() + patience
        told: set[int] = set()
        while left := remaining():
            for pid in left - told:  # also those that were forked meanwhile
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signum)
            told |= left
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        else:
            return
    raise UserError(f"processes do not end: {', '.join(map(str, sorted(remaining())))}")


def remove(name: str) -> None:
    """Remove a namespace and all that belongs to it; nothing happens when there is none."""
    if usable(name):
        with inside(name):
            runtime.remove_directories()
    with contextlib.suppress(FileNotFoundError):
        netns.remove(name)
    shutil.rmtree(ETC / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        ETC.rmdir()  # only when it is empty
