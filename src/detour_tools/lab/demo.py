# SPDX-License-Identifier: GPL-2.0-or-later
"""The demo: the main job on a lab of its own, told as it happens, measured, and checked."""

import contextlib
import hashlib
import importlib.util
import json
import os
import time
from pathlib import Path
from typing import Final

from detour_tools import control
from detour_tools.errors import UserError
from detour_tools.lab import graph, namespaces, transfers
from detour_tools.lab.captures import Capture
from detour_tools.lab.daemons import Daemon
from detour_tools.lab.network import NO_NETEM, Lab, need_root
from detour_tools.lab.results import TITLES, Results, Way
from detour_tools.lab.story import Output, Story, own_lab
from detour_tools.lab.tools import need_tools

FILE_BYTES: Final = 8_000_000
HTTP_PORT: Final = 80
IPERF_PORT: Final = 5201
_TOOLS: Final = {"ip": "iproute2", "curl": "curl", "iperf3": "iperf3", "tcpdump": "tcpdump",
                 "mptcpize": "mptcpize"}
# The TCP header with all its options fits; payload is of no interest.
_SNAPLEN: Final = 96
_TELL_SECONDS: Final = 1.0


def run(folder: Path, name: str) -> int:
    """Run the demo on a lab called ``name`` and write to ``folder``; returns the exit status.

    Raises UserError when something does not work. Whatever ends it, the lab goes down.
    """
    need_root()
    need_tools(_TOOLS)
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("missing: the Python package matplotlib",
                        "install detour-tools[lab], or use 'make venv'")
    output = Output(folder)
    with own_lab(name, "demo") as (lab, story):
        results = _Demo(lab, story).run(output)
    output.hand_over()
    story.note(f"pictures, captures and figures are in {output}")
    if not results.holds:
        raise UserError(f"the claim does not hold: {results.claim()}",
                        "a busy machine can be the reason; try again")
    story.note(results.claim())
    return 0


class _Demo:
    """One run, on a lab that is not up yet."""

    def __init__(self, lab: Lab, story: Story) -> None:
        self._lab = lab
        self._story = story
        self._client, self._detour, self._server = (
            lab.host(name) for name in ("client", "detour", "server"))
        self._programs: list[Daemon] = []
        self._next_tick = 0.0

    def run(self, output: Output) -> Results:
        """Everything, from bringing the lab up to the pictures."""
        story = self._story
        story.heading("The lab")
        self._lab.up()
        for line in graph.draw(self._lab.topology):
            story.note(line)
        if not self._lab.netem:
            story.note(f"note: {NO_NETEM}")
        folder = self._lab.folder()
        with contextlib.ExitStack() as running:
            captures = {}
            for host, link in ((self._client, "L1"), (self._detour, "L6"), (self._server, "L3")):
                captures[host.name] = running.enter_context(Capture(
                    host, link, folder / f"{host.name}.pcap", snaplen=_SNAPLEN, live=False,
                    expression="tcp or udp port 45672"))
            self._start_programs(running, folder)
            results = Results(netem=self._lab.netem)
            self._transfers(results, folder)
            story.quiet = True  # what they say when they are stopped is no part of it
        story.caught.check()
        results.count_paths(captures["client"].path, self._client.address, {
            self._server.address: "direct", self._detour.address: "detour"})
        story.caught.check()
        # Not before: it keeps a cache in the home folder unless told otherwise.
        os.environ["MPLCONFIGDIR"] = str(folder)
        from detour_tools.lab import report  # noqa: PLC0415

        report.print_chart(results, story.console)
        for capture in captures.values():
            output.take(capture.path)
        report.write(results, output.add)
        return results

    def _start_programs(self, running: contextlib.ExitStack, folder: Path) -> None:
        story = self._story
        story.heading("A server that speaks Multipath TCP, a detour, and a client that knows it")
        pages = folder / "pages"
        pages.mkdir()
        content = os.urandom(FILE_BYTES)
        (pages / "file").write_bytes(content)
        self._sha256 = hashlib.sha256(content).hexdigest()
        for command, port in (
                (["python3", "-m", "http.server", HTTP_PORT, "--bind", self._server.address,
                  "--directory", pages], HTTP_PORT),
                (["iperf3", "-s", "-J", "-p", IPERF_PORT], IPERF_PORT)):
            wrapped = ["mptcpize", "run", *command]
            story.line("server", "$ " + " ".join(map(str, wrapped)))
            # Not followed: they have nothing to say about paths.
            self._programs.append(running.enter_context(Daemon(self._server, wrapped)))
            self._programs[-1].wait_listening(port)
        for host, ours in ((self._detour, ["detour-server", "--allow-remote", "10.0.0.0/8",
                                          # For what is fetched by plain TCP, to compare.
                                          "--relay", "tcp"]),
                           (self._client, ["detour-client", "daemon", "detour"])):
            self._programs.append(running.enter_context(story.follow(host, ours)))
            self._programs[-1].wait_control_socket()

    def _transfers(self, results: Results, folder: Path) -> None:
        ways: list[tuple[Way, str, tuple[str, ...]]] = [
            ("tcp", "server", ()),
            ("tcp_nat", "detour", ()),
            ("mptcp_nat", "server", ("detour-client", "run", "--")),
        ]
        for way, target, prefix in ways:
            self._story.heading(TITLES[way])
            http_port, iperf_port = HTTP_PORT, IPERF_PORT
            if way == "tcp_nat":
                http_port, iperf_port = self._mapping(HTTP_PORT), self._mapping(IPERF_PORT)
            url = f"http://{target}" + ("" if http_port == 80 else f":{http_port}") + "/file"
            self._story.line("client", "$ " + " ".join([*prefix, "curl", url]))
            self._next_tick = time.monotonic() + _TELL_SECONDS
            got = transfers.download(self._client, url, folder / "got", self._sha256, prefix,
                                     lambda: self._tick("received"))
            results.transfers["download"][way] = got
            self._story.line("client", f"{FILE_BYTES / 1e6:g} MB in {got.ended - got.started:.1f} s"
                                       f" ({got.mbps:.2f} Mbit/s), SHA-256 as it should be")
            self._next_tick = time.monotonic() + _TELL_SECONDS
            self._story.line("client", "$ " + " ".join(
                [*prefix, f"iperf3 -c {target} -p {iperf_port}"]))
            sent = transfers.upload(self._client, target, iperf_port, prefix,
                                    lambda: self._tick("sent"))
            results.transfers["upload"][way] = sent
            self._story.line("client", f"{sent.mbps:.2f} Mbit/s, as the receiver counted from "
                                       "second 1 to second 10")

    def _mapping(self, port: int) -> int:
        """Ask by hand for a mapping, as a user would; returns the detour port."""
        command = ["detour-client", "request", "detour", f"{self._server.address}:{port}",
                   "--json"]
        self._story.line("client", "$ " + " ".join(command[:-1]))
        answer = json.loads(self._client.run(command).stdout)
        self._story.line("client", f"{answer['detour']}:{answer['detour_port']} leads to "
                                   f"{answer['remote']}")
        return int(answer["detour_port"])

    def _tick(self, direction: str) -> None:
        """See that all programs live, and tell the bytes by path so far as the daemon has them."""
        self._story.caught.check()
        for program in self._programs:
            program.check()
        if time.monotonic() < self._next_tick:
            return
        self._next_tick = time.monotonic() + _TELL_SECONDS
        with namespaces.inside(self._client.namespace):
            status = control.call("detour-client", "status")
        totals: dict[str, int] = {}
        for connection in status["connections"]:
            for subflow in connection["subflows"]:
                path = "direct" if subflow["via"] is None else f"by detour {subflow['via']}"
                totals[path] = totals.get(path, 0) + (subflow[f"bytes_{direction}"] or 0)
        if totals:
            self._story.line("client", f"{direction}: " + ", ".join(
                f"{count / 1e6:.1f} MB {path}" for path, count in sorted(
                    totals.items(), reverse=True)))
