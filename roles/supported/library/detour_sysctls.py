#!/usr/bin/python
# SPDX-License-Identifier: GPL-2.0-or-later
"""Ansible module: sysctls now and at boot, with what stood there before for the way back."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: detour_sysctls
short_description: Sets sysctls now and at boot, and puts back what stood before
description:
  - Writes a file for C(/etc/sysctl.d) and sets the same at once. What stood before is kept in
    comments of the file, so that I(state=absent) can put it back.
  - Leaves alone at run time what a running detour-client or detour-server has borrowed.
options:
  path:
    description: The file; its name decides what it comes after at boot.
    type: path
    required: true
  note:
    description: Why, for who reads the file.
    type: str
    default: ''
  values:
    description: Names and values; those that this kernel does not have are written all the same.
    type: dict
    default: {}
  remember:
    description: Others that the kernel changes along with them (shell patterns).
    type: list
    elements: str
    default: []
  default:
    description: What stands before where the kernel does not have them yet.
    type: str
    default: ''
  state:
    description: Whether they are to be set, or as they were before.
    type: str
    choices: [present, absent]
    default: present
author: [detour-tools]
"""

EXAMPLES = """
- name: Forward
  detour_sysctls:
    path: /etc/sysctl.d/90-detour-forward.conf
    values: {net.ipv4.ip_forward: 1}
"""

RETURN = """
borrowed:
  description: Names that were not touched now, because a running program has borrowed them.
  type: list
  returned: always
"""

ROOT = Path("/proc/sys")
FOLDERS = ("/etc/sysctl.d", "/run/sysctl.d", "/usr/local/lib/sysctl.d", "/usr/lib/sysctl.d")
# 'sysctl --system' reads it after all others. Debian 12 has a link to it, 99-sysctl.conf, which
# systemd reads at boot; Debian 13 has none.
LAST = "/etc/sysctl.conf"
# Two names of one switch (net/ipv4/devinet.c).
_SAME = {"net.ipv4.conf.all.forwarding": "net.ipv4.ip_forward"}
_LINE = re.compile(r"(?P<was>#was )?-?(?P<name>[\w./*-]+?)\s*=\s*(?P<value>.*)")
_SO_NETNS_COOKIE = 71  # include/uapi/asm-generic/socket.h


def path_of(name: str) -> Path:
    """The file of a sysctl; with slashes in its name, dots are part of an interface's name."""
    return ROOT / (name if "/" in name else name.replace(".", "/"))


def read(name: str) -> str | None:
    """What it is now, None where the kernel does not have it."""
    try:
        return " ".join(path_of(name).read_text(encoding="ascii").split())
    except OSError:
        return None


def parse(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """What a file sets, and what it says stood before."""
    sets: dict[str, str] = {}
    was: dict[str, str] = {}
    for line in text.splitlines():
        match = _LINE.fullmatch(line.strip())
        if match:
            (was if match["was"] else sets)[match["name"]] = match["value"].strip()
    return sets, was


def later(path: Path, values: dict[str, str], folders: tuple[str, ...] = FOLDERS,
          last: str = LAST) -> str:
    """A file that comes after ours and sets one of them otherwise, said in one line."""
    files: dict[str, Path] = {}
    for folder in reversed(folders):
        files |= {found.name: found for found in Path(folder).glob("*.conf")}
    after = [files[name] for name in sorted(files)
             if name > path.name and files[name] != path]
    for file, when in [*((each, "at boot") for each in after),
                       (Path(last), "whenever somebody runs 'sysctl --system' or 'sysctl -p'")]:
        try:
            sets, _ = parse(file.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue
        theirs = {_plain(name): value for name, value in sets.items()}
        for name, value in values.items():
            if theirs.get(_plain(name), value) != value:
                return (f"{file.resolve()} sets {name} to {theirs[_plain(name)]} {when}, "
                        f"after {path}: take that line away")
    return ""


def _plain(name: str) -> str:
    """With slashes is as good as with dots."""
    dotted = name.replace("/", ".")
    return _SAME.get(dotted, dotted)


def borrowed() -> dict[str, tuple[str, str]]:
    """What running programs of ours have borrowed: names, and what it was and what they set."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            raw = probe.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    except OSError:
        return {}
    found: dict[str, tuple[str, str]] = {}
    for journal in Path("/run/detour-tools").glob(
            f"**/netns-{struct.unpack('=Q', raw)[0]}/*.sysctls"):
        try:
            # A daemon's user may write it, and what it says goes into a file of root's.
            found |= {name.replace("/", "."): (was, ours) for name, (was, ours)
                      in json.loads(journal.read_text(encoding="utf-8")).items()
                      if re.fullmatch(r"[A-Za-z0-9_-]{1,32}", was) and isinstance(ours, str)}
        except (OSError, ValueError, AttributeError, TypeError):
            continue
    return {name: (was, ours) for name, (was, ours) in found.items() if read(name) == ours}


def expand(patterns: list[str]) -> list[str]:
    """The sysctls that patterns name, with slashes, as interfaces' names may have dots."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns
                  for path in ROOT.glob(pattern.replace(".", "/")))


def render(note: str, values: dict[str, str], was: dict[str, str]) -> str:
    """The file's text."""
    lines = [f"# detour-tools: {note}"]
    if was:
        lines += ["# What stood before, for when this is taken away again:",
                  *(f"#was {name} = {value}" for name, value in was.items())]
    # With '-' a kernel that does not have one is no failure at boot.
    return "\n".join([*lines, *(f"-{name} = {value}" for name, value in values.items())]) + "\n"


def main() -> None:
    """Run the module."""
    module = AnsibleModule({
        "path": {"type": "path", "required": True},
        "note": {"type": "str", "default": ""},
        "values": {"type": "dict", "default": {}},
        "remember": {"type": "list", "elements": "str", "default": []},
        "default": {"type": "str", "default": ""},
        "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    }, supports_check_mode=True)
    path = Path(module.params["path"])
    values = ({name: str(int(value) if isinstance(value, bool) else value)
               for name, value in module.params["values"].items()}
              if module.params["state"] == "present" else {})
    try:
        before = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        before = ""
    sets, was = parse(before)
    if problem := later(path, values):
        module.fail_json(msg=problem)

    lent = borrowed()
    write: dict[str, str] = {}
    skipped: list[str] = []
    kept = {name: value for name, value in was.items() if name in values}
    # What is no longer wanted goes back, unless somebody else has changed it meanwhile.
    gone = {name: value for name, value in was.items() if name in sets and name not in values
            and read(name) == sets[name] and name not in lent}
    write |= gone
    # ... and along with it what the kernel had changed along with it.
    others = {name: value for name, value in was.items() if name not in sets}
    if gone:
        write |= others
    elif any(name in values for name in sets):
        kept |= others
    for name, value in values.items():
        current = read(name)
        if current is None:
            if name not in sets and module.params["default"]:
                kept[name] = module.params["default"]
            continue
        if name not in sets:
            kept[name] = lent[name][0] if name in lent else current
            if current != value or name in lent:
                kept |= {other: found for other in expand(module.params["remember"])
                         if (found := read(other)) is not None}
        if current != value:
            if name in lent:
                skipped.append(name)
            else:
                write[name] = value

    after = render(module.params["note"], values, kept) if values else ""
    # Set by the kernel itself as soon as the ones before are.
    write = {name: value for name, value in write.items() if read(name) is not None}
    now = {name: read(name) for name in write}
    changed = before != after or any(now[name] != write[name] for name in write)
    if changed and not module.check_mode:
        _store(module, path, after)
        for name, value in write.items():
            if read(name) != value:
                try:
                    path_of(name).write_text(value, encoding="ascii")
                except OSError as error:
                    _store(module, path, before)  # it would not hold at boot, either
                    module.fail_json(msg=f"cannot set {name} to {value}: {error.strerror}")
    diff: dict[str, Any] = {"before_header": str(path), "after_header": str(path)}
    diff["before"] = before + "".join(f"now: {name} = {now[name]}\n" for name in write)
    diff["after"] = after + "".join(f"now: {name} = {write[name]}\n" for name in write)
    module.exit_json(changed=changed, diff=diff, borrowed=skipped)


def _store(module: AnsibleModule, path: Path, text: str) -> None:
    if not text:
        path.unlink(missing_ok=True)
        return
    try:
        path.parent.mkdir(exist_ok=True)
        aside = path.with_name(f".{path.name}.new")
        aside.write_text(text, encoding="utf-8")
        aside.chmod(0o644)
        os.replace(aside, path)
    except OSError as error:
        module.fail_json(msg=f"cannot write {path}: {error.strerror}")


if __name__ == "__main__":
    main()
