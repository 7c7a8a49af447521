# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's own tests of MPTCP: building them, running them in a VM, comparing results.

Results are TAP, one block a program, with comments that say what ran where:

    # kernel: 6.12.117-detour-vm
    # selftests: linux-source-6.12 6.12.117-1~deb12u1, 9 patches
    # program: mptcp_join.sh -f
    TAP version 13
    ...
    # end: status 0, 108 s, log clean
"""

import collections
import hashlib
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from detour_kernel.building import compiler
from detour_kernel.common import KERNEL, Lock, Problem, cache, run_logged, say
from detour_kernel.tree import Tree, read_base, remove, series

sys.path.insert(0, str(KERNEL.parent / "src"))

from detour_tools.errors import UserError
from detour_tools.lab import session, vm
from detour_tools.lab.tools import search_path

UPSTREAM: Final = ("pm_netlink.sh", "diag.sh", "userspace_pm.sh", "mptcp_join.sh")
OURS: Final = "detour.sh"
# What of the host's the programs call; as in scripts/setup.
_TOOLS: Final = {"ethtool": "ethtool", "ip": "iproute2", "iptables": "iptables", "jq": "jq",
                 "nft": "nftables", "rsync": "rsync", "ss": "iproute2", "tc": "iproute2"}
_KEPT: Final = 3  # builds in the cache
_SECONDS_FOR_LOG: Final = 120.0
_SPLAT: Final = re.compile(
    r"WARNING: |\bBUG: |\bOops\b|general protection fault|refcount_t: |suspicious RCU|"
    r"possible (?:circular|recursive|irq)|INFO: (?:task|rcu)|UBSAN: |unregister_netdevice: |"
    r"Kernel panic|kmemleak: \d+ new|blocked for more than")
_RESULT: Final = re.compile(r"^(not ok|ok) \d+ - (?:[\w.-]+: )?(.*?) *(?:# *(.*))?$")


def build() -> tuple[Path, str]:
    """The folder of the programs of the series' tree, from the cache or made; and what it is of."""
    base, patches = read_base(), series()
    origin = f"{base.package} {base.version}, {len(patches)} patches"
    digest = hashlib.sha256("\0".join(
        [base.version, compiler(), *(patch.read_text() for patch in patches)]).encode())
    folder = cache() / "selftests" / digest.hexdigest()[:16]
    if not folder.exists():
        with Lock() as lock:
            if not folder.exists():  # nobody made it while we waited
                tree = Tree(base, lock)
                tree.go_to(tree.commits(patches)[-1])
                _make(tree, folder)
    programs = folder / "net" / "mptcp"
    folder.touch()  # the newest
    return programs, origin


def _make(tree: Tree, folder: Path) -> None:
    objects, log = tree.path / "build-selftests", cache() / "logs" / "selftests.log"
    aside = folder.with_name("new")
    for each in (objects, aside):
        remove(each)
        each.mkdir(parents=True)
    run_logged(["make", f"O={objects.name}", "headers"], what="the kernel's headers", log=log,
               cwd=tree.path)
    run_logged(["make", "-C", "tools/testing/selftests", "TARGETS=net/mptcp", f"O={objects}",
                f"KHDR_INCLUDES=-isystem {objects}/usr/include", f"INSTALL_PATH={aside}",
                "install"],
               what="building the selftests", log=log, cwd=tree.path)
    remove(objects)
    aside.rename(folder)
    old = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for each in old[_KEPT:]:
        remove(each)


def commands(programs: Path, wanted: Iterable[str]) -> list[list[str]]:
    """The commands to run, in words.

    ``mptcp_join.sh`` alone becomes a command for each of its groups, so that results come as it
    goes, and a group that hangs costs no other.
    """
    made = []
    for text in wanted:
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise Problem(f"{text}: {error}") from None
        if not words or "/" in words[0] or not (programs / words[0]).is_file():
            there = " ".join(sorted(path.name for path in programs.glob("*.sh")))
            raise Problem(f"there is no selftest '{text}'; there are {there}")
        if words == ["mptcp_join.sh"]:
            groups = re.findall(r"^\t(\w)@\w+$", (programs / words[0]).read_text(), re.MULTILINE)
            made += [[*words, f"-{group}"] for group in groups]
        else:
            made.append(words)
    return made


@dataclass(frozen=True)
class Options:
    """What to run where; times in seconds, memory in MiB."""

    kernel: Path
    output: Path
    wanted: tuple[str, ...]
    cpus: int
    memory: int
    timeout: float
    accelerate: bool


def run(options: Options) -> tuple[Path, bool]:
    """Run programs in a VM; the file of results, and whether all passed with a clean log."""
    for tool, package in _TOOLS.items():
        if shutil.which(tool, path=search_path()) is None:
            raise Problem(f"{tool} is missing (package {package}): run 'scripts/setup selftests'")
    programs, origin = build()
    commands(programs, options.wanted)  # a wrong one shows before the VM boots
    options.output.mkdir(parents=True, exist_ok=True)
    results = options.output / "results.tap"
    settings = vm.Settings(options.kernel.resolve(), cpus=options.cpus, memory=options.memory,
                           accelerate=options.accelerate)
    good = True
    try:
        with vm.Machine.start(settings) as machine, results.open("w") as file:
            release = machine.run(["uname", "-r"]).stdout.strip()
            ours = machine.run(["test", "-e", "/proc/sys/net/mptcp/detour_subflows"])
            wanted = options.wanted or (*UPSTREAM, *([] if ours.returncode else [OURS]))
            print(f"# kernel: {release}\n# selftests: {origin}", file=file, flush=True)
            machine.run(["dmesg", "--clear"])
            for number, words in enumerate(todo := commands(programs, wanted), 1):
                say(f"{release}: {shlex.join(words)} ({number} of {len(todo)})")
                text = _run_one(machine, programs, words, options)
                print(text, file=file, flush=True)
                ran = next(_blocks(text))
                say(f"{release}: {shlex.join(words)}: {ran.tell()}, {ran.end}")
                good = good and ran.status == 0 and ran.clean and not ran.count("not ok")
    except UserError as error:
        raise Problem(str(error)) from None
    return results, good


def _run_one(machine: vm.Machine, programs: Path, words: list[str], options: Options) -> str:
    """One program's block of results; its output and the kernel's log go to files of their own."""
    name = re.sub(r"[^\w.-]+", "_", "".join(words))[:80]
    output = options.output / f"{name}.log"
    began = time.monotonic()

    def check() -> None:
        if time.monotonic() > began + options.timeout:
            raise TimeoutError

    with output.open("wb", buffering=0) as log:
        try:
            with session.Session(machine.folder, [f"./{words[0]}", *words[1:]], cwd=programs,
                                 on_turn=check) as running:
                end = f"status {running.relay(None, log.write, log.write)}"
        except TimeoutError:
            end = f"ended after {options.timeout:g} s"
    seconds = time.monotonic() - began
    try:
        kernel_log = machine.run(["dmesg", "--read-clear"], timeout=_SECONDS_FOR_LOG).stdout
    except subprocess.TimeoutExpired:
        raise UserError(f"the VM does not answer after {shlex.join(words)}") from None
    (options.output / f"{name}.dmesg").write_text(kernel_log)
    splats = [line for line in kernel_log.splitlines() if _SPLAT.search(line)]
    state = f"{len(splats)} complaints: {splats[0].strip()}" if splats else "clean"
    tap = re.findall(r"^(?:TAP version .*|1\.\.\d+|(?:not )?ok \d+ .*)$",
                     output.read_text(errors="replace"), re.MULTILINE)
    return "\n".join([f"# program: {shlex.join(words)}", *tap,
                      f"# end: {end}, {seconds:.0f} s, log {state}"])


@dataclass
class Ran:
    """What came of one program: its subtests in order, each with ok, skipped, ignored or not ok.

    *Ignored* is a failure of what the selftests themselves mark as flaky.
    """

    program: str
    subtests: list[tuple[str, str]] = field(default_factory=list)
    end: str = "never ended"

    def count(self, what: str) -> int:
        """How many subtests ended so."""
        return sum(result == what for _, result in self.subtests)

    def tell(self) -> str:
        """The counts in words."""
        return ", ".join(f"{self.count(what)} {what}" for what in RESULTS
                         if self.count(what) or what == "ok")

    @property
    def status(self) -> int | None:
        """Its exit status; None when it was ended."""
        found = re.match(r"status (-?\d+),", self.end)
        return int(found[1]) if found else None

    @property
    def seconds(self) -> int:
        """How long it took."""
        found = re.search(r", (\d+) s, log", self.end)
        return int(found[1]) if found else 0

    @property
    def clean(self) -> bool:
        """Whether the kernel's log had no complaint."""
        return self.end.endswith(", log clean")


RESULTS: Final = ("ok", "skipped", "ignored", "not ok")


def _blocks(text: str) -> Iterator[Ran]:
    ran: Ran | None = None
    seen: collections.Counter[str] = collections.Counter()
    for line in text.splitlines():
        key, _, value = line.partition(": ")
        if key == "# program":
            if ran is not None:
                yield ran
            ran = Ran(value)
            seen.clear()
        elif ran is not None and key == "# end":
            ran.end = value
        elif ran is not None and (found := _RESULT.match(line)):
            result, name, more = found[1], found[2].strip(), found[3] or ""
            seen[name] += 1
            if seen[name] > 1:
                name += f" #{seen[name]}"
            if more.startswith("SKIP"):
                result = "skipped"
            elif more.startswith("IGNORE"):
                result = "ignored"
            ran.subtests.append((name, result))
    if ran is not None:
        yield ran


class Side:
    """All results of one kernel: a first run, and reruns of some of it."""

    def __init__(self, files: list[Path]) -> None:
        self.kernel = ""
        # By program, mptcp_join.sh's groups together.
        self.first: dict[str, list[Ran]] = {}
        self.all: dict[str, list[Ran]] = {}
        self.results: dict[tuple[str, str], list[str]] = {}
        commands_seen: set[str] = set()
        for path in files:
            try:
                text = path.read_text()
            except OSError as error:
                raise Problem(f"{path}: {error.strerror}") from None
            kernel = re.search(r"^# kernel: (.*)$", text, re.MULTILINE)
            if kernel is None:
                raise Problem(f"{path} is not a file of results that 'kernel/selftests run' made")
            if self.kernel and kernel[1] != self.kernel:
                raise Problem(f"{path} is of {kernel[1]}, and {files[0]} of {self.kernel}")
            self.kernel = kernel[1]
            for ran in _blocks(text):
                program = ran.program.split()[0]
                self.all.setdefault(program, []).append(ran)
                # A rerun names what ran before, or single subtests of it.
                known = {key[1] for key in self.results if key[0] == program}
                if ran.program not in commands_seen and not known & {n for n, _ in ran.subtests}:
                    self.first.setdefault(program, []).append(ran)
                commands_seen.add(ran.program)
                for name, result in ran.subtests:
                    self.results.setdefault((program, name), []).append(result)

    def cell(self, program: str) -> str:
        """A program's counts: ok / skipped / ignored / not ok."""
        runs = self.first.get(program, [])
        if not runs:
            return "not run"
        text = " / ".join(str(sum(ran.count(what) for ran in runs)) for what in RESULTS)
        ended = [ran.program for ran in runs if ran.status is None]
        return text + (f" ({', '.join(ended)} ended early)" if ended else "")

    def unfinished(self, program: str) -> bool:
        """Whether a command of the program was ended early each time."""
        runs = self.all[program]
        return bool({ran.program for ran in runs} -
                    {ran.program for ran in runs if ran.status is not None})

    def minutes(self, program: str) -> str:
        """How long it took."""
        seconds = sum(ran.seconds for ran in self.first.get(program, []))
        return f"{seconds // 60}:{seconds % 60:02d}"

    def log(self, program: str) -> str:
        """Whether the kernel complained, in any run."""
        runs = self.all.get(program, [])
        bad = [ran for ran in runs if not ran.clean]
        return "-" if not runs else f"{len(bad)} with complaints" if bad else "clean"


def compare(files: list[Path], others: list[Path]) -> tuple[str, bool]:
    """A Markdown table of both sides and of subtests that differ, and whether they are the same.

    They are not where a program was ended early, or the kernel complained on one side only.
    A subtest whose results differ from run to run on one and the same kernel, and that had the
    same result on both at least once, is flaky and not a difference; it is listed all the same.
    """
    one, two = Side(files), Side(others)
    programs = list(dict.fromkeys([*one.first, *two.first]))
    both = [name for name in programs if name in one.first and name in two.first]
    lines = [f"| program | subtests | {one.kernel} | {two.kernel} | minutes | kernel log |",
             "|---|---:|---:|---:|---:|---|"]
    for program in programs:
        names = {key[1] for side in (one, two) for key in side.results if key[0] == program}
        lines.append(f"| `{program}` | {len(names)} | {one.cell(program)} | {two.cell(program)} | "
                     f"{one.minutes(program)}, {two.minutes(program)} | "
                     f"{one.log(program)}, {two.log(program)} |")
    lines += ["", f"Counts are {' / '.join(RESULTS)} in the first run; *ignored* is a failure of "
              "what upstream marks as flaky.", ""]
    differing = sum(one.unfinished(name) or two.unfinished(name) or one.log(name) != two.log(name)
                    for name in both)
    # What one side alone ran is named by its command, and not subtest by subtest.
    alone: set[tuple[str, str]] = set()
    for side, other in ((one, two), (two, one)):
        only = []
        for program in both:
            for ran in side.all[program]:
                keys = {(program, name) for name, _ in ran.subtests}
                if keys and not keys & other.results.keys():
                    alone |= keys
                    only.append(f"`{ran.program}`")
        if only:
            differing += 1
            lines += [f"Not run on {other.kernel}: {', '.join(only)}.", ""]
    rows = []
    for key in dict.fromkeys([*one.results, *two.results]):
        if key[0] not in both or key in alone:
            continue
        left, right = one.results.get(key, ["not run"]), two.results.get(key, ["not run"])
        if len({*left, *right}) == 1:
            continue
        flaky = (len(set(left)) > 1 or len(set(right)) > 1) and bool({*left} & {*right})
        differing += not flaky
        rows.append(f"| `{key[0]}` {key[1]} | {', '.join(left)} | {', '.join(right)} | "
                    f"{'flaky' if flaky else '**differs**'} |")
    if rows:
        lines += [f"| subtest | {one.kernel} | {two.kernel} | |", "|---|---|---|---|", *rows]
    else:
        lines.append("No subtest differs.")
    return "\n".join(lines), not differing
