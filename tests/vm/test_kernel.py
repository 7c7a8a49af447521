# SPDX-License-Identifier: GPL-2.0-or-later
"""The kernel's path manager: its interface, as a stranger would use it, and its own tests."""

import errno
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from detour_tools.lab.daemons import Daemon
from tests.vm.conftest import Vm
from tests.vm.kernel.net import (
    HERE,
    NOBODY,
    PATIENCE,
    REMOTE,
    SERVERS,
    SPEC,
    Net,
    is_debug,
    nat,
)

ROOT = Path(__file__).parents[2]
KUNIT = Path("/sys/kernel/debug/kunit")
# 192.168.0.2:80 for 130.104.230.45:80, attribute by attribute.
IP, PORT, REMOTE_IP, REMOTE_PORT = "1:c0a80002", "2:0050", "3:8268e62d", "4:0050"
NAMED = f"{IP} {PORT} {REMOTE_IP} {REMOTE_PORT}"
IP6, REMOTE_IP6 = (f"{kind}:20010db8000000000000000000000001" for kind in (6, 7))
LO = "5:6c6f"

_nets: dict[int, Net] = {}


@pytest.fixture
def net(vm: Vm) -> Net:
    """The network. The tests share one, as building it takes a while."""
    if id(vm) not in _nets:
        _nets[id(vm)] = Net(vm)
    _nets[id(vm)].reset()
    return _nets[id(vm)]


@pytest.fixture
def server(net: Net) -> Iterator[Daemon]:
    with net.serve() as running:
        yield running


def log(vm: Vm, since: int) -> list[str]:
    """What the kernel said, without its times and prefixes."""
    return [re.sub(r"^\[.*?\] (MPTCP: )?", "", line) for line in vm.dmesg()[since:]]


def listener(net: Net, *then: str, host: str = "c", seconds: int = 60) -> Daemon:
    """The spec client in the background: waits for a request, and does what follows."""
    lines = "\\n".join(("join", f"hear {seconds}", *then))
    command = net.inside(host, ["sh", "-c", f"printf '{lines}\\n' | exec {' '.join(SPEC)}"])
    started = net.vm.start(command)
    started.wait_line("ok", PATIENCE)
    return started


# The interface


def test_the_names_and_numbers_of_the_first_path_manager(net: Net):
    since = len(net.vm.dmesg())
    assert net.spec("family", f"send 2 {NAMED}", "send 2 5:6c6f00", "echo") == [
        "1 0 detour_req", "ok", "ok", "ok"]
    logged = log(net.vm, since)
    assert "detour: detour=192.168.0.2:80 remote=130.104.230.45:80" in logged
    assert "detour: interface=lo" in logged
    assert net.spec("add lo", f"send 3 {NAMED}", f"send 3 {NAMED}", "del lo", "del lo") == [
        "ok", "ok", "ENOENT no such detour", "ok", "ENOENT no such detour"]
    assert net.entries() == 0


def test_a_request_is_heard_and_the_answer_used(net: Net, server: Daemon):
    with listener(net, f"add {nat()}") as client, net.held():
        client.wait_line(f"^req {REMOTE} {SERVERS}$", PATIENCE)
        net.wait_counter("MPJoinSynAckRx", 1)
    assert client.lines == ["ok", f"req {REMOTE} {SERVERS}", "ok"]
    counters = net.counters()
    assert (counters["DetourReqTx"], counters["DetourNatJoin"], counters["DetourVpnJoin"]) == (
        1, 1, 0)


def test_an_interface_is_used_by_connections_that_are_there(net: Net, server: Daemon):
    with net.held(count=3):
        assert net.counters()["DetourReqDrop"] == 3
        net.add("tun0")
        net.wait_counter("MPJoinSynAckRx", 3)
        assert net.counters()["DetourVpnJoin"] == 3
        subflows = net.run("c", "ss", "-Htn", "state", "established", "dport", f"= :{SERVERS}")
        assert len(re.findall(r"10\.0\.3\.1", subflows)) == 3


def test_deleted_detours_are_not_used_and_subflows_live_on(net: Net, server: Daemon):
    net.add(nat(number=0))
    with net.held():
        net.wait_counter("MPJoinSynAckRx", 1)
        net.spec(f"del {nat(number=0)}")
        query = ["ss", "-Htn", "state", "established", "dport", "= :5000"]
        assert net.run("c", *query).count("\n") == 1
    net.wait_closed()
    with net.held():
        assert net.counters()["DetourNatJoin"] == 1


def test_interfaces_are_not_for_connections_within_the_host(net: Net, server: Daemon):
    net.add("tun0")
    with net.start("c", net.programs / "load", "serve", SERVERS, 1) as here:
        here.wait_line("serving", PATIENCE)
        with net.held("127.0.0.1"), net.held("10.0.1.1"), net.held("dead:beef:1::1"):
            net.wait_counter("DetourReqDrop", 3)
            with net.held():
                net.wait_counter("MPJoinSynAckRx", 1)
            assert net.counters()["DetourVpnJoin"] == 1


BOUND = f"""
import socket, time
with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262) as it:
    it.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    it.connect(("{REMOTE}", {SERVERS}))
    it.send(b"x")
    it.recv(1)
    print("ready", flush=True)
    time.sleep(1000)
"""


def test_interfaces_are_not_for_programs_that_chose_another(net: Net, server: Daemon):
    net.add("tun0")
    with net.start("c", *SPEC[:-1], "-c", BOUND) as bound:
        bound.wait_line("ready", PATIENCE)
        net.wait_counter("DetourReqDrop", 1)
        with net.held():
            net.wait_counter("MPJoinSynAckRx", 1)
        assert net.counters()["DetourVpnJoin"] == 1


@pytest.mark.parametrize("how", ["down", "away"])
def test_an_interface_that_comes_later_is_used_once_its_entry_is_renewed(net: Net, server: Daemon,
                                                                         how: str):
    net.add("tun0")
    net.vm.run(["ip", "-n", f"{net.name}-c", "link", "set", "tun0", "down"])
    try:
        if how == "away":
            net.vm.run([HERE / "network", "tunnel-down", net.name])
        with net.held():
            net.wait_counter("DetourReqDrop", 1)
            if how == "down":
                net.vm.run([HERE / "network", "tunnel-down", net.name])
            net.vm.run([HERE / "network", "tunnel-up", net.name])
            net.add("tun0")
            net.wait_counter("MPJoinSynAckRx", 1)
    finally:
        net.vm.run([HERE / "network", "tunnel-up", net.name], status=None)


def test_more_subflows_are_for_connections_that_are_there(net: Net, server: Daemon):
    net.set("detour_subflows=1")
    net.add(nat(number=0))
    with net.held():
        assert net.counters()["DetourReqDrop"] == 0
        net.set("detour_subflows=2")
        net.add(nat(number=1))
        net.wait_counter("MPJoinSynAckRx", 1)


# Who may


def test_users_may_not(net: Net):
    # ... not even in their own user namespace, as the network is not theirs.
    for who in (NOBODY, [*NOBODY, "unshare", "--user", "--map-root-user"]):
        assert net.spec("family", f"add {nat()}", "add lo", f"del {nat()}", "echo", "join",
                        prefix=who) == [
            "1 0 detour_req", *["EPERM"] * 4, "EPERM Operation not permitted"]
    assert net.entries() == 0
    assert net.run("c", *NOBODY, net.programs / "messages", "list") == "0\n"


def test_the_root_of_a_container_may_in_its_network_only(net: Net):
    net.add(nat())
    script = [f"del {nat()}", f"add {nat()}", "add lo", "join", "echo"]
    assert net.spec(*script, prefix=[*NOBODY, "unshare", "--user", "--map-root-user", "--net"]
                    ) == ["ENOENT no such detour", *["ok"] * 4]
    assert net.entries() == 1


def test_namespaces_do_not_meet(net: Net, server: Daemon):
    net.add(nat())
    assert (net.entries("d"), net.spec(f"del {nat()}", host="d")) == (0, ["ENOENT no such detour"])
    with listener(net, seconds=5, host="d") as elsewhere, listener(net) as here:
        with net.held():
            here.wait_line("^req ", PATIENCE)
        assert elsewhere.wait_line("^(req|nothing)", PATIENCE) == "nothing"


SANDBOXED = f"""
import ctypes, socket, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
if "sandboxed" in sys.argv:
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    # linux/landlock.h: handled are LANDLOCK_ACCESS_NET_CONNECT_TCP, none is allowed
    rules = libc.syscall(444, struct.pack("QQ", 0, 1 << 1), 16, 0)
    assert rules >= 0 and libc.syscall(446, rules, 0) == 0, ctypes.get_errno()
with socket.socket() as it:
    print(it.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL), end=" ")
    print(it.connect_ex(("{REMOTE}", {SERVERS})))
"""


def test_rules_for_tcp_hold_for_upgraded_programs(net: Net, server: Daemon):
    if not is_debug(net.vm):
        pytest.skip("this needs a kernel with Landlock: pytest --kernel debug")
    run = ["c", *SPEC[:-1], "-c", SANDBOXED]
    assert net.run(*run, "sandboxed") == f"6 {errno.EACCES}\n"
    net.set("detour_upgrade_tcp=1")
    assert net.run(*run) == "262 0\n"
    assert net.run(*run, "sandboxed") == f"262 {errno.EACCES}\n"


# What is refused


@pytest.mark.parametrize("command", [2, 3])
def test_what_is_wrong_is_refused_and_said(net: Net, command: int):
    with_ip6 = f"{IP6} {PORT} {REMOTE_IP6} {REMOTE_PORT}"
    wrong = {
        "nothing at all": "",
        "no detour": f"{PORT} {REMOTE_IP} {REMOTE_PORT}",
        "no detour's port": f"{IP} {REMOTE_IP} {REMOTE_PORT}",
        "no remote": f"{IP} {PORT} {REMOTE_PORT}",
        "no remote's port": f"{IP} {PORT} {REMOTE_IP}",
        "both ways": f"{NAMED} {LO}",
        "an interface and a port": f"{LO} {PORT}",
        "an interface and an IPv6 address": f"{LO} {IP6}",
        "two families": f"{IP} {PORT} {REMOTE_IP6} {REMOTE_PORT}",
        "two detours": f"{IP6} {NAMED}",
        "two remotes": f"{with_ip6} {REMOTE_IP}",
        "a mapped detour of an IPv6 remote":
            f"6:00000000000000000000ffffc0a80002 {PORT} {REMOTE_IP6} {REMOTE_PORT}",
        "port 0 of the detour": f"{IP} 2:0000 {REMOTE_IP} {REMOTE_PORT}",
        "port 0 of the remote": f"{IP} {PORT} {REMOTE_IP} 4:0000",
        "a multicast detour": f"1:e0000001 {PORT} {REMOTE_IP} {REMOTE_PORT}",
        "a multicast remote": f"{IP} {PORT} 3:efffffff {REMOTE_PORT}",
        "no address": f"1:00000000 {PORT} {REMOTE_IP} {REMOTE_PORT}",
        "broadcast": f"{IP} {PORT} 3:ffffffff {REMOTE_PORT}",
        "an IPv6 multicast detour":
            f"6:ff020000000000000000000000000001 {PORT} {REMOTE_IP6} {REMOTE_PORT}",
        "a link-local remote":
            f"{IP6} {PORT} 7:fe800000000000000000000000000001 {REMOTE_PORT}",
        "a mapped multicast":
            f"6:00000000000000000000ffffe0000001 {PORT} 7:00000000000000000000ffffc0a80002 "
            f"{REMOTE_PORT}",
        "a short address": f"1:c0a800 {PORT} {REMOTE_IP} {REMOTE_PORT}",
        "a long address": f"1:c0a8000200 {PORT} {REMOTE_IP} {REMOTE_PORT}",
        "a long port": f"{IP} 2:00000050 {REMOTE_IP} {REMOTE_PORT}",
        "an empty port": f"{IP} 2: {REMOTE_IP} {REMOTE_PORT}",
        "a short IPv6 address": f"6:2001 {PORT} {REMOTE_IP6} {REMOTE_PORT}",
        "an attribute that there is not": f"{LO} 77:00",
        "attribute 0": f"{LO} 0:00",
        "statistics": f"{LO} 9:",
        "a name that is too long": f"5:{'61' * 16}",
        "a name without end": f"5:{'61' * 300}",
        "an empty name": "5:00",
        "a name of nothing": "5:",
        "a name that no interface has": "5:612f62",
        "the name of a directory": "5:2e2e",
        **({"a lifetime of a byte": f"{LO} 8:01", "a lifetime of years": f"{LO} 8:ffffff7f",
            "a lifetime only": "8:01000000"} if command == 2 else
           {"a lifetime": f"{LO} 8:01000000"}),
    }
    answers = dict(zip(wrong, net.spec(*(f"send {command} {each}" for each in wrong.values())),
                       strict=True))
    bad = {what: answer for what, answer in answers.items()
           if not re.fullmatch(r"(EINVAL|ERANGE) \S.*", answer)}
    assert bad == {}
    assert net.entries() == 0
    # Nothing of this is because all is refused.
    assert net.spec(f"send 2 {NAMED}", f"send 2 {with_ip6}", f"send 2 {LO}") == ["ok"] * 3


def test_unknown_commands_and_interfaces_are_refused(net: Net):
    assert net.spec("add nonesuch", "del nonesuch", f"send 4 {NAMED}", f"send 6 {NAMED}",
                    f"send 7 {NAMED}", "send 0", "send 255") == [
        "ENODEV no such interface", "ENOENT no such detour", *["ENOTSUP"] * 5]


def test_there_are_limits(net: Net):
    full = "ENOSPC too many detours"
    assert net.spec(f"fill 64 {REMOTE} {SERVERS}", f"add {nat()}", f"add {nat(1)}", "add lo",
                    f"del 10.0.0.77 5000 {REMOTE} {SERVERS}", f"add {nat()}",
                    f"add 192.0.2.1 5000 {REMOTE} {SERVERS}") == [
        "64 ok", full, "ok", "ok", "ok", "ok", full]
    net.run("c", net.programs / "messages", "flush")
    # An entry that is there is renewed, nevertheless.
    assert net.spec(f"fill 4097 {REMOTE} 1", f"add {nat()}", "add lo", f"fill 65 {REMOTE} 1",
                    f"del 10.0.0.77 5000 {REMOTE} 1", "add lo", f"add {nat()}") == [
        f"4096 {full}", full, full, "65 ok", "ok", "ok", full]
    assert net.entries() == 4096
    assert net.spec(f"add {nat()}", host="d") == ["ok"]
    net.run("d", net.programs / "messages", "flush")


def test_dead_detours_are_gone_through(net: Net, server: Daemon):
    # No route leads to them: each is refused at once, and the next one is tried.
    net.run("c", "ip", "route", "add", "unreachable", "10.128.0.0/9")
    dead = [f"10.200.0.{number} 5000 {REMOTE} {SERVERS}" for number in range(63)]
    with net.held(), net.held():
        net.add(*dead, nat())
        net.wait_counter("MPJoinSynAckRx", 2)
        counters = net.counters()
        assert counters["MPJoinSynTxConnectErr"] == 2 * 63
        assert counters["DetourNatJoin"] == 2 * 64
    net.run("c", "ip", "route", "del", "unreachable", "10.128.0.0/9")


# The kernel's own tests


@pytest.fixture
def debug(vm: Vm) -> None:
    if not is_debug(vm):
        pytest.skip("this needs a kernel that tests itself: pytest --kernel debug")


@pytest.mark.usefixtures("debug")
@pytest.mark.parametrize("suite", ["mptcp-detour", "mptcp-token", "mptcp-crypto"])
def test_unit_tests_of_the_kernel(vm: Vm, suite: str):
    results = vm.run(["cat", KUNIT / suite / "results"]).stdout
    assert re.search(rf"^ok \d+ {suite}$", results, re.MULTILINE), results
    cases = re.findall(r"^    ok \d+ \S+$", results, re.MULTILINE)
    planned = re.search(r"^    1\.\.(\d+)$", results, re.MULTILINE)
    assert planned is not None
    assert len(cases) == int(planned[1]) > 0
    assert "not ok" not in results
    assert "SKIP" not in results


def test_the_selftest_of_the_series(vm_kernel: Path, tmp_path: Path):
    done = subprocess.run([ROOT / "kernel" / "selftests", "run", "--kernel", vm_kernel,
                           "-o", tmp_path, "detour.sh"], capture_output=True, text=True,
                          check=False, timeout=1800)
    results = (tmp_path / "results.tap").read_text() if done.returncode != 1 else ""
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{results}"
    assert results.count("\nok ") >= 20, results
