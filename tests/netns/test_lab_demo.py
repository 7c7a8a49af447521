# SPDX-License-Identifier: GPL-2.0-or-later
"""The demo: shortened, interrupted at all kinds of moments, and with something broken."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from detour_tools.errors import UserError
from detour_tools.lab import demo, results, tools, transfers
from detour_tools.lab.captures import segments
from detour_tools.lab.daemons import wait_for
from tests.detour_lab import DETOUR_LAB, running
from tests.netns.conftest import traces

LAB_IS_BUILT = "A server that speaks"
PROGRAMS_RUN = "$ curl http://server/file"
# What hangs does so for ever; a busy machine takes its time to take a lab down.
END_SECONDS = 120


def shown(name: str, folder: Path) -> list[object]:
    return ["--name", name, "demo", "--output", folder / "demo"]


def test_the_demo_from_end_to_end_shortened(name: str, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(demo, "FILE_BYTES", 1_000_000)
    monkeypatch.setattr(transfers, "UPLOAD_SECONDS", 4)
    # Three seconds on a machine that runs other tests prove no figure; 'make demo' does.
    monkeypatch.setattr(results, "WANTED_SHARE", 0.8)
    monkeypatch.setenv("SUDO_UID", "65534")
    monkeypatch.setenv("SUDO_GID", "65534")
    output = tmp_path / "demo"
    assert demo.run(output, name) == 0
    assert traces(name) == []
    story = capsys.readouterr().out
    for told in ("created", "new      client 10.0.1.1 remote 10.0.3.2:80 detour port 80", "joins",
                 "has subflow", "MB direct", "MB by detour", "SHA-256 as it should be"):
        assert told in story
    assert {path.name: path.stat().st_uid for path in output.iterdir()} == dict.fromkeys(
        ["client.pcap", "detour.pcap", "server.pcap", "results.json", "throughput.png",
         "throughput-over-time.png"], 65534)
    figures = json.loads((output / "results.json").read_text(encoding="utf-8"))
    for direction in ("upload", "download"):
        assert min(figures[direction]["mptcp_bytes_by_path"].values()) > 100_000
    # The captures agree: at the server Multipath TCP came from the client and from the detour.
    sources = {str(segment.source.address) for segment in segments(output / "server.pcap")
               if segment.payload and segment.destination.port == 5201}
    assert sources == {"10.0.1.1", "10.0.6.2"}
    assert {str(segment.source.address) for segment in segments(output / "detour.pcap")} == {
        "10.0.1.1", "10.0.3.2", "10.0.6.2"}


@pytest.mark.parametrize(("moment", "signum", "status"), [
    ("The lab", signal.SIGINT, 130),
    (LAB_IS_BUILT, signal.SIGINT, 130),
    (PROGRAMS_RUN, signal.SIGINT, 130),
    (PROGRAMS_RUN, signal.SIGTERM, 143),
    (PROGRAMS_RUN, signal.SIGHUP, 129),
])
def test_interrupted(name: str, tmp_path: Path, moment: str, signum: int, status: int):
    with running(moment, *shown(name, tmp_path)) as process:
        # As a terminal does it, the whole group is told; and then once more, by an impatient user.
        os.killpg(process.pid, signum)
        os.killpg(process.pid, signum)
        _, complaint = process.communicate(timeout=END_SECONDS)
    assert (process.returncode, complaint) == (status, "")
    assert traces(name) == []
    assert not (tmp_path / "demo").exists()


def test_after_sigkill_the_next_start_cleans_up(name: str, tmp_path: Path):
    with running(PROGRAMS_RUN, *shown(name, tmp_path)) as process:
        process.kill()
        process.communicate(timeout=END_SECONDS)
    assert traces(name)
    with running(PROGRAMS_RUN, *shown(name, tmp_path)) as process:
        process.send_signal(signal.SIGINT)
        told, complaint = process.communicate(timeout=END_SECONDS)
    assert (process.returncode, complaint) == (130, "")
    assert "everything is down again" in told
    assert traces(name) == []


@pytest.mark.parametrize(("host", "program"), [("client", "detour-client"),
                                               ("detour", "detour-server")])
def test_a_program_that_dies_is_told_in_one_line(name: str, tmp_path: Path, host: str,
                                                 program: str):
    with running(PROGRAMS_RUN, *shown(name, tmp_path)) as process:
        found = subprocess.run(["ip", "netns", "pids", f"{name}-{host}"], capture_output=True,
                               text=True, check=True).stdout.split()
        victim = next(int(pid) for pid in found
                      if program in Path(f"/proc/{pid}/cmdline").read_text(encoding="ascii"))
        os.kill(victim, signal.SIGKILL)
        _, complaint = process.communicate(timeout=END_SECONDS)
    assert process.returncode == 1
    assert complaint.startswith(f"detour-lab: {program} on {host} ended with status -9 (")
    assert complaint.count("\n") == 1
    assert traces(name) == []


def test_a_claim_that_fails_is_an_error(name: str, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch):
    class Failed:
        holds = False

        def claim(self) -> str:
            return "80 % only"

    monkeypatch.setattr("detour_tools.lab.demo._Demo.run", lambda *_: Failed())
    monkeypatch.setenv("SUDO_UID", "65534")
    monkeypatch.setenv("SUDO_GID", "65534")
    with pytest.raises(UserError, match="the claim does not hold: 80 % only"):
        demo.run(tmp_path / "demo", name)


def test_two_demos_at_once(name: str, tmp_path: Path):
    with running("The lab", *shown(name, tmp_path)) as first:
        second = subprocess.run([DETOUR_LAB, "--name", name, "demo"], capture_output=True,
                                text=True, check=False, cwd=tmp_path)
        assert (second.returncode, second.stderr) == (
            1, f"detour-lab: a demo is running on the lab '{name}' already\n")
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=END_SECONDS)
    wait_for(lambda: not traces(name))


def test_missing_tools_are_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tools, "search_path", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"missing: ip, curl, iperf3, tcpdump, mptcpize \(install: "
                                        r"curl iperf3 iproute2 mptcpize tcpdump\)"):
        demo.run(tmp_path / "demo", name)
