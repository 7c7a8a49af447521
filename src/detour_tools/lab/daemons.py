# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs that run in the background on a lab's host, with their output at hand."""

import contextlib
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Self, TypeVar

from detour_tools import control
from detour_tools.errors import UserError
from detour_tools.lab import namespaces
from detour_tools.lab.network import Host, environment

POLL_SECONDS = 0.01
# Waiting costs nothing where the machine is not busy.
PATIENCE_SECONDS = 30.0

Found = TypeVar("Found")


def wait_for(condition: Callable[[], object], timeout: float = PATIENCE_SECONDS,
             what: str = "") -> None:
    """Return as soon as ``condition()`` is true; raises TimeoutError after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} s for {what or 'a condition'}")
        time.sleep(POLL_SECONDS)


def _accepts(path: Path) -> bool:
    """Whether somebody listens; the socket of one that was killed stays in the file system."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


class Daemon:
    """A program running on ``host``; as a context manager it is stopped after the block.

    Both its outputs are read line by line as they come, into ``lines``, and handed to
    ``on_line`` (from threads of this object).
    """

    def __init__(self, host: Host, command: Sequence[object],
                 on_line: Callable[[str], None] | None = None) -> None:
        self.host = host
        self.name = str(command[0])
        self.lines: list[str] = []
        self._on_line = on_line
        self.process = host.popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**environment(), "PYTHONUNBUFFERED": "1"},
            start_new_session=True)  # Ctrl-C is for us; we stop it in our order
        self._readers = [threading.Thread(target=self._read, args=(stream,), daemon=True)
                         for stream in (self.process.stdout, self.process.stderr)]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self.lines.append(line.rstrip("\n"))
            if self._on_line is not None:
                self._on_line(self.lines[-1])

    @property
    def output(self) -> str:
        """All it has said so far."""
        return "\n".join(self.lines)

    def matching(self, pattern: str) -> list[str]:
        """The lines in which ``pattern`` (a regular expression) is found."""
        return [line for line in self.lines if re.search(pattern, line)]

    def wait_line(self, pattern: str, timeout: float = PATIENCE_SECONDS) -> str:
        """The first line in which ``pattern`` is found, as soon as there is one.

        Raises UserError when the program ends before, or after ``timeout`` seconds.
        """
        return self.wait_until(lambda: self.matching(pattern), f"'{pattern}'", timeout)[0]

    def wait_control_socket(self, timeout: float = PATIENCE_SECONDS) -> None:
        """Wait until the program (one of ours) answers on its control socket."""
        with namespaces.inside(self.host.namespace):
            path = control.socket_path(self.name)
        self.wait_until(lambda: _accepts(path), "its control socket", timeout)

    def wait_listening(self, port: int, timeout: float = PATIENCE_SECONDS) -> None:
        """Wait until something on the host listens on the TCP port."""
        query = ["ss", "-Hltn", f"sport = :{port}"]
        self.wait_until(lambda: self.host.run(query).stdout, f"that it listens on {port}", timeout)

    def wait_until(self, condition: Callable[[], Found], what: str, timeout: float) -> Found:
        """Wait for ``condition()`` to give something true, and return that."""
        deadline = time.monotonic() + timeout
        while not (found := condition()):
            if self.process.poll() is not None:
                self._join()
                if found := condition():  # it was its last word
                    break
                self.check()
            if time.monotonic() > deadline:
                raise UserError(f"{self.name} on {self.host.name} did not show {what} within "
                                f"{timeout:g} s", self.lines[-1] if self.lines else "")
            time.sleep(POLL_SECONDS)
        return found

    def check(self) -> None:
        """Raise UserError when the program has ended."""
        ended = self.process.poll()
        if ended is not None:
            raise UserError(f"{self.name} on {self.host.name} ended with status {ended}",
                            self.lines[-1] if self.lines else "it said nothing")

    def stop(self, signum: int = signal.SIGTERM, timeout: float = 10.0) -> int:
        """Send ``signum`` and wait for the end (SIGKILL after ``timeout``); its exit status."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signum)
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self._join()
        return status

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.stop(signal.SIGKILL)

    def _join(self) -> None:
        # A child of the program may hold the pipe open for longer.
        for reader in self._readers:
            reader.join(1.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
