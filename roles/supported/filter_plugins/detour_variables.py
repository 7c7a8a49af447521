# SPDX-License-Identifier: GPL-2.0-or-later
"""Filter detour_misspelt: which variables are meant for our roles, and are none that they know."""

import difflib
import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

ROLES = Path(__file__).resolve().parents[2]

# All names that begin so are ours ...
_OURS = ("detour_", "ip_forward_", "mptcp_")
# ... and of these only what is nearly one of ours: other roles' variables may begin so, too.
_SHARED = ("bridge_", "monitoring_", "supported_")

# Of no role: how others reach a host (see inventories/example).
_OF_NO_ROLE = ("detour_address",)

_NAME = re.compile(r"\b(?:" + "|".join(_OURS + _SHARED) + r")\w+")


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {"detour_misspelt": misspelt}


def misspelt(names: Iterable[str]) -> list[str]:
    """What is wrong with each name that is none of our roles', with the nearest one that is."""
    options, internal = known()
    found = []
    for name in sorted(set(map(str, names))):
        if not name.startswith(_OURS + _SHARED) or name in options or name in internal:
            continue
        near = difflib.get_close_matches(name, options, 1, 0.6 if name.startswith(_OURS) else 0.85)
        if near:
            found.append(f"{name} (is {near[0]} meant?)")
        elif name.startswith(_OURS):
            found.append(name)
    return found


@functools.lru_cache(1)
def known() -> tuple[list[str], frozenset[str]]:
    """Names that a user may set, and what roles call things themselves (results, facts)."""
    options: list[str] = list(_OF_NO_ROLE)
    internal: set[str] = set()
    for role in sorted(path for path in ROLES.iterdir() if path.is_dir()):
        specs = yaml.safe_load((role / "meta/argument_specs.yml").read_text(encoding="utf-8"))
        for entry in specs["argument_specs"].values():
            options += entry.get("options", {})
        # Modules, too, which are called as variables are.
        internal |= {path.stem for path in role.glob("library/*.py")}
        for folder in ("defaults", "handlers", "tasks", "vars"):
            for path in role.glob(f"{folder}/*.yml"):
                internal |= set(_NAME.findall(path.read_text(encoding="utf-8")))
    return options, frozenset(internal)
