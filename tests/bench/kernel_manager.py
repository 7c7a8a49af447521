# SPDX-License-Identifier: GPL-2.0-or-later
"""(f) The kernel's path manager against the userspace one, in a VM with the kernel we built.

Uploads on the reference lab, shaped, with delay; and on one with four detours. Then, on an
unshaped lab in the VM (kernel_guest.py): how soon each joins, from a capture at the client, and
what processor time connections take with each.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from detour_tools.errors import UserError
from detour_tools.lab import vm
from detour_tools.lab.network import environment
from detour_tools.lab.topology import Topology, reference_topology
from detour_tools.lab.vmlab import VmHost
from tests.bench.figures import Figure, quantile
from tests.bench.kernel_guest import MANAGERS
from tests.bench.kernel_uploads import CORE_LIMITED, Uploads

NAME = "f"
TITLE = "the kernel's path manager against the userspace one, in a VM"

_MEMORY = 1536
_RATES_MBPS = (10, 4, 2)
# So that an emulated processor keeps up with five paths.
_FIVE_PATHS_MBPS = 4
_TARGET_SHARE = 0.95


def run(say: Callable[[str], None], *, quick: bool, load: Path) -> Iterator[Figure]:
    try:
        settings = vm.Settings(_kernel(), memory=_MEMORY)
        vm.check(settings)
    except UserError as error:
        say(f"left out, 'make kernel' and 'scripts/setup vm' make it possible: {error.message}")
        return
    with vm.Machine.start(settings) as machine:
        release = machine.run(["uname", "-r"]).stdout.strip()
        say(f"Linux {release}, {'KVM' if vm.kvm_works() else 'emulated by QEMU'}")
        yield from _uploads(say, machine, rounds=1 if quick else 2)
        yield from _five_paths(say, machine)
        yield from _joins_and_time(say, machine, load, quick=quick)


def _kernel() -> Path:
    """The image: as for the tests in the VM."""
    name = os.environ.get("DETOUR_TEST_KERNEL", "vm")
    return Path(name) if "/" in name else vm.default_kernel(name)


# -- uploads -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _lab(machine: vm.Machine, topology: Topology, *options: object) -> Iterator[Uploads]:
    """A shaped lab in the VM, ready for uploads."""
    name = "bench"
    done = machine.run(["detour-lab", "--name", name, "up", *options], env=environment())
    if done.returncode:
        raise UserError("the lab could not be built in the VM", done.stderr.strip())
    try:
        with Uploads(lambda host: VmHost(host, machine.folder, topology.address(host),
                                         f"{name}-{host}"), topology) as uploads:
            yield uploads
    finally:
        machine.run(["detour-lab", "--name", name, "down"], env=environment())


def _uploads(say: Callable[[str], None], machine: vm.Machine, rounds: int) -> Iterator[Figure]:
    """On slower links, too, where an emulated processor is too slow for both path managers."""
    for rate in _RATES_MBPS:
        rates = [word for link, share in CORE_LIMITED.items()
                 for word in ("--rate", f"{link}={share * rate}")]
        load_before = os.getloadavg()
        plain: list[list[float]] = []
        multipath: dict[str, list[float]] = {manager: [] for manager in MANAGERS}
        with _lab(machine, reference_topology(), *rates) as uploads:
            for _ in range(rounds):
                plain.append([each.mbps for each in uploads.plain()])
                for manager in MANAGERS:
                    multipath[manager].append(uploads.multipath(manager).mbps)
                say(f"upload, Mbit/s: TCP {plain[-1][0]:.2f} + {plain[-1][1]:.2f}; " + ", ".join(
                    f"{manager} {found[-1]:.2f}" for manager, found in multipath.items()))
        sums = [sum(each) for each in plain]
        shares = {manager: statistics.median(a / b for a, b in zip(found, sums, strict=True))
                  for manager, found in multipath.items()}
        too_slow = max(shares.values()) < _TARGET_SHARE and rate != _RATES_MBPS[-1]
        for manager, found in multipath.items():
            yield Figure(
                bench=NAME, name=f"upload on two paths of {rate} Mbit/s, {manager}",
                value=statistics.median(found), unit="Mbit/s", baseline=statistics.median(sums),
                baseline_name="TCP on both", ratio=shares[manager],
                target="" if too_slow else f">= {_TARGET_SHARE} x",
                met=None if too_slow else shares[manager] >= _TARGET_SHARE,
                details={"tcp": plain, "mbps": found, "load_average_before": load_before})
        if not too_slow:
            return


def _five_paths(say: Callable[[str], None], machine: vm.Machine) -> Iterator[Figure]:
    topology = reference_topology(detours=4)
    core = (topology.path("client", topology.address(name))[1]
            for name in ("server", *topology.detours()))
    rates = [word for link in core for word in ("--rate", f"{link}={_FIVE_PATHS_MBPS}")]
    with _lab(machine, topology, "--detours", 4, *rates) as uploads:
        plain = [each.mbps for each in uploads.plain()]
        for manager in MANAGERS:
            found = uploads.multipath(manager)
            carried = found.bytes_by_link
            # What else than the upload goes over a path is far less than a tenth of it.
            used = sum(count > found.mbps * 1e6 / 8 for count in carried.values())
            say(f"upload on five paths, Mbit/s: TCP {sum(plain):.2f} in all, {manager} "
                f"{found.mbps:.2f} on {used}")
            yield Figure(
                bench=NAME, name=f"upload on five paths of {_FIVE_PATHS_MBPS} Mbit/s, {manager}",
                value=found.mbps, unit="Mbit/s", baseline=sum(plain),
                baseline_name="TCP on all", ratio=found.mbps / sum(plain), target="5 paths used",
                met=used == 5, details={"tcp": plain, "bytes_by_link": carried})


# -- joins and processor time ------------------------------------------------------------------


def _joins_and_time(say: Callable[[str], None], machine: vm.Machine, load: Path,
                    *, quick: bool) -> Iterator[Figure]:
    load_before = os.getloadavg()
    options = ["--rounds", 1, "--joins", 20, "--seconds", 4] if quick else []
    found = _in_vm(say, machine, load, options)
    yield from _delays(found["delays"], found["opened"], load_before)
    yield from _times(found["loads"])


def _in_vm(say: Callable[[str], None], machine: vm.Machine, load: Path,
           options: list[object]) -> dict[str, Any]:
    """Run the part that is in the VM; what it found."""
    host = VmHost("vm", machine.folder, reference_topology().address("client"))
    last = ""
    with host.popen([sys.executable, "-m", "tests.bench.kernel_guest", load, *options],
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = line
            if not line.startswith("{"):
                say(line.rstrip())
    if process.returncode:
        raise UserError("the measurement in the VM failed", last.strip())
    result: dict[str, Any] = json.loads(last)
    return result


def _delays(delays: dict[str, dict[str, list[float]]], opened: int,
            load_before: tuple[float, float, float]) -> Iterator[Figure]:
    for kind in ("present", "absent"):
        for share, told in ((0.5, ""), (0.9, ", 90 % below")):
            ours, theirs = (quantile(delays[manager][kind], share) * 1e3
                            for manager in ("kernel", "userspace"))
            yield Figure(
                bench=NAME, name=f"ESTABLISHED to join, entry {kind}{told}", value=ours,
                unit="ms", baseline=theirs, baseline_name="userspace", ratio=ours / theirs,
                details={"connections": opened, "load_average_before": load_before,
                         **{manager: {"joins": len(delays[manager][kind]),
                                      "p10_ms": quantile(delays[manager][kind], 0.1) * 1e3,
                                      "p99_ms": quantile(delays[manager][kind], 0.99) * 1e3}
                            for manager in MANAGERS}})


def _times(loads: dict[str, list[dict[str, float]]]) -> Iterator[Figure]:
    def each(manager: str, what: str) -> list[float]:
        """Seconds per 1,000 connections, a round each."""
        return [load[what] / load["opened"] * 1000 for load in loads[manager]]

    none = each("none", "busy")
    for name, what, less in (
            ("processor time of the daemon per 1,000 connections", "daemon", False),
            ("of all programs and the kernel", "busy", False),
            ("the same, beyond what they take without detours", "busy", True)):
        ours, theirs = (statistics.median(
            value - (bare if less else 0)
            for value, bare in zip(each(manager, what), none, strict=True))
            for manager in ("kernel", "userspace"))
        yield Figure(
            bench=NAME, name=name, value=ours, unit="s", baseline=theirs,
            baseline_name="userspace", ratio=ours / theirs, details={"rounds": loads})
