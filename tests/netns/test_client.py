# SPDX-License-Identifier: GPL-2.0-or-later
"""detour-client on real kernels: real servers, real detours, captures and ss as witnesses."""

import collections
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from detour_tools.lab import namespaces
from detour_tools.lab.captures import segments
from detour_tools.lab.daemons import wait_for
from detour_tools.lab.network import Lab, environment
from detour_tools.lab.topology import reference_topology
from tests.netns.conftest import PLAIN, PRIVATE

SERVER = "10.0.3.2"
DETOUR = "10.0.6.2"
PORT = 5001


def program(name, *arguments):
    return [sys.executable, "-m", "tests.netns.programs", name, *arguments]


def status(host):
    return json.loads(host.run(["detour-client", "status", "--json"]).stdout)


def subflows(host):
    """Where the subflows of the connections to the server go, a sorted list each."""
    return [sorted(subflow["via"] or "direct" for subflow in connection["subflows"]
                   if subflow["state"] == "established")
            for connection in status(host)["connections"]]


def path_manager(host):
    return host.run(["cat", "/proc/sys/net/mptcp/path_manager"]).stdout.strip()


def counter(host, name):
    """A counter of the kernel's MPTCP code."""
    found = re.search(rf"^MPTcpExt{name}\s+(\d+)", host.run(["nstat", "-asz"]).stdout, re.M)
    return int(found[1])


@pytest.fixture
def sink(start):
    """Run the MPTCP server on a host: ``sink(lab.host("server"))``."""
    def run(host):
        start(host, program("sink", PORT)).wait_line("ready")
    return run


@pytest.fixture
def hold():
    """Keep connections open from a host: ``hold(lab.host("client"))``; close() ends them."""
    with contextlib.ExitStack() as stack:
        def run(host, count=1, name="hold"):
            process = host.popen(program(name, SERVER, PORT, *([count] if name == "hold" else [])),
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            stack.callback(process.wait)
            stack.callback(process.stdin.close)
            assert process.stdout.readline() == "ready\n"
            stack.callback(process.stdout.close)
            return process.stdin
        yield run


@pytest.fixture
def ready_lab(lab, sink, start_server, start_client):
    """A lab with everything running; the daemons are ``.server`` and ``.client``."""
    sink(lab.host("server"))
    lab.server = start_server(lab.host("detour"))
    lab.client = start_client(lab.host("client"), "detour")
    return lab


def test_an_unmodified_program_uses_two_paths(make_lab, start, start_server, start_client,
                                               start_capture):
    lab = make_lab(reference_topology())
    client, server = lab.host("client"), lab.host("server")
    detour_daemon = start_server(lab.host("detour"))
    start_client(client, "detour")
    start(server, ["mptcpize", "run", "iperf3", "-s", "-1", "--forceflush"]
          ).wait_line("listening")
    capture = start_capture(server, "L3", "tcp port 5201")
    client.run(["detour-client", "run", "--", "iperf3", "-c", "server", "-t", "3"])
    capture.stop()
    sent = collections.Counter()
    for segment in segments(capture.path):
        sent[str(segment.source.address)] += segment.payload
    assert sent["10.0.1.1"] > 1e6  # the client itself
    assert sent[DETOUR] > 1e6
    assert detour_daemon.matching(rf"new .*{SERVER}:5201")
    assert client.run(["ss", "-Hnt", "state", "syn-sent"]).stdout == ""


def test_a_second_connection_adds_its_subflow_without_asking(ready_lab, hold):
    client = ready_lab.host("client")
    hold(client)
    wait_for(lambda: subflows(client) == [[DETOUR, "direct"]])
    hold(client)
    wait_for(lambda: subflows(client) == [[DETOUR, "direct"]] * 2)
    assert status(client)["counters"]["requests"] == 1
    assert counter(client, "MPJoinSynAckRx") == 2


def test_status_tells_the_story(ready_lab, hold):
    client = ready_lab.host("client")
    hold(client)
    wait_for(lambda: subflows(client) == [[DETOUR, "direct"]])
    told = status(client)
    [detour], [connection] = told["detours"], told["connections"]
    assert (detour["address"], detour["state"]) == (DETOUR, "up")
    assert 0 < detour["rtt_ms"] < 1000
    assert connection["remote"] == f"{SERVER}:{PORT}"
    direct, through = sorted(connection["subflows"], key=lambda each: each["via"] or "")
    assert (direct["remote"], direct["via"]) == (f"{SERVER}:{PORT}", None)
    assert (through["remote"], through["via"]) == (f"{DETOUR}:{PORT}", DETOUR)
    assert through["bytes_sent"] + direct["bytes_sent"] >= 1
    ss = client.run(["ss", "-Hnt", "dst", DETOUR]).stdout
    assert through["local"] in ss
    for_people = client.run(["detour-client", "status"]).stdout
    assert connection["token"] in for_people
    assert through["local"] in for_people


def test_a_dual_stack_socket_gets_its_detour(ready_lab, hold):
    client = ready_lab.host("client")
    hold(client, name="dual-stack")
    wait_for(lambda: subflows(client) == [[DETOUR, "direct"]])


def test_a_mapping_that_the_detour_dropped_is_asked_for_again(ready_lab, hold):
    client, detour = ready_lab.host("client"), ready_lab.host("detour")
    first = hold(client)
    wait_for(lambda: subflows(client) == [[DETOUR, "direct"]])  # no join may be under way
    first.close()
    wait_for(lambda: not status(client)["connections"])
    detour.run(["detour-server", "flush"])
    hold(client)
    wait_for(lambda: subflows(client) == [[DETOUR, "direct"]])
    told = status(client)["counters"]
    assert told["joins_refused"] == 1
    assert told["requests"] == 2


def test_the_c_flag_is_honoured(ready_lab, hold):
    client, server = ready_lab.host("client"), ready_lab.host("server")
    server.run(["sysctl", "-qw", "net.mptcp.allow_join_initial_addr_port=0"])
    hold(client)
    wait_for(lambda: status(client)["connections"])
    ready_lab.client.wait_line("C flag")
    assert counter(client, "MPJoinSynTx") == 0
    assert status(client)["counters"]["requests"] == 0


def test_no_detour_on_link_and_on_this_host(lab, start, start_server, start_client):
    client, r1 = lab.host("client"), lab.host("r1")
    start_server(lab.host("detour"))
    daemon = start_client(client, "detour")
    start(r1, program("sink", PORT)).wait_line("ready")
    start(client, program("sink", PORT)).wait_line("ready")
    for host in ("10.0.1.2", "127.0.0.1", "10.0.1.1"):
        client.run(program("upload", host, PORT, 1000))
    daemon.wait_line("on link")
    daemon.wait_line("stays on this host")
    wait_for(lambda: len(daemon.matching("closed")) >= 3)
    assert status(client)["counters"]["requests"] == 0
    daemon.stop()
    daemon = start_client(client, "detour", "--include", "10.0.1.2/32")
    client.run(program("upload", "10.0.1.2", PORT, 1000))
    wait_for(lambda: status(client)["counters"]["requests"] == 1)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_sysctl_and_the_files_are_put_back(lab, start_client, signum):
    client = lab.host("client")
    before = path_manager(client)
    assert before == "kernel"
    daemon = start_client(client, DETOUR)
    assert path_manager(client) == "userspace"
    folder = _runtime_folder(client)
    assert folder.exists()
    assert daemon.stop(signum) == 0
    assert path_manager(client) == before
    assert not folder.exists()


def _runtime_folder(host):
    """The daemon's folder, by asking Python inside the namespace."""
    return Path(host.run([sys.executable, "-c",
                          "from detour_tools import runtime; "
                          "print(runtime.directory('detour-client'))"
                          ]).stdout.strip())


def test_after_a_kill_the_sysctl_is_put_back_by_the_next_daemon(lab, start_client):
    client = lab.host("client")
    start_client(client, DETOUR).kill()
    assert path_manager(client) == "userspace"
    second = start_client(client, DETOUR)
    assert second.stop() == 0
    assert path_manager(client) == "kernel"


def test_what_somebody_else_set_after_a_kill_is_what_is_put_back(lab, tmp_path):
    client = lab.host("client")
    borrow = ("from pathlib import Path; from detour_tools.sysctl import BorrowedSysctls; "
              f"borrowed = BorrowedSysctls(Path('{tmp_path}/journal')); "
              "borrowed.hold({'net.ipv4.tcp_syn_retries': '3'}); ")
    client.run([sys.executable, "-c", borrow])  # as killed: it puts nothing back
    client.run(["sysctl", "-qw", "net.ipv4.tcp_syn_retries=5"])
    client.run([sys.executable, "-c", borrow + "borrowed.restore()"])
    assert client.run(["sysctl", "-n", "net.ipv4.tcp_syn_retries"]).stdout == "5\n"


def test_a_sysctl_that_somebody_else_changed_is_left_alone(lab, start_client):
    client = lab.host("client")
    client.run(["sysctl", "-qw", "net.mptcp.path_manager=userspace"])
    start_client(client, DETOUR).stop()
    assert path_manager(client) == "userspace"


def test_a_restarted_daemon_shows_and_looks_after_open_connections(ready_lab, start_client, hold):
    client = ready_lab.host("client")
    hold(client)
    wait_for(lambda: subflows(client) == [[DETOUR, "direct"]])
    ready_lab.client.kill()
    daemon = start_client(client, "detour")
    assert subflows(client) == [[DETOUR, "direct"]]
    client.run(["ss", "-K", "-t", "dst", DETOUR])
    daemon.wait_line("lost subflow")
    wait_for(lambda: subflows(client) == [[DETOUR, "direct"]])
    assert counter(client, "MPJoinSynTx") == 2


def test_a_subflow_through_a_detour_that_is_no_longer_used_is_shown_as_such(
        ready_lab, start_client, hold):
    client = ready_lab.host("client")
    hold(client)
    wait_for(lambda: subflows(client) == [[DETOUR, "direct"]])
    ready_lab.client.kill()
    start_client(client, "10.0.6.99")
    assert subflows(client) == [[DETOUR, "direct"]]


def test_connections_that_close_at_once_are_no_refusals(ready_lab, hold):
    client = ready_lab.host("client")
    for _ in range(10):
        client.run(["detour-client", "check", "--remote", f"server:{PORT}"])
    hold(client)
    wait_for(lambda: subflows(client) == [[DETOUR, "direct"]])
    assert [detour["joins_refused"] for detour in status(client)["detours"]] == [0]


def test_connections_made_while_no_daemon_ran_get_their_detour(ready_lab, start_client, hold):
    client = ready_lab.host("client")
    ready_lab.client.kill()  # the sysctl stays
    hold(client)
    start_client(client, "detour")
    wait_for(lambda: subflows(client) == [[DETOUR, "direct"]])


def test_lost_events_lead_to_a_fresh_look(lab, sink, start, start_server, hold):
    client = lab.host("client")
    sink(lab.host("server"))
    start_server(lab.host("detour"))
    small = ("from detour_tools.pathmanager import events; events.RECEIVE_BUFFER = 8192;"
             "from detour_tools.cli.client import main; main()")
    daemon = start(client, [sys.executable, "-c", small, "daemon", "detour"])
    daemon.wait_line("ready")
    daemon.process.send_signal(signal.SIGSTOP)
    hold(client, 40)
    daemon.process.send_signal(signal.SIGCONT)
    wait_for(lambda: subflows(client) == [[DETOUR, "direct"]] * 40)
    assert status(client)["counters"]["overruns"] >= 1
    assert counter(client, "MPJoinSynTx") == 40


def test_a_lost_subflow_is_replaced(ready_lab, hold):
    client = ready_lab.host("client")
    hold(client)
    wait_for(lambda: subflows(client) == [[DETOUR, "direct"]])
    time.sleep(2.1)  # one that dies younger counts as refused
    client.run(["ss", "-K", "-t", "dst", DETOUR])
    wait_for(lambda: subflows(client) == [["direct"]])
    wait_for(lambda: subflows(client) == [[DETOUR, "direct"]])
    client.run(["ss", "-K", "-t", "dst", SERVER])
    wait_for(lambda: subflows(client) == [[DETOUR]])
    wait_for(lambda: subflows(client) == [[DETOUR, "direct"]])


def test_a_silent_detour_is_used_once_it_answers(lab, sink, start_server, start_client, hold):
    client = lab.host("client")
    sink(lab.host("server"))
    daemon = start_client(client, "detour", "--probe-interval", "1")
    hold(client)
    daemon.wait_line("does not answer", timeout=60)
    assert [each["state"] for each in status(client)["detours"]] == ["down"]
    start_server(lab.host("detour"))
    daemon.wait_line("answers again")
    wait_for(lambda: subflows(client) == [[DETOUR, "direct"]])


def test_three_detours_and_a_server_at_default_limits(make_lab, sink, start_server, start_client,
                                                      hold):
    lab = make_lab(reference_topology(rates_mbps=None, detours=3))
    names = ["detour", "detour2", "detour3"]
    client = lab.host("client")
    sink(lab.host("server"))
    for name in names:
        start_server(lab.host(name))
    start_client(client, *names, "--max-subflows", "3")
    hold(client)
    wait_for(lambda: len(subflows(client)[0]) == 3)  # the server's limit: two besides the first
    wait_for(lambda: status(client)["counters"]["joins_refused"] >= 1)
    time.sleep(10)
    assert len(subflows(client)[0]) == 3
    assert status(client)["counters"]["joins_refused"] <= 2
    assert counter(client, "MPJoinSynTx") <= 4


def test_forged_answers_are_dropped_and_counted(ready_lab, hold):
    client = ready_lab.host("client")
    hold(client)
    wait_for(lambda: subflows(client) == [[DETOUR, "direct"]])
    sockets = client.run(["ss", "-Hunap"]).stdout
    port = re.search(r"0\.0\.0\.0:(\d+) .*detour-client", sockets)[1]
    forge = ("import socket, struct; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM);"
             "{bind}"
             "s.sendto(struct.pack('!BBHIHH', 1, 1, 0, 0x0a000302, 443, 666),"
             " ('10.0.1.1', {port}))")
    ready_lab.host("r2").run([sys.executable, "-c", forge.format(port=port, bind="")])
    ready_lab.server.stop()  # its port is needed: an answer from the right place, to no question
    ready_lab.host("detour").run([sys.executable, "-c", forge.format(
        port=port, bind="s.bind(('10.0.6.2', 45672));")])
    wait_for(lambda: status(client)["counters"]["answers_unmatched"] == 2)
    assert status(client)["detours"][0]["mappings"] == 1


@pytest.mark.parametrize("link", ["L2", "L6"])
def test_an_upload_survives_a_cut_path(make_lab, sink, start_server, start_client, link):
    rates = dict.fromkeys(("L1", "L3", "L6"), 80.0) | dict.fromkeys(("L2", "L4", "L5"), 40.0)
    lab = make_lab(reference_topology(rates_mbps=rates))
    client = lab.host("client")
    sink(lab.host("server"))
    start_server(lab.host("detour"))
    start_client(client, "detour")
    transfer = _upload(client)
    wait_for(lambda: _sent_everywhere(client, 1_000_000), 20)
    lab.set_link(link, up=False)
    _finish(transfer)


def test_an_upload_survives_killed_daemons(make_lab, sink, start_server, start_client):
    # Slow enough that the daemons are back long before its end.
    rates = dict.fromkeys(("L1", "L3", "L6"), 30.0) | dict.fromkeys(("L2", "L4", "L5"), 12.0)
    lab = make_lab(reference_topology(rates_mbps=rates))
    client, detour = lab.host("client"), lab.host("detour")
    sink(lab.host("server"))
    server_daemon = start_server(detour)
    daemon = start_client(client, "detour")
    transfer = _upload(client)
    wait_for(lambda: _sent_everywhere(client, 1_000_000), 20)
    server_daemon.kill()
    start_server(detour)
    daemon.kill()
    start_client(client, "detour")
    assert subflows(client) == [[DETOUR, "direct"]]
    through_detour = _sent(client)[DETOUR]
    wait_for(lambda: _sent(client).get(DETOUR, 0) > through_detour)
    _finish(transfer)


def _upload(client):
    return client.popen(program("upload", SERVER, PORT, 20_000_000), stdout=subprocess.PIPE)


def _sent(client):
    return {subflow["via"] or "direct": subflow["bytes_sent"]
            for connection in status(client)["connections"]
            for subflow in connection["subflows"]}


def _sent_everywhere(client, least):
    sent = _sent(client)
    return len(sent) == 2 and min(sent.values()) > least


def _finish(transfer):
    output, _ = transfer.communicate(timeout=60)
    assert transfer.returncode == 0
    sent, received = output.split()
    assert sent == received


def test_request_by_hand_carries_any_tcp_where_that_is_relayed(lab, sink, start_server):
    client = lab.host("client")
    sink(lab.host("server"))
    start_server(lab.host("detour"), *PRIVATE, *PLAIN)
    told = json.loads(client.run(["detour-client", "request", "detour", f"server:{PORT}",
                                  "--port", "6000", "--json"]).stdout)
    assert told["detour_port"] == 6000
    uploaded = client.run(program("upload", DETOUR, 6000, 1000)).stdout.split()
    assert uploaded[0] == uploaded[1]
    line = client.run(["detour-client", "request", "detour", f"server:{PORT}"]).stdout
    assert line == f"{DETOUR}:6000 leads to {SERVER}:{PORT}\n"


def test_check_is_content_with_a_good_host_and_names_a_bad_detour(ready_lab):
    client = ready_lab.host("client")
    good = client.run(["detour-client", "check", "detour", "--remote", f"{SERVER}:{PORT}"])
    assert "FAIL" not in good.stdout
    bad = client.run(["detour-client", "check", "10.0.3.2"], check=False)
    assert bad.returncode == 1
    assert "FAIL  detour 10.0.3.2: nothing listens on UDP 45672" in bad.stdout


def test_check_of_a_remote_tells_what_is_wrong_on_the_way(ready_lab, start):
    client, detour = ready_lab.host("client"), ready_lab.host("detour")

    def check(port, status):
        told = client.run(["detour-client", "check", "--remote", f"server:{port}"], check=False)
        assert told.returncode == status
        return told.stdout

    good = check(PORT, 0)
    assert f"ok    remote {SERVER}:{PORT}: speaks Multipath TCP\n" in good
    assert re.search(rf"ok    detour {DETOUR}:45672: .*, and joins get there\n", good)

    assert "FAIL  remote 10.0.3.2:81: cannot be reached directly: Connection ref" in check(81, 1)

    plain = [sys.executable, "-m", "http.server", "--bind", SERVER, "8080"]
    start(ready_lab.host("server"), plain).wait_line("Serving")
    assert "FAIL  remote 10.0.3.2:8080: answers by plain TCP" in check(8080, 1)

    detour.run(["nft", "table ip closed { chain in { type filter hook forward priority 0; "
                "ct status dnat reject; }; }"])
    assert re.search(r"FAIL  detour 10.0.6.2:45672: .*, but a join to that port: .* -> let TCP "
                     ".*; on the detour run: detour-server firewall check\n", check(PORT, 1))
    detour.run(["nft", "flush ruleset; table ip closed { chain in { "
                "type filter hook input priority 0; udp dport 45672 drop; }; }"])
    assert re.search(r"FAIL  detour 10.0.6.2:45672: .* did not answer -> .*"
                     r"on the detour run: detour-server firewall check\)", check(PORT, 1))


def test_check_without_privilege_tells_what_a_refusal_of_plain_tcp_means(ready_lab):
    told = ready_lab.host("client").run([
        "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "detour-client", "check",
        "detour", "--remote", f"{SERVER}:{PORT}"], check=False).stdout
    assert re.search("note  detour detour: .*; plain TCP to that port: Connection refused -> that "
                     "is as it should be where the detour relays joins only", told)


def test_run_passes_the_exit_status_and_sets_go_up(lab):
    client = lab.host("client")
    ended = client.run(["detour-client", "run", "--", "sh", "-c", "echo $GODEBUG; exit 7"],
                       check=False)
    assert (ended.returncode, ended.stdout) == (7, "multipathtcp=1\n")


ONE_LINERS = [
    (["daemon"], 2, "no detour is given"),
    (["daemon", "10.0.6.2:99999"], 2, "is not a port"),
    (["daemon", "10.0.6.2", "10.0.6.2:99999", "--check-config"], 2, "is not a port"),
    (["daemon", "2001:db8::1", "127.0.0.1"], 2, "is an IPv6 address"),
    (["daemon", "10.0.6.2", "--max-subflows", "99"], 2, "not from 1 to 8"),
    (["daemon", "10.0.6.2", "--exclude", "nonsense"], 2, "is not a network"),
    (["daemon", "10.0.6.2", "--exclude", "203.0.113.7/2"], 2, "lies within 192.0.0.0/2"),
    (["daemon", "10.0.6.2", "--control-group", "no-such-group"], 2, "no group"),
    (["daemon", "--config", "/no/such/file"], 2, "there is no file"),
    (["daemon", "--no-such-option"], 2, "--no-such-option"),
    (["daemon", "10.0.6.2", "--path-manager", "none"], 2, "invalid choice"),
    (["daemon", "10.0.6.2", "--path-manager", "kernel"], 1, "no detour path manager"),
    (["daemon", "10.0.6.2", "--upgrade-tcp"], 1, "does not upgrade TCP sockets"),
    (["netlink"], 2, "required"),
    (["netlink", "list"], 1, "CONFIG_MPTCP_PM_DETOUR"),
    (["netlink", "add"], 2, "which entry?"),
    (["request", "10.0.6.2", "10.0.3.2"], 2, "has no port"),
    (["request", "2001:db8::1", "10.0.3.2:80"], 2, "is an IPv6 address"),
    (["request", "no.such.host.invalid", "10.0.3.2:80"], 1, "no.such.host.invalid"),
    (["request", "10.0.6.2", "10.0.3.2:80"], 1, "nothing listens"),
    (["status"], 1, "no detour-client runs"),
    (["run"], 2, "no program is given"),
    (["run", "--", "no-such-program"], 127, "no such program"),
    ([], 2, "required"),
]


@pytest.mark.parametrize(("arguments", "exit_status", "words"), ONE_LINERS)
def test_what_is_wrong_is_said_in_one_line(client_host, arguments, exit_status, words):
    ended = client_host.run(["detour-client", *arguments], check=False)
    assert ended.returncode == exit_status
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1
    assert words in ended.stderr
    assert ended.stderr.startswith("detour-client")


@pytest.fixture(scope="module")
def client_host():
    """The client of a lab that several tests share, as nothing is left on it."""
    with Lab(reference_topology(rates_mbps=None), f"t{os.getpid()}shared") as lab:
        yield lab.host("client")


def test_ctrl_c_while_it_is_loaded_is_no_traceback(client_host, tmp_path):
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = client_host.run(["detour-client", "status"], check=False, timeout=60,
                           env={**environment(), "PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (130, "")


def test_an_unprivileged_daemon_says_what_it_lacks(client_host):
    ended = client_host.run(["setpriv", "--reuid", "65534", "--clear-groups", "--bounding-set",
                             "-all", "detour-client", "daemon", DETOUR], check=False)
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    assert "CAP_NET_ADMIN" in ended.stderr


def test_one_daemon_a_namespace(lab, start_client):
    client = lab.host("client")
    first = start_client(client, DETOUR)
    second = client.run(["detour-client", "daemon", DETOUR], check=False, timeout=60)
    assert second.returncode == 1
    assert second.stderr.count("\n") == 1
    assert f"pid {first.process.pid}" in second.stderr
    assert status(client)["detours"]


def test_a_log_that_nobody_reads_does_not_stop_the_daemon(lab, sink, start_server, hold):
    client = lab.host("client")
    sink(lab.host("server"))
    start_server(lab.host("detour"))
    daemon = client.popen(["detour-client", "daemon", "detour", "-v"], stderr=subprocess.PIPE)
    wait_for(lambda: path_manager(client) == "userspace")
    try:
        hold(client, 400)  # some 200 kB of log, where a pipe holds 64
        wait_for(lambda: subflows(client) == [[DETOUR, "direct"]] * 400)
        daemon.terminate()
        assert daemon.wait(5) == 0
    finally:
        daemon.kill()
        daemon.stderr.close()
        daemon.wait()
    assert path_manager(client) == "kernel"


def test_a_control_connection_that_is_not_read_does_not_hold_up_the_end(ready_lab, hold):
    client = ready_lab.host("client")
    hold(client, 100)
    path = _runtime_folder(client) / "detour-client.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1)
        connection.connect(str(path))
        with contextlib.suppress(TimeoutError):
            for _ in range(10_000):
                connection.sendall(b'{"command": "status"}\n')
        started = time.monotonic()
        assert ready_lab.client.stop() == 0
        assert time.monotonic() - started < 5


def test_a_default_route_without_a_gateway_puts_nobody_on_link(ready_lab, hold):
    client = ready_lab.host("client")
    ready_lab.host("r1").run(["sysctl", "-qw", "net.ipv4.conf.L1.proxy_arp=1"])
    client.run(["ip", "route", "flush", "table", "main", "scope", "global"])
    client.run(["ip", "route", "replace", "default", "dev", "L1"])
    assert "via" not in client.run(["ip", "route"]).stdout
    hold(client)
    wait_for(lambda: subflows(client) == [[DETOUR, "direct"]])


def know(host, names=""):
    """Have a host know these names (lines of /etc/hosts), and no others."""
    namespaces.write_etc(host.namespace, "nsswitch.conf", "hosts: files\n")
    namespaces.write_etc(host.namespace, "hosts", names)


BAD_DETOURS = [
    ("2001:db8::1", "cannot be used: 2001:db8::1 is an IPv6 address"),
    ("[2001:db8::1]:45672", "cannot be used: 2001:db8::1 is an IPv6 address"),
    ("0.0.0.0", "cannot be used: 0.0.0.0 is not the address of a host"),
    ("224.0.0.1", "cannot be used: 224.0.0.1 is not the address of a host"),
    ("127.0.0.1", "cannot be used: 127.0.0.1 is an address of this host itself"),
    ("10.0.6.3:99999", "cannot be used: '99999' in '10.0.6.3:99999' is not a port"),
    ("10.0.6", "cannot be used: '10.0.6' is neither an IPv4 address nor a name"),
    ("me@web1", "cannot be used: 'me@web1' is neither an IPv4 address nor a name"),
    ("", "cannot be used: '' has no host"),
    ("web1", "is not used yet: 'web1' is no name of an IPv4 address"),
    ("six.example", "is not used yet: 'six.example' has IPv6 addresses only"),
    ("me.example", "is not used yet: 127.0.1.1 is an address of this host itself"),
    ("10.0.1.1", "is not used yet: 10.0.1.1 is an address of this host itself"),
    ("10.0.1.255", "is not used yet: 10.0.1.255 is a network's broadcast address"),
    (f"{DETOUR}:1000", f"is not used yet: {DETOUR}:45672 is used already, as detour '{DETOUR}'"),
]


@pytest.mark.parametrize(("bad", "words"), BAD_DETOURS)
def test_a_bad_detour_is_named_and_the_others_are_used(client_host, start_client, bad, words):
    know(client_host, "2001:db8::5 six.example\n127.0.1.1 me.example\n")
    daemon = start_client(client_host, DETOUR, bad)
    told = status(client_host)
    assert [each["address"] for each in told["detours"]] == [DETOUR]
    [warning] = told["warnings"]
    assert warning.startswith(f"detour '{bad}' {words}")
    assert len(daemon.matching("detour '")) == 1
    assert warning in daemon.matching("detour '")[0]
    assert f"warning: {warning}\n" in client_host.run(["detour-client", "status"]).stdout
    checked = client_host.run(["detour-client", "check"], check=False)
    assert f"FAIL  daemon: {warning}\n" in checked.stdout
    if "used already" not in words:  # alone it would do
        checked = client_host.run(["detour-client", "check", bad], check=False)
        assert f"FAIL  detour {bad}: {words.partition(': ')[2]}" in checked.stdout


def test_connections_get_the_good_detour_of_a_bad_list(lab, sink, start_server, start_client,
                                                       hold):
    client = lab.host("client")
    sink(lab.host("server"))
    start_server(lab.host("detour"))
    start_client(client, "2001:db8::1", "web1", "127.0.0.1", "detour", "10.0.1.1")
    hold(client)
    wait_for(lambda: subflows(client) == [[DETOUR, "direct"]])


def test_a_name_that_comes_to_be_known_is_used(lab, sink, start_server, start_client, hold):
    client = lab.host("client")
    sink(lab.host("server"))
    start_server(lab.host("detour"))
    know(client)
    daemon = start_client(client, "late.example")
    hold(client)
    wait_for(lambda: subflows(client) == [["direct"]])
    told = status(client)
    assert told["detours"] == []
    assert told["warnings"][0] == "no detour can be used yet, so connections get none"
    assert "'late.example' is no name of an IPv4 address" in told["warnings"][1]
    know(client, f"{DETOUR} late.example\n")
    wait_for(lambda: subflows(client) == [[DETOUR, "direct"]])
    assert status(client)["warnings"] == []
    assert daemon.matching("no longer so: detour 'late.example'")


def test_name_servers_that_say_nothing_hold_nothing_up(lab, sink, start, start_server,
                                                       start_client, hold):
    client, server = lab.host("client"), lab.host("server")
    sink(server)
    start_server(lab.host("detour"))
    mute = ("import socket, time; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM);"
            f"s.bind(('{SERVER}', 53)); print('ready', flush=True); time.sleep(600)")
    start(server, [sys.executable, "-c", mute]).wait_line("ready")
    namespaces.write_etc(client.namespace, "nsswitch.conf", "hosts: dns\n")
    namespaces.write_etc(client.namespace, "resolv.conf", f"nameserver {SERVER}\n")
    started = time.monotonic()
    daemon = start_client(client, "slow.example", DETOUR)
    hold(client)
    wait_for(lambda: subflows(client) == [[DETOUR, "direct"]])
    [warning] = status(client)["warnings"]
    assert warning.startswith("detour 'slow.example' is not used yet: no name server has an answer")
    assert daemon.stop() == 0
    assert time.monotonic() - started < 8  # the resolver asks twice, for 5 s each


def test_a_subflow_through_a_detour_whose_name_comes_late_is_its_own(ready_lab, start_client,
                                                                     hold):
    client = ready_lab.host("client")
    hold(client)
    wait_for(lambda: subflows(client) == [[DETOUR, "direct"]])
    ready_lab.client.kill()
    know(client)
    daemon = start_client(client, "detour")
    assert status(client)["detours"] == []
    know(client, f"{DETOUR} detour\n")
    daemon.wait_line(f"detour detour is {DETOUR}")
    wait_for(lambda: status(client)["detours"])
    time.sleep(1)  # for a second join, which should not come
    assert subflows(client) == [[DETOUR, "direct"]]
    assert counter(client, "MPJoinSynTx") == 1
