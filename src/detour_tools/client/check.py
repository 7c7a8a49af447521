# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether this host has what a client needs, and how to mend what it lacks."""

import errno
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from detour_tools import control, mproxy, runtime, sysctl
from detour_tools.client import probe
from detour_tools.client.given import unfit
from detour_tools.client.lookup import resolve
from detour_tools.client.request import request_mapping
from detour_tools.client.service import PROGRAM
from detour_tools.endpoint import Endpoint, parse_endpoint
from detour_tools.errors import UserError
from detour_tools.netlink.inet_diag import InetDiag
from detour_tools.netlink.route import Routes
from detour_tools.netlink.socket import GenericNetlink
from detour_tools.pathmanager import codec
from detour_tools.pathmanager.choose import kernel_obstacle
from detour_tools.pathmanager.userspace import sysctl_setting

_IPPROTO_MPTCP = 262
_SOL_MPTCP = 284  # linux/socket.h
_MPTCP_INFO = 1  # linux/mptcp.h
_CONNECT_SECONDS = 5.0

# Any public address does: the mapping leads there, and nothing is sent.
_SOME_REMOTE = parse_endpoint("1.1.1.1:443")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the check; ``needed`` is False for what is only good to have."""

    what: str
    ok: bool
    found: str
    mend: str = ""
    needed: bool = True


def check_host(detours: tuple[str, ...], remote: Endpoint | None) -> Iterator[Finding]:
    """Check the kernel, the privileges, the tools, and whether each detour answers.

    Without ``detours`` those of the running daemon are asked. With ``remote``, connect to it too,
    directly, and see whether joins get to it through each detour; no data is sent.
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
    unused: tuple[str, ...] = ()
    try:
        status = control.call(PROGRAM, "status")
        with control.understood(PROGRAM):
            used = tuple(f"{each['address']}:{each['port']}" for each in status["detours"])
            unused = tuple(map(str, status["warnings"]))
        yield Finding("daemon", True, "runs in this network namespace")
        detours = detours or used
    except UserError as error:
        yield Finding("daemon", False, error.message, error.hint, needed=False)
    for text in unused:
        yield Finding("daemon", False, text)
    if not detours and not unused:
        yield Finding("detour", False, "none given, so none asked",
                      "detour-client check DETOUR", needed=False)
    if remote:
        yield _remote(remote)
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
                   f"{obstacle.message}: the daemon takes the userspace one",
                   f"optional: {obstacle.hint}", needed=False)


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


def _remote(remote: Endpoint) -> Finding:
    what = f"remote {remote}"
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, _IPPROTO_MPTCP) as connection:
            connection.settimeout(_CONNECT_SECONDS)
            connection.connect((str(remote.address), remote.port))
            # Refused where it fell back to TCP (mptcp_getsockopt() in net/mptcp/sockopt.c).
            connection.getsockopt(_SOL_MPTCP, _MPTCP_INFO, 1)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOPROTOOPT):
            return Finding(what, False, "answers by plain TCP: connections to it get no detours",
                           "switch MPTCP on there (mptcpize enable UNIT); if it is on, something "
                           "on the way removes it: try another port")
        return Finding(what, False, f"cannot be reached directly: {_reason(error)}",
                       "every connection begins on the direct path: is the server up, and the "
                       "port right?")
    return Finding(what, True, "speaks Multipath TCP")


def _detour(text: str, remote: Endpoint | None) -> Finding:
    what, wanted = f"detour {text}", remote or _SOME_REMOTE
    try:
        detour = resolve(text, mproxy.PORT)
        problem = unfit(detour.address, Routes().look_up(detour.address))
        if problem is not None:
            raise problem
        port, seconds = request_mapping(detour, wanted, wanted.port)
    except UserError as error:
        return Finding(what, False, error.message, error.hint)
    answered = f"answered in {seconds * 1000:.1f} ms: its port {port} leads to {wanted}"
    if remote:
        return _through(what, answered, Endpoint(detour.address, port), remote)
    return Finding(what, True, answered)


def _through(what: str, answered: str, port: Endpoint, remote: Endpoint) -> Finding:
    """Whether joins of connections get through, as these are all that a detour may relay."""
    try:
        found = probe.join(port)
        if found is probe.Joined.ARRIVED:
            return Finding(what, True, f"{answered}, and joins get there")
        if found is probe.Joined.REFUSED and probe.join(remote) is not probe.Joined.ARRIVED:
            return Finding(what, False, f"{answered}; the server does not say who resets joins",
                           "see in 'detour-client status' whether connections get a second subflow",
                           needed=False)
        reason = found.value
    except PermissionError:
        return _plainly(what, answered, port)
    except OSError as error:
        reason = _reason(error)
    return Finding(what, False, f"{answered}, but a join to that port: {reason}",
                   "let TCP pass to the detour's ports, in its provider's firewall too, and on to "
                   "the remote; on the detour run: detour-server firewall check")


def _plainly(what: str, answered: str, port: Endpoint) -> Finding:
    try:
        socket.create_connection((str(port.address), port.port), _CONNECT_SECONDS).close()
    except OSError as error:
        return Finding(what, False, f"{answered}; plain TCP to that port: {_reason(error)}",
                       "that is as it should be where the detour relays joins only, its default; "
                       "root's check tries a join", needed=False)
    return Finding(what, True, f"{answered}, and plain TCP gets there")


def _reason(error: OSError) -> str:
    return "no answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
