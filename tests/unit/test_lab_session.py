# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands on the VM's agent, which runs here, at the other end of a socket in place of a port."""

import os
import pty
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from detour_tools.errors import UserError
from detour_tools.lab import session

AGENT = """
import os, socket, sys
from detour_tools.lab.guest import agent
while True:
    connection, _ = socket.socket(fileno=int(sys.argv[1])).accept()
    connection.setblocking(False)
    if os.fork() == 0:
        agent.work(connection.detach())
    break
"""
SLOW_READER = 0.05  # seconds in which everything that a short command says has come


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The folder of a VM that runs one command."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "1"))
        listener.listen()
        agent = subprocess.Popen([sys.executable, "-c", AGENT, str(listener.fileno())],
                                 pass_fds=[listener.fileno()])
    yield tmp_path
    agent.kill()
    agent.wait()


def slowly() -> None:
    select.select([], [], [], SLOW_READER)


def test_output_and_status(folder: Path):
    done = session.run(folder, ["sh", "-c", "echo out; echo err >&2; exit 3"], timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_input(folder: Path):
    assert session.run(folder, ["wc", "-c"], stdin=bytes(200_000), timeout=20).stdout == "200000\n"


def test_a_command_that_ends_before_we_look(folder: Path):
    done = session.run(folder, ["echo", "hello"], timeout=20, on_turn=slowly)
    assert (done.returncode, done.stdout) == (0, "hello\n")


def test_a_command_that_cannot_be_started(folder: Path):
    script = folder / "script"
    script.write_text("no interpreter is named here")
    script.chmod(0o755)
    with pytest.raises(UserError, match=r"cannot run '.*/script': Exec format error") as caught:
        session.run(folder, [script], timeout=20, on_turn=slowly)
    assert caught.value.status == 126


def test_a_background_job_leaves_the_terminal_alone(folder: Path):
    leader, terminal = pty.openpty()
    # A shell with job control: its background jobs are process groups of their own.
    shell = subprocess.Popen(
        ["setsid", "--ctty", "bash", "-ic",
         f"{sys.executable} -m detour_tools.lab.session {folder} echo hello & wait"],
        stdin=terminal, stdout=terminal, stderr=subprocess.DEVNULL)
    os.close(terminal)
    said = b""
    try:
        while b"hello" not in said:
            assert select.select([leader], [], [], 20)[0], said
            said += os.read(leader, 4096)
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()
        os.close(leader)
