# SPDX-License-Identifier: GPL-2.0-or-later
"""How a run that tells what it does is told, interrupted, and its fruits handed over."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Final, Self

from rich.console import Console
from rich.markup import escape

from detour_tools.errors import UserError
from detour_tools.lab import signals, state
from detour_tools.lab.daemons import Daemon
from detour_tools.lab.network import Host, Lab
from detour_tools.lab.topology import reference_topology

_STAMP = re.compile(r"^\d\d:\d\d:\d\d\.\d+ ")
_COLOURS: Final = {"client": "cyan", "detour": "yellow", "server": "magenta"}


class Output:
    """The folder for what a run makes."""

    def __init__(self, folder: Path) -> None:
        """See, before all the work, that it can be written to; leaves nothing. Raises UserError."""
        self.folder = folder
        self.written: list[Path] = []
        self._was_there = folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            if not self._was_there:
                folder.rmdir()
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}",
                            "see --output") from None

    def take(self, source: Path) -> None:
        """Copy a file there."""
        shutil.copy(source, self.add(source.name))

    def add(self, name: str) -> Path:
        """The path for a file that is to be written there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.written.append(self.folder / name)
        return self.written[-1]

    def hand_over(self) -> None:
        """Give what was written to the user who ran sudo."""
        try:
            uid, gid = int(os.environ["SUDO_UID"]), int(os.environ["SUDO_GID"])
        except (KeyError, ValueError):
            return
        for path in (*self.written, *([] if self._was_there else [self.folder])):
            with contextlib.suppress(FileNotFoundError):  # not written, as the run failed
                os.chown(path, uid, gid, follow_symlinks=False)

    def __str__(self) -> str:
        return f"{self.folder}/: " + ", ".join(sorted(path.name for path in self.written))


class Signals:
    """Takes SIGINT, SIGTERM and SIGHUP while it is entered; check() acts on them.

    An exception out of a signal handler can come anywhere, also where Python swallows it or in
    the middle of the clean-up. So the handler only takes note.
    """

    def __init__(self) -> None:
        self._caught: int | None = None
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._undo.enter_context(signals.taken(
            self._note, signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        self._caught = self._caught or signum

    def check(self) -> None:
        """Raise what ends the program, if a signal has come."""
        if self._caught == signal.SIGINT:
            raise KeyboardInterrupt
        if self._caught is not None:
            raise SystemExit(128 + self._caught)


class Story:
    """Prints what happens, with the seconds since the start and the host it happens on.

    Headings and notes are also where a signal takes effect.
    """

    def __init__(self, caught: Signals) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.caught = caught
        self.quiet = False
        self._started = time.monotonic()

    def heading(self, text: str) -> None:
        """What comes next."""
        self.caught.check()
        self.console.print(f"\n[bold]{escape(text)}[/bold]")

    def note(self, text: str) -> None:
        """A line of its own."""
        self.caught.check()
        self.console.print(escape(text))

    def last_words(self, text: str) -> None:
        """A note that nothing can keep back, not even a terminal that is gone."""
        with contextlib.suppress(OSError):
            self.console.print(escape(text))

    def line(self, host: str, text: str) -> None:
        """One thing that happened on ``host``."""
        if not self.quiet:
            elapsed = time.monotonic() - self._started
            self.console.print(f"{elapsed:6.2f} s  [{_COLOURS[host]}]{host:6}[/]  {escape(text)}")

    def follow(self, host: Host, command: Sequence[object]) -> Daemon:
        """Start a program in the background and tell what it says."""
        self.line(host.name, "$ " + " ".join(map(str, command)))
        return Daemon(host, command,
                      lambda line: self.line(host.name, _STAMP.sub("", line)))


@contextlib.contextmanager
def own_lab(name: str, what: str) -> Iterator[tuple[Lab, Story]]:
    """The reference lab, not up yet, for this run of ``what`` alone; down whatever ends the block.

    Raises UserError when another one runs on the lab of that name.
    """
    with contextlib.ExitStack() as running:
        try:
            running.enter_context(state.locked(f"{name}.demo", wait=False))
        except BlockingIOError:
            raise UserError(f"a {what} is running on the lab '{name}' already") from None
        caught = running.enter_context(Signals())
        story = Story(caught)
        lab = Lab(reference_topology(), name)
        if state.load(name) is not None:
            story.note(f"removing the lab '{name}' that a {what} before left")
        lab.down()
        try:
            yield lab, story
        except subprocess.CalledProcessError as error:
            caught.check()
            said = " ".join(str(error.stderr or error.stdout or "").split())
            raise UserError(f"'{' '.join(error.cmd)}' failed",
                            said or f"status {error.returncode}") from None
        except Exception:
            caught.check()  # Ctrl-C also ends what we had just started: that is no error
            raise
        finally:
            lab.down()
            story.last_words("everything is down again")
        caught.check()
