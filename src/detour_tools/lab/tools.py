# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the programs of labs and VMs are looked for, and what is said when one is missing."""

import os
import shutil
import sysconfig
from collections.abc import Mapping

from detour_tools.errors import UserError


def search_path() -> str:
    """PATH with the console scripts' folder first, and the system's folders in any case."""
    parts = [sysconfig.get_path("scripts"), *os.environ.get("PATH", os.defpath).split(":"),
             "/usr/local/sbin", "/usr/sbin", "/sbin"]
    return ":".join(dict.fromkeys(parts))


def need_tools(packages: Mapping[str, str]) -> None:
    """Raise UserError unless all these programs are there; ``packages`` says which has each."""
    missing = {tool: package for tool, package in packages.items()
               if shutil.which(tool, path=search_path()) is None}
    if missing:
        raise UserError(f"missing: {', '.join(missing)}",
                        f"install: {' '.join(sorted(set(missing.values())))}")
