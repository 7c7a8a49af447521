# SPDX-License-Identifier: GPL-2.0-or-later
"""Measured transfers on a lab: uploads by iperf3, downloads by curl."""

import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from detour_tools.errors import UserError
from detour_tools.lab.network import Host

# The reference's measure: bytes received from second 1 to second 10, over 9 s.
UPLOAD_SECONDS: Final = 10
_TICK_SECONDS: Final = 0.2
_PATIENCE_SECONDS: Final = 60.0


@dataclass(frozen=True)
class Transfer:
    """A transfer that went through: its speed as the receiver saw it, and when (since 1970)."""

    mbps: float
    started: float
    ended: float


def upload(client: Host, target: str, port: int, prefix: Sequence[str],
           on_tick: Callable[[], None]) -> Transfer:
    """Send with iperf3 for 10 s; ``prefix`` goes before the command.

    Raises UserError when it does not work.
    """
    started = time.time()
    output = _watched(client, [*prefix, "iperf3", "-c", target, "-p", port, "-J",
                               "-t", UPLOAD_SECONDS, "--get-server-output"], on_tick)
    try:
        return Transfer(received_mbps(json.loads(output)), started, time.time())
    except ValueError as error:
        raise UserError(f"iperf3's report is not to be read: {error}") from None


def received_mbps(report: Mapping[str, Any]) -> float:
    """The receiver's figure from an iperf3 client's JSON report with the server's inside.

    Raises ValueError when the report does not hold it.
    """
    if "error" in report:
        raise ValueError(report["error"])
    try:
        intervals = [each["sum"] for each in report["server_output_json"]["intervals"]]
    except (KeyError, TypeError):
        raise ValueError("the server's intervals are missing") from None
    counted = intervals[1:UPLOAD_SECONDS]
    if len(counted) < UPLOAD_SECONDS - 1:
        raise ValueError(f"only {len(intervals)} intervals of one second")
    seconds = sum(float(each["seconds"]) for each in counted)
    return sum(int(each["bytes"]) for each in counted) * 8 / 1e6 / seconds


def download(client: Host, url: str, target: Path, sha256: str, prefix: Sequence[str],
             on_tick: Callable[[], None]) -> Transfer:
    """Fetch a file with curl and compare its SHA-256; raises UserError when it differs."""
    started = time.time()
    output = _watched(client, [*prefix, "curl", "-sS", "--fail", "-o", target, "-w",
                               "%{speed_download}", url], on_tick)
    ended = time.time()
    with target.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    target.unlink()
    if found != sha256:
        raise UserError(f"the file from {url} did not arrive whole: its SHA-256 is {found}")
    return Transfer(float(output) * 8 / 1e6, started, ended)


def _watched(host: Host, command: Sequence[object], on_tick: Callable[[], None]) -> str:
    """Run ``command``, calling ``on_tick`` several times a second; returns what it printed.

    An exception out of ``on_tick`` ends the command.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    with host.popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE, start_new_session=True) as process:
        try:
            while True:
                try:
                    output, complaint = process.communicate(timeout=_TICK_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    if time.monotonic() > deadline:
                        raise UserError(f"{command[0]} on {host.name} did not end within "
                                        f"{_PATIENCE_SECONDS:g} s") from None
                    on_tick()
        except BaseException:
            process.kill()
            raise
    if process.returncode and not output.startswith("{"):  # iperf3 -J tells errors in its report
        said = complaint.strip().splitlines()
        raise UserError(f"{' '.join(map(str, command))} failed on {host.name}",
                        said[-1] if said else f"status {process.returncode}")
    return output
