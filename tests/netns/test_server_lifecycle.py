# SPDX-License-Identifier: GPL-2.0-or-later
"""Start, stop, kill, restart, reload, expiry: what a detour leaves, keeps and takes over."""

import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from detour_tools import runtime
from detour_tools.lab import namespaces
from detour_tools.lab.network import Lab, environment
from detour_tools.netlink.conntrack import Conntrack
from tests.netns import asking
from tests.netns.asking import Asker, Flow, WhoAmI, kernel_mappings, mappings
from tests.netns.conftest import PLAIN, PRIVATE, Start


@pytest.fixture
def web(lab: Lab) -> WhoAmI:
    return WhoAmI(lab.host("server"), 80)


def flow_through(lab: Lab, asker: Asker, proposed: int = 80) -> Flow:
    flow = Flow(lab.host("client"), "10.0.6.2", asker.ask("10.0.3.2:80", proposed))
    assert flow.seen_as == "10.0.6.2"
    assert flow.echo()
    return flow


def runtime_folder(lab: Lab) -> Path:
    with namespaces.inside(lab.host("detour").namespace):
        return runtime.directory("detour-server")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("forwarding", ["0", "1"])
def test_clean_up(lab, serve, asker, web, number, forwarding):
    detour = lab.host("detour")
    detour.run(["sysctl", "-qw", f"net.ipv4.ip_forward={forwarding}"])
    # With NAT of somebody else's the kernel would go on with flows it has once translated.
    detour.run(["nft", "-f", "-"], input="""table ip nat {
        chain prerouting { type nat hook prerouting priority dstnat; policy accept;
            tcp dport 8088 dnat to 10.0.3.2:81; }
        chain postrouting { type nat hook postrouting priority srcnat; policy accept;
            ip saddr 192.168.77.0/24 masquerade; }
    }""")
    before = asking.rules(detour)
    server = serve()
    assert asking.forwarding(detour) == "1"
    flow = flow_through(lab, asker)
    assert server.stop(number) == 0
    assert asking.rules(detour) == before
    assert asking.forwarding(detour) == forwarding
    assert asking.is_cut(flow)
    assert not [path for path in runtime_folder(lab).glob("*") if path.suffix != ".lock"]


def test_after_a_kill_the_next_one_takes_over(lab, serve, backend, asker, web):
    detour = lab.host("detour")
    server = serve()
    flow = flow_through(lab, asker)
    picked = asker.ask("10.0.3.2:81", 0)
    before = mappings(detour)
    for _ in range(2):
        server.kill()
        assert flow.echo(), "flows do not need the server"
        assert not asking.refuses(lab.host("client"), "10.0.6.2", 80), "nor do mappings"
        server = serve()
        server.wait_line("took over 2 mappings")
        assert mappings(detour) == before
        assert set(kernel_mappings(detour, backend)) == before
        assert asker.ask("10.0.3.2:81", 0) == picked
        assert flow.echo()
    assert server.stop() == 0
    assert asking.forwarding(detour) == "0", "what stood before the first one was remembered"
    assert "DETOUR" not in asking.rules(detour).upper()
    assert asking.is_cut(flow)


def test_the_other_back_end_takes_over(lab, serve, backend, asker, web):
    detour = lab.host("detour")
    server = serve()
    flow = flow_through(lab, asker)
    asker.ask("10.0.3.2:81", 0)
    before = mappings(detour)
    server.kill()
    other = {"nftables": "iptables", "iptables": "nftables"}[backend]
    server = serve(backend=other)
    assert asking.status(detour)["backend"] == other
    assert flow.echo()
    assert set(kernel_mappings(detour, other)) == mappings(detour) == before
    text = asking.rules(detour)
    assert ("table ip detour-tools" in text) == (other == "nftables")
    assert ("DETOUR-PREROUTING" in text) == (other == "iptables")
    again = Flow(lab.host("client"), "10.0.6.2", 80)
    assert again.seen_as == "10.0.6.2"
    server.stop()
    assert "DETOUR" not in asking.rules(detour).upper()


def test_empty_left_overs_of_the_other_back_end_are_removed(lab, serve, backend):
    serve().kill()
    other = {"nftables": "iptables", "iptables": "nftables"}[backend]
    serve(backend=other).stop()
    assert "DETOUR" not in asking.rules(lab.host("detour")).upper()


def test_auto_prefers_nftables(lab, start_server):
    start_server(lab.host("detour"), *PRIVATE)
    assert asking.status(lab.host("detour"))["backend"] == "nftables"


def test_rules_that_somebody_removes_come_back(lab, serve, backend, asker, web):
    detour = lab.host("detour")
    server = serve()
    flow = flow_through(lab, asker)
    before = mappings(detour)
    if backend == "nftables":
        detour.run(["nft", "flush", "ruleset"])
    else:
        detour.run(["iptables-legacy", "-t", "nat", "-F"])
    server.wait_line("made them anew, with 1 mappings")
    assert set(kernel_mappings(detour, backend)) == before
    assert Flow(lab.host("client"), "10.0.6.2", 80).seen_as == "10.0.6.2"
    assert flow.echo()
    # A request is not answered in between without being live either.
    if backend == "nftables":
        asking.in_time("a repair is allowed again", _slowly(1.1))
        detour.run(["nft", "delete", "table", "ip", "detour-tools"])
        assert asker.ask("10.0.3.2:8000", 8000) == 8000
        assert ("10.0.1.1", 8000, "10.0.3.2:8000") in kernel_mappings(detour, backend)


def _slowly(seconds: float):
    start = time.monotonic()
    while True:
        yield time.monotonic() - start > seconds


def test_idle_mappings_go_and_those_with_flows_stay(lab, serve, backend, asker, web):
    detour = lab.host("detour")
    serve("--idle-timeout", "1")
    flow = flow_through(lab, asker)
    asker.ask("10.0.3.2:81", 81)
    used = {("10.0.1.1", 80, "10.0.3.2:80")}
    asking.in_time("the idle one is gone", (mappings(detour) == used for _ in itertools.count()))
    assert set(kernel_mappings(detour, backend)) == used
    assert asking.status(detour)["expired"] == 1
    assert flow.echo()
    # Requests keep a mapping alive, too.
    for _ in range(8):
        asker.ask("10.0.3.2:82", 82)
        asking.in_time("a while", _slowly(0.25))
    assert ("10.0.1.1", 82, "10.0.3.2:82") in mappings(detour)
    with namespaces.inside(detour.namespace), contextlib.closing(Conntrack()) as conntrack:
        flows = [each for each in conntrack.flows() if each.mapping.detour_port == 80]
        assert len(flows) == 1
        conntrack.cut(flows[0])
    asking.in_time("all are gone", (not mappings(detour) for _ in itertools.count()))
    assert kernel_mappings(detour, backend) == []


def test_reload(lab, serve, backend, asker, tmp_path):
    detour = lab.host("detour")
    config = tmp_path / "server.toml"
    config.write_text('allow-client = ["10.0.1.0/24"]\nmax-mappings = 3\nidle-timeout = 100\n')
    server = serve("--config", config, "--idle-timeout", "200")
    stranger = Asker(lab.host("r1"), detour.address)
    assert asker.ask("10.0.3.2:80", 80) == 80
    assert stranger_is_refused(detour, stranger)
    config.write_text('allow-client = ["10.0.0.0/8"]\nmax-mappings = 200000\nidle-timeout = 50\n'
                      'listen = "0.0.0.0:99"\n')
    server.process.send_signal(signal.SIGHUP)
    server.wait_line("^.*reloaded$")
    server.wait_line("listen takes effect at the next start only")
    assert stranger.ask("10.0.3.2:80", 80) == 80
    policy = asking.status(detour)["policy"]
    assert (policy["max_mappings"], policy["idle_timeout"]) == (200000, 200.0)
    assert policy["allow_remote"] == ["10.0.0.0/8"], "the command line stays"
    assert len(kernel_mappings(detour, backend)) == 2, "mappings stay"
    # A bad file changes nothing, and is one line.
    config.write_text("allow-client = 5\n")
    server.process.send_signal(signal.SIGHUP)
    server.wait_line(r"not reloaded: .*allow-client: must be a list")
    assert stranger.ask("10.0.3.2:81", 81) == 81
    config.unlink()
    server.process.send_signal(signal.SIGHUP)
    server.wait_line("not reloaded: there is no file")
    assert asking.status(detour)["policy"] == policy
    assert "Traceback" not in server.output


def stranger_is_refused(detour, stranger) -> bool:
    stranger.send_request("10.0.3.2:80", 80)
    asking.in_time("the refusal is counted",
                   (asking.status(detour)["refused"].get("client") for _ in itertools.count()))
    return True


def fails(lab: Lab, *arguments: object, command: tuple[str, ...] = ("detour-server",)) -> str:
    """What a server that cannot start says: one line."""
    done = lab.host("detour").run([*command, *arguments], check=False, timeout=60)
    assert done.returncode not in (0, None)
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def test_a_second_server_is_refused_and_the_first_unharmed(lab, serve, asker, web):
    serve()
    flow = flow_through(lab, asker)
    assert "another detour-server already runs" in fails(lab, "--listen", "0.0.0.0:1234")
    assert flow.echo()
    assert asker.ask("10.0.3.2:81", 81) == 81


def test_a_start_that_fails_leaves_what_a_killed_server_left(lab, serve, asker, web):
    server = serve()
    flow = flow_through(lab, asker)
    server.kill()
    detour = lab.host("detour")
    with namespaces.inside(detour.namespace):
        busy = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with busy:
        busy.bind(("0.0.0.0", 45672))
        assert re.search(r"UDP port 45672 is in use \(.*--listen\)", fails(lab))
    assert "there is no group 'nobody-knows'" in fails(lab, "--control-group", "nobody-knows")
    assert "10.1.2.3 is not an address of this host" in fails(lab, "--listen", "10.1.2.3")
    assert flow.echo()
    assert asking.forwarding(detour) == "1"
    serve().stop()
    assert asking.forwarding(detour) == "0"


def test_without_privileges_it_is_one_line(lab):
    line = fails(lab, command=(
        "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "detour-server"))
    assert "needs CAP_NET_ADMIN (run it as root, or with sudo)" in line


@pytest.mark.parametrize(("backend", "missing", "words"), [
    ("nftables", "nftables", "python3-nftables"), ("iptables", "iptc", "python-iptables")])
def test_a_missing_library_is_one_line(lab, tmp_path, backend, missing, words):
    (tmp_path / f"{missing}.py").write_text("raise ImportError('not installed')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    code = "import sys; from detour_tools.cli.server import main; main()"
    done = lab.host("detour").run([_python(), "-c", code, "--backend", backend], check=False,
                                  env=environment, timeout=60)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert words in done.stderr
    assert asking.forwarding(lab.host("detour")) == "0"


def _python() -> str:
    return str(Path(__file__).parents[2] / ".venv/bin/python")


def test_nobody_reading_the_output_does_not_stop_the_service(lab, backend, asker):
    detour = lab.host("detour")
    process = detour.popen(["detour-server", "--backend", backend, *PRIVATE, "--rate", "0"],
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout.readline() == "net.ipv4.ip_forward = 1\n"
        # First it is not read (64 KiB fill the pipe), then it is closed.
        for port in range(1001, 2201):
            asker.ask("10.0.3.2:80" if port % 2 else "10.0.3.3:80", 0)
        process.stdout.close()
        for port in range(1001, 1050):
            assert asker.ask(f"10.0.3.2:{port}", port) == port
        assert asking.status(detour)["unprinted"] > 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()


def test_systemd_is_told(lab, start: Start, backend, tmp_path):
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(path))
        systemd.settimeout(10)
        server = start(lab.host("detour"), [
            "env", f"NOTIFY_SOCKET={path}", "WATCHDOG_USEC=200000", "detour-server",
            "--backend", backend])
        assert systemd.recv(100) == b"READY=1"
        assert systemd.recv(100) == b"WATCHDOG=1"
        server.stop()
        with contextlib.suppress(TimeoutError):
            while (said := systemd.recv(100)) == b"WATCHDOG=1":
                pass
        assert said == b"STOPPING=1"


def test_a_narrower_policy_holds_for_mappings_that_are_there(lab, serve, backend, asker, web,
                                                             tmp_path):
    """After a reload, and after a take-over."""
    detour = lab.host("detour")
    config = tmp_path / "server.toml"
    config.write_text('allow-client = ["10.0.0.0/8"]\n')
    server = serve("--config", config)
    stranger = Asker(lab.host("r1"), detour.address)
    stranger.ask("10.0.3.2:81", 81)
    theirs = Flow(lab.host("r1"), detour.address, stranger.ask("10.0.3.2:80", 80))
    flow = flow_through(lab, asker)
    config.write_text('allow-client = ["10.0.1.0/24"]\n')
    server.process.send_signal(signal.SIGHUP)
    server.wait_line("removed 2 mappings that are not allowed any more")
    server.wait_line("reloaded$")
    assert asking.is_cut(theirs)
    assert mappings(detour) == {("10.0.1.1", 80, "10.0.3.2:80")}
    assert flow.echo()
    server.kill()
    config.write_text('allow-client = ["10.9.0.0/16"]\n')
    server = serve("--config", config)
    server.wait_line("removed 1 mappings that are not allowed any more")
    assert kernel_mappings(detour, backend) == []
    assert asking.is_cut(flow)
    assert asking.status(detour)["refused"] == {}


def test_sighup_while_it_starts_is_a_reload_when_it_serves(lab, start: Start, backend):
    detour = lab.host("detour")
    code = ("import os, signal; from detour_tools.nat import choose; original = choose._open\n"
            "def hang_up(wanted):\n"
            "    os.kill(os.getpid(), signal.SIGHUP)\n"
            "    return original(wanted)\n"
            "choose._open = hang_up\n"
            "from detour_tools.cli.server import main; main()")
    server = start(detour, [_python(), "-c", code, "--backend", backend])
    server.wait_line("serving")
    server.wait_line("reloaded$")
    assert server.stop() == 0
    assert asking.forwarding(detour) == "0"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_impatience_does_no_harm(lab, serve, backend, number):
    """A signal that comes again and again until there is no process any more."""
    detour = lab.host("detour")
    server = serve()
    server.process.send_signal(signal.SIGTERM)
    while server.process.poll() is None:
        server.process.send_signal(number)
        time.sleep(0.0005)
    assert server.stop() == 0
    assert not [line for line in server.lines if not line.startswith("net.ipv4.")
                and not re.search(r"(serving on .*|stopping|reloaded)$", line)]
    assert asking.forwarding(detour) == "0"
    assert "DETOUR" not in asking.rules(detour).upper()


def test_ctrl_c_while_it_is_loaded_is_no_traceback(lab, tmp_path):
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = lab.host("detour").run(["detour-server"], check=False, timeout=60,
                                  env={**environment(), "PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (130, "")


def test_when_it_gets_crowded_unused_mappings_go_soon(lab, start: Start, backend, web):
    detour = lab.host("detour")
    code = ("from detour_tools.server import policy, upkeep\n"
            "policy._CROWDED_SECONDS = 1.0; upkeep._SWEEP_SECONDS = 0.2\n"
            "from detour_tools.cli.server import main; main()")
    server = start(detour, [_python(), "-c", code, "--backend", backend, *PRIVATE, *PLAIN,
                            "--max-mappings", "20"])
    server.wait_line("serving")
    asker = Asker(lab.host("client"), detour.address)
    flow = flow_through(lab, asker)
    for port in range(1, 20):
        asker.ask(f"10.0.3.3:{port}", port)
    good = Asker(lab.host("r1"), detour.address)
    assert good.ask("10.0.3.2:80", 80, tries=9) == 80
    # On a busy machine they were made over more than a second: then those that are left are fine.
    asking.in_time("there is room again", (len(mappings(detour)) <= 18 for _ in itertools.count()))
    assert ("10.0.1.1", 80, "10.0.3.2:80") in mappings(detour)
    assert flow.echo()


def test_what_the_kernel_changes_with_forwarding_is_put_back(lab, serve):
    detour = lab.host("detour")
    detour.run(["ip", "link", "add", "with.dot", "type", "veth", "peer", "name", "end"])
    names = ["with.dot", "default"]
    for name in names:
        detour.run(["sysctl", "-qw", f"net/ipv4/conf/{name}/forwarding=1"])
    detour.run(["sysctl", "-qw", "net.ipv4.conf.all.accept_redirects=0"])

    def switches(name: str = "*") -> str:
        return detour.run(["sh", "-c", f"grep . /proc/sys/net/ipv4/conf/*/{name}"]).stdout

    before = switches()
    assert ":0" in switches("forwarding")
    assert switches("forwarding").count(":1") == 2
    serve().stop()
    assert switches() == before
    serve().kill()
    serve().kill()
    assert switches("forwarding").count(":0") == 0
    serve().stop()
    assert switches() == before


@pytest.mark.parametrize("what", ["InetDiag.__init__", "InetDiag.listening"])
def test_a_kernel_that_does_not_list_sockets_is_one_line(lab, what):
    error = {"InetDiag.__init__": "OSError(93, 'Protocol not supported')",
             "InetDiag.listening": "UserError('this kernel does not list its sockets: none')"}[what]
    code = ("from detour_tools.netlink.inet_diag import InetDiag\n"
            "from detour_tools.errors import UserError\n"
            f"def fail(self): raise {error}\n"
            f"{what} = fail\n"
            "from detour_tools.cli.server import main; main()")
    assert "this kernel does not list its sockets" in fails(lab, command=(_python(), "-c", code))
    assert asking.forwarding(lab.host("detour")) == "0"


def test_a_narrower_policy_holds_for_requests_that_wait(lab, start: Start, asker, tmp_path):
    config = tmp_path / "server.toml"
    config.write_text('allow-client = ["10.0.0.0/8"]\n')
    code = ("import asyncio\n"
            "from detour_tools.server.requests import Requests\n"
            "from detour_tools.server.service import Server\n"
            "serve, reload, reloaded = Requests.serve, Server._reload, asyncio.Event()\n"
            "async def late(self):\n"
            "    await reloaded.wait()\n"
            "    await serve(self)\n"
            "async def tell(self):\n"
            "    await reload(self)\n"
            "    reloaded.set()\n"
            "Requests.serve, Server._reload = late, tell\n"
            "from detour_tools.cli.server import main; main()")
    detour = lab.host("detour")
    server = start(detour, [_python(), "-c", code, "--config", config, *PRIVATE])
    server.wait_line("serving")
    asker.send_request("10.0.3.2:80", 80)
    asking.in_time("it waits", (asking.status(detour)["requests"]["received"]
                                for _ in itertools.count()))
    config.write_text('allow-client = ["10.0.2.0/23", "10.0.4.0/22"]\n')
    server.process.send_signal(signal.SIGHUP)
    server.wait_line("reloaded$")
    assert Asker(lab.host("r1"), detour.address).ask("10.0.3.2:80", 80) == 80
    assert [client for client, _, _ in mappings(detour) if client == "10.0.1.1"] == []
