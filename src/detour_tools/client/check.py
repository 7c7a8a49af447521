# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether this host has what a client needs, and how to mend what it lacks."""

import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from detour_tools import control, mproxy, runtime, sysctl
from detour_tools.client.request import request_mapping, resolve
from detour_tools.client.service import PROGRAM
from detour_tools.endpoint import Endpoint
from detour_tools.errors import UserError
from detour_tools.netlink.inet_diag import InetDiag
from detour_tools.netlink.socket import GenericNetlink
from detour_tools.pathmanager import codec
from detour_tools.pathmanager.choose import kernel_obstacle
from detour_tools.pathmanager.userspace import sysctl_setting

_IPPROTO_MPTCP = 262


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the check; ``needed`` is False for what is only good to have."""

    what: str
    ok: bool
    found: str
    mend: str = ""
    needed: bool = True


def check_host(detours: tuple[str, ...], remote: Endpoint) -> Iterator[Finding]:
    """Check the kernel, the privileges, the tools, and each detour's answer for ``remote``.

    Without ``detours`` those of the running daemon are asked.
    """
    yield _kernel()
    yield _socket()
    yield _path_manager()
    yield _detour_family()
    yield _socket_listing()
    privileged = runtime.has_capability("CAP_NET_ADMIN")
    yield Finding("privileges", privileged, "CAP_NET_ADMIN is there" if privileged
                  else "CAP_NET_ADMIN is missing: the daemon cannot run",
                  "run it as root, or with sudo")
    yield _tool("mptcpize", "runs unmodified programs over MPTCP", "apt install mptcpize")
    yield _tool("ss", "shows connections", "apt install iproute2")
    try:
        status = control.call(PROGRAM, "status")
        yield Finding("daemon", True, "runs in this network namespace")
        detours = detours or tuple(f"{each['address']}:{each['port']}"
                                   for each in status["detours"])
    except UserError as error:
        yield Finding("daemon", False, error.message, "detour-client daemon DETOUR", needed=False)
    if not detours:
        yield Finding("detour", False, "none given, so none asked",
                      "detour-client check DETOUR", needed=False)
    for text in detours:
        yield _detour(text, remote)


def _kernel() -> Finding:
    enabled = sysctl.read("net.mptcp.enabled")
    if enabled is None:
        return Finding("kernel", False, "has no MPTCP",
                       "boot a kernel with CONFIG_MPTCP, Linux 5.19 or newer")
    if enabled == "0":
        return Finding("kernel", False, "MPTCP is switched off", "sysctl net.mptcp.enabled=1")
    return Finding("kernel", True, "has MPTCP, switched on")


def _socket() -> Finding:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, _IPPROTO_MPTCP).close()
    except OSError as error:
        return Finding("socket", False, f"cannot make an MPTCP socket: {error.strerror}",
                       "a container's seccomp filter may forbid it")
    return Finding("socket", True, "MPTCP sockets can be made")


def _path_manager() -> Finding:
    try:
        name, value = sysctl_setting()
        GenericNetlink(codec.FAMILY).close()
    except UserError as error:
        return Finding("path manager", False, error.message, error.hint)
    except OSError as error:
        return Finding("path manager", False, f"no mptcp_pm netlink family: {error.strerror}",
                       "Linux 5.19 or newer is needed")
    current = sysctl.read(name)
    return Finding("path manager", True,
                   f"the userspace one is there ({name} is {current}"
                   + (")" if current == value else f"; the daemon may set {value})"))


def _detour_family() -> Finding:
    obstacle = kernel_obstacle()
    if obstacle is None:
        return Finding("detour kernel", True,
                       "the DETOUR family is there: the daemon takes the kernel's path manager")
    return Finding("detour kernel", False,
                   f"{obstacle.message}: the daemon takes the userspace one", obstacle.hint,
                   needed=False)


def _socket_listing() -> Finding:
    try:
        InetDiag().connections()
    except UserError as error:
        return Finding("inet_diag", False, error.message, error.hint)
    return Finding("inet_diag", True, "the kernel lists its MPTCP connections")


def _tool(name: str, use: str, mend: str) -> Finding:
    path = shutil.which(name)
    return Finding(name, path is not None, f"{path}: {use}" if path else f"is missing: {use}",
                   mend, needed=False)


def _detour(text: str, remote: Endpoint) -> Finding:
    try:
        detour = resolve(text, mproxy.PORT)
        port, seconds = request_mapping(detour, remote, remote.port)
    except UserError as error:
        return Finding(f"detour {text}", False, error.message, error.hint)
    return Finding(f"detour {text}", True,
                   f"answered in {seconds * 1000:.1f} ms: its port {port} leads to {remote}")
