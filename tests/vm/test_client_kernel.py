# SPDX-License-Identifier: GPL-2.0-or-later
"""detour-client on the kernel's detour path manager, in a VM with that kernel."""

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from detour_tools.lab.daemons import Daemon, wait_for
from detour_tools.lab.network import Host
from detour_tools.lab.topology import reference_topology
from tests.vm.conftest import GuestLab, Vm

SERVER = "10.0.3.2"
REMOTE = "10.0.3.2:5001"
PORT = 5001
WEB = 8080
SYSCTLS = ("net.mptcp.pm_type", "net.mptcp.detour_subflows", "net.mptcp.detour_upgrade_tcp")
UNTOUCHED = ["0", "2", "0"]
STRANGER = ("192.0.2.1:5001", REMOTE)  # an entry for no detour of ours
# Python takes a second or two to start in a VM without acceleration.
PATIENCE = 120.0

Start = Callable[..., Daemon]
Hold = Callable[..., None]

_labs: dict[int, GuestLab] = {}


def program(name: str, *arguments: object) -> list[object]:
    return [sys.executable, "-m", "tests.netns.programs", name, *arguments]


def status(host: Host) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(host.run(["detour-client", "status", "--json"]).stdout)
    return found


def subflows(host: Host) -> list[list[str]]:
    """Where the subflows of the connections to the server go, a sorted list each."""
    return [sorted(subflow["via"] or "direct" for subflow in connection["subflows"]
                   if subflow["state"] == "established")
            for connection in status(host)["connections"]]


def by_hand(host: Host, *arguments: object, check: bool = True
            ) -> "subprocess.CompletedProcess[str]":
    """``detour-client netlink``."""
    return host.run(["detour-client", "netlink", *arguments], check=check)


def named(detour: str, remote: str | None) -> list[str]:
    return ["--detour", detour, "--remote", remote] if remote else ["--interface", detour]


def listed(host: Host) -> dict[tuple[str, str | None], int | None]:
    """The kernel's entries: what is left of the lifetime, by (detour, remote)."""
    found = json.loads(by_hand(host, "list", "--json").stdout)["entries"]
    return {(each["detour"] or each["interface"], each["remote"]): each["lifetime_s"]
            for each in found}


def sysctls(host: Host) -> list[str]:
    return host.run(["sysctl", "-n", *SYSCTLS]).stdout.split()


def counter(host: Host, name: str) -> int:
    """A counter of the kernel's MPTCP code."""
    names, values = (line.split() for line in host.run(["cat", "/proc/net/netstat"]).stdout
                     .splitlines() if line.startswith("MPTcpExt:"))
    return int(values[names.index(name)])


def kill(host: Host, daemon: Daemon) -> None:
    """SIGKILL the daemon itself, in the VM."""
    host.run(["pkill", "-KILL", "-f", "bin/detour-client daemon"])
    daemon.process.wait()


def until(condition: Callable[[], object], what: str = "") -> None:
    wait_for(condition, PATIENCE, what)


@pytest.fixture
def lab(vm: Vm) -> Iterator[GuestLab]:
    """The reference network with two detours, in the VM; nobody uses it, and no entry is there.

    The tests share one, as building it takes a minute.
    """
    if id(vm) not in _labs:
        _labs.clear()
        vm.run(["detour-lab", "--name", "kernelpm", "up", "--detours", 2], timeout=600)
        _labs[id(vm)] = GuestLab(vm, "kernelpm", reference_topology(detours=2))
    made = _labs[id(vm)]
    client = made.host("client")
    yield made
    for detour, remote in listed(client):
        by_hand(client, "del", *named(detour, remote))
    assert sysctls(client) == UNTOUCHED


@pytest.fixture
def start() -> Iterator[Start]:
    """Run a program in the background: ``start(host, command, "a line to wait for")``."""
    with contextlib.ExitStack() as stack:
        def run(host: Host, command: list[object], ready: str) -> Daemon:
            daemon = stack.enter_context(Daemon(host, command))
            daemon.wait_line(ready, PATIENCE)
            return daemon
        yield run


@pytest.fixture
def start_server(start: Start) -> Start:
    """Run ``detour-server``: ``start_server(lab.host("detour"))``."""
    def run(host: Host) -> Daemon:
        return start(host, ["detour-server", "--allow-remote", "10.0.0.0/8"], "serving on")
    return run


@pytest.fixture
def start_client(start: Start) -> Start:
    """Run ``detour-client daemon``: ``start_client(host, "detour", option...)``."""
    def run(host: Host, *arguments: object) -> Daemon:
        return start(host, ["detour-client", "daemon", *arguments], "ready with the")
    return run


@pytest.fixture
def ready_lab(lab: GuestLab, start: Start, start_server: Start) -> GuestLab:
    """A lab whose server and first detour serve."""
    start(lab.host("server"), program("sink", PORT), "ready")
    start_server(lab.host("detour"))
    return lab


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Keep connections open from a host: ``hold(lab.host("client"), 3)``."""
    with contextlib.ExitStack() as stack:
        def run(host: Host, count: int = 1) -> None:
            process = host.popen(program("hold", SERVER, PORT, count), stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE)
            stack.callback(process.wait)
            stack.callback(process.stdin.close)
            assert process.stdout.readline() == "ready\n"
            stack.callback(process.stdout.close)
        yield run


def detour_of(lab: GuestLab, name: str = "detour") -> str:
    return str(lab.host(name).address)


def entry_of(lab: GuestLab, name: str = "detour") -> tuple[str, str]:
    return f"{detour_of(lab, name)}:{PORT}", REMOTE


# -- the daemon ------------------------------------------------------------------------------------


def test_an_unmodified_program_uses_two_paths_without_a_wrapper(
        vm: Vm, ready_lab: GuestLab, start: Start, start_client: Start):
    client, server = ready_lab.host("client"), ready_lab.host("server")
    (vm.results / "page").write_bytes(b"x" * 1_000_000)
    start(server, ["mptcpize", "run", sys.executable, "-u", "-m", "http.server", WEB,
                   "--directory", vm.results], "Serving")
    daemon = start_client(client, "detour", "--upgrade-tcp")
    assert daemon.matching("ready with the kernel path manager")
    assert sysctls(client) == ["2", "3", "1"]
    got = client.run(["curl", "-s", "--limit-rate", "300k", "-w", "%{size_download}",
                      "-o", "/dev/null", f"http://{SERVER}:{WEB}/page"], timeout=120)
    assert got.stdout == "1000000"
    [entry] = json.loads(by_hand(client, "stat", "--json").stdout)["entries"]
    assert entry["remote"] == f"{SERVER}:{WEB}"
    assert (entry["made"], entry["failed"], entry["live"]) == (1, 0, 0)
    assert entry["bytes_received"] > 100_000
    assert entry["srtt_ms"] > 1
    assert daemon.matching(f"has subflow .* -> {detour_of(ready_lab)}:{WEB}")


def test_status_has_the_shape_that_it_has_with_the_userspace_manager(
        ready_lab: GuestLab, start_client: Start, hold: Hold):
    client = ready_lab.host("client")
    told = {}
    for count, kind in enumerate(("userspace", "kernel"), 1):
        daemon = start_client(client, "detour", "--path-manager", kind)
        hold(client)
        wanted = [[detour_of(ready_lab), "direct"]] * count  # the first one lives on
        until(lambda wanted=wanted: subflows(client) == wanted, "its subflows")
        told[kind] = status(client)
        found = told[kind]["connections"][0]
        assert {each["state"] for each in found["subflows"]} == {"established"}
        text = client.run(["detour-client", "status"]).stdout
        assert found["token"] in text
        daemon.stop()
    assert told["kernel"]["path_manager"] == "kernel"
    assert told["userspace"]["path_manager"] == "userspace"
    assert shape(told["kernel"]) == shape(told["userspace"])
    [detour] = told["kernel"]["detours"]
    assert detour["joins_established"] == 1
    assert detour["state"] != "down"  # not asked yet if the first connection told its port
    assert told["kernel"]["counters"]["detours_wanted"] == 1


def shape(value: Any) -> Any:
    """Names, without values, which may not be known yet; of a list, those of its first."""
    if isinstance(value, dict):
        return {key: shape(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "value"


def test_connections_share_an_entry_and_every_detour_is_used(
        ready_lab: GuestLab, start_server: Start, start_client: Start, hold: Hold):
    client = ready_lab.host("client")
    start_server(ready_lab.host("detour2"))
    start_client(client, "detour", "detour2", "--max-subflows", 2)
    both = sorted([detour_of(ready_lab), detour_of(ready_lab, "detour2"), "direct"])
    before = counter(client, "DetourReqTx")
    hold(client, 5)
    until(lambda: subflows(client) == [both] * 5, "both detours")
    counters = status(client)["counters"]
    assert counters["requests"] == 2
    assert counters["joins_established"] == 10
    assert counter(client, "DetourReqTx") - before == counters["detours_wanted"] == 5
    assert set(listed(client)) == {entry_of(ready_lab), entry_of(ready_lab, "detour2")}


def test_a_killed_daemons_entries_are_reconciled(ready_lab: GuestLab, start_client: Start,
                                                 hold: Hold):
    client = ready_lab.host("client")
    wanted = [[detour_of(ready_lab), "direct"]]
    first = start_client(client, "detour", "--upgrade-tcp")
    hold(client)
    until(lambda: subflows(client) == wanted)
    kill(client, first)
    assert sysctls(client) == ["2", "3", "1"]
    wrong = (f"{detour_of(ready_lab)}:1234", REMOTE)
    for entry in (STRANGER, wrong):
        by_hand(client, "add", *named(*entry))
    second = start_client(client, "detour")
    assert sysctls(client) == ["2", "3", "0"]  # it was not told to upgrade
    assert subflows(client) == wanted
    until(lambda: set(listed(client)) == {entry_of(ready_lab), STRANGER}, "the right entries")
    assert listed(client)[STRANGER] is None
    until(lambda: status(client)["counters"]["answers"] >= 1, "a confirmation")
    hold(client)
    until(lambda: subflows(client) == wanted * 2)
    assert second.stop() == 0
    assert set(listed(client)) == {STRANGER}
    ss = client.run(["ss", "-Hnt", "state", "established", "dst", detour_of(ready_lab)]).stdout
    assert ss.count("\n") == 2  # live subflows stay


def test_a_detour_that_stops_is_withdrawn_and_used_again_when_it_is_back(
        ready_lab: GuestLab, start: Start, start_client: Start, hold: Hold):
    client, second = ready_lab.host("client"), ready_lab.host("detour2")
    command = ["detour-server", "--allow-remote", "10.0.0.0/8"]
    server = start(second, command, "serving on")
    daemon = start_client(client, "detour2", "--probe-interval", 1)
    hold(client)
    through = [[detour_of(ready_lab, "detour2"), "direct"]]
    until(lambda: subflows(client) == through)
    assert listed(client).keys() == {entry_of(ready_lab, "detour2")}
    server.stop()
    daemon.wait_line("does not answer", PATIENCE)
    until(lambda: not listed(client), "no entry")
    assert status(client)["detours"][0]["state"] == "down"
    client.run(["ss", "-K", "-t", "dst", detour_of(ready_lab, "detour2")])
    until(lambda: subflows(client) == [["direct"]])
    start(second, command, "serving on")
    daemon.wait_line("answers again", PATIENCE)
    until(lambda: subflows(client) == through, "the subflow again")
    lifetime = listed(client)[entry_of(ready_lab, "detour2")]
    assert lifetime is not None
    assert 0 < lifetime <= 16
    until(lambda: len(daemon.matching("joins|has subflow")) >= 2)


def test_entries_are_renewed_in_time(ready_lab: GuestLab, start_client: Start, hold: Hold):
    client = ready_lab.host("client")
    start_client(client, "detour", "--probe-interval", 1)  # 16 s
    hold(client)
    until(lambda: subflows(client) == [[detour_of(ready_lab), "direct"]])
    wait_for(lambda: status(client)["counters"]["answers"] >= 12, 120)  # one in 2 s
    assert listed(client)[entry_of(ready_lab)] is not None
    assert counter(client, "DetourExpired") == 0


def test_lost_events_lead_to_a_fresh_look(ready_lab: GuestLab, start: Start, hold: Hold):
    client = ready_lab.host("client")
    small = ("from detour_tools.pathmanager import events; events.RECEIVE_BUFFER = 8192;"
             "from detour_tools.cli.client import main; main()")
    daemon = start(client, [sys.executable, "-c", small, "daemon", "detour"], "ready with the")
    pid = client.run(["pgrep", "-f", "RECEIVE_BUFFER = 8192.*daemon detour$"]).stdout.split()[-1]
    client.run(["kill", "-STOP", pid])
    hold(client, 30)
    client.run(["kill", "-CONT", pid])
    until(lambda: subflows(client) == [[detour_of(ready_lab), "direct"]] * 30)
    assert status(client)["counters"]["overruns"] >= 1
    assert daemon.matching("more events than we could read")


_ONLY_OURS = """
table inet firewall {
    chain forward {
        type filter hook forward priority filter; policy drop;
        ct label 97 counter accept
        counter comment "dropped"
    }
}
table ip published {
    chain prerouting {
        type nat hook prerouting priority dstnat; policy accept;
        tcp dport 2222 dnat to 10.0.3.2:5001
    }
}
"""


@pytest.mark.parametrize("backend", ["nftables", "iptables"])
def test_a_firewall_lets_mapped_flows_pass_by_their_label(lab: GuestLab, start: Start,
                                                          backend: str):
    """And nothing else that is translated; the kernel must have conntrack labels."""
    client, detour = lab.host("client"), lab.host("detour")

    def connects(port: int) -> bool:
        done = client.run(["curl", "-s", "--max-time", 3, "-w", "%{num_connects}",
                           f"http://{detour.address}:{port}/"], check=False)
        assert done.returncode == 28  # nobody answers there, connected or not
        return done.stdout == "1"

    detour.run(["nft", "-f", "-"], input=_ONLY_OURS)
    try:
        start(lab.host("server"), program("sink", PORT), "ready")
        # The host's own firewall is to drop what is not ours, and not the server.
        server = start(detour, ["detour-server", "--backend", backend, "--router", "yes", "--relay",
                                "tcp", "--allow-remote", "10.0.0.0/8"], "serving on")
        client.run(["detour-client", "request", detour.address, REMOTE])
        assert connects(PORT)
        assert not connects(2222)
        rules = detour.run(["nft", "list", "table", "inet", "firewall"]).stdout
        passed, dropped = map(int, re.findall(r"counter packets (\d+)", rules))
        assert passed >= 3
        assert dropped >= 1
        assert not server.matching("labels|not limited|drops detoured packets")
        assert server.stop() == 0
    finally:
        detour.run(["nft", "delete table inet firewall; delete table ip published"])


def test_sysctls_are_put_back(lab: GuestLab, start_client: Start):
    client = lab.host("client")
    assert sysctls(client) == UNTOUCHED
    daemon = start_client(client, detour_of(lab), "--max-subflows", 4, "--upgrade-tcp")
    assert sysctls(client) == ["2", "5", "1"]
    kill(client, daemon)
    assert sysctls(client) == ["2", "5", "1"]
    daemon = start_client(client, detour_of(lab), "--path-manager", "userspace")
    assert sysctls(client) == ["1", "2", "0"]  # what the first one set besides went at once
    assert daemon.stop() == 0
    assert sysctls(client) == UNTOUCHED


def test_check_says_what_auto_would_choose(lab: GuestLab):
    text = lab.host("client").run(["detour-client", "check"]).stdout
    assert re.search(r"^ok .*DETOUR family is there: the daemon takes the kernel's", text, re.M)


# -- detour-client netlink -------------------------------------------------------------------------


def test_entries_by_hand(vm: Vm, lab: GuestLab):
    client = lab.host("client")
    v6 = ("[2001:db8::1]:443", "[2001:db8::2]:443")
    assert by_hand(client, "list").stdout == "no entries\n"
    assert by_hand(client, "add", *named(*STRANGER)).stdout == (
        f"added: detour {STRANGER[0]} for {STRANGER[1]}, for ever\n")
    by_hand(client, "add", *named(*v6), "--lifetime", 600)
    client.run(["ip", "link", "add", "tun0", "type", "dummy"])
    by_hand(client, "add", "--interface", "tun0")
    found = listed(client)
    assert found.keys() == {STRANGER, v6, ("tun0", None)}
    assert 500 <= found[v6] <= 600  # a slow machine takes its time
    assert found[STRANGER] is None
    table = by_hand(client, "list").stdout.splitlines()
    assert table[1].split() == ["interface", "tun0", "any", "for", "ever"]
    assert "stat" not in table[0]
    by_hand(client, "add", *named(*v6))
    assert listed(client)[v6] is None
    [figures] = json.loads(by_hand(client, "stat", *named(*v6), "--json").stdout)["entries"]
    assert (figures["detour"], figures["made"], figures["srtt_ms"]) == (v6[0], 0, None)
    assert len(by_hand(client, "stat").stdout.splitlines()) == 4
    since = len(vm.dmesg())
    assert "dmesg" in by_hand(client, "echo").stdout
    log = "\n".join(vm.dmesg()[since:])
    assert "detour=192.0.2.1:5001 remote=10.0.3.2:5001" in log
    assert "interface=tun0" in log
    for detour, remote in found:
        by_hand(client, "del", *named(detour, remote))
    assert listed(client) == {}
    client.run(["ip", "link", "del", "tun0"])


def test_requests_are_shown(ready_lab: GuestLab, start: Start, hold: Hold):
    client = ready_lab.host("client")
    client.run(["sysctl", "-qw", "net.mptcp.pm_type=2"])
    try:
        monitor = Daemon(client, ["detour-client", "netlink", "monitor", "--json", "--count", 2])
        with monitor:
            groups = ["sh", "-c", "cat /proc/net/netlink"]
            until(lambda: re.search(r"^\S+ 16 +\d+ +0*[1-9a-f]\S* ", client.run(groups).stdout,
                                    re.M), "a listener")
            hold(client, 2)
            monitor.wait_until(lambda: len(monitor.lines) == 2, "requests", PATIENCE)
            assert monitor.process.wait(PATIENCE) == 0
        assert [json.loads(line) for line in monitor.lines] == [{"remote": REMOTE}] * 2
    finally:
        client.run(["sysctl", "-qw", "net.mptcp.pm_type=0"])


ONE_LINERS = [
    (["del", *named(*STRANGER)], 1, "no such detour"),
    (["stat", *named(*STRANGER)], 1, "no such detour"),
    (["add", "--interface", "nosuch0"], 1, "no such interface"),
    (["add", "--interface", "much-too-long-a-name"], 2, "not an interface's name"),
    (["add", "--detour", "192.0.2.1:80"], 2, "which entry?"),
    (["add", *named("192.0.2.1:80", "[2001:db8::1]:80")], 2, "not both IPv4 or both IPv6"),
    (["add", *named("192.0.2.1", REMOTE)], 2, "has no port"),
    (["add", *named("224.0.0.1:80", REMOTE)], 1, "unicast"),
    (["add", *named(*STRANGER), "--lifetime", "604801"], 2, "not from 1 to 604800"),
    (["monitor", "--count", "1", "--timeout", "0.1"], 1, "0 of 1 requests"),
    (["nonsense"], 2, "invalid choice"),
]


def test_what_is_wrong_is_said_in_one_line(lab: GuestLab):
    client = lab.host("client")
    for arguments, exit_status, words in ONE_LINERS:
        ended = by_hand(client, *arguments, check=False)
        assert ended.returncode == exit_status, ended
        assert ended.stdout == ""
        assert ended.stderr.count("\n") == 1
        assert ended.stderr.startswith("detour-client")
        assert words in ended.stderr


def test_what_an_unprivileged_user_may(lab: GuestLab):
    client = lab.host("client")
    nobody = ["setpriv", "--reuid", "65534", "--clear-groups", "--bounding-set", "-all",
              "detour-client", "netlink"]
    for words in (["add", *named(*STRANGER)], ["del", *named(*STRANGER)], ["echo"], ["monitor"]):
        ended = client.run([*nobody, *words], check=False)
        assert ended.returncode == 1, ended
        assert ended.stderr.count("\n") == 1
        assert "CAP_NET_ADMIN" in ended.stderr
    by_hand(client, "add", *named(*STRANGER))
    assert STRANGER[0] in client.run([*nobody, "list"]).stdout
    assert STRANGER[0] in client.run([*nobody, "stat"]).stdout
