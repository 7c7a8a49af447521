# SPDX-License-Identifier: GPL-2.0-or-later
"""A change of the network that undoes itself unless it is confirmed in time."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import shlex
import shutil
import time
from pathlib import Path

from ansible.module_utils.detour_bridging import host
from ansible.module_utils.detour_bridging.bridge import Bridge
from ansible.module_utils.detour_bridging.host import BridgeError, Files
from ansible.module_utils.detour_bridging.manager import Manager

# Of what changes the network. Wide, as it has to come to its end: netplan and ifupdown run much.
LIMITS = ("MemoryMax=1G", "TasksMax=512")
ROLLBACK = "detour-bridge-rollback"
APPLY = "detour-bridge-apply"
UNITS = Path("/etc/systemd/system")


def script(manager: Manager, befores: tuple[Files, ...], after: Files, undone: set[str],
           source: str, marker: str) -> str:
    """A shell script that goes from any of some sets of files to one that is kept in a folder."""
    different = {path: each for before in befores
                 for path, each in before.items() ^ after.items()}
    known = [manager.bridges_of(each) for each in (*befores, after)]
    names = {name for each in known for name in each}
    there = known[-1].keys()
    anew = undone | manager.anew(different, names)
    changed = manager.bridges_of(different).keys() - anew
    ports = {port for each in known for name in anew for port in each.get(name, ())}
    # Noted in a file: the other script may have to attach them.
    lines = ["#!/bin/sh", *(
        f"ls {host.SYS}/{name}/brif 2>/dev/null >>{host.WORK}/carried-{name}"
        for name in sorted(anew))]
    lines += manager.down(anew, ports)
    lines += [f"rm -f {shlex.quote(path)}" for path in sorted(
        {path for before in befores for path in before} - after.keys())]
    lines += [f"install -D -m {mode:o} {host.WORK}/{source}/{number} {shlex.quote(path)}"
              for number, (path, (_, mode)) in enumerate(after.items())]
    lines += manager.up(anew, ports | changed, names - there)
    lines += [attach(name, ports) for name in sorted(anew & there)]
    return "\n".join([*lines, f"touch {host.WORK}/{marker}", ""])


def attach(bridge: str, ports: set[str]) -> str:
    """Shell commands that put into a bridge what it carried, virtual machines, but for ports."""
    return f"""for guest in $(sort -u {host.WORK}/carried-{bridge}); do
    case $guest in {'|'.join(['lo', *sorted(ports)])}) continue;; esac
    tries=0  # the bridge comes when its manager has made it
    until [ ! -e {host.SYS}/$guest ] || [ -e {host.SYS}/$guest/master ] || [ $tries = 50 ] ||
          ip link set $guest master {bridge}; do tries=$((tries + 1)); sleep 0.2; done
done"""


def settle() -> None:
    """Let what is going on come to its end, and forget a change that was put back."""
    for unit, marker in ((APPLY, "applied"), (ROLLBACK, "rolled-back")):
        if host.active(f"{unit}.service"):
            wait_for(host.WORK / marker, 60)
    if (host.WORK / "rolled-back").exists():
        clean()  # nobody came back then


def unconfirmed() -> bool:
    """Whether there is a change that nobody has confirmed yet."""
    return (host.WORK / "apply").exists()


def change(manager: Manager, old: Files, new: Files, bridges: list[Bridge], rollback: int) -> None:
    """Start the timer, then the change, and wait for it. All by files, so that it outlives us."""
    for unit in (APPLY, ROLLBACK):  # stuck, or settle() would have seen them end
        host.run("systemctl", "stop", f"{unit}.service", check=False)
    # After a change that nobody has confirmed, what stood before that one is the way back.
    kept = host.text_of(host.WORK / "old" / "files") if unconfirmed() else None
    first: Files = {path: (text, mode) for path, (text, mode) in json.loads(kept).items()} if (
        kept) else old
    # And the host's own files that only this change touches.
    first |= {path: each for path, each in old.items() if path not in first
              and not any(fnmatch.fnmatchcase(path, pattern) for pattern in manager.patterns)}
    undone = {bridge.name for bridge in bridges if bridge.done()}
    start_timer(rollback)
    for marker in ("applied", "failed"):
        (host.WORK / marker).unlink(missing_ok=True)
    for folder, files in (("old", first), ("new", new)):
        (host.WORK / folder).mkdir(parents=True, exist_ok=True, mode=0o700)
        for number, (text, _) in enumerate(files.values()):
            (host.WORK / folder / str(number)).write_text(text, encoding="utf-8")
    (host.WORK / "old" / "files").write_text(json.dumps(first), encoding="utf-8")
    back = script(manager, (new, old), first, undone, "old", "rolled-back")
    (host.WORK / "rollback").write_text(
        f"systemctl stop {APPLY}.service 2>/dev/null\n{back}", encoding="utf-8")
    (host.WORK / "apply").write_text(
        script(manager, (old,), new, undone, "new", "applied"), encoding="utf-8")
    os.sync()  # of no use if a power cut loses it
    host.run("systemd-run", "-q", f"--unit={APPLY}", "--collect",
             *(f"--property={each}" for each in LIMITS), "/bin/sh", str(host.WORK / "apply"))
    wait_for(host.WORK / "applied", 60)


def start_timer(seconds: int) -> None:
    """Have all put back after that time, also when somebody reboots the lost host before."""
    what = "[Unit]\nDescription=Put back the network that was there before its bridges\n"
    (UNITS / f"{ROLLBACK}.service").write_text(
        f"{what}ConditionPathExists={host.WORK}/rollback\n"
        f"ConditionPathExists=!{host.WORK}/rolled-back\n\n"
        f"[Service]\nExecStart=/bin/sh {host.WORK}/rollback\n"
        + "".join(f"{each}\n" for each in LIMITS), encoding="utf-8")
    (UNITS / f"{ROLLBACK}.timer").write_text(
        f"{what}\n[Timer]\nOnActiveSec={seconds}\nAccuracySec=1s\n\n"
        "[Install]\nWantedBy=timers.target\n", encoding="utf-8")
    host.run("systemctl", "daemon-reload")
    host.run("systemctl", "stop", f"{ROLLBACK}.timer", check=False)  # it may run already
    host.run("systemctl", "enable", "-q", "--now", f"{ROLLBACK}.timer")


def wait_for(path: Path, seconds: float) -> bool:
    """Wait for a file."""
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def confirm(bridges: list[Bridge], seconds: float) -> None:
    """See that the change is done, and stop the timer; raises BridgeError."""
    if not unconfirmed():
        return
    if (host.WORK / "rolled-back").exists() or host.active(f"{ROLLBACK}.service"):
        wait_for(host.WORK / "rolled-back", 30)
        clean()
        raise BridgeError("this host could not be reached with its new bridges in time, and has "
                          "put back what it had: look at the addresses and ports in "
                          "bridge_bridges")
    end = time.monotonic() + seconds
    missing = "the change is still going on"
    # Only what we came to after the change shows that the way is there.
    if (host.WORK / "applied").exists():
        failed = (host.text_of(host.WORK / "failed") or "").strip()
        missing = f"'ifup {failed}' failed: 'journalctl -u {APPLY}' says why" if failed else ""
        while not failed and (missing := next(
                (each for bridge in bridges if (each := bridge.done())), "")):
            if time.monotonic() > end:
                break
            time.sleep(0.5)
    if missing:
        raise BridgeError(f"{missing}; what stood before is put back when bridge_rollback_seconds "
                          "are over")
    clean()


def clean() -> None:
    """Stop the timer, and forget the files that stood before."""
    host.run("systemctl", "disable", "-q", "--now", f"{ROLLBACK}.timer", check=False)
    for kind in ("timer", "service"):
        (UNITS / f"{ROLLBACK}.{kind}").unlink(missing_ok=True)
    host.run("systemctl", "daemon-reload")
    shutil.rmtree(host.WORK, ignore_errors=True)
    with contextlib.suppress(OSError):  # others may keep something there
        host.WORK.parent.rmdir()
