# SPDX-License-Identifier: GPL-2.0-or-later
"""Virtual machines: commands and their status, NICs, what is left after every way out."""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shlex
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from detour_tools.lab import namespaces, state, vm
from detour_tools.lab.captures import Capture
from detour_tools.lab.daemons import Daemon, wait_for
from detour_tools.lab.network import Host
from detour_tools.lab.topology import reference_topology
from tests.detour_lab import DETOUR_LAB
from tests.netns.conftest import unique_lab_name
from tests.vm.conftest import MakeVmLab, Vm

Call = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def boot(vm_kernel: Path) -> Call:
    """Run ``detour-lab vm`` with the session's kernel; it must leave nothing."""
    def run(*arguments: object, status: int = 0, prefix: tuple[str, ...] = (),
            **options: Any) -> "subprocess.CompletedProcess[str]":
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        with subprocess.Popen([*prefix, DETOUR_LAB, "vm", "--kernel", vm_kernel,
                               *map(str, arguments)], text=True, **options) as process:
            try:
                output, complaint = process.communicate(timeout=120)
            finally:
                process.kill()
        assert (process.returncode, left_by(process)) == (status, []), (output, complaint)
        return subprocess.CompletedProcess("vm", process.returncode, output, complaint)
    return run


def left_by(process: "subprocess.Popen[str]") -> list[str]:
    """What there is of VMs that the process has started, after the usual clean-up."""
    vm.remove_leftovers()
    return [str(path) for path in vm.root_folder().glob(f"vm-{process.pid}.*")]


# The command


def test_output_and_status_come_back(boot: Call, tmp_path: Path):
    command = ["sh", "-c", "uname -r; echo oops >&2; exit 7"]
    done = boot("--", *command, status=7)
    assert done.stdout.count("\n") == 1
    assert done.stdout != os.uname().release + "\n"
    assert done.stderr == "oops\n"
    # Into a file, with input from a file, of a size that fills every buffer on the way.
    (tmp_path / "in").write_bytes(os.urandom(1_000_000))
    with (tmp_path / "in").open("rb") as given, (tmp_path / "out").open("wb") as taken:
        boot("--", "cat", stdin=given, stdout=taken)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "in").read_bytes()


def test_the_host_is_seen_and_not_changed(boot: Call, tmp_path: Path):
    writable = tmp_path / "a b,c$(x)"
    writable.mkdir()
    (tmp_path / "kept").write_text("as it was")
    script = (f"cat {tmp_path}/kept; echo new >{tmp_path}/kept; rm -r /etc/passwd /usr/share/doc; "
              f"touch /made-in-the-vm; echo left >{shlex.quote(str(writable))}/file; pwd")
    done = boot("--rw", writable, "--", "sh", "-c", script, cwd=tmp_path)
    assert done.stdout == f"as it was{tmp_path}\n"
    assert (tmp_path / "kept").read_text() == "as it was"
    assert (writable / "file").read_text() == "left\n"
    assert Path("/etc/passwd").exists()
    assert Path("/usr/share/doc").exists()
    assert not Path("/made-in-the-vm").exists()


def test_a_shell_on_a_terminal(vm_kernel: Path):
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(DETOUR_LAB, [DETOUR_LAB, "vm", "--kernel", str(vm_kernel)],  # noqa: S606
                  {**os.environ, "SHELL": "/bin/sh", "PS1": "VM> "})
    try:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
        expect(terminal, "VM> ")
        os.write(terminal, b"stty size; sh -c 'tty; exec sleep 1000'\n")
        expect(terminal, "33 77")
        expect(terminal, "/dev/pts/")
        # Ctrl-C ends the shell's command, not the VM.
        os.write(terminal, b"\x03")
        expect(terminal, "VM> ")
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 44, 88, 0, 0))
        os.write(terminal, b"stty size; exit 9\n")
        expect(terminal, "44 88")
        wait_for(lambda: os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT), 30)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.close(terminal)


def expect(terminal: int, text: str, seconds: float = 60) -> None:
    """Read from the terminal up to ``text``."""
    seen = ""
    deadline = time.monotonic() + seconds
    while text not in seen:
        assert select.select([terminal], [], [], deadline - time.monotonic())[0], seen
        seen += os.read(terminal, 4096).decode(errors="replace")


def read_until(process: "subprocess.Popen[str]", text: str) -> str:
    """What the process prints, up to the line with ``text``."""
    assert process.stdout is not None
    seen = ""
    while text not in seen:
        line = process.stdout.readline()
        assert line, seen
        seen += line
    return seen


def test_settings_reach_the_vm(boot: Call):
    done = boot("--cpus", "1", "--memory", "512", "--append", "quiet", "--append",
                'dyndbg="file net/mptcp/* +p"', "--", "sh", "-c",
                "nproc; grep MemTotal /proc/meminfo; cat /proc/cmdline")
    cpus, memory, line = done.stdout.splitlines()
    assert cpus == "1"
    assert 380_000 < int(memory.split()[1]) < 512 * 1024
    assert 'quiet dyndbg="file net/mptcp/* +p"' in line


def test_a_time_limit(boot: Call):
    done = boot("--timeout", "8", "--", "sleep", "1000", status=124)
    assert done.stderr == "detour-lab: the VM was ended after 8 s\n"


def test_a_vm_that_dies_is_one_line(boot: Call):
    done = boot("--", "sh", "-c", "echo c >/proc/sysrq-trigger; sleep 100", status=1)
    assert re.fullmatch(r"detour-lab: the VM ended \(.*Kernel panic.*\)\n", done.stderr)


@pytest.mark.parametrize(("arguments", "status", "complaint"), [
    (["--kernel", "/nonexistent"], 1,
     "cannot read the kernel /nonexistent: No such file or directory"),
    (["--kernel", "/etc/passwd"], 1,
     "/etc/passwd is not a bootable kernel (a bzImage is needed)"),
    (["--bridge", "nonesuch"], 1,
     "there is no bridge 'nonesuch' (make it: ip link add nonesuch type bridge)"),
    (["--bridge", "lo"], 1, "'lo' is not a bridge"),
    (["--rw", "/nonexistent"], 1, "/nonexistent is not a folder"),
    (["--cpus", "0"], 2, "argument --cpus: 0 is not from 1 to 64"),
    (["--memory", "much"], 2,
     "argument --memory: 'much' is not MiB such as 1024, or GiB such as 2G"),
    (["--append", "init=/bin/sh"], 2, "--append 'init=/bin/sh' would keep the VM from booting"),
    (["--bridge", "a-name-that-is-too-long"], 1,
     "'a-name-that-is-too-long' cannot be the name of a bridge"),
    (["--", "nonesuch"], 127, "there is no command 'nonesuch'"),
    (["--", "/etc/passwd"], 126, "/etc/passwd is not executable"),
    (["--bogus"], 2, "unrecognized arguments: --bogus"),
])
def test_what_is_wrong_is_one_line(boot: Call, arguments: list[str], status: int,
                                   complaint: str):
    done = boot(*arguments, status=status)
    assert re.fullmatch(
        rf"detour-lab( vm)?: {re.escape(complaint)}( \(see detour-lab.*--help\))?\n", done.stderr)


def test_without_a_kernel_it_says_how_to_make_one(tmp_path: Path):
    # By sudo it finds the user's, too.
    environment = {name: value for name, value in os.environ.items() if name != "SUDO_USER"}
    done = subprocess.run([DETOUR_LAB, "vm"], capture_output=True, text=True, check=False,
                          env={**environment, "XDG_CACHE_HOME": str(tmp_path)})
    assert (done.returncode, done.stderr) == (
        1, f"detour-lab: there is no kernel in {tmp_path}/detour-tools/kernel/vm "
           "(run 'make kernel', or name one: --kernel IMAGE)\n")


# NICs


@pytest.fixture
def bridged() -> Iterator[Host]:
    """A namespace with two bridges, a DHCP server on the first."""
    name = f"{unique_lab_name()}-server"
    namespaces.create(name)
    host = Host("server", name, ip_address("192.168.9.1"))
    try:
        for bridge in ("br0", "br1"):
            host.run(["ip", "link", "add", bridge, "type", "bridge"])
            host.run(["ip", "link", "set", bridge, "up"])
        host.run(["ip", "address", "add", "192.168.9.1/24", "dev", "br0"])
        with Daemon(host, ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null",
                           "--port=0", "--no-ping", "--user=root", "--log-facility=-",
                           "--pid-file=", "--dhcp-leasefile=/dev/null", "--interface=br0",
                           "--except-interface=lo", "--bind-interfaces",
                           "--dhcp-range=192.168.9.100,192.168.9.110,1h"]) as server:
            server.wait_line("sockets bound")
            yield host
    finally:
        namespaces.end_processes([name])
        namespaces.remove(name)


def ports(host: Host, bridge: str = "br0") -> list[str]:
    """The interfaces in the bridge."""
    return [link["ifname"] for link in json.loads(
        host.run(["ip", "-j", "link", "show", "master", bridge]).stdout or "[]")]


def test_a_nic_gets_an_address_by_dhcp(boot: Call, bridged: Host, tmp_path: Path):
    with Capture(bridged, "br0", tmp_path / "pcap", expression="icmp") as capture:
        done = boot("--bridge", "br0", "--", "sh", "-c",
                    "ip -4 -br address show eth0; ip route; ping -qc1 192.168.9.1",
                    prefix=tuple(bridged.argv([])))
    assert re.search(r"eth0 +UP +192\.168\.9\.1(0\d|10)/24 ", done.stdout)
    assert "default via 192.168.9.1 dev eth0" in done.stdout
    assert done.stderr == ""
    assert bridged.run(["tcpdump", "-nr", capture.path], check=False).stdout.count("echo") == 2
    assert ports(bridged) == []


def test_no_lease_is_one_line(boot: Call, bridged: Host):
    done = boot("--bridge", "br0", "--bridge", "br1", "--", "ip", "-4", "-br", "address",
                prefix=tuple(bridged.argv([])))
    assert done.stderr == ("detour-lab: note: no address by DHCP for eth1, the NIC on the "
                           "bridge br1\n")
    assert re.search(r"eth0 .*192\.168\.9\.", done.stdout)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_nothing_is_left_after_a_signal(vm_kernel: Path, bridged: Host, signum: int):
    with bridged.popen([DETOUR_LAB, "vm", "--kernel", vm_kernel, "--bridge", "br0", "--", "sh",
                        "-c", "echo here; sleep 1000"], stdout=subprocess.PIPE,
                       stderr=subprocess.PIPE, start_new_session=True) as process:
        try:
            read_until(process, "here")
            assert len(ports(bridged)) == 1
            process.send_signal(signum)
            _, complaint = process.communicate(timeout=20)
        finally:
            process.kill()
    assert complaint == ""
    assert process.returncode == (-signum if signum == signal.SIGKILL else 128 + signum)
    wait_for(lambda: ports(bridged) == [], 5)
    wait_for(lambda: all("qemu" not in command for _, command in bridged.processes()), 5)
    wait_for(lambda: left_by(process) == [], 5)


# The session's VM, and labs within


def test_many_commands_at_once(vm: Vm):
    with contextlib.ExitStack() as running:
        cats = [running.enter_context(vm.start(f"echo {number}; sleep 1000"))
                for number in range(8)]
        for number, cat in enumerate(cats):
            assert cat.wait_line(r"^\d+$", 60) == str(number)
        assert vm.run("pgrep -cx sleep").stdout == "8\n"
    # Those whose stand-ins on the host went, are ended.
    wait_for(lambda: vm.run("pgrep -cx sleep", status=None).stdout == "0\n", 20)


def test_a_killed_command_does_not_disturb_the_next(vm: Vm):
    for _ in range(5):
        flood = vm.start("yes")
        wait_for(lambda: flood.lines, 30)  # noqa: B023
        flood.kill()
        assert vm.run("echo clean").stdout == "clean\n"
    wait_for(lambda: vm.run("pgrep -cx yes", status=None).stdout == "0\n", 20)


def test_the_results_folder_is_shared(vm: Vm):
    (vm.results / "given").write_text("by the host\n")
    vm.run(f"cat {vm.results}/given >{vm.results}/taken")
    assert (vm.results / "taken").read_text() == "by the host\n"


def test_a_splat_is_found(vm: Vm):
    before = len(vm.dmesg())
    vm.run("echo 'WARNING: CPU: 0 PID: 1 at net/core/dev.c' >/dev/kmsg")
    with pytest.raises(pytest.fail.Exception, match="the kernel complained"):
        vm.check_log(before)
    vm.splats("WARNING: CPU: 0 PID: 1 at net/core/dev.c")


def milliseconds(ping: str) -> float:
    found = re.search(r"= [\d.]+/([\d.]+)/", ping)
    assert found, ping
    return float(found[1])


def test_a_lab_in_the_vm_delays(vm_lab: MakeVmLab):
    lab = vm_lab("--l2-delay", 100)
    client = lab.host("client")
    client.run(["ping", "-qc1", "server"])
    client.run(["ping", "-qc1", "detour"])
    slow = milliseconds(client.run(["ping", "-qc5", "-i0.2", "server"]).stdout)
    # 5 ms on each of the other links, of which the way to the detour has three.
    quick = milliseconds(client.run(["ping", "-qc5", "-i0.2", "detour"]).stdout)
    assert 215 < slow < 280
    assert 30 < quick < 95


@pytest.fixture
def name() -> Iterator[str]:
    """A name for a lab in a VM; it is gone after the test."""
    made = unique_lab_name()
    yield made
    subprocess.run([DETOUR_LAB, "--name", made, "down"], check=False, capture_output=True)


def test_up_exec_status_and_down(vm_kernel: Path, name: str):
    def call(*arguments: str, status: int = 0, **options: Any) -> str:
        done = subprocess.run([DETOUR_LAB, "--name", name, *arguments], text=True, check=False,
                              capture_output=True, timeout=120, **options)
        assert done.returncode == status, done
        return str(done.stdout + done.stderr)

    up = ("up", "--vm", "--kernel", str(vm_kernel), "--rate", "L1=50")
    assert "is up in a VM" in call(*up)
    assert "was up already in a VM" in call(*up)
    assert "already up as another network" in call(*up, "--detours", "2", status=1)
    assert "already up, in a VM" in call("up", status=1)
    assert call("exec", "client", "--", "sh", "-c", "ip -br address show L1; exit 6",
                status=6).split()[2] == "10.0.1.1/24"
    assert call("exec", "client", "cat", input="through\n") == "through\n"
    assert call("exec", "vm", "uname", "-r") != os.uname().release + "\n"
    assert "has no host 'nobody'" in call("exec", "nobody", "true", status=2)
    assert "there is no command 'nonesuch'" in call("exec", "client", "nonesuch", status=127)
    shown = json.loads(call("status", "--json"))
    assert shown["netem"] is True
    assert {link["name"]: link["rate_mbps"] for link in shown["links"]}["L1"] == 50
    with subprocess.Popen([DETOUR_LAB, "--name", name, "exec", "server", "--", "sh", "-c",
                           "trap 'exit 42' INT; echo here; while :; do sleep 0.1; done"],
                          stdout=subprocess.PIPE, text=True) as process:
        read_until(process, "here")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 42
    pid = int((vm.folder_of(f"lab-{name}") / "pid").read_text())
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not vm.Machine(f"lab-{name}").alive())
    assert re.fullmatch(rf"detour-lab: the VM of the lab '{name}' has died \(.*; take it down and "
                        r"up again\)\n", call("exec", "client", "true", status=1))
    assert call("down") == f"the lab '{name}' is down\n"
    assert not vm.folder_of(f"lab-{name}").exists()
    assert "is not up" in call("exec", "client", "true", status=1)


def test_an_interrupted_up_leaves_no_vm(vm_kernel: Path, name: str):
    folder = vm.folder_of(f"lab-{name}")
    with subprocess.Popen([DETOUR_LAB, "--name", name, "up", "--vm", "--kernel",
                           vm_kernel]) as process:
        wait_for(folder.exists, 20)
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert process.returncode != 0
    assert not folder.exists()
    assert state.load(name) is None
    assert subprocess.run(["pgrep", "-f", f"detour-{folder.name}"], check=False,
                          capture_output=True).stdout == b""


def test_what_a_crash_left_of_one_kind_is_removed_by_the_other(vm_kernel: Path, name: str):
    half = state.State(reference_topology(), complete=False)
    with state.locked(name):
        state.save(name, half)
    subprocess.run(["ip", "netns", "add", f"{name}-client"], check=True)
    subprocess.run([DETOUR_LAB, "--name", name, "up", "--vm", "--kernel", vm_kernel], check=True)
    assert not (namespaces.RUN / f"{name}-client").exists()
    with state.locked(name):
        state.forget(name)
    subprocess.run([DETOUR_LAB, "--name", name, "down"], check=True)
    assert not vm.folder_of(f"lab-{name}").exists()
    with state.locked(name):
        state.save(name, state.State(reference_topology(), complete=False, vm=True))
    subprocess.run([DETOUR_LAB, "--name", name, "up"], check=True)
    subprocess.run([DETOUR_LAB, "--name", name, "down"], check=True)
