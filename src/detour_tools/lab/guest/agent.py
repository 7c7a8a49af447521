# SPDX-License-Identifier: GPL-2.0-or-later
"""Process 1 of a lab's VM: runs what the host asks for, on any of many virtio-serial ports.

A port carries one session at a time, of lines in both directions, so that whatever a session
that broke off left in the pipes is skipped: ``open`` begins a new one. Lines are words; words
marked with * are base64, in lists NUL separates.

Host to guest: ``open NONCE CWD* ENVIRONMENT* ARGV* [ROWS COLUMNS]`` (a terminal, when there are
numbers), ``in DATA*``, ``eof``, ``size ROWS COLUMNS``, ``signal NUMBER``, ``poweroff``.
Guest to host: ``open NONCE NOTES*``, ``out DATA*``, ``err DATA*``, ``exit STATUS`` (negative:
the signal it died of), ``failed ERRNO`` (the command could not be started).

Run with the host's Python, without this package: only few, cheap imports.
"""

import errno
import fcntl
import os
import select
import signal
import struct
import sys
import termios
import time
from binascii import Error, a2b_base64, b2a_base64

_CHUNK = 32768
_QUEUED = 65536  # how much waits for a reader before we stop reading for it
_TERM_SECONDS = 3.0
# That one session has ended is told by another queue than the next one's data, and may come later.
_AWAY_SECONDS = 1.0
# On a busy host what came is, now and then, not announced (2 times in some 600 commands, QEMU 7.2
# without KVM): so we look by ourselves, too.
_LOOK_MS = 300
_NOTES = "/run/detour-vm/notes"


class Gone(Exception):  # noqa: N818
    """The host has closed the port, or begun another session on it."""


class Port:
    """A virtio-serial port: lines in, lines out, neither ever blocking."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._in = b""
        self.out = b""
        self._away_since: float | None = None

    def check(self, event: int) -> None:
        """Note whether the host is there, from what poll said; raises Gone when it stays away."""
        if not event & select.POLLHUP:
            self._away_since = None
            return
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
        if now - self._away_since > _AWAY_SECONDS:
            raise Gone
        time.sleep(0.01)  # poll returns at once meanwhile

    def lines(self) -> list[bytes]:
        """The lines that have come; raises Gone."""
        try:
            data = os.read(self.fd, _CHUNK)
        except BlockingIOError:
            return []
        except OSError as error:
            raise Gone from error
        if not data:
            self.check(select.POLLHUP)
        *lines, self._in = (self._in + data).split(b"\n")
        return [line for line in lines if line]

    def send(self, *words: bytes) -> None:
        """Queue a line."""
        self.out += b" ".join(words) + b"\n"

    def flush(self) -> None:
        """Write what the host takes now."""
        try:
            while self.out:
                self.out = self.out[os.write(self.fd, self.out[:_CHUNK]):]
        except BlockingIOError:
            pass

    def drain(self) -> None:
        """Write all; raises Gone."""
        poller = select.poll()
        poller.register(self.fd, select.POLLOUT)
        while self.out:
            for _, event in poller.poll(_LOOK_MS):
                self.check(event)
            self.flush()


def encode(data: bytes) -> bytes:
    """A word that stands for any bytes."""
    return b2a_base64(data, newline=False) or b"="


def decode(word: bytes) -> bytes:
    """The bytes that a word stands for."""
    return b"" if word == b"=" else a2b_base64(word)


def main() -> None:
    """Hand each port on which the host says something to a process of its own; never returns."""
    wake, wakened = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wakened)
    for signum in (signal.SIGCHLD, signal.SIGUSR1):
        signal.signal(signum, lambda *_: None)
    epoll = select.epoll()
    epoll.register(wake, select.EPOLLIN)
    ports = open_ports(int(sys.argv[1]))
    for fd in ports:
        # By edges: a port without a host at the other end hangs up all the time.
        epoll.register(fd, select.EPOLLIN | select.EPOLLET)
    workers: dict[int, int] = {}  # process -> port

    def look(fd: int) -> None:
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        if fd not in workers.values() and [event for _, event in poller.poll(0)] == [select.POLLIN]:
            pid = os.fork()
            if pid == 0:
                work(fd)
            workers[pid] = fd

    while True:
        events = epoll.poll(_LOOK_MS / 1000)
        for fd in ports if not events else ():
            look(fd)
        for fd, _ in events:
            if fd != wake:
                look(fd)
                continue
            if bytes([signal.SIGUSR1]) in os.read(wake, 4096):
                power_off()
            for pid in reap():
                if pid in workers:
                    look(workers.pop(pid))


def open_ports(count: int) -> list[int]:
    """Open the ports, once the driver has them all."""
    while True:
        names = [name for name in os.listdir("/dev") if name.startswith("vport")]
        if len(names) >= count:
            return [os.open(f"/dev/{name}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
                    for name in names]
        time.sleep(0.01)


def reap() -> list[int]:
    """The processes that have ended; orphans among them."""
    ended = []
    try:
        while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
            ended.append(pid)
    except ChildProcessError:
        pass
    return ended


def power_off() -> None:
    """End all processes, as at a shutdown, and switch the machine off."""
    deadline = time.monotonic() + _TERM_SECONDS
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(-1, signum)
        except ProcessLookupError:
            break
        while time.monotonic() < deadline:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    time.sleep(0.02)
            except ChildProcessError:
                break
    os.sync()
    import ctypes  # noqa: PLC0415
    ctypes.CDLL(None).reboot(0x4321FEDC)  # RB_POWER_OFF of reboot(2)


def work(fd: int) -> None:
    """Serve one session on the port, and end."""
    signal.set_wakeup_fd(-1)
    for signum in (signal.SIGCHLD, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_DFL)
    port = Port(fd)
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    opening: list[bytes] | None = None
    try:
        while True:
            if opening is None:
                poller.poll(_LOOK_MS)
                for line in port.lines():
                    words = line.split(b" ")
                    if words == [b"poweroff"]:
                        os.kill(1, signal.SIGUSR1)
                    elif words[0] == b"open" and len(words) in {5, 7}:
                        opening = words
            else:
                opening = Session(port, opening).run()
                if opening is None:
                    break
    except Gone:
        pass
    os._exit(0)


class Session:
    """A command that runs, between its start and its end."""

    def __init__(self, port: Port, words: list[bytes]) -> None:
        self.port = port
        self.again: list[bytes] | None = None
        self.input = b""
        self.input_ends = False
        self.outputs: dict[int, bytes] = {}
        nonce, *request = words[1:5]
        self.cwd, environment, argv = map(decode, request)
        self.environment = dict(each.split(b"=", 1) for each in environment.split(b"\0") if each)
        self.argv = argv.split(b"\0")
        self.size = words[5:]
        # The line before may have broken off.
        port.send(b"\nopen", nonce, encode(notes()))

    def run(self) -> list[bytes] | None:
        """Run the command; returns another session's opening when one has come instead."""
        try:
            pid = self.start()
        except OSError as error:
            self.port.send(b"failed", b"%d" % (error.errno or errno.EIO))
            self.port.drain()
            return None
        try:
            status = self.relay(pid)
            self.port.send(b"exit", b"%d" % status)
            self.port.drain()
        except Gone:
            end(pid)
            if self.again is None:
                raise
        return self.again

    def start(self) -> int:
        """Start the command; raises OSError."""
        if self.size:
            terminal, inner = os.openpty()
            self.resize(terminal, self.size)
            theirs = [inner, inner, inner]
            self.stdin = os.dup(terminal)
            self.outputs = {terminal: b"out"}
        else:
            (stdin, self.stdin), (out, stdout), (err, stderr) = os.pipe(), os.pipe(), os.pipe()
            theirs = [stdin, stdout, stderr]
            self.outputs = {out: b"out", err: b"err"}
        for fd in (self.stdin, *self.outputs):
            os.set_blocking(fd, False)
        trouble, tell = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            try:
                self.become(theirs)
            except OSError as error:
                os.write(tell, b"%d" % (error.errno or errno.EIO))
            os._exit(127)
        for fd in {*theirs, tell}:
            os.close(fd)
        told = os.read(trouble, 16)
        os.close(trouble)
        if told:
            os.waitpid(pid, 0)
            raise OSError(int(told), "")
        return pid

    def become(self, fds: list[int]) -> None:
        """In the child: be the command."""
        os.setsid()
        for target, fd in enumerate(fds):
            os.dup2(fd, target)
        if self.size:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        try:
            os.chdir(self.cwd)
        except OSError:
            os.chdir("/")  # of the host's /run, say, nothing is here
        # Python ignores it, and that would be inherited.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        os.execvpe(self.argv[0], self.argv, self.environment)  # noqa: S606

    def relay(self, pid: int) -> int:
        """Carry input and output until the command ends; returns its status. Raises Gone."""
        ended = os.pidfd_open(pid)
        while True:
            poller = select.poll()
            poller.register(ended, select.POLLIN)
            poller.register(self.port.fd, (select.POLLIN if len(self.input) < _QUEUED else 0)
                            | (select.POLLOUT if self.port.out else 0))
            if self.input and self.stdin >= 0:
                poller.register(self.stdin, select.POLLOUT)
            if len(self.port.out) < _QUEUED:
                for fd in self.outputs:
                    poller.register(fd, select.POLLIN)
            events = dict(poller.poll(_LOOK_MS))
            port = events.pop(self.port.fd, 0)
            if port & select.POLLIN:
                self.take(pid)
            else:
                self.port.check(port)
            for fd in events:
                if fd == ended:
                    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    self.empty()
                    return status
                elif fd in self.outputs:
                    self.forward(fd)
            self.feed()
            self.port.flush()

    def take(self, pid: int) -> None:
        """Do what the host says."""
        for line in self.port.lines():
            words = line.split(b" ")
            try:
                if words[0] == b"in":
                    self.input += decode(words[1])
                elif words[0] == b"eof":
                    self.input_ends = True
                elif words[0] == b"size" and self.size:
                    self.resize(next(iter(self.outputs)), words[1:])
                elif words[0] == b"signal":
                    os.killpg(pid, int(words[1]))
                elif words[0] == b"poweroff":
                    os.kill(1, signal.SIGUSR1)
                elif words[0] == b"open" and len(words) in {5, 7}:
                    self.again = words
                    raise Gone
            except (Error, IndexError, ValueError, ProcessLookupError, StopIteration):
                pass  # the rest of a line that broke off

    def feed(self) -> None:
        """Give the command what input it takes now."""
        if self.stdin < 0:
            self.input = b""
            return
        try:
            while self.input:
                self.input = self.input[os.write(self.stdin, self.input):]
        except BlockingIOError:
            return
        except OSError:  # it has closed its input
            self.input, self.input_ends = b"", True
        if self.input_ends and not self.size:
            os.close(self.stdin)
            self.stdin = -1

    def forward(self, fd: int) -> bool:
        """Pass on some output; returns whether there was any."""
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return False
        except OSError:  # how a terminal says that nobody has it open any more
            data = b""
        if data:
            self.port.send(self.outputs[fd], encode(data))
        else:
            del self.outputs[fd]
            os.close(fd)
        return bool(data)

    def empty(self) -> None:
        """Pass on what the command has said before it ended. Raises Gone."""
        for fd in list(self.outputs):
            while self.forward(fd):
                self.port.drain()

    @staticmethod
    def resize(fd: int, size: list[bytes]) -> None:
        """Tell the terminal its rows and columns."""
        rows, columns = map(int, size)
        fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def end(pid: int) -> None:
    """End the command and its process group, as when a terminal goes away."""
    deadline = time.monotonic() + _TERM_SECONDS
    try:
        os.killpg(pid, signal.SIGHUP)
        os.killpg(pid, signal.SIGCONT)
        while time.monotonic() < deadline and os.waitpid(pid, os.WNOHANG)[0] == 0:
            time.sleep(0.02)
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, ChildProcessError):
        pass


def notes() -> bytes:
    """What init had to say; "" when all went well."""
    try:
        with open(_NOTES, "rb") as stream:
            return stream.read()
    except FileNotFoundError:
        return b""


if __name__ == "__main__":
    main()
