# SPDX-License-Identifier: GPL-2.0-or-later
"""A million random and mutated datagrams."""

import re
import sys
import time
from pathlib import Path

import pytest

from detour_tools import control
from detour_tools.endpoint import parse_endpoint
from detour_tools.errors import UserError
from detour_tools.lab import namespaces
from tests.netns import asking
from tests.netns.asking import Asker, kernel_mappings

SENDERS = 2
DATAGRAMS = 1_000_000
# So many in so long it takes on the busiest machine.
SOME = 1000
STUCK_SECONDS = 60
ROOT = Path(__file__).parents[2]


def resident_kib(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1])


@pytest.mark.parametrize("backend", ["nftables"])  # none of it gets as far as a back end
def test_a_million_bad_datagrams(lab, start_server, start, backend):
    detour, client = lab.host("detour"), lab.host("client")
    server = start_server(detour, "--backend", backend, "--rate", "0")
    asker = Asker(client, detour.address)
    served = set()
    answered_after = []

    def received() -> int:
        with namespaces.inside(detour.namespace):
            counts = control.call("detour-server", "status")["requests"]
        return counts["received"] + counts["lost"]

    def flood(count: int, seed: int, *pace: int) -> None:
        """Until so many more came to the server; asking it all the time."""
        last = received()
        until = last + count
        senders = [start(client, [sys.executable, "-m", "tests.netns.flood", detour.address,
                                  seed + number, *pace]) for number in range(SENDERS)]
        stuck_at = time.monotonic() + STUCK_SECONDS
        while (now := received()) < until:
            assert [sender.process.poll() for sender in senders] == [None] * SENDERS
            if now > last + SOME:
                last, stuck_at = now, time.monotonic() + STUCK_SECONDS
            assert time.monotonic() < stuck_at, "the server takes no datagrams"
            remote = parse_endpoint(f"130.104.230.45:{1000 + len(served)}")
            began = time.monotonic()
            served.add(("10.0.1.1", asker.ask(remote, 0, tries=60), str(remote)))
            answered_after.append(time.monotonic() - began)
            time.sleep(0.02)
        for sender in senders:
            sender.stop()

    # More than it can take: the kernel drops most, and still there are answers.
    flood(DATAGRAMS // 10, 1)
    answered_after.clear()
    before = resident_kib(server.process.pid)
    # As fast as it takes them, so that it sees all of them, whatever else the machine does.
    flood(DATAGRAMS, 11, server.process.pid)
    grown = resident_kib(server.process.pid) - before
    asker.ask("130.104.230.45:65535", 65535)
    served.add(("10.0.1.1", 65535, "130.104.230.45:65535"))

    found = asking.status(detour)
    requests = found["requests"]
    assert set(kernel_mappings(detour, backend)) == served
    assert found["mappings"] == len(served) > 3  # each takes up to a second on a busy machine
    assert requests["malformed"] + requests["lost"] > requests["received"] / 4
    assert requests["malformed"] < requests["lost"], "they are dropped unread"
    assert requests["refused"] > requests["received"] / 4
    assert {"private", "loopback", "multicast", "reserved"} <= set(found["refused"])
    # Room for the well-behaved client's own mappings, and for nothing a datagram.
    assert grown < 4096, f"{grown} KiB for a million datagrams"
    assert max(answered_after) < 5.0
    assert "Traceback" not in server.output
    assert len(server.lines) < len(served) + 1000, "bad datagrams are logged at a bounded rate"


def test_addresses_that_cannot_be_listed_do_not_stop_the_server(lab, start):
    code = ("from detour_tools.server import upkeep\n"
            "def fail(): raise OSError(105, 'No buffer space available')\n"
            "upkeep.interface_addresses = fail; upkeep._CHECK_SECONDS = 0.05\n"
            "from detour_tools.cli.server import main; main()")
    server = start(lab.host("detour"), [sys.executable, "-c", code])
    server.wait_line("serving")
    with pytest.raises(UserError, match="within 1 s"):
        server.wait_line("Traceback", 1.0)
    assert server.stop() == 0
