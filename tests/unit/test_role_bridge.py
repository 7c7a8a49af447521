# SPDX-License-Identifier: GPL-2.0-or-later
"""detour_bridges: what is checked, what files come of it, and the scripts from one to another."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.module_utils.detour_bridging import host, way_back
from ansible.module_utils.detour_bridging.bridge import Bridge
from ansible.module_utils.detour_bridging.dnsmasq import DhcpByDnsmasq
from ansible.module_utils.detour_bridging.host import BridgeError
from ansible.module_utils.detour_bridging.ifupdown import MARK, Ifupdown, comment_out
from ansible.module_utils.detour_bridging.manager import Manager
from ansible.module_utils.detour_bridging.networkd import Networkd
from ansible.module_utils.detour_bridging.networkmanager import NetworkManager

from tests.unit import role_modules

_VMS: dict[str, Any] = {"name": "br-vm", "address": ["10.77.0.1/24"],
                        "dhcp": {"first": "10.77.0.50", "last": "10.77.0.99"}}
_UPLINK: dict[str, Any] = {"name": "br0", "ports": ["ens3"], "mac_from": "ens3"}
_MAC = "52:54:00:00:00:01"


@pytest.fixture(autouse=True)
def _on_a_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the interfaces ens3 and ens4."""
    monkeypatch.setattr(host, "SYS", tmp_path / "net")
    monkeypatch.setattr(host, "WORK", tmp_path / "work")
    for name in ("ens3", "ens4"):
        (host.SYS / name).mkdir(parents=True)
    (host.SYS / "ens3" / "address").write_text(f"{_MAC}\n")
    host.WORK.mkdir()
    _answer(monkeypatch, {})


def _answer(monkeypatch: pytest.MonkeyPatch, answers: dict[str, str]) -> None:
    """Have commands that begin so print that; others print nothing."""
    def run(*command: str, check: bool = True) -> str:
        del check
        return next((answer for begin, answer in answers.items()
                     if " ".join(command).startswith(begin)), "")
    monkeypatch.setattr(host, "run", run)


@pytest.mark.parametrize(("given", "message"), [
    ({"name": "a-bridge-of-long-name"}, "'a-bridge-of-long-name' is no name"),
    ({"name": "ens3"}, "ens3 is there already, and no bridge"),
    ({"name": "br0", "ports": ["eth7"]}, "no interface 'eth7'; there are: ens3 ens4"),
    ({"name": "br0", "ports": ["ens4"], "mac_from": "ens3"}, "'ens3' is none of its ports"),
    ({"name": "br0", "address": ["192.0.2.1"]}, "needs its prefix"),
    ({"name": "br0", "address": ["192.0.2.1/33"]}, "192.0.2.1/33"),
    ({"name": "br0", "address": ["192.0.2.1/24"], "gateway": "198.51.100.1"},
     "gateway 198.51.100.1 is in none"),
    (_VMS | {"ports": ["ens4"]}, "a DHCP server is for a bridge without ports"),
    (_VMS | {"address": ["fd00::1/64"]}, "needs an IPv4 address"),
    (_VMS | {"dhcp": {"first": "10.77.0.50"}}, "needs first and last"),
    (_VMS | {"dhcp": {"first": "10.77.0.1", "last": "10.77.0.9"}}, "beside the bridge's own"),
])
def test_what_is_wrong_is_said(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BridgeError, match=re.escape(message)):
        Bridge(given)


def test_an_address_may_be_written_in_any_form(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = Bridge({"name": "br0", "address": [
        "FD00:0:0::01/64", "10.0.0.1/255.255.255.0"]})
    assert bridge.address == ["fd00::1/64", "10.0.0.1/24"]
    (host.SYS / "br0" / "bridge").mkdir(parents=True)
    shown = "4: br0    inet 10.0.0.1/24 scope global br0\\ valid_lft forever\n"
    _answer(monkeypatch, {"ip -o addr": shown})
    assert bridge.done() == "br0 has no address fd00::1/64"
    _answer(monkeypatch, {
        "ip -o addr": f"{shown}4: br0    inet6 fd00::1/64 scope global \\ valid_lft forever\n"})
    assert not bridge.done()


def test_a_bridge_without_its_default_route_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = Bridge({"name": "br0", "address": ["fd00::2/64"], "gateway": "FD00::01"})
    (host.SYS / "br0" / "bridge").mkdir(parents=True)
    address = {"ip -o addr": "4: br0    inet6 fd00::2/64 scope global \\ valid_lft forever\n"}
    _answer(monkeypatch, address)
    assert bridge.done() == "br0 has no default route by fd00::1"
    _answer(monkeypatch, address | {
        "ip -6 route show default via fd00::1 dev br0": "default via fd00::1"})
    assert not bridge.done()


@pytest.fixture
def dnsmasq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"/usr/sbin/{name}")


@pytest.mark.usefixtures("dnsmasq")
def test_a_default_route_is_told_only_when_asked_for() -> None:
    def told(**more: bool) -> tuple[str, str]:
        made = [Bridge(_VMS | {"dhcp": _VMS["dhcp"] | more})]
        files = Networkd().files(made) | DhcpByDnsmasq.files(made)
        return (files["/etc/systemd/network/05-detour-br-vm.network"][0],
                files["/etc/detour-tools/bridge-br-vm.dnsmasq"][0])

    networkd, dnsmasq = told()
    assert "EmitRouter=no\n" in networkd
    assert "dhcp-option=option:router\n" in dnsmasq  # without a value dnsmasq tells none
    networkd, dnsmasq = told(router=True)
    assert "EmitRouter=yes\n" in networkd
    assert "option:router" not in dnsmasq


@pytest.mark.usefixtures("dnsmasq")
def test_the_dhcp_server_of_dnsmasq_is_confined(tmp_path: Path) -> None:
    files = DhcpByDnsmasq.files([Bridge(_VMS)])
    unit = tmp_path / "detour-bridge-dhcp-br-vm.service"
    unit.write_text(files[f"/etc/systemd/system/{unit.name}"][0])
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=49", "--no-pager", unit],
        capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


_STANZA = """\
auto ens3
iface ens3 inet static
    address 10.0.0.2/24
    pre-up ethtool -K ens3 gro off
    up ip route add 10.1.0.0/16 via 10.0.0.1 dev ens3
    up ip address add 10.0.0.3/24 dev ens3 label ens3:1
    up ip route add 10.2.0.0/16 via 10.3.0.1 dev ens3.10
    up ip route add 10.4.0.0/16 dev xens3 || ip route add 10.4.0.0/16 dev ens3
    up echo 1 >/proc/sys/net/ipv4/conf/ens3/forwarding
    # and so on

auto ens4
iface ens4 inet dhcp
"""


def test_a_stanza_that_is_taken_over_speaks_of_the_bridge() -> None:
    text, taken = comment_out(_STANZA, {"ens3"})
    assert text.replace(MARK, "") == _STANZA
    assert re.findall("^(?!#).+", text, re.MULTILINE) == ["auto ens4", "iface ens4 inet dhcp"]
    assert Ifupdown._stanza(Bridge(_UPLINK), taken).splitlines() == [
        "", "auto br0", "iface br0 inet static",
        "    pre-up ip link show br0 >/dev/null 2>&1 || "
        f"ip link add br0 address {_MAC} type bridge",
        "    pre-up ip link set ens3 master br0 up",
        "    post-down ip link delete br0 type bridge 2>/dev/null || true",
        "    address 10.0.0.2/24",
        "    pre-up ethtool -K ens3 gro off",
        "    up ip route add 10.1.0.0/16 via 10.0.0.1 dev br0",
        "    up ip address add 10.0.0.3/24 dev br0 label br0:1",
        "    up ip route add 10.2.0.0/16 via 10.3.0.1 dev ens3.10",
        "    up ip route add 10.4.0.0/16 dev xens3 || ip route add 10.4.0.0/16 dev br0",
        "    up echo 1 >/proc/sys/net/ipv4/conf/br0/forwarding"]


def test_a_line_that_names_a_port_beside_others_is_refused() -> None:
    with pytest.raises(BridgeError, match="a line of its own"):
        comment_out("auto ens3 ens4\n", {"ens3"})


_Files = Callable[..., dict[str, tuple[str, int]]]


@pytest.fixture
def networkd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> _Files:
    """Its files for bridges; what the uplink was configured with is there."""
    source = tmp_path / "20-uplink.network"
    source.write_text("[Match]\nName=ens3\n\n[Network]\n# by DHCP\nDHCP=yes\n")
    _answer(monkeypatch, {"networkctl status": (
        f" Network File: {source}\n DHCP4 Client ID: IAID:0x10/DUID\n")})
    return lambda *given: Networkd().files([Bridge(each) for each in given])


@pytest.mark.usefixtures("dnsmasq")
def test_files_are_known_by_their_bridges(
        networkd: _Files, monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path) -> None:
    wanted = [_UPLINK | {"address": ["10.0.0.2/24"]}, _VMS]
    expected = {"br0": {"ens3"}, "br-vm": set()}
    assert Networkd().bridges_of(networkd(*wanted)) == expected
    made = [Bridge(each) for each in wanted]
    assert NetworkManager().bridges_of(NetworkManager().files(made)) == expected
    hosts = tmp_path / "interfaces"
    hosts.write_text("source /etc/network/interfaces.d/*\n")
    monkeypatch.setattr(Ifupdown, "_hosts", classmethod(lambda cls: [hosts]))
    assert Ifupdown().bridges_of(Ifupdown().files(made)) == expected
    # A unit that is another is that bridge's, too.
    files = DhcpByDnsmasq.files(made)
    assert Ifupdown().bridges_of({path: each for path, each in files.items()
                                  if path.endswith(".service")}) == {"br-vm": set()}


def test_networkd_gets_what_the_uplink_had(networkd: _Files) -> None:
    files = networkd(_UPLINK)
    assert files["/etc/systemd/network/05-detour-br0.network"][0].partition("20-uplink")[2] == (
        ".network\n[Network]\nDHCP=yes\n\n[DHCPv4]\nIAID=16\n")
    assert f"MACAddress={_MAC}\n" in files["/etc/systemd/network/05-detour-br0.netdev"][0]


def test_a_port_has_nothing_to_take_over(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/etc/systemd/network/05-detour-br0-port-ens3.network"
    profile = "/etc/NetworkManager/system-connections/detour-br0-port-ens3.nmconnection"
    _answer(monkeypatch, {
        "networkctl status": f" Network File: {path}\n", "nmcli -g": "1-2\n",
        "nmcli -t -f UUID": f"3-4:/run/other\n1-2:{profile}\n"})
    for manager in Networkd(), NetworkManager():
        with pytest.raises(BridgeError, match="ens3 is its port already"):
            manager.files([Bridge(_UPLINK)])


def test_only_a_bridge_that_must_be_another_is_made_anew(networkd: _Files) -> None:
    def script(before: dict[str, Any], after: dict[str, Any], *undone: str) -> str:
        text: str = way_back.script(Networkd(), (networkd(_VMS, before),),
                                    networkd(_VMS, after), set(undone), "new", "applied")
        assert undone or "br-vm" not in re.sub("^install .*", "", text, flags=re.MULTILINE)
        return text

    before = {"name": "br1", "address": ["10.1.0.1/24"]}
    other = script(before, before | {"address": ["10.1.0.2/24"]})
    assert "networkctl reconfigure br1" in other
    assert "ip link delete" not in other
    for after in (before | {"ports": ["ens4"]}, before | {"ports": ["ens3"], "mac_from": "ens3"}):
        assert "ip link delete br1" in script(before, after)
        assert f"reconfigure {after['ports'][0]} " in script(after, before)
    assert "ip link delete br-vm" in script(before, before, "br-vm")


def test_virtual_machines_come_back_into_their_bridge(networkd: _Files, tmp_path: Path) -> None:
    before = networkd({"name": "br1", "address": ["10.1.0.1/24"], "ports": ["ens4"]})
    after = networkd({"name": "br1", "address": ["10.1.0.1/24"], "ports": ["ens3"],
                      "mac_from": "ens3"})
    for port in ("ens4", "tap0", "vm-1"):
        (host.SYS / "br1" / "brif" / port).mkdir(parents=True)
        (host.SYS / port).mkdir(exist_ok=True)
    # As if the other script had been stopped in between.
    (host.WORK / "carried-br1").write_text("vm-0\ngone\n")
    (host.SYS / "vm-0").mkdir()
    (host.WORK / "new").mkdir()
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("install", "networkctl", "rm"):
        (tools / tool).symlink_to("/bin/true")
    (tools / "ip").write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/said\n')
    (tools / "ip").chmod(0o755)
    text = way_back.script(Networkd(), (before,), after, set(), "new", "applied")
    subprocess.run(["/bin/sh", "-s"], input=text, text=True, check=True, timeout=60,
                   env={"PATH": f"{tools}:/usr/bin:/bin"})
    assert (tmp_path / "said").read_text().splitlines() == [
        "link delete br1 type bridge", "link set tap0 master br1", "link set vm-0 master br1",
        "link set vm-1 master br1"]
    assert (host.WORK / "applied").exists()


def test_what_nobody_confirmed_does_not_become_the_way_back(
        networkd: _Files, monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path) -> None:
    monkeypatch.setattr(way_back, "UNITS", tmp_path)
    monkeypatch.setattr(way_back, "wait_for", lambda *_: True)
    original = networkd(_VMS)
    first = networkd(_VMS, {"name": "br1", "address": ["10.1.0.1/24"]})
    second = networkd(_VMS | {"address": ["10.77.0.2/24"]})

    # Of a run that was killed before it changed anything.
    (host.WORK / "old").mkdir()
    (host.WORK / "old" / "files").write_text("{}")
    way_back.change(Networkd(), original, first, [], 120)
    way_back.change(Networkd(), first, second, [], 120)

    rollback = (host.WORK / "rollback").read_text()
    for path in first.keys() - original.keys():
        assert f"rm -f {path}\n" in rollback
    assert {path: (host.WORK / "old" / number).read_text() for number, path in re.findall(
        rf"^install .* {host.WORK}/old/(\d+) (\S+)$", rollback, re.MULTILINE)} == {
            path: text for path, (text, _) in original.items()}


def test_the_way_back_has_the_hosts_own_files_of_every_change(
        monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ifupdown: a change nobody confirmed left /etc/network/interfaces alone, this one does not."""
    monkeypatch.setattr(way_back, "UNITS", tmp_path)
    monkeypatch.setattr(way_back, "wait_for", lambda *_: True)
    manager = Ifupdown()
    hosts, own = "/etc/network/interfaces", manager.own
    plain = (_STANZA, 0o644)
    first = {own: ("auto br-vm\n", 0o644)}
    second = {own: ("auto br-vm\nauto br0\n", 0o644),
              hosts: (comment_out(_STANZA, {"ens3"})[0], 0o644)}

    way_back.change(manager, {}, first, [], 120)
    way_back.change(manager, first | {hosts: plain}, second, [], 120)
    way_back.change(manager, second, first | {hosts: plain}, [], 120)

    rollback = (host.WORK / "rollback").read_text()
    assert f"rm -f {own}\n" in rollback
    assert f"rm -f {hosts}\n" not in rollback
    assert f"install -D -m 644 {host.WORK}/old/0 {hosts}\n" in rollback
    assert (host.WORK / "old" / "0").read_text() == _STANZA


def test_who_runs_again_before_it_is_confirmed_confirms_it(
        networkd: _Files, monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path) -> None:
    program = role_modules.load("bridge/library/detour_bridges.py", monkeypatch)
    result: dict[str, Any] = {}
    given = {"bridges": [{"name": "br1"}], "manager": "networkd", "rollback": 77,
             "unfiltered": False, "qemu_acl": False, "qemu_helper_setuid": False, "confirm": False}
    module = SimpleNamespace(params=given, check_mode=False, exit_json=result.update)
    monkeypatch.setattr(program, "AnsibleModule", lambda *_, **__: module)
    monkeypatch.setattr(way_back, "UNITS", tmp_path)
    monkeypatch.setattr(Manager, "ours", lambda _: networkd({"name": "br1"}))
    (host.SYS / "br1" / "bridge").mkdir(parents=True)

    program.main()
    assert not result["applied"]
    (host.WORK / "apply").touch()
    program.main()
    assert result["applied"]
    assert "OnActiveSec=77" in (tmp_path / "detour-bridge-rollback.timer").read_text()
    # Also when none is left.
    monkeypatch.setattr(Manager, "ours", lambda _: {})
    given["bridges"] = []
    program.main()
    assert result["applied"]
    # It was put back in between: then there is nothing to confirm.
    (host.WORK / "rolled-back").touch()
    program.main()
    assert not result["applied"]
    assert not host.WORK.exists()


def test_what_ifupdown_could_not_bring_up_is_not_confirmed() -> None:
    (host.SYS / "br1" / "bridge").mkdir(parents=True)
    for name in ("apply", "applied"):
        (host.WORK / name).touch()
    (host.WORK / "failed").write_text("br1\n")
    with pytest.raises(BridgeError, match="'ifup br1' failed"):
        way_back.confirm([Bridge({"name": "br1"})], 30)
    assert (host.WORK / "apply").exists()
    # But a port's own stanza may have been as wrong before.
    bridge, port = (line for line in Ifupdown().up({"br1"}, {"ens3"}, set())
                    if "ifup " in line)
    assert f"ifup br1 || echo br1 >{host.WORK}/failed" in bridge
    assert "ifup ens3 || true" in port
