# SPDX-License-Identifier: GPL-2.0-or-later
"""What all console scripts have in common."""

import subprocess
import sysconfig
from pathlib import Path

import pytest

SCRIPTS = Path(sysconfig.get_path("scripts"))


def run(line: str) -> "subprocess.CompletedProcess[str]":
    """A line of shell, with the console scripts in its PATH."""
    return subprocess.run(["sh", "-c", f"PATH={SCRIPTS}:$PATH; {line}"], capture_output=True,
                          text=True, check=False)


@pytest.mark.parametrize("script", ["detour-client", "detour-server", "detour-lab"])
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_outputs(script: str, closed: str):
    done = run(f"{script} --help {closed}")
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout) == (closed == "2>&-")


@pytest.mark.parametrize("command", ["detour-client netlink list", "detour-lab vm",
                                     "detour-lab down", "detour-server list"])
def test_unknown_arguments_point_at_the_commands_help(command: str):
    done = run(f"{command} --bogus")
    assert (done.returncode, done.stderr) == (
        2, f"{command}: unrecognized arguments: --bogus (see {command} --help)\n")


def test_bounds_are_whole():
    done = run("detour-lab vm --memory 1")
    assert done.stderr == ("detour-lab vm: argument --memory: 1 is not from 128 to 1048576 "
                           "(see detour-lab vm --help)\n")
