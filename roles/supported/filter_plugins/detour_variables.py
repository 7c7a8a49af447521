# SPDX-License-Identifier: GPL-2.0-or-later
"""Filters that look at what an inventory means for our roles.

detour_misspelt: which of the names none of our roles knows. detour_unlisted: which values are no
list, or dictionary, and are to be. detour_near: which groups' names are nearly ours.
detour_renamed: which names are old. detour_both, detour_contradicting: what an old name and the new
one are both set to.
detour_addresses, detour_endpoints: where others reach hosts, and where clients ask detours.
"""

import contextlib
import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

ROLES = Path(__file__).resolve().parents[2]

# All names that begin so are ours ...
_OURS = ("detour_", "ip_forward_", "mptcp_")
# ... and of these only what is nearly one of ours: other roles' variables may begin so, too.
_SHARED = ("bridge_", "capture_", "monitoring_", "supported_")

# Old names, which hold where the new ones are not set: see the roles' defaults, and their tags.
_RENAMED = {"monitoring_authorized_keys": "capture_authorized_keys",
            "monitoring_state": "capture_state"}
_RENAMED_TAGS = {"monitoring": "capture"}

# Of no role: how others reach a host (see inventories/example).
_OF_NO_ROLE = ("detour_address",)

_LOOKUP = re.compile(r"\b(lookup|query|q)\s*\(")
_NAME = re.compile(r"\b(?:" + "|".join(_OURS + _SHARED) + r")\w+")


class FilterModule:
    """What Ansible looks for."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters by name."""
        return {"detour_misspelt": misspelt, "detour_unlisted": unlisted, "detour_near": near,
                "detour_renamed": renamed, "detour_both": both,
                "detour_contradicting": contradicting,
                "detour_addresses": addresses, "detour_endpoints": endpoints}


def misspelt(names: Iterable[str]) -> list[str]:
    """What is wrong with each name that is none of our roles', with the nearest one that is."""
    options, internal = known()
    mine = [*options, *_RENAMED]
    found = []
    for name in sorted(set(map(str, names))):
        if not name.startswith(_OURS + _SHARED) or name in mine or name in internal:
            continue
        nearest = difflib.get_close_matches(
            name, mine, 1, 0.6 if name.startswith(_OURS) else 0.85)
        if nearest:
            meant = _RENAMED.get(nearest[0], nearest[0])
            found.append(f"no role knows {name} (is {meant} meant?)")
        elif name.startswith(_OURS):
            found.append(f"no role knows {name}")
    return found


def renamed(names: Iterable[str], tags: Iterable[str] = ()) -> list[str]:
    """Each old name among those of variables and tags, with the one to use instead."""
    return [*(f"{name} (use {_RENAMED[name]})" for name in sorted(_RENAMED.keys() & set(names))),
            *(f"tag {tag} (use {_RENAMED_TAGS[tag]})"
              for tag in sorted(_RENAMED_TAGS.keys() & set(tags)))]


def both(names: Iterable[str]) -> list[str]:
    """Of these names the old ones that stand beside their new ones, and those."""
    given = set(map(str, names))
    return [name for pair in _RENAMED.items() if given.issuperset(pair) for name in pair]


def contradicting(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with each variable that is set by its old name, too, and to another value."""
    found = []
    for old, new in _RENAMED.items():
        with contextlib.suppress(Exception):  # made of what is not known yet
            if old in values and new in values and values[old] != values[new]:
                found.append(f"{old} is the old name of {new}, and both are set, to different "
                             f"values: keep {new}")
    return found


def near(groups: Iterable[str], ours: Iterable[str]) -> list[str]:
    """A question for each group that is none of ours, and nearly bears the name of one."""
    known_groups = list(ours)
    return [f"Is '{found[0]}' meant by group '{group}'?" for group in map(str, groups)
            if group not in known_groups
            and (found := difflib.get_close_matches(group, known_groups, 1, 0.75))]


def unlisted(raw: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """What is wrong with each variable that is a text or a number where a list is wanted.

    Ansible takes these for lists where it looks at a role's arguments, and leaves them as they are:
    of a text a role then takes one character after the other. Dictionaries likewise.

    ``raw`` are a host's variables as they are written, ``values`` what they come to. A variable
    that is made by a look-up is left out: that may be dear, or fail where no role needs it.
    """
    found = []
    for name in sorted(_kinds().keys() & raw.keys()):
        written = raw[name]
        if isinstance(written, str) and _LOOKUP.search(written):
            continue
        with contextlib.suppress(Exception):  # made of what is not known yet
            found += _unlisted(name, values[name])
    return found


def _unlisted(name: str, value: object) -> list[str]:
    if _kinds()[name] == "dict":
        return [] if isinstance(value, Mapping) else [
            f"{name} is {value!r}, and is to be a dictionary: {{key: value}}"]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return []
    return [f"{name} is {value!r}, and is to be a list: [{value}]"]


def addresses(hosts: Iterable[Mapping[str, Any]]) -> list[str]:
    """The name or address by which others reach each host, of which these are the variables."""
    return [str(host.get("detour_address") or host.get("ansible_host")
                or host["inventory_hostname"]) for host in hosts]


def endpoints(detours: Iterable[Mapping[str, Any]]) -> list[str]:
    """The same of detours, with the port if their server listens on another than usual."""
    listed = list(detours)
    listen = [str(detour.get("detour_server_listen") or "") for detour in listed]
    return [address + each[each.rfind(":"):] if ":" in each else address
            for address, each in zip(addresses(listed), listen, strict=True)]


@functools.lru_cache(1)
def _options() -> dict[str, dict[str, Any]]:
    """What users may set, by name, as the roles' argument specs tell."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(ROLES.glob("*/meta/argument_specs.yml")):
        specs = yaml.safe_load(path.read_text(encoding="utf-8"))
        for entry in specs["argument_specs"].values():
            found |= entry.get("options", {})
    return found


def _kinds() -> dict[str, str]:
    kinds = {name: option["type"] for name, option in _options().items()
             if option.get("type") in ("list", "dict")}
    return kinds | {old: kinds[new] for old, new in _RENAMED.items() if new in kinds}


@functools.lru_cache(1)
def known() -> tuple[list[str], frozenset[str]]:
    """Names that a user may set, and what roles call things themselves (results, facts)."""
    internal: set[str] = set()
    for role in sorted(path for path in ROLES.iterdir() if path.is_dir()):
        # Modules, too, which are called as variables are.
        internal |= {path.stem for path in role.glob("library/*.py")}
        for folder in ("defaults", "handlers", "tasks", "vars"):
            for path in role.glob(f"{folder}/*.yml"):
                internal |= set(_NAME.findall(path.read_text(encoding="utf-8")))
    return [*_OF_NO_ROLE, *_options()], frozenset(internal)
