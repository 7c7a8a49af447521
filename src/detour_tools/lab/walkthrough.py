# SPDX-License-Identifier: GPL-2.0-or-later
"""The walk-through: a client in a VM, on a kernel with our path manager, uses a detour.

Detour and web server are hosts of a lab; the lab's ``client`` is the machine that carries the
VM: it has a bridge with a DHCP server, and routes. Every claim that the walk-through makes is
looked for in what happened, and told with a tick or a cross.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv4Interface, ip_address
from pathlib import Path
from typing import Final

from detour_tools.endpoint import Endpoint, IPAddress
from detour_tools.errors import UserError
from detour_tools.lab import namespaces, trace, vm
from detour_tools.lab.captures import Capture, segments
from detour_tools.lab.daemons import Daemon
from detour_tools.lab.network import Host, Lab, environment, need_root
from detour_tools.lab.story import Output, Story, own_lab
from detour_tools.lab.tools import need_tools
from detour_tools.lab.vmlab import VmHost

DEFAULT_NAME: Final = "walkthrough"
PAGE_BYTES: Final = 12_000_000
BRIDGE: Final = "br0"
ALLOWED: Final = "10.0.0.0/8"  # where the detour relays to
HOME: Final = IPv4Interface("192.168.7.1/24")
_PORT: Final = 80
_TOOLS: Final = {"dnsmasq": "dnsmasq-base", "nc": "netcat-openbsd", "tcpdump": "tcpdump",
                 "mptcpize": "mptcpize", "ss": "iproute2"}
_SNAPLEN: Final = 96
# A path that carries less than this has not been used for the page.
_WANTED_SHARE: Final = 0.1
_PATIENCE_SECONDS: Final = 90.0

Flow = frozenset[Endpoint]


def run(folder: Path, settings: vm.Settings, name: str, *, path_manager: str) -> int:
    """Run the walk-through on a lab called ``name`` and write to ``folder``; the exit status.

    ``path_manager`` is ``kernel``, or ``userspace`` on a kernel without ours: then the program
    is wrapped, and there is no trace. Raises UserError. Whatever ends it, everything goes down.
    """
    need_root()
    need_tools(_TOOLS)
    vm.check(settings)
    output = Output(folder)
    with own_lab(name, "walk-through") as (lab, story):
        walk = _Walk(lab, story, settings, path_manager)
        walk.run(output)
    output.hand_over()
    story.note(f"captures and the kernel's log are in {output}")
    if walk.failed:
        raise UserError(f"not seen: {'; '.join(walk.failed)}",
                        "a busy machine can be the reason; try again")
    story.note(f"all {walk.passed} things that should be seen were seen")
    return 0


class _Walk:
    """One run, on a lab that is not up yet."""

    def __init__(self, lab: Lab, story: Story, settings: vm.Settings, path_manager: str) -> None:
        self._lab = lab
        self._story = story
        self._settings = settings
        self._manager = path_manager
        self._home, self._detour, self._server = (
            lab.host(name) for name in ("client", "detour", "server"))
        self._remote = Endpoint(self._server.address, _PORT)
        self.failed: list[str] = []
        self.passed = 0

    def run(self, output: Output) -> None:
        """Everything, from bringing the lab up to the last check."""
        story = self._story
        with contextlib.ExitStack() as running:
            folder = self._build(running)
            story.heading("1. The detour forwards")
            server = running.enter_context(story.follow(
                self._detour, ["detour-server", "--allow-remote", ALLOWED]))
            server.wait_control_socket()
            forward = self._detour.run(["sysctl", "net.ipv4.ip_forward"]).stdout.strip()
            self._check(forward.endswith("= 1"), f"forwarding is on at the detour: {forward}")

            story.heading("2. and 3. The client: a VM on the bridge, with an address by DHCP")
            client = running.enter_context(self._client(folder))
            self._check_dhcp(client)

            story.heading("4. The daemon")
            daemon = running.enter_context(self._daemon(client))

            story.heading("5. A page, by an unmodified program")
            captures = {host.name: running.enter_context(Capture(
                host, interface, folder / f"{host.name}.pcap", snaplen=_SNAPLEN,
                expression="tcp or udp port 45672"))
                for host, interface in ((client, "eth0"), (self._detour, "L6"),
                                        (self._server, "L3"))}
            subflows = self._fetch(client, folder)
            daemon.check()
            for capture in captures.values():
                capture.stop()
            log = client.run(["dmesg"]).stdout
            story.quiet = True  # what they say when they are stopped is no part of it

            story.heading("6. What was to be seen")
            if self._manager == "kernel":
                self._check_trace(log.splitlines())
            self._check_subflows(subflows)
            self._check_flows({name: capture.path for name, capture in captures.items()},
                              client.address)
            output.add("dmesg.txt").write_text(log, encoding="utf-8")
            for capture in captures.values():
                output.take(capture.path)

    def _check(self, holds: bool, what: str) -> None:
        self._story.note(f"{'✓' if holds else '✗'} {what}")
        if holds:
            self.passed += 1
        else:
            self.failed.append(what)

    def _build(self, running: contextlib.ExitStack) -> Path:
        """The lab, the client's bridge with its DHCP server, and a web server."""
        story = self._story
        story.heading("0. The network: a bridge with a DHCP server, a detour, and a web server")
        self._lab.up()
        folder = self._lab.folder()
        for command in (["ip", "link", "add", BRIDGE, "type", "bridge"],
                        ["ip", "address", "add", HOME, "dev", BRIDGE],
                        ["ip", "link", "set", BRIDGE, "up"],
                        ["sysctl", "-qw", "net.ipv4.ip_forward=1"]):
            story.line("client", "$ " + " ".join(map(str, command)))
            self._home.run(command)
        for host in self._lab.hosts():
            if host.name != self._home.name:
                _route(host, self._home.address)
        dnsmasq = ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-hosts",
                   f"--addn-hosts={namespaces.ETC / self._home.namespace / 'hosts'}",
                   "--no-resolv", "--no-ping", "--user=root", "--log-facility=-", "--pid-file=",
                   f"--interface={BRIDGE}", "--except-interface=lo", "--bind-interfaces",
                   f"--dhcp-leasefile={folder / 'leases'}",
                   f"--dhcp-range={HOME.ip + 99},{HOME.ip + 149},1h"]
        running.enter_context(story.follow(self._home, dnsmasq)).wait_line("sockets bound")
        pages = folder / "pages"
        pages.mkdir()
        content = os.urandom(PAGE_BYTES)
        (pages / "index.html").write_bytes(content)
        self._sha256 = hashlib.sha256(content).hexdigest()
        serve = ["mptcpize", "run", "python3", "-m", "http.server", _PORT, "--bind",
                 self._server.address, "--directory", pages]
        story.line("server", "$ " + " ".join(map(str, serve)))
        running.enter_context(Daemon(self._server, serve)).wait_listening(_PORT)
        return folder

    @contextlib.contextmanager
    def _client(self, folder: Path) -> Iterator[VmHost]:
        """The VM, booted, on the bridge."""
        story = self._story
        story.line("client", f"$ detour-lab vm --kernel {self._settings.kernel} "
                             f"--bridge {BRIDGE} --rw {folder}")
        settings = dataclasses.replace(self._settings, bridges=(BRIDGE,), writable=(folder,),
                                       hostname="client")
        with namespaces.inside(self._home.namespace):
            machine = vm.Machine.start(settings)
        with machine:
            booted = machine.run(["ip", "-j", "-4", "address", "show", "dev", "eth0"],
                                 env=environment(), on_turn=story.caught.check)
            found = json.loads(booted.stdout or "[]")
            addresses = [ip_address(each["local"]) for link in found for each in link["addr_info"]]
            yield VmHost("client", machine.folder,
                         addresses[0] if addresses else IPv4Address(0))

    def _check_dhcp(self, client: VmHost) -> None:
        leases = (self._lab.folder() / "leases").read_text(encoding="ascii").split("\n")
        leased = [line.split()[2] for line in leases if len(line.split()) > 2]
        self._check(str(client.address) in leased and client.address in HOME.network,
                    f"the client in the VM has the address {client.address} by DHCP")
        if str(client.address) not in leased:
            raise UserError("the VM got no address by DHCP", f"leases: {', '.join(leased)}")
        self._story.line("client", "$ uname -r  ->  " + client.run(["uname", "-r"]).stdout.strip())

    def _daemon(self, client: VmHost) -> Daemon:
        options = ["--path-manager", self._manager]
        if self._manager == "kernel":
            options.append("--upgrade-tcp")
            tracing = "file net/mptcp/pm_detour.c +p"
            self._story.line("client", f"$ echo '{tracing}' >/proc/dynamic_debug/control")
            client.run(["sh", "-c", 'echo "$1" >/proc/dynamic_debug/control', "sh", tracing])
        daemon = self._story.follow(client, ["detour-client", "daemon", *options, "detour"])
        try:
            daemon.wait_until(lambda: client.run(
                ["sh", "-c", "ss -xlH | grep -q detour-client"], check=False).returncode == 0,
                "its control socket", _PATIENCE_SECONDS)
        except BaseException:
            daemon.kill()
            raise
        sysctls = client.run(["sysctl", "net.mptcp"]).stdout.splitlines()
        selected = ", ".join(line for line in sysctls if "pm_type" in line or "detour" in line)
        self._check(f"pm_type = {2 if self._manager == 'kernel' else 1}" in selected,
                    f"the {self._manager} path manager is selected: {selected}")
        return daemon

    def _fetch(self, client: VmHost, folder: Path) -> list[str]:
        """Fetch the page; returns what ``ss`` shows of its subflows meanwhile."""
        request = (f"GET / HTTP/1.1\\r\\nHost: {self._server.name}\\r\\n"
                   "Connection: close\\r\\n\\r\\n")
        program = "nc" if self._manager == "kernel" else "mptcpize run nc"
        line = f"printf '{request}' | {program} {self._server.name} {_PORT} >{folder}/page"
        self._story.line("client", f"$ {line}")
        shown: list[str] = []
        fetching = client.popen(["sh", "-c", line], stdin=subprocess.DEVNULL,
                                stderr=subprocess.PIPE, start_new_session=True)
        with fetching:
            try:
                deadline = time.monotonic() + _PATIENCE_SECONDS
                while fetching.poll() is None:
                    self._story.caught.check()
                    if time.monotonic() > deadline:
                        raise UserError(f"the page did not come within {_PATIENCE_SECONDS:g} s")
                    now = client.run(["ss", "-HOtni", "state", "established",
                                      f"dport = :{_PORT}"]).stdout.splitlines()
                    if len(now) >= len(shown):  # the last look while all of them were there
                        shown = now
            except BaseException:
                fetching.kill()
                raise
            complaint = fetching.stderr.read().strip() if fetching.stderr else ""
        header, _, body = (folder / "page").read_bytes().partition(b"\r\n\r\n")
        whole = hashlib.sha256(body).hexdigest() == self._sha256
        self._check(whole, f"the page came whole: {len(body)} bytes, "
                           f"{header.splitlines()[0].decode() if header else complaint}")
        return shown

    def _check_trace(self, log: Sequence[str]) -> None:
        """The kernel's trace, in its order and with the right port."""
        for pattern, line in trace.look(log, self._remote, self._detour.address):
            self._check(line is not None,
                        f"in the kernel's log: {line or pattern.replace(chr(92), '')}")

    def _check_subflows(self, shown: Sequence[str]) -> None:
        peers = set()
        for line in shown:
            words = line.split()
            if len(words) > 3:
                peers.add(words[3].rsplit(":", 1)[0])
                self._story.line("client", f"ss: {words[2]} to {words[3]} " + " ".join(
                    word for word in words if word.startswith(("bytes_received", "tcp-ulp"))))
        wanted = {str(self._server.address), str(self._detour.address)}
        self._check(peers == wanted and len(shown) == len(wanted),
                    f"the connection has two subflows, to {' and '.join(sorted(peers))}")

    def _check_flows(self, paths: dict[str, Path], client: IPAddress) -> None:
        """What each capture holds: the TCP flows of the page, and the data they carry."""
        names = {client: "client", self._detour.address: "detour", self._server.address: "server"}

        def title(flow: Flow) -> str:
            return " - ".join(sorted(names.get(end.address, str(end.address)) for end in flow))

        flows = {name: _flows(path) for name, path in paths.items()}
        expected = {"client": ["client - detour", "client - server"],
                    "detour": ["client - detour", "detour - server"],
                    "server": ["client - server", "detour - server"]}
        for name, wanted in expected.items():
            seen = flows[name]
            for flow, count in seen.items():
                self._story.line(name, f"capture: {title(flow)}, {count / 1e6:.1f} MB of data "
                                       f"({', '.join(sorted(map(str, flow)))})")
            self._check(sorted(map(title, seen)) == wanted,
                        f"at the {name} there are two TCP flows: {' and '.join(wanted)}")
            if name == "client":
                self._check(len(seen) == 2 and min(seen.values()) >= _WANTED_SHARE * PAGE_BYTES,
                            "both subflows carry data at the client")
        every = {flow for seen in flows.values() for flow in seen}
        self._check(len(every) == 3, "there are three TCP flows in all: "
                    + ", ".join(sorted(map(title, every))))


def _flows(path: Path) -> dict[Flow, int]:
    """The TCP flows in a capture, with the payload from the server's side, in bytes."""
    found: dict[Flow, int] = {}
    for segment in segments(path):
        flow = frozenset((segment.source, segment.destination))
        found[flow] = found.get(flow, 0) + segment.payload
    return found


def _route(host: Host, home: IPAddress) -> None:
    """The way to the bridge's network is the way to the machine that has it."""
    way = json.loads(host.run(["ip", "-j", "route", "get", home]).stdout)[0]
    host.run(["ip", "route", "add", HOME.network, "via", way.get("gateway", home)])
