# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a running program keeps its socket, lock and journal: a folder for each network namespace.

Each program has its own, so that each may run as a user of its own (systemd's RuntimeDirectory=).

It is named after the namespace's cookie, which the kernel never gives twice in one boot
(``SO_NETNS_COOKIE``, Linux 5.14), so that two namespaces never meet and nothing stale is ever
mistaken for our own. ``/run`` is emptied at boot, and so are sysctls and firewall rules.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import stat
import struct
from pathlib import Path

from detour_tools.errors import UserError

ROOT = Path("/run/detour-tools")

_SO_NETNS_COOKIE = 71  # include/uapi/asm-generic/socket.h
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}


def netns_cookie() -> int:
    """The cookie of the network namespace this thread is in."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            raw = probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
        except OSError as error:
            raise UserError("this kernel has no network namespace cookies",
                            "Linux 5.14 or newer is needed") from error
    return int(struct.unpack("=Q", raw)[0])


def directory(program: str) -> Path:
    """The folder of ``program`` for this network namespace; it may not exist yet."""
    return ROOT / program / f"netns-{netns_cookie()}"


def make_directory(program: str) -> Path:
    """Make the folder of ``program`` for this network namespace, and return it."""
    path = directory(program)
    while True:
        try:
            for each in (ROOT, path.parent, path):
                # Each with its mode: what the umask allows is not what is trusted.
                with contextlib.suppress(FileExistsError):
                    each.mkdir(mode=0o755)
                _check_directory(each)
        except FileNotFoundError:  # another one has just removed a parent that was empty
            continue
        except PermissionError as error:
            raise UserError(f"cannot write to {path.parent}", "run it as root") from error
        return path


def _check_directory(path: Path) -> None:
    """Raise UserError unless nobody but root and we ourselves decide what lies in a folder.

    Its parent has been checked. Raises FileNotFoundError.
    """
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise UserError(f"{path} is no folder", "nothing was written; find out who put it there")
    if found.st_uid not in (0, os.geteuid()):
        raise UserError(f"{path} belongs to user {found.st_uid}",
                        f"run it as that user, or stop what uses it, then: rm -r {path}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(f"others may write to {path}", f"chmod go-w {path}")


def remove_directories() -> None:
    """Remove the folders of all programs for this network namespace, with what is in them."""
    for path in ROOT.glob(f"*/netns-{netns_cookie()}"):
        shutil.rmtree(path, ignore_errors=True)
        _remove_if_empty(path.parent)


def _remove_if_empty(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.rmdir()


def has_capability(name: str) -> bool:
    """Whether this process has the capability in effect (``/proc/self/status``)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAPABILITIES[name] & 1)
    return False


def need_capability(name: str, purpose: str) -> None:
    """Raise UserError unless this process has the capability."""
    if not has_capability(name):
        raise UserError(f"{purpose} needs {name}", "run it as root, or with sudo")


class InstanceLock:
    """Holds the right to be the only ``program`` in this network namespace.

    The lock goes with the process, however that ends. Raises UserError when it is taken.
    """

    def __init__(self, program: str) -> None:
        while True:
            self._path = make_directory(program) / f"{program}.lock"
            try:
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
                                   | os.O_NOFOLLOW, 0o600)
            except FileNotFoundError:  # its holder removed the folder just now
                continue
            except PermissionError:
                raise UserError(f"may not write {self._path}", "it is another user's") from None
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.EISDIR):
                    raise
                raise _no_lock(self._path) from None
            found = os.fstat(self._fd)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
                os.close(self._fd)
                raise _no_lock(self._path)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = os.read(self._fd, 32).decode(errors="replace").strip() or "unknown"
                os.close(self._fd)
                raise UserError(f"another {program} already runs in this network namespace "
                                f"(pid {pid})", "stop that one first") from None
            if os.fstat(self._fd).st_nlink:
                break
            os.close(self._fd)  # its holder removed the file just before it let go
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let another instance start; the folders go too if nothing is left in them."""
        self._path.unlink(missing_ok=True)
        os.close(self._fd)
        _remove_if_empty(self._path.parent)
        _remove_if_empty(self._path.parent.parent)


def _no_lock(path: Path) -> UserError:
    return UserError(f"{path} is no file of ours", "find out who put it there, then remove it")
