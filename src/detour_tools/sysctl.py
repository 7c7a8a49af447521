# SPDX-License-Identifier: GPL-2.0-or-later
"""Sysctls that are changed while a program runs and put back when it stops.

What stood there before is written to a journal first, so that a program that was killed finds
it at its next start and puts the right value back in the end.

A journal may lie where a daemon's user writes, and be read by root: only names and values that
its program could have written there are taken from it, and no link is followed.
"""

import json
import logging
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from detour_tools.errors import UserError

log = logging.getLogger(__name__)

_ANY = re.compile(r"net[./][\w./-]+")
_VALUE = re.compile(r"[A-Za-z0-9_-]{1,32}")
_JOURNAL_BYTES = 16 << 20  # thousands of interfaces


def path_of(name: str) -> Path:
    """The file of a sysctl such as ``net.ipv4.ip_forward``.

    As for sysctl(8), parts may have slashes between them instead, and dots within then. Raises
    UserError when a part is none of a name: what is named stays below /proc/sys.
    """
    parts = name.split("/" if "/" in name else ".")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise UserError(f"{name!r} is no name of a sysctl")
    return Path("/proc/sys", *parts)


def read(name: str) -> str | None:
    """The sysctl's value, None when this kernel does not have it."""
    try:
        return path_of(name).read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return None


def write(name: str, value: str) -> None:
    """Set a sysctl; raises UserError when that is not allowed or there is none."""
    try:
        path_of(name).write_text(value, encoding="ascii")
    except FileNotFoundError:
        raise UserError(f"this kernel has no sysctl {name}") from None
    except PermissionError:
        raise UserError(f"may not set {name} to {value}",
                        "run it as root; in a container /proc/sys must be writable") from None
    except OSError as error:
        raise UserError(f"cannot set {name} to {value}: {error.strerror}") from None


class BorrowedSysctls:
    """Sysctls set for a while; ``journal`` is the file that remembers what to put back.

    ``names`` matches those that this program sets; others in the journal are not its own.
    """

    def __init__(self, journal: Path, names: re.Pattern[str] = _ANY) -> None:
        self._journal = journal
        # name -> (value found, value we set)
        self._borrowed: dict[str, tuple[str, str]] = {}
        foreign = []
        try:
            for name, (was, ours) in json.loads(read_file(journal)).items():
                if all(isinstance(each, str) and _VALUE.fullmatch(each) for each in (was, ours)) \
                        and names.fullmatch(name) and _is_name(name):
                    self._borrowed[name] = (was, ours)
                else:
                    foreign.append(name)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, AttributeError, TypeError, RecursionError):
            log.warning("%s is damaged: what it remembered is lost", journal)
        if foreign:
            log.warning("%s names what this program never sets (%a and so on): that is left alone",
                        journal, foreign[0][:80])

    def set(self, name: str, value: str, resets: Mapping[str, str] | None = None,
            was: str | None = None) -> None:
        """Set a sysctl, remembering what it was; raises UserError.

        ``was``: what to remember instead. ``resets`` are others that the kernel changes along with
        this one, and what it sets them to when this one is put back.
        """
        current = read(name)
        if current is None:
            raise UserError(f"this kernel has no sysctl {name}")
        before = self._borrowed.get(name)
        if before is not None and current not in before:
            before = None  # somebody else has changed it since
        if before is None and current == value:
            return
        self._borrowed[name] = (before[0] if before else was or current, value)
        if before is None:
            # Put back after this one.
            for other, reset in (resets or {}).items():
                found = read(other)
                if found not in (None, reset):
                    self._borrowed[other] = (found, reset)
        self._save()
        write(name, value)

    def found(self, name: str) -> str | None:
        """What a sysctl was that is ours now; None where we, or others since, left it as it is."""
        before = self._borrowed.get(name)
        return before[0] if before and read(name) in before else None

    def hold(self, wanted: Mapping[str, str]) -> None:
        """Set these, and put back what a program that was killed had set besides.

        Raises UserError.
        """
        for name in self._borrowed.keys() - wanted.keys():
            self._put_back(name, *self._borrowed.pop(name))
            self._save()
        for name, value in wanted.items():
            self.set(name, value)

    def restore(self) -> None:
        """Put everything back, except what somebody else has changed since."""
        for name, (was, ours) in self._borrowed.items():
            self._put_back(name, was, ours)
        self.forget()

    def forget(self) -> None:
        """Leave everything as it is now."""
        self._borrowed = {}
        self._journal.unlink(missing_ok=True)

    @staticmethod
    def _put_back(name: str, was: str, ours: str) -> None:
        current = read(name)
        if current == ours and current != was:
            try:
                write(name, was)
            except UserError as error:
                log.error("%s stays %s: %s", name, ours, error)

    def _save(self) -> None:
        write_file(self._journal, json.dumps(self._borrowed))


def read_file(path: Path) -> str:
    """The text of a regular file, which is no link. Raises OSError, ValueError."""
    # A pipe put in its place must not make us wait.
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, encoding="utf-8") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError(f"{path} is no regular file")
        if len(text := file.read(_JOURNAL_BYTES)) == _JOURNAL_BYTES:
            raise ValueError(f"{path} is too long")
        return text


def write_file(path: Path, text: str) -> None:
    """Put a file of ours in the place of whatever lies there. Raises OSError."""
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                 0o644)
    with open(fd, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


def _is_name(name: str) -> bool:
    try:
        path_of(name)
    except UserError:
        return False
    return True
