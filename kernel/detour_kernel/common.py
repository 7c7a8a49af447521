# SPDX-License-Identifier: GPL-2.0-or-later
"""One-line errors, signals, the cache's place and lock, and running long commands."""

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import ClassVar, Final, NoReturn

KERNEL: Final = Path(__file__).resolve().parent.parent
SETUP: Final = "run 'scripts/setup kernel'"

# Program or file, and the Debian package that brings it; as in scripts/setup.
_TOOLS: Final = {
    "bc": "bc", "bison": "bison", "cpio": "cpio", "dh": "debhelper",
    "dpkg-buildpackage": "dpkg-dev", "flex": "flex", "gcc": "gcc",
    "g++": "build-essential", "git": "git", "kmod": "kmod", "lz4": "lz4", "make": "make",
    "perl": "perl", "rsync": "rsync", "tar": "tar", "xz": "xz-utils", "zstd": "zstd",
    "/usr/include/libelf.h": "libelf-dev", "/usr/include/openssl/opensslv.h": "libssl-dev",
}
_SECONDS_BETWEEN_NEWS: Final = 15.0
_SECONDS_TO_END: Final = 20.0


class Problem(Exception):  # noqa: N818 - not always an error: see Interrupted
    """Something the user can mend, told in one line; ``status`` is the exit status."""

    status = 1


class Interrupted(Problem):
    """SIGINT, SIGTERM or SIGHUP came."""

    def __init__(self, number: int) -> None:
        self.status = 128 + number
        super().__init__(f"stopped by {signal.Signals(number).name}")


def say(text: str) -> None:
    """Tell what is being done; results alone go to the standard output."""
    print(f"== {text}", file=sys.stderr, flush=True)


def run_main(main: Callable[[], int]) -> NoReturn:
    """Run a program of ours: signals clean up, and a Problem is one line."""
    def stop(number: int, _frame: FrameType | None) -> None:
        for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    # What we start shall speak the language that we read, and no other configuration of git
    # than ours may change what a patch looks like.
    os.environ.update(LC_ALL="C.UTF-8", GIT_CONFIG_NOSYSTEM="1", GIT_CONFIG_GLOBAL="/dev/null",
                      # Root may work in a user's folder.
                      GIT_CONFIG_COUNT="1", GIT_CONFIG_KEY_0="safe.directory",
                      GIT_CONFIG_VALUE_0="*")
    for name in list(os.environ):
        if name.startswith(("GIT_DIR", "GIT_INDEX", "GIT_WORK", "KBUILD_", "KCONFIG_")):
            del os.environ[name]
    # None are those that were closed when we started.
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        status = main()
        sys.stdout.flush()
    except Problem as problem:
        print(f"{Path(sys.argv[0]).name}: {problem}", file=sys.stderr)
        status = problem.status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except OSError as error:
        print(f"{Path(sys.argv[0]).name}: {error.strerror}: {error.filename or ''}".rstrip(": "),
              file=sys.stderr)
        status = 1
    sys.exit(status)


def cache() -> Path:
    """The folder of all that is made: ~/.cache/detour-tools/kernel."""
    home = os.environ.get("XDG_CACHE_HOME") or ""
    # As the XDG rules say, a relative path is not one.
    base = Path(home) if home.startswith("/") else Path.home() / ".cache"
    return base / "detour-tools" / "kernel"


def check_tools(*more: str) -> None:
    """Raise a Problem that names the first missing tool and where it comes from."""
    for tool, package in {**_TOOLS, **dict.fromkeys(more, "")}.items():
        found = os.path.exists(tool) if tool.startswith("/") else shutil.which(tool)
        if not found:
            raise Problem(f"{tool} is missing (package {package or tool}): {SETUP}")


def check_space(folder: Path, gigabytes: float) -> None:
    """Raise a Problem where a build would run out of disk space."""
    free = shutil.disk_usage(folder).free / 1e9
    if free < gigabytes:
        raise Problem(f"{folder}: {free:.1f} GB free, and this takes up to {gigabytes:.0f}; "
                      "make room, or set XDG_CACHE_HOME to another disk")


class Lock:
    """One program of ours at a time works in the cache; others wait.

    Commands that we start inherit it, so that one that outlives us, after a kill -9, still
    holds the others off.
    """

    inherited: ClassVar[tuple[int, ...]] = ()

    def __init__(self) -> None:
        cache().mkdir(parents=True, exist_ok=True)
        self.file = os.open(cache() / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def __enter__(self) -> "Lock":
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self.file, 100, 0).decode(errors="replace").strip()
            say(f"waiting for another one at work in {cache()} ({holder or 'just begun'})")
            fcntl.flock(self.file, fcntl.LOCK_EX)
        os.ftruncate(self.file, 0)
        holder = f"process {os.getpid()}, since {time.strftime('%H:%M:%S')}\n"
        os.pwrite(self.file, holder.encode(), 0)
        Lock.inherited = (self.file,)
        return self

    def __exit__(self, *_: object) -> None:
        Lock.inherited = ()
        os.ftruncate(self.file, 0)
        os.close(self.file)


def capture(command: Sequence[str | Path], *, cwd: Path | None = None,
            env: Mapping[str, str] | None = None, text: str | None = None) -> str:
    """The output of a short command; a Problem with its last complaint when it fails."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, input=text or "",
                          env={**os.environ, **(env or {})}, capture_output=True, text=True,
                          errors="surrogateescape", check=False, pass_fds=Lock.inherited)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or
                f"exit status {done.returncode}").splitlines()
        # Git says what is wrong first, and then how to go on.
        complaints = [line for line in said if line.startswith(("error: ", "fatal: "))]
        raise Problem(f"{Path(command[0]).name}: {(complaints or said)[-1]}")
    return done.stdout


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def run_logged(command: Sequence[str | Path], *, what: str, log: Path, cwd: Path,
               env: Mapping[str, str] | None = None, stamp: Path | None = None) -> None:
    """Run a long command with its output in ``log``, telling now and then how far it is.

    A Problem names the first error in the log. On a signal the command is ended first. The file
    ``stamp`` is there while it runs, and stays when something was killed while writing.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    say(f"{what} (log: {log})")
    if stamp:
        stamp.touch()
    with log.open("wb") as output:
        # A process group of its own, so that we can end all of it; and should we be killed,
        # make is told, and tidies up.
        process = subprocess.Popen(["setpriv", "--pdeathsig", "TERM", *map(str, command)], cwd=cwd,
                                   env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL,
                                   stdout=output, stderr=subprocess.STDOUT, process_group=0,
                                   pass_fds=Lock.inherited)
        try:
            with _news(what, log, began) as tell:
                while True:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(_SECONDS_BETWEEN_NEWS)
                        break
                    tell()
        except BaseException:
            if _end(process) and stamp:
                stamp.unlink(missing_ok=True)
                say("what was compiled is kept for the next time")
            raise
    if stamp and process.returncode >= 0:  # not killed, by the kernel for its memory say
        stamp.unlink(missing_ok=True)
    if process.returncode:
        raise Problem(f"{what} failed: {_first_error(log)} (log: {log})")
    say(f"{what}: done in {clock(time.monotonic() - began)}")


@contextlib.contextmanager
def _news(what: str, log: Path, began: float) -> Iterator[Callable[[], None]]:
    position = count = 0

    def tell() -> None:
        nonlocal position, count
        with log.open("rb") as file:
            file.seek(position)
            text = file.read()
        position += len(text)
        count += len(re.findall(rb"^ +(?:CC|AS|LD|CHECK)\b", text, re.MULTILINE))
        say(f"{what}: {clock(time.monotonic() - began)}, {count} files")

    yield tell


def _end(process: subprocess.Popen[bytes]) -> bool:
    """End the command with all it started; whether it ended by itself."""
    tidy = False
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        os.killpg(process.pid, signal.SIGCONT)  # should somebody have stopped it
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_TO_END)
            tidy = True
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return tidy


def _first_error(log: Path) -> str:
    text = log.read_text(errors="replace")
    if found := re.search(r".*No space left on device.*", text):
        return f"no disk space left: {found[0].strip()}"
    for pattern in (r"^\S+:\d+:(?:\d+:)? (?:fatal )?error: .*", r"^.*\b[Ee]rror: .*",
                    r"^.*undefined reference to .*", r"^make.*\*\*\* .*", r"^E: .*"):
        if found := re.search(pattern, text, re.MULTILINE):
            return found[0].strip()
    return (text.strip().splitlines() or ["no output"])[-1].strip()
