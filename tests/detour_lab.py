# SPDX-License-Identifier: GPL-2.0-or-later
"""The command detour-lab, as users start it."""

import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DETOUR_LAB = str(Path(sysconfig.get_path("scripts"), "detour-lab"))


@contextmanager
def running(until: str, *arguments: object) -> Iterator["subprocess.Popen[str]"]:
    """detour-lab with these arguments, as far as to the line with ``until``."""
    with subprocess.Popen([DETOUR_LAB, *map(str, arguments)],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as process:
        try:
            assert process.stdout is not None
            seen = ""
            while until not in seen:
                line = process.stdout.readline()
                assert line, (seen, process.stderr)
                seen += line
            yield process
        finally:
            process.kill()
