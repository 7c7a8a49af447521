# SPDX-License-Identifier: GPL-2.0-or-later
"""A command that runs in a lab's VM, seen from the host: its input, output, terminal and status.

The other end, and the lines that go between, are in ``guest/agent.py``. Also a program: ``python
-m detour_tools.lab.session FOLDER COMMAND...`` stands on the host for a command in the VM, with
its outputs, signals and status. It imports little, as it starts often.
"""

import contextlib
import fcntl
import os
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from detour_tools.errors import UserError
from detour_tools.lab import signals
from detour_tools.lab.guest.agent import decode, encode

PORTS: Final = 30  # what a virtio-serial device has, but for one
BOOT_SECONDS: Final = 180.0  # a kernel with all its debugging, emulated, on a busy machine
_CHUNK: Final = 32768
_QUEUED: Final = 65536
_POLL_MS: Final = 100
# What a command has to end after a signal that is to end it, before we let go of it.
_PATIENCE_SECONDS: Final = 8.0
_FORWARDED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

OnOutput = Callable[[bytes], object]


class Session:
    """One command in the VM whose files are in ``folder``.

    ``size`` (rows, columns) gives it a terminal. The constructor returns when the VM has taken
    the command, so it also waits for the VM to boot. ``on_turn`` is called several times a second
    while something is waited for. Raises UserError.
    """

    def __init__(self, folder: Path, argv: Sequence[object], *,
                 env: Mapping[str, str] | None = None, cwd: Path | None = None,
                 size: tuple[int, int] | None = None, timeout: float = BOOT_SECONDS,
                 on_turn: Callable[[], object] | None = None) -> None:
        self._folder = folder
        self._in = b""
        self._out = b""
        self.status: int | None = None
        self.notes: list[str] = []
        self._argv = [str(each) for each in argv]
        self.on_turn = on_turn
        self._early: list[list[str]] = []  # what came together with the answer to 'open'
        self._open(env, cwd, size, timeout)

    def _open(self, env: Mapping[str, str] | None, cwd: Path | None,
              size: tuple[int, int] | None, timeout: float) -> None:
        self._lock, self._socket = _claim(self._folder)
        try:
            nonce = os.urandom(12).hex()
            environment = "\0".join(f"{name}={value}"
                                    for name, value in (os.environ if env is None else env).items())
            words = [nonce, *(encode(os.fsencode(text)).decode() for text in (
                str(cwd or Path.cwd()), environment, "\0".join(self._argv)))]
            # The line feed ends what somebody before us may have broken off.
            self._send("\nopen", *words, *map(str, size or ()))
            deadline = time.monotonic() + timeout
            while True:
                if time.monotonic() > deadline:
                    raise UserError(f"the VM did not answer within {timeout:g} s",
                                    last_words(self._folder))
                lines = self._turn()
                for number, words in enumerate(lines, 1):
                    if words[:2] == ["open", nonce]:
                        self._early = lines[number:]  # it may have ended already
                        self.notes = decode(words[2].encode()).decode().splitlines()
                        return
        except BaseException:
            self.close()
            raise

    def relay(self, read_from: int | None, on_out: OnOutput, on_err: OnOutput) -> int:
        """Carry input (from a file descriptor) and outputs until the command ends.

        Returns its exit status, negative for the signal it died of. Raises UserError, with
        status 127 or 126 when it cannot be started.
        """
        if read_from is None:
            self._send("eof")
        while self.status is None:
            wanted = read_from if len(self._out) < _QUEUED else None
            for words in self._turn(wanted):
                if words[0] == "out":
                    on_out(decode(words[1].encode()))
                elif words[0] == "err":
                    on_err(decode(words[1].encode()))
                elif words[0] == "exit":
                    self.status = int(words[1])
                elif words[0] == "failed":
                    raise _not_started(self._argv[0], int(words[1]))
            if self._readable:
                data = os.read(read_from, _CHUNK) if read_from is not None else b""
                if data:
                    self._send("in", encode(data).decode())
                else:
                    self._send("eof")
                    read_from = None
        return self.status

    def signal(self, signum: int) -> None:
        """Send a signal to the command's process group."""
        self._send("signal", str(int(signum)))

    def resize(self, rows: int, columns: int) -> None:
        """Tell the command's terminal its size."""
        self._send("size", str(rows), str(columns))

    def power_off(self) -> None:
        """Have the VM end its programs and switch itself off; returns after some seconds anyway."""
        self._send("\npoweroff")
        deadline = time.monotonic() + _PATIENCE_SECONDS
        with contextlib.suppress(UserError):
            while time.monotonic() < deadline:
                self._turn()

    def close(self) -> None:
        """Let go of the command; one that still runs is ended."""
        self._socket.close()
        os.close(self._lock)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, *words: str) -> None:
        self._out += " ".join(words).encode() + b"\n"

    def _turn(self, read_from: int | None = None) -> list[list[str]]:
        """Wait a moment; write what goes, and return the lines that came, in words."""
        if self.on_turn is not None:
            self.on_turn()
        self._readable = False
        if self._early:
            early, self._early = self._early, []
            return early
        poller = select.poll()
        poller.register(self._socket, select.POLLIN | (select.POLLOUT if self._out else 0))
        if read_from is not None:
            poller.register(read_from, select.POLLIN)
        lines: list[bytes] = []
        for fd, event in poller.poll(_POLL_MS):
            if fd != self._socket.fileno():
                self._readable = True
                continue
            try:
                # Reading first: it may have said something before it went.
                if event & (select.POLLIN | select.POLLHUP | select.POLLERR):
                    data = self._socket.recv(_CHUNK)
                    if not data:
                        raise ConnectionResetError
                    *lines, self._in = (self._in + data).split(b"\n")
                elif event & select.POLLOUT:
                    self._out = self._out[self._socket.send(self._out[:_CHUNK]):]
            except BlockingIOError:
                pass
            except (ConnectionResetError, BrokenPipeError):
                raise died(self._folder) from None
        return [words for line in lines if (words := line.decode(errors="replace").split(" "))]


def _claim(folder: Path) -> tuple[int, socket.socket]:
    """A port nobody else uses: its lock and its connection."""
    for number in range(1, PORTS + 1):
        try:
            lock = os.open(folder / f"{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            raise died(folder) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(folder / str(number)))
        except OSError:
            connection.close()
            os.close(lock)
            raise died(folder) from None
        connection.setblocking(False)
        return lock, connection
    raise UserError(f"the VM runs {PORTS} commands already", "end one of them first")


def last_words(folder: Path) -> str:
    """What the VM's kernel, or else QEMU, said that can be the reason for its end."""
    lines = []
    for name in ("console.log", "qemu.log"):
        with contextlib.suppress(OSError):
            text = (folder / name).read_text(encoding="utf-8", errors="replace")
            lines += [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "Kernel panic" in line or "qemu-system" in line]
    return re.sub(r"^\[ *[\d.]+\] ", "", (telling or lines or ["it said nothing"])[-1])


def died(folder: Path) -> UserError:
    """The error when the VM is gone."""
    return UserError("the VM ended", last_words(folder))


def _not_started(program: str, number: int) -> UserError:
    if number in {2, 20}:  # ENOENT, ENOTDIR
        return UserError(f"there is no command '{program}'", status=127)
    return UserError(f"cannot run '{program}': {os.strerror(number)}", status=126)


def run(folder: Path, argv: Sequence[object], *, stdin: bytes | None = None,
        timeout: float | None = None, env: Mapping[str, str] | None = None,
        cwd: Path | None = None, on_turn: Callable[[], object] | None = None
        ) -> "subprocess.CompletedProcess[str]":
    """Run a command in the VM to its end; its outputs are captured, as text.

    Raises UserError when it cannot be started or the VM dies, subprocess.TimeoutExpired.
    """
    out, err = bytearray(), bytearray()
    deadline = None if timeout is None else time.monotonic() + timeout

    def check() -> None:
        if on_turn is not None:
            on_turn()
        if deadline is not None and time.monotonic() > deadline:
            raise subprocess.TimeoutExpired(list(map(str, argv)), timeout or 0.0, bytes(out),
                                            bytes(err))

    with (Session(folder, argv, env=env, cwd=cwd, on_turn=check) as session,
          _pipe_of(stdin) as source):
        status = session.relay(source, out.extend, err.extend)
    return subprocess.CompletedProcess(list(map(str, argv)), status,
                                       out.decode(errors="replace"), err.decode(errors="replace"))


@contextlib.contextmanager
def _pipe_of(data: bytes | None) -> Iterator[int | None]:
    """A file descriptor to read ``data`` from."""
    if data is None:
        yield None
        return
    fd = os.memfd_create("input")
    try:
        with open(fd, "wb", closefd=False) as stream:
            stream.write(data)
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


def attach(folder: Path, argv: Sequence[object], *, env: Mapping[str, str] | None = None,
           on_note: Callable[[str], object] | None = None,
           on_turn: Callable[[], object] | None = None) -> int:
    """Run a command in the VM in this process's place: with its files, terminal and signals.

    With a terminal at both ends it gets one in the VM; a shell's background job leaves it alone.
    ``on_turn`` is called several times a second, and then signals are the caller's. Returns the
    exit status as a shell gives it. Raises UserError.
    """
    background = _in_background()
    interactive = os.isatty(0) and os.isatty(1) and not background
    size = os.get_terminal_size() if interactive else None
    with Session(folder, argv, env=env,
                 size=(size.lines, size.columns) if size else None,
                 on_turn=on_turn) as session:
        if on_note is not None:
            for note in session.notes:
                on_note(note)
        with contextlib.ExitStack() as undo:
            if on_turn is None:
                undo.enter_context(_forwarding(session))
            if interactive:
                undo.enter_context(_raw_terminal(session))
            status = session.relay(None if background else 0, _writer(1), _writer(2))
    return status if status >= 0 else 128 - status


def _in_background() -> bool:
    """Whether our input is a terminal that another job has: using it would stop us."""
    try:
        return os.tcgetpgrp(0) != os.getpgrp()
    except OSError:  # no terminal, or not ours
        return False


def _writer(fd: int) -> OnOutput:
    def write(data: bytes) -> None:
        while data:
            data = data[os.write(fd, data):]
    return write


@contextlib.contextmanager
def _forwarding(session: Session) -> Iterator[None]:
    """Send our signals on; a VM that does not react is left after a while."""
    last: list[tuple[int, float]] = []

    def pass_on(signum: int, _frame: object) -> None:
        session.signal(signum)
        last[:] = [(signum, time.monotonic())]

    def check() -> None:
        if last and last[0][0] in {signal.SIGTERM, signal.SIGHUP} and (
                time.monotonic() > last[0][1] + _PATIENCE_SECONDS):
            raise SystemExit(128 + last[0][0])

    session.on_turn = check
    with signals.taken(pass_on, *_FORWARDED):
        yield


@contextlib.contextmanager
def _raw_terminal(session: Session) -> Iterator[None]:
    """Every key goes to the VM's terminal; and so does the window's size."""
    before = termios.tcgetattr(0)
    with signals.taken(lambda *_: session.resize(*reversed(os.get_terminal_size())),
                       signal.SIGWINCH):
        tty.setraw(0, termios.TCSADRAIN)  # what was typed meanwhile is kept
        try:
            yield
        finally:
            termios.tcsetattr(0, termios.TCSADRAIN, before)


def _main() -> None:
    try:
        status = attach(Path(sys.argv[1]), sys.argv[2:])
    except UserError as error:
        print(f"detour-lab: {error}", file=sys.stderr)
        status = error.status
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 141
    sys.exit(status)


if __name__ == "__main__":
    _main()
