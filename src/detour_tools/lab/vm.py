# SPDX-License-Identifier: GPL-2.0-or-later
"""A virtual machine that runs a kernel of ours on this machine's own files.

QEMU boots the kernel directly. Its root is this machine's file system, read-only, under an
overlay in the VM's memory; only folders named as ``writable`` are really written to. NICs are
taps put into bridges of the network namespace we are in. A tap lives as long as QEMU has it
open, so it goes with QEMU, however that ends; QEMU goes with this process, unless detached.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from detour_tools import runtime
from detour_tools.errors import UserError
from detour_tools.lab import session, signals
from detour_tools.lab.session import PORTS
from detour_tools.lab.tools import need_tools

_GUEST: Final = Path(__file__).parent / "guest"
_TOOLS: Final = {"qemu-system-x86_64": "qemu-system-x86", "busybox": "busybox-static"}
_STOP_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.02
# linux/if_tun.h
_TUNSETIFF: Final = 0x400454CA
_IFF_TAP: Final = 0x0002
_IFF_NO_PI: Final = 0x1000


@dataclass(frozen=True)
class Settings:
    """What a VM is made of; memory in MiB, ``append`` goes to the kernel's command line."""

    kernel: Path
    bridges: tuple[str, ...] = ()
    cpus: int = 2
    memory: int = 1024
    writable: tuple[Path, ...] = ()
    append: tuple[str, ...] = ()
    accelerate: bool = True
    hostname: str = "vm"


def default_kernel(flavour: str = "vm") -> Path:
    """The kernel that ``make kernel`` built last; raises UserError when there is none."""
    # As kernel/detour_kernel/common.py has it; and that of the user who ran sudo.
    caches = [_cache()]
    if user := os.environ.get("SUDO_USER"):
        with contextlib.suppress(RuntimeError):
            caches.append(Path(f"~{user}").expanduser() / ".cache")
    images = [cache / "detour-tools" / "kernel" / flavour / "bzImage" for cache in caches]
    found = [image for image in images if image.exists()]
    if not found:
        raise UserError(f"there is no kernel in {' or '.join(str(each.parent) for each in images)}",
                        "run 'make kernel', or name one: --kernel IMAGE")
    return max(found, key=lambda image: image.stat().st_mtime)


def _cache() -> Path:
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return given if given.is_absolute() else Path.home() / ".cache"


def kvm_works() -> bool:
    """Whether the CPU has virtualisation and we may use it.

    A /dev/kvm alone says little: in a VM without nested virtualisation it opens, and hangs.
    """
    flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    return bool(re.search(r"^flags\s*:.*\b(vmx|svm)\b", flags, re.MULTILINE)) and os.access(
        "/dev/kvm", os.R_OK | os.W_OK)


def root_folder() -> Path:
    """Where VMs have their folders."""
    if os.geteuid() == 0:
        return runtime.ROOT
    if given := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(given) / "detour-tools"
    # Not where everybody may write, and so take the name first.
    return _cache() / "detour-tools" / "run"


def folder_of(name: str) -> Path:
    """The folder of the VM of that name: its sockets, logs and lock."""
    return root_folder() / f"vm-{name}"


def lab_machine(name: str) -> "Machine":
    """The VM of the lab of that name, whether it runs or not."""
    return Machine(f"lab-{name}")


class Machine:
    """A VM that was started; as a context manager it is stopped after the block."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = folder_of(name)
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(cls, settings: Settings, name: str = "", *, detached: bool = False) -> Self:
        """Start a VM; it boots while this returns, and the first command waits for it.

        One that is ``detached`` outlives this process. Raises UserError.
        """
        check(settings)
        remove_leftovers()
        machine = cls(name or f"{os.getpid()}.{secrets.token_hex(3)}")
        lock = _take_folder(machine.folder)
        if lock is None:
            raise UserError(f"the VM '{machine.name}' runs already")
        try:
            with contextlib.ExitStack() as files:
                files.callback(os.close, lock)
                taps = []
                for number, bridge in enumerate(settings.bridges):
                    tap = _make_tap(f"vm{os.getpid()}n{number}", bridge)
                    files.callback(os.close, tap)
                    taps.append(tap)
                machine._run_qemu(settings, lock, taps, detached=detached)
        except BaseException:
            machine.stop()
            raise
        return machine

    def _run_qemu(self, settings: Settings, lock: int, taps: list[int], *, detached: bool) -> None:
        (self.folder / "config").write_text(_config(settings), encoding="utf-8")
        follow_us = [] if detached else ["setpriv", "--pdeathsig", "KILL"]
        # Signals wait until we know what there is to be ended.
        with (self.folder / "qemu.log").open("wb") as log, signals.held_back():
            # The lock goes with QEMU: as long as it is held, the VM lives.
            self._process = subprocess.Popen(
                [*follow_us, *_qemu(settings, self.folder, taps)], stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, pass_fds=(lock, *taps), start_new_session=True)
        (self.folder / "pid").write_text(f"{self._process.pid}\n", encoding="ascii")
        while not (self.folder / str(PORTS)).exists():
            if self._process.poll() is not None:
                raise UserError("QEMU could not start the VM", session.last_words(self.folder))
            time.sleep(_POLL_SECONDS)

    def alive(self) -> bool:
        """Whether QEMU runs."""
        try:
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    def run(self, command: list[object], **options: object) -> "subprocess.CompletedProcess[str]":
        """Run a command in the VM with its outputs captured: see session.run()."""
        return session.run(self.folder, command, **options)  # type: ignore[arg-type]

    def power_off(self) -> None:
        """End the VM's programs (SIGTERM, then SIGKILL), then the VM."""
        with contextlib.suppress(UserError), session.Session(self.folder, ["true"]) as last:
            last.power_off()
        self.stop()

    def stop(self) -> None:
        """End the VM at once, and remove its folder; fine when it has ended."""
        for signum in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + _STOP_SECONDS
            with contextlib.suppress(OSError, ValueError):
                if self._process is not None:
                    self._process.send_signal(signum)
                elif self.alive():
                    os.kill(int((self.folder / "pid").read_text(encoding="ascii")), signum)
            while self.alive() and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
        if self._process is not None:
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()  # only when it is empty

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def check(settings: Settings) -> None:
    """Raise UserError when such a VM cannot be started here."""
    need_tools(_TOOLS)
    try:
        with settings.kernel.open("rb") as image:
            header = image.read(0x206)
    except OSError as error:
        raise UserError(f"cannot read the kernel {settings.kernel}: {error.strerror}") from None
    if header[0x202:0x206] != b"HdrS":  # Documentation/arch/x86/boot.rst
        raise UserError(f"{settings.kernel} is not a bootable kernel", "a bzImage is needed")
    # They go to the VM by its kernel's command line and by a shell's.
    for path in (_GUEST, root_folder(), Path(sys.executable)):
        if not re.fullmatch(r"[\w/.@:+,~-]+", str(path), re.ASCII):
            raise UserError(f"the VM cannot use the path '{path}'",
                            "a path without blanks and quotes is needed")
    for folder in settings.writable:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder")
    if settings.bridges:
        runtime.need_capability("CAP_NET_ADMIN", "a NIC on a bridge")


def remove_leftovers() -> None:
    """Remove the folders of VMs that have ended without anybody to do it; not those of labs."""
    for folder in root_folder().glob("vm-*"):
        if folder.name.startswith("vm-lab-"):  # says why it ended until the lab goes down
            continue
        with contextlib.suppress(UserError):  # another user's
            lock = _take_folder(folder, create=False)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def _take_folder(folder: Path, *, create: bool = True) -> int | None:
    """Make the VM's folder ours; None when a VM has it."""
    while True:
        try:
            if create:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # somebody removes it
            if create:
                continue
            return None
        except PermissionError:
            raise UserError(f"cannot write to {folder}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        if os.fstat(lock).st_nlink:
            if create:  # what a VM before it left
                for each in folder.iterdir():
                    if each.name != "lock":
                        each.unlink()
            return lock
        os.close(lock)


def _make_tap(name: str, bridge: str) -> int:
    """A tap that is a port of the bridge and goes when it is closed; raises UserError."""
    from pyroute2 import IPRoute  # noqa: PLC0415 - slow, and not needed without a bridge
    from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

    with IPRoute() as route:
        if not re.fullmatch(r"[^\s/:]{1,15}", bridge):  # dev_valid_name() of the kernel
            raise UserError(f"'{bridge}' cannot be the name of a bridge")
        found = route.link_lookup(ifname=bridge)
        if not found:
            raise UserError(f"there is no bridge '{bridge}'",
                            f"make it: ip link add {bridge} type bridge")
        info = route.get_links(found[0])[0].get_attr("IFLA_LINKINFO")
        if info is None or info.get_attr("IFLA_INFO_KIND") != "bridge":
            raise UserError(f"'{bridge}' is not a bridge")
        try:
            tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
            # Without offloads: what is captured is what goes over the wire.
            fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode(),
                                                     _IFF_TAP | _IFF_NO_PI))
            index = route.link_lookup(ifname=name)[0]
            route.link("set", index=index, master=found[0], state="up")
        except (OSError, NetlinkError) as error:
            raise UserError(f"cannot put a NIC on the bridge {bridge}: {error}") from None
    return tap


def _config(settings: Settings) -> str:
    """Shell variables for guest/init."""
    folders = " ".join("".join(
        char if re.fullmatch(r"[\w/.-]", char, re.ASCII) else "".join(
            f"\\0{byte:03o}" for byte in os.fsencode(char))
        for char in str(folder.resolve())) for folder in settings.writable)
    values = {
        "folders": folders, "nics": " ".join(settings.bridges), "hostname": settings.hostname,
        "python": os.path.realpath(sys.executable), "here": str(_GUEST), "ports": str(PORTS),
    }
    return "".join(f"{name}='{value}'\n" for name, value in values.items())


def _qemu(settings: Settings, folder: Path, taps: list[int]) -> list[str]:
    """The command line of the VM."""
    kvm = settings.accelerate and kvm_works()
    kernel_line = [
        "root=detour-root", "rootfstype=9p", "ro",
        "rootflags=trans=virtio,version=9p2000.L,msize=262144,cache=loose",
        "console=ttyS0", "loglevel=5", "panic=-1", "log_buf_len=4M",
        # The kernel's test of the timer panics when an emulated one is late on a busy machine.
        *([] if kvm else ["no_timer_check"]), *settings.append,
        # What follows is init's; it is told by its environment where its files are.
        f"detour_vm={folder}", f"init={shutil.which('busybox')}", "--", "sh", str(_GUEST / "init"),
        str(shutil.which("busybox")),
    ]
    command = [
        "qemu-system-x86_64", "-name", f"detour-{folder.name}", "-nodefaults", "-no-user-config",
        "-display", "none", "-no-reboot", "-machine", "q35",
        *(["-accel", "kvm", "-cpu", "host"] if kvm else
          ["-accel", "tcg,thread=multi", "-cpu", "max"]),
        "-smp", str(settings.cpus), "-m", str(settings.memory),
        "-kernel", str(settings.kernel), "-append", " ".join(kernel_line),
        "-chardev", f"file,id=console,path={_quote(folder / 'console.log')}",
        "-serial", "chardev:console", "-device", "virtio-rng-pci",
        *_share("detour-root", Path("/"), "security_model=none,readonly=on"),
        "-device", f"virtio-serial-pci,max_ports={PORTS + 1}",
    ]
    for number in range(1, PORTS + 1):
        command += ["-chardev", f"socket,id=port{number},path={_quote(folder / str(number))},"
                                "server=on,wait=off",
                    "-device", f"virtserialport,chardev=port{number},name=detour.{number}"]
    model = "passthrough" if os.geteuid() == 0 else "none"
    for number, path in enumerate(settings.writable):
        command += _share(f"folder{number}", path.resolve(), f"security_model={model}")
    for number, tap in enumerate(taps):
        command += ["-netdev", f"tap,id=nic{number},fd={tap}",
                    "-device", f"virtio-net-pci,netdev=nic{number},romfile=,mac={_mac()}"]
    return command


def _share(tag: str, path: Path, options: str) -> list[str]:
    return ["-fsdev", f"local,id={tag},path={_quote(path)},{options},multidevs=remap",
            "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]


def _quote(path: Path) -> str:
    return str(path).replace(",", ",,")


def _mac() -> str:
    """An address nobody else has, of QEMU's own range."""
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))
