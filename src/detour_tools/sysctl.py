# SPDX-License-Identifier: GPL-2.0-or-later
"""Sysctls that are changed while a program runs and put back when it stops.

What stood there before is written to a journal first, so that a program that was killed finds
it at its next start and puts the right value back in the end.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from detour_tools.errors import UserError

log = logging.getLogger(__name__)


def path_of(name: str) -> Path:
    """The file of a sysctl such as ``net.ipv4.ip_forward``.

    As for sysctl(8), parts may have slashes between them instead, and dots within then.
    """
    return Path("/proc/sys", *name.split("/" if "/" in name else "."))


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
    """Sysctls set for a while; ``journal`` is the file that remembers what to put back."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        # name -> (value found, value we set)
        self._borrowed: dict[str, tuple[str, str]] = {}
        try:
            stored = json.loads(journal.read_text(encoding="utf-8"))
            self._borrowed = {str(name): (str(was), str(ours))
                              for name, (was, ours) in stored.items()}
        except FileNotFoundError:
            pass
        except (ValueError, AttributeError, TypeError):
            log.warning("%s is damaged: what it remembered is lost", journal)

    def set(self, name: str, value: str, resets: Mapping[str, str] | None = None) -> None:
        """Set a sysctl, remembering what it was; raises UserError.

        ``resets`` are others that the kernel changes along with this one, and what it sets them to
        when this one is put back.
        """
        current = read(name)
        if current is None:
            raise UserError(f"this kernel has no sysctl {name}")
        before = self._borrowed.get(name)
        if before is not None and current not in before:
            before = None  # somebody else has changed it since
        if before is None and current == value:
            return
        self._borrowed[name] = (before[0] if before else current, value)
        if before is None:
            # Put back after this one.
            for other, reset in (resets or {}).items():
                found = read(other)
                if found not in (None, reset):
                    self._borrowed[other] = (found, reset)
        self._save()
        write(name, value)

    def found(self, name: str) -> str | None:
        """What a sysctl was that is ours now; None when it is as it was."""
        before = self._borrowed.get(name)
        return before[0] if before else None

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
        temporary = self._journal.with_suffix(".new")
        temporary.write_text(json.dumps(self._borrowed), encoding="utf-8")
        os.replace(temporary, self._journal)
