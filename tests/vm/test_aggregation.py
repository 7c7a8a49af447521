# SPDX-License-Identifier: GPL-2.0-or-later
"""Uploads on shaped links in the VM: the kernel's path manager adds the paths up."""

import pytest

from detour_tools.lab.topology import reference_topology
from tests.bench.kernel_uploads import CORE_LIMITED, Uploads
from tests.vm.conftest import MakeVmLab

# What the demo claims of the userspace path manager.
WANTED_SHARE = 0.95
# Bytes: far more than goes over a path that an upload does not use, and what also a busy machine
# gets through.
USED = 1 << 19


def test_an_upload_has_the_sum_of_both_paths(vm_lab: MakeVmLab):
    """Where not even the userspace path manager has it, the links are too fast for the machine.

    Then slower ones are tried. Where it has, the kernel's gets a second chance and no third.
    """
    told = []
    for rate in (10, 4, 2):
        lab = vm_lab(*(word for link, share in CORE_LIMITED.items()
                       for word in ("--rate", f"{link}={share * rate}")))
        with Uploads(lab.host, reference_topology()) as uploads:
            for _ in range(2):
                plain = [each.mbps for each in uploads.plain()]
                by = {manager: uploads.multipath(manager) for manager in ("userspace", "kernel")}
                shares = {manager: each.mbps / sum(plain) for manager, each in by.items()}
                told.append((rate, plain, by, shares))
                print(told[-1])
                # By far the slower path still matters to the sum.
                assert min(plain) > 0.25 * sum(plain), told
                assert min(by["kernel"].bytes_by_link.values()) > USED, told
                if shares["kernel"] >= WANTED_SHARE:
                    return
                if shares["userspace"] < WANTED_SHARE:
                    break
            else:
                break
    pytest.fail(f"{told}")


def test_an_upload_uses_five_paths(vm_lab: MakeVmLab):
    # Slow links, so that an emulated processor keeps up with five.
    topology = reference_topology(detours=4)
    core = [topology.path("client", topology.address(name))[1]
            for name in ("server", *topology.detours())]
    lab = vm_lab("--detours", 4, *(word for link in core for word in ("--rate", f"{link}=4")))
    with Uploads(lab.host, topology) as uploads:
        sent = uploads.multipath("kernel")
    carried = sent.bytes_by_link
    assert len(carried) == 5
    assert min(carried.values()) > USED, sent
