# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab on a real kernel: what up builds, what down leaves, what the links do."""

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sysconfig
import threading
import time
from pathlib import Path

import pytest

from detour_tools import runtime
from detour_tools.errors import UserError
from detour_tools.lab import namespaces, state
from detour_tools.lab.daemons import wait_for
from detour_tools.lab.network import Lab
from detour_tools.lab.topology import reference_topology
from tests.detour_lab import DETOUR_LAB
from tests.netns.conftest import MakeLab, Start, StartCapture, traces


def machine() -> dict[str, set[str]]:
    """What a lab could leave in the machine's own namespace and folders."""
    links = json.loads(subprocess.run(["ip", "-j", "link"], capture_output=True, check=True).stdout)
    rules = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=True)
    return {"links": {link["ifname"] for link in links}, "tables": set(rules.stdout.splitlines())}


def call(*arguments: object, status: int | None = 0, **options) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([DETOUR_LAB, *map(str, arguments)], capture_output=True, text=True,
                          check=False, **options)
    if status is not None:
        assert done.returncode == status, done
    return done


# Reaches


@pytest.mark.parametrize("detours", [1, 3])
def test_every_host_reaches_every_other_by_name(make_lab: MakeLab, detours: int):
    lab = make_lab(reference_topology(detours=detours, rates_mbps=None))
    with_listener = {}
    for host in lab.hosts():
        with namespaces.inside(host.namespace):
            with_listener[host.name] = socket.create_server(("0.0.0.0", 7))
    probe = ("import socket, sys\n"
             "for name in sys.argv[1:]: socket.create_connection((name, 7), 3).close()")
    try:
        for host in lab.hosts():
            host.run(["python3", "-c", probe, *with_listener])
    finally:
        for listener in with_listener.values():
            listener.close()


def packets(lab: Lab, link: str) -> int:
    """Packets that left the link's first end, which is the one nearer to the client."""
    end = lab.topology.link(link).a.host
    shown = lab.host(end).run(["ip", "-j", "-s", "link", "show", link])
    return int(json.loads(shown.stdout)[0]["stats64"]["tx"]["packets"])


@pytest.mark.parametrize(("target", "way"), [("server", "L1 L2 L3"), ("detour", "L1 L4 L6")])
def test_packets_take_the_paths_of_the_reference(lab: Lab, target: str, way: str):
    counters = ["L1", "L2", "L3", "L4", "L5", "L6"]
    before = {link: packets(lab, link) for link in counters}
    send = ("import socket\n"
            "with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:\n"
            f"    for _ in range(300): s.sendto(b'x', ('{target}', 9))")
    lab.host("client").run(["python3", "-c", send])
    wanted = set(way.split())
    wait_for(lambda: all(packets(lab, link) - before[link] >= 300 for link in wanted))
    others = set(counters) - wanted
    # Neighbour discovery puts a few on every link.
    assert all(packets(lab, link) - before[link] < 100 for link in others)


def test_hops_to_the_server_and_to_the_detour(lab: Lab):
    """As traceroute does it: who says that the time to live is over."""
    script = """
import socket, sys
target = sys.argv[1]
for ttl in range(1, 6):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
        probe.setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR
        probe.connect((target, 33434))
        probe.send(b"x")
        import select
        poll = select.poll(); poll.register(probe, select.POLLERR); poll.poll(3000)
        _, ancillary, _, _ = probe.recvmsg(100, 200, socket.MSG_ERRQUEUE)
        offender = ancillary[0][2][20:24]
        print(socket.inet_ntoa(offender))
        if offender == socket.inet_aton(socket.gethostbyname(target)):
            break
"""
    client = lab.host("client")
    assert client.run(["python3", "-c", script, "server"]).stdout.split() == [
        "10.0.1.2", "10.0.2.2", "10.0.3.2"]
    assert client.run(["python3", "-c", script, "detour"]).stdout.split() == [
        "10.0.1.2", "10.0.4.2", "10.0.6.2"]


def test_only_routers_forward_and_nobody_filters_reverse_paths(lab: Lab):
    for host in lab.hosts():
        shown = host.run(["sysctl", "-a", "-r", r"^net\.ipv4\.(ip_forward$|conf\..*\.rp_filter)"])
        values = dict(line.split(" = ") for line in shown.stdout.splitlines())
        forward = values.pop("net.ipv4.ip_forward")
        assert forward == ("1" if host.name in ("r1", "r2", "r3") else "0")
        assert {f"net.ipv4.conf.{link.name}.rp_filter"
                for link in lab.topology.links_of(host.name)} <= set(values)
        assert set(values.values()) == {"0"}


# Up and down


def test_up_is_idempotent_and_refuses_to_become_another_network(name: str):
    lab = Lab(reference_topology(rates_mbps=None), name)
    assert lab.up() is True
    inode = (namespaces.RUN / f"{name}-client").stat().st_ino
    assert Lab(reference_topology(rates_mbps=None), name).up() is False
    assert (namespaces.RUN / f"{name}-client").stat().st_ino == inode
    with pytest.raises(UserError, match="already up as another network"):
        Lab(reference_topology(detours=2), name).up()


def test_down_leaves_nothing(name: str):
    before = machine()
    with Lab(reference_topology(detours=2), name) as lab:
        assert machine() == before  # the machine itself never sees the lab's interfaces
        # One that obeys SIGTERM, one that does not, and one that would fork on.
        for script in ("exec sleep 1000", "trap '' TERM; while :; do sleep 1000; done",
                       "while :; do sleep 0.01 & wait; done"):
            lab.host("detour2").popen(["sh", "-c", f": marker-{name}; {script}"])
        with namespaces.inside(lab.host("detour").namespace):
            folder = runtime.make_directory("detour-server")
        (folder / "detour-server.lock").touch()
        wait_for(lambda: len(lab.host("detour2").processes()) >= 3)
        lab.set_link("L2", up=False)
    assert traces(name) == []
    assert not folder.exists()
    assert machine() == before
    lab.down()  # once more is fine


@pytest.mark.parametrize("steps", [0, 3])
def test_killed_in_the_middle_of_up(name: str, steps: int, start: Start):
    """SIGKILL while the namespaces are being made: down finds all, and so does the next up."""
    script = f"""
import os, signal
from detour_tools.lab import namespaces, network, topology
create, made = namespaces.create, []
def killed(name):
    if len(made) == {steps}:
        # What a kill between two system calls leaves: the file, and no namespace on it.
        open(f"/run/netns/{{name}}", "x").close()
        os.kill(os.getpid(), signal.SIGKILL)
    create(name); made.append(name)
namespaces.create = killed
network.Lab(topology.reference_topology(), "{name}").up()
"""
    def crash() -> None:
        namespaces.RUN.mkdir(exist_ok=True)
        python = str(Path(sysconfig.get_path("scripts"), "python"))
        done = subprocess.run([python, "-c", script], check=False)
        assert done.returncode == -signal.SIGKILL
        assert len([each for each in traces(name) if each.startswith("/run/netns")]) == steps + 1

    crash()
    call("--name", name, "down")
    assert traces(name) == []
    crash()
    call("--name", name, "up")
    assert "10.0.6.2" in call("--name", name, "exec", "client", "--", "ip", "route", "get",
                              "10.0.6.2").stdout


def test_killed_while_links_are_made(name: str):
    script = f"""
import os, signal
from detour_tools.lab import links, network, topology
links._shape = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
network.Lab(topology.reference_topology(), "{name}").up()
"""
    python = str(Path(sysconfig.get_path("scripts"), "python"))
    assert subprocess.run([python, "-c", script], check=False).returncode == -signal.SIGKILL
    assert call("--name", name, "status", status=1).stderr.startswith(
        f"detour-lab: the lab '{name}' is not up")
    call("--name", name, "down")
    assert traces(name) == []


def test_down_without_its_state_file(name: str):
    Lab(reference_topology(detours=3), name).up()
    state.path(name).unlink()
    call("--name", name, "down")
    assert traces(name) == []


def test_a_failure_in_up_leaves_nothing(name: str, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise KeyboardInterrupt
    monkeypatch.setattr("detour_tools.lab.links._shape", fail)
    with pytest.raises(KeyboardInterrupt):
        Lab(reference_topology(), name).up()
    assert traces(name) == []


def test_labs_whose_names_begin_alike_are_apart(name: str, make_lab: MakeLab):
    other = Lab(reference_topology(rates_mbps=None), f"{name}-client")
    with other:
        Lab(reference_topology(rates_mbps=None), name).up()
        Lab(reference_topology(rates_mbps=None), name).down()
        other.host("server").run(["true"])


def test_two_ups_at_once_make_one_lab(name: str):
    results: list[bool] = []
    threads = [threading.Thread(
        target=lambda: results.append(Lab(reference_topology(), name).up())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False, False, False, True]


def test_no_thread_process_or_descriptor_stays(name: str):
    def held() -> tuple[int, int, str]:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii")
        return threading.active_count(), len(os.listdir("/proc/self/fd")), children

    with Lab(reference_topology(), name):  # first use of the libraries
        pass
    before = held()
    with Lab(reference_topology(l2_loss=1), name) as lab:
        lab.set_link("L2", up=False)
    assert held() == before


# Links


def mbps(lab: Lab, start: Start, seconds: int = 2) -> float:
    """Plain TCP from client to server, as iperf3's receiver saw it after the first second."""
    server = start(lab.host("server"), ["iperf3", "-s", "-1", "-J"])
    wait_for(lambda: lab.host("server").run(["ss", "-Hltn", "sport = :5201"]).stdout)
    done = lab.host("client").run(["iperf3", "-c", "server", "-t", seconds, "-J", "-O", 1])
    server.process.wait(10)
    return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]) / 1e6


def test_a_link_of_10_mbps_carries_10_mbps(make_lab: MakeLab, start: Start):
    lab = make_lab(reference_topology())
    # Of 1514 bytes on the link 1448 are payload: 9.56 at best.
    assert 9.0 <= mbps(lab, start) <= 10.0


def test_a_rate_can_be_overridden(make_lab: MakeLab, start: Start):
    lab = make_lab(reference_topology(rates_mbps={"L1": 4}))
    assert 3.6 <= mbps(lab, start) <= 4.0


def datagrams_arrived(lab: Lab, start: Start, sent: int) -> int:
    """How many of ``sent`` datagrams from client get to the server."""
    receive = ("import socket\n"
               "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(('', 9))\n"
               "s.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE\n"
               "print('ready'); n = 0\n"
               "while s.recv(99) != b'end': n += 1\n"
               "print('arrived', n)")
    receiver = start(lab.host("server"), ["python3", "-c", receive])
    receiver.wait_line("ready")
    send = ("import socket, time\n"
            "try: socket.create_connection(('server', 9), 9)\n"
            "except OSError: pass  # refused; all neighbours on the way are known now\n"
            "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect(('server', 9))\n"
            f"for i in range({sent}):\n"
            "    s.send(b'x')\n"
            "    if i % 20 == 0: time.sleep(0.001)\n"
            "try:\n"
            "    for _ in range(99): s.send(b'end')\n"
            "except ConnectionRefusedError: pass  # one arrived")
    lab.host("client").run(["python3", "-c", send])
    return int(receiver.wait_line("arrived").split()[1])


def test_loss_is_the_share_that_was_asked_for(make_lab: MakeLab, start: Start):
    lab = make_lab(reference_topology(l2_loss=10, rates_mbps=None))
    arrived = datagrams_arrived(lab, start, 5000)
    assert 0.87 * 5000 < arrived < 0.93 * 5000  # seven standard deviations either way


def test_no_loss_unless_asked_for(lab: Lab, start: Start):
    assert datagrams_arrived(lab, start, 5000) == 5000


def test_a_cut_link_is_silent_and_can_be_mended(lab: Lab, start_capture: StartCapture,
                                                start: Start):
    start(lab.host("server"), ["python3", "-m", "http.server", "80"])
    wait_for(lambda: lab.host("server").run(["ss", "-Hltn", "sport = :80"]).stdout)
    client = lab.host("client")
    fetch = ["curl", "-s", "-o", "/dev/null", "-m", "1", "http://server/"]
    assert client.run(fetch, check=False).returncode == 0
    lab.set_link("L2", up=False)
    assert not lab.link_is_up("L2")
    with start_capture(client, "L1") as capture:
        assert client.run(fetch, check=False).returncode == 28  # it timed out: nobody told it
    heard = client.run(["tcpdump", "-nr", capture.path, "src not 10.0.1.1 and not arp and not ip6"])
    assert heard.stdout == ""
    assert "LOWER_UP" in client.run(["ip", "link", "show", "L1"]).stdout
    # The way by the detour is as it was.
    assert lab.host("detour").run(fetch, check=False).returncode == 0
    lab.set_link("L2", up=True)
    assert lab.link_is_up("L2")
    assert client.run(fetch, check=False).returncode == 0


def test_set_link_twice_is_fine(lab: Lab):
    for up in (True, False, False, True, True):
        lab.set_link("L6", up=up)
        assert lab.link_is_up("L6") is up


def test_hosts_see_no_firewall_of_the_lab(make_lab: MakeLab):
    """The lab drops at routers, for a detour's rules are its own business."""
    lab = make_lab(reference_topology(l2_loss=1))
    for link in ("L1", "L3", "L6"):
        lab.set_link(link, up=False)
    for host in ("client", "server", "detour"):
        assert lab.host(host).run(["nft", "list", "ruleset"]).stdout == ""


# The command


def test_exec_passes_status_input_and_output(lab: Lab):
    run = ("--name", lab.name, "exec", "client", "--")
    assert call(*run, "sh", "-c", "exit 7", status=7).stderr == ""
    assert call(*run, "cat", input="hello").stdout == "hello"
    assert call(*run, "cat", "/etc/hosts").stdout.startswith("10.0.1.1\tclient\n")
    found = call(*run, "sh", "-c", "command -v detour-client",
                 env={**os.environ, "PATH": "/usr/bin:/bin"}).stdout.strip()
    assert found == str(Path(sysconfig.get_path("scripts"), "detour-client"))


def test_exec_gives_the_terminal_and_ctrl_c_to_the_command(lab: Lab):
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(DETOUR_LAB, [  # noqa: S606
            DETOUR_LAB, "--name", lab.name, "exec", "client", "--", "sh", "-c",
            "trap 'exit 42' INT; test -t 0 && echo on a terminal; while :; do sleep 0.1; done"])
    output = b""
    while b"on a terminal" not in output:
        output += os.read(terminal, 1000)
    os.write(terminal, b"\x03")
    deadline = time.monotonic() + 60
    while (done := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(done[1]) == 42


@pytest.mark.parametrize(("command", "status", "complaint"), [
    (["nobody", "--", "true"], 2,
     "detour-lab: the lab has no host 'nobody' (hosts: client, server, detour, r1, r2, r3)\n"),
    (["client", "--"], 2,
     "detour-lab: no command given (detour-lab exec HOST -- COMMAND...)\n"),
    (["client", "--", "nonesuch"], 127, "detour-lab: there is no command 'nonesuch'\n"),
])
def test_exec_says_what_is_wrong(lab: Lab, command: list[str], status: int, complaint: str):
    assert call("--name", lab.name, "exec", *command, status=status).stderr == complaint


def test_commands_on_a_lab_that_is_not_up(name: str):
    for command in (["status"], ["exec", "client", "--", "true"]):
        assert call("--name", name, *command, status=1).stderr.startswith(
            f"detour-lab: the lab '{name}' is not up (start it: detour-lab --name {name} up")
    assert "is not up; this is what" in call("--name", name, "graph").stdout


def test_up_says_that_delay_is_not_emulated(name: str):
    shown = call("--name", name, "up").stdout
    tried = subprocess.run(["ip", "netns", "exec", f"{name}-client", "tc", "qdisc", "add", "dev",
                            "lo", "root", "netem"], capture_output=True, check=False)
    assert ("delays are not emulated" in shown) == (tried.returncode != 0)


def test_status_and_graph_of_a_lab(make_lab: MakeLab, start: Start):
    lab = make_lab(reference_topology(l2_loss=2))
    sleeper = start(lab.host("server"), ["sleep", "987"])
    wait_for(lambda: (sleeper.process.pid, "sleep 987") in lab.host("server").processes())
    lab.set_link("L4", up=False)
    shown = json.loads(call("--name", lab.name, "status", "--json").stdout)
    hosts = {host["name"]: host for host in shown["hosts"]}
    assert hosts["server"]["processes"] == [{"pid": sleeper.process.pid, "command": "sleep 987"}]
    assert hosts["detour"]["addresses"] == {"L6": "10.0.6.2/24"}
    links = {link["name"]: link for link in shown["links"]}
    assert (links["L2"]["rate_mbps"], links["L2"]["loss_percent"]) == (10, 2)
    assert (links["L2"]["up"], links["L4"]["up"]) == (True, False)
    told = call("--name", lab.name, "status").stdout
    assert re.search(r"server .*sleep 987", told)
    assert re.search(r"L4 .*cut", told)
    drawing = call("--name", lab.name, "graph").stdout
    assert "L4 10 Mbit/s CUT" in drawing
    assert "detour 10.0.6.2" in drawing


def test_down_from_inside_the_lab_is_refused(lab: Lab):
    shown = call("--name", lab.name, "exec", "client", "--", DETOUR_LAB, "--name", lab.name, "down",
                 status=1)
    assert "runs inside the lab" in shown.stderr
    lab.host("client").run(["true"])


def test_without_root_it_is_one_line():
    if shutil.which("setpriv") is None:
        pytest.fail("setpriv (util-linux) is missing")
    done = subprocess.run(["setpriv", "--bounding-set=-all", "--inh-caps=-all", DETOUR_LAB, "up"],
                          capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        1, "detour-lab: the lab needs CAP_SYS_ADMIN (run it as root, or with sudo)\n")
