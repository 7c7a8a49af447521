# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's path manager under load, out of memory, and with everything going away meanwhile.

Meant for the debug kernel (``--kernel debug --vm-memory 3072``): the fixture ``vm`` fails a test
when that finds anything wrong. On another kernel the same load is run without these eyes.
"""

import re
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from detour_tools.lab.daemons import wait_for
from tests.vm.conftest import Vm
from tests.vm.kernel.net import (
    DETOUR,
    HERE,
    PATIENCE,
    REMOTE,
    SERVERS,
    Net,
    build,
    is_debug,
    nat,
)

# Of what a connection, an entry or a namespace is made; each in a slab of its own.
SLABS = ("MPTCP", "MPTCPv6", "TCP", "TCPv6", "net_namespace")
FAILSLAB = "/sys/kernel/debug/failslab"
SECONDS = 20

Census = dict[str, int]
Answers = dict[str, dict[str, int]]


def count(vm: Vm) -> Census:
    """How much there is of everything in the whole kernel, namespaces that are going included."""
    # A namespace is freed only when the next one goes: let one go.
    lines = vm.run(f"unshare -n true; cd /sys/kernel/slab; for slab in {' '.join(SLABS)}; do "
                   "echo 1 >$slab/shrink; echo $slab $(cat $slab/objects); done").stdout
    return {name: int(number) for name, number, *_ in map(str.split, lines.splitlines())}


def census(vm: Vm) -> Census:
    """The same, once it does not change."""
    before, now = None, count(vm)
    while before != now:
        time.sleep(1)
        before, now = now, count(vm)
    return now


def wait_gone(vm: Vm, before: Census, timeout: float = 120) -> None:
    """Wait until there is no more of anything than before."""
    deadline = time.monotonic() + timeout
    while any(number > before[name] for name, number in count(vm).items()):
        assert time.monotonic() < deadline, f"before: {before}, left: {count(vm)}"
        time.sleep(0.5)


def answers(text: str) -> Answers:
    """``NAME COUNT=NUMBER...`` a line."""
    return {words[0]: {name: int(number) for name, number in map(pair, words[1:])}
            for words in map(str.split, text.splitlines())}


def pair(word: str) -> list[str]:
    return word.split("=")


@pytest.fixture
def net(vm: Vm) -> Iterator[Net]:
    """The network; all of it, and all that was done on it, is gone afterwards."""
    build(vm)
    before = census(vm)
    made = Net(vm)
    yield made
    made.down()
    wait_gone(vm, before)


LOADS = ("made", "close", "reset", "again", "shut-write", "unread", "shut-both", "early")
CHURNS = ("add.OK", "add.ENODEV", "del.OK", "del.ENOENT", "stat.OK", "stat.ENOENT", "get.OK")
COUNTERS = ("DetourReqTx", "DetourNatJoin", "DetourVpnJoin", "DetourExpired", "MPJoinSynAckRx",
            "MPFastcloseTx")
ROUNDS = 6


def storm(net: Net, *what: str, seed: int = 1, wanted: Census | None = None
          ) -> dict[str, Counter[str]]:
    """Everything at once, see the script, until it has brought about what it is for.

    That is also how much the counters ``wanted`` must grow at least.
    """
    done: dict[str, Counter[str]] = {}
    for number in range(ROUNDS):
        ended = net.vm.run([HERE / "storm", net.name, SECONDS, seed + 100 * number, net.programs,
                            *what], timeout=SECONDS + 300)
        for program, counts in answers(ended.stdout).items():
            done.setdefault(program, Counter()).update(counts)
        counters = net.counters()
        lacking = missing(done, counters, dict.fromkeys(COUNTERS, 5) | (wanted or {}))
        print(number, done, {name: value for name, value in counters.items() if "Detour" in name or
                             "Join" in name}, ended.stderr)
        if not lacking:
            return done
    raise AssertionError(f"not seen in {ROUNDS} rounds: {lacking}")


def missing(done: dict[str, Counter[str]], counters: Census, wanted: Census) -> list[str]:
    """What has not happened yet."""
    lacking = [each for each in LOADS if not done["load1"][each] + done["load2"][each]]
    lacking += [f"{churn} {each}" for churn in ("churn1", "churn2") for each in CHURNS
                if not done[churn][each]]
    lacking += [name for name, least in wanted.items() if counters[name] < least]
    if not done["listen"]["heard"] or done["listen"]["joins"] <= 3:
        lacking.append("listeners")
    # Some failed: refused, silent, without a route.
    if counters["DetourNatJoin"] + counters["DetourVpnJoin"] <= counters["MPJoinSynAckRx"]:
        lacking.append("joins that fail")
    return lacking


def still_works(net: Net) -> None:
    """A connection with a detour, with data through it."""
    net.run("c", net.programs / "messages", "flush")
    assert net.entries() == 0
    net.set("pm_type=2", "detour_subflows=2", "detour_upgrade_tcp=0")
    with net.serve():
        before = net.counters()["MPJoinSynAckRx"]
        net.add(nat(port=3))
        with net.held(port=SERVERS + 3):
            net.wait_counter("MPJoinSynAckRx", before + 1)
            statistics = net.run("c", "ss", "-Htn", "state", "established", "dport = :5012")
            assert statistics.count("\n") == 1
        sent = net.run("c", net.programs / "load", "once", REMOTE, SERVERS + 3, 500_000)
        assert sent == "equal\n"


# Connections and entries come and go


def test_connections_under_changing_entries(net: Net):
    storm(net)
    still_works(net)


def test_connections_lose_subflows_servers_and_interfaces(net: Net):
    storm(net, "server", "subflows", "tunnel", "sysctls", seed=3)
    still_works(net)


def test_servers_and_clients_with_the_same_path_manager(net: Net):
    net.run("s", "sysctl", "-q", "net.mptcp.pm_type=2", "net.mptcp.detour_upgrade_tcp=1")
    storm(net, "server", seed=5)
    still_works(net)


def test_namespaces_go_with_all_in_them(vm: Vm):
    programs = build(vm)
    before = census(vm)
    graves = vm.run([HERE / "graves", "grave", 6, programs], timeout=300).stdout
    assert graves.count("grave") == 6
    for name in ("MPJoinAckRx", "DetourReqTx"):
        assert all(int(number) for number in re.findall(rf"{name}=(\d+)", graves)), graves
    wait_gone(vm, before)


def test_the_daemon_is_killed_again_and_again(net: Net):
    load = [net.programs / "load", "churn", 1000, 11, SERVERS, 4, REMOTE]
    with net.serve(), net.start("d", "detour-server", "--allow-remote", "10.0.0.0/8") as nat_daemon:
        nat_daemon.wait_line("serving on", PATIENCE)
        with net.start("c", *load):
            for number in range(3):
                with net.start("c", "detour-client", "daemon", DETOUR) as daemon:
                    daemon.wait_line("ready with the kernel", PATIENCE)
                    time.sleep(number)  # after a while, each time another one
                    net.vm.run(["pkill", "-KILL", "-f", "bin/detour-client daemon"])
                    daemon.process.wait()
        with net.start("c", "detour-client", "daemon", DETOUR) as daemon:
            daemon.wait_line("ready with the kernel", PATIENCE)
            before = net.counters()["MPJoinSynAckRx"]
            assert before > 0
            with net.held(count=2):
                net.wait_counter("MPJoinSynAckRx", before + 2)
            assert daemon.stop() == 0
    assert net.entries() == 0
    still_works(net)


# Messages


def test_random_messages(net: Net):
    net.set("detour_subflows=8")
    with net.serve(), net.held(count=3):
        scripts = [net.start("c", net.programs / "messages", "fuzz", 50_000, seed)
                   for seed in (7, 8)]
        for script in scripts:
            assert script.process.wait(300) == 0
            script.stop()
            done = answers(f"fuzz {script.lines[-1]}")["fuzz"]
            print(done)
            # Many were right, and many wrong in a way that was noticed.
            assert done["add.OK"] > 300
            assert done["del.OK"] > 30
            assert done["stat.OK"] > 30
            assert sum(number for name, number in done.items() if "EINVAL" in name) > 5000
        assert net.counters()["DetourNatJoin"] > 0
    still_works(net)


# Out of memory


@pytest.fixture
def failslab(vm: Vm) -> Iterator[None]:
    """Allocations can fail, in those who ask for it."""
    if not is_debug(vm):
        pytest.skip("this needs a kernel whose allocations can fail: pytest --kernel debug")
    vm.run(f"cd {FAILSLAB}; echo Y >task-filter; echo N >ignore-gfp-wait; echo 0 >verbose; "
           "echo -1 >times; echo 1 >interval; echo 0 >space")
    yield
    vm.run(f"echo 0 >{FAILSLAB}/probability")


def end_stuck(net: Net) -> None:
    """End what would never end: without memory for a FIN, TCP waits without a timer for its answer.

    Plain TCP, too, see tcp_send_fin().
    """
    for host in "cs":
        wait_for(lambda host=host: "timer:(" not in net.run(host, "ss", "-Hton"), PATIENCE,
                 "connections that have a timer to be gone")
        net.run(host, "ss", "-KHtn", "state", "fin-wait-1", "state", "last-ack")


@pytest.mark.usefixtures("failslab")
def test_each_allocation_fails(net: Net):
    entries = net.vm.results / "entries"
    entries.write_text("nat 10.0.1.2 5000 10.0.2.1 8000\nvpn tun0\n")
    # fail-nth works with a probability of 0, too.
    done = answers("nth " + net.run("c", net.programs / "messages", "nth", 40, entries))["nth"]
    print(done)
    for command in ("add", "del", "stat"):
        assert done[f"{command}.ENOMEM"] + done.get(f"{command}.ENOBUFS", 0) > 1, done
        assert done[f"{command}.OK"] > 1, done
    assert done["no-namespaces"] > 5, done
    still_works(net)


@pytest.mark.usefixtures("failslab")
def test_allocations_fail_at_random(net: Net):
    net.vm.run(f"echo 3 >{FAILSLAB}/probability")
    try:
        done = storm(net, "fail", "tunnel", seed=9,
                     wanted={"DetourReqDrop": 1, "MPJoinSynTxCreatSkErr": 1})
    finally:
        net.vm.run(f"echo 0 >{FAILSLAB}/probability")
        end_stuck(net)
    assert done["churn1"]["add.ENOMEM"] + done["churn2"]["add.ENOMEM"] > 3
    still_works(net)


# At last


def test_nothing_has_leaked(vm: Vm):
    if not is_debug(vm):
        pytest.skip("this needs a kernel that looks for leaks: pytest --kernel debug")
    leaks = "/sys/kernel/debug/kmemleak"
    vm.run(f"echo scan >{leaks}; sleep 6; echo scan >{leaks}", timeout=400)
    found = vm.run(["cat", leaks]).stdout
    assert not found, found
