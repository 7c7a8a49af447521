# SPDX-License-Identifier: GPL-2.0-or-later
"""What is added to firewalld and taken from it, on one that answers as 1.3.3 and 2.3.1 do."""

import json
import re
from pathlib import Path

import pytest

from detour_tools.firewall import look, managers, opening, requests

_CLIENT = "203.0.113.0/24"
_RULE = (f'rule family="ipv4" source address="{_CLIENT}" port port="45672" protocol="udp" accept')
# As somebody wrote it, and as firewalld writes it.
_SHIPPED = """<?xml version="1.0" encoding="utf-8"?>
<zone>
  <short>Public</short>

  <description>
    For use in
    public areas.
  </description>
<forward />
<service name='ssh'/>
</zone>
"""
_WRITTEN = """<?xml version="1.0" encoding="utf-8"?>
<zone>
  <short>Public</short>
  <description>     For use in     public areas.   </description>
  <service name="ssh"/>
  <forward/>
</zone>
"""


class _Firewalld:
    """Its one zone is public, whose rules are kept as comments of its file."""

    def __init__(self, folder: Path) -> None:
        self.running = True
        self.runtime: dict[str, set[str]] = {"public": set()}
        self.own, self.shipped = folder / "etc", folder / "usr"
        for path in (self.own, self.shipped):
            path.mkdir()
        (self.shipped / "public.xml").write_text(_SHIPPED)

    def run(self, command: list[str]) -> bytes:
        program, *options = command
        if program == "ufw" or (program == "firewall-cmd" and not self.running):
            raise OSError("it is not there, or not running")
        if program == "firewall-offline-cmd" and self.running:
            raise AssertionError("its files would be written behind firewalld's back")
        at_boot = "--permanent" in options or program == "firewall-offline-cmd"
        words = dict(each.partition("=")[::2] for each in options)
        zone = words.get("--zone", words.get("--load-zone-defaults", ""))
        if "--state" in words:
            return b"running\n"
        if "--get-default-zone" in words:
            return b"public\n"
        if "--get-active-zones" in words:
            return b"public (default)\n  interfaces: up0\n"
        if "--load-zone-defaults" in words:
            assert at_boot
            (self.own / f"{zone}.xml").rename(self.own / f"{zone}.xml.old")
            return b"success\n"
        what, rule = next((name, value) for name, value in words.items() if "rich-rule" in name)
        rules = self.permanent(zone) if at_boot else self.runtime[zone]
        if what == "--query-rich-rule":
            if rule not in rules:
                raise OSError("no")
            return b"yes\n"
        rules ^= {rule}  # neither is asked for in vain
        assert (rule in rules) == (what == "--add-rich-rule")
        if at_boot:
            self._write(zone, rules)
        return b"success\n"

    def have(self, *, at_boot: bool) -> None:
        """As if its owner had told it the rule."""
        if at_boot:
            self._write("public", {_RULE})
        else:
            self.runtime["public"] = {_RULE}

    def permanent(self, zone: str) -> set[str]:
        path = self.own / f"{zone}.xml"
        return set(re.findall("<!-- (.*) -->", path.read_text())) if path.exists() else set()

    def _write(self, zone: str, rules: set[str]) -> None:
        path = self.own / f"{zone}.xml"
        text = path.read_text() if path.exists() else _WRITTEN
        lines = [line for line in text.splitlines() if "<!--" not in line]
        if path.exists():
            path.with_name(f"{path.name}.old").write_text(text)
        more = [f"  <rule/><!-- {each} -->" for each in rules]
        path.write_text("\n".join([*lines[:-1], *more, "</zone>", ""]))


@pytest.fixture
def firewalld(monkeypatch, tmp_path):
    fake = _Firewalld(tmp_path)
    monkeypatch.setattr(look, "run", fake.run)
    monkeypatch.setattr(look, "chains", lambda: ([], []))
    monkeypatch.setattr(managers, "_ZONES", fake.own)
    monkeypatch.setattr(managers, "_ZONES_SHIPPED", fake.shipped)
    monkeypatch.setattr(requests, "_STATE", tmp_path / "detour-tools/firewall.json")
    return fake


def _open(client=_CLIENT, **options):
    return requests.open_way("auto", 45672, [managers.IPv4Network(client)], **options)


def test_all_of_it_goes_again(firewalld):
    said = _open(only_say=True)
    assert list(firewalld.own.iterdir()) == []
    assert said == _open()
    assert said.added == (f"firewalld: public (now) {_RULE}",
                          f"firewalld: public (at boot) {_RULE}",
                          f"firewalld: public {firewalld.own}/public.xml")
    assert firewalld.runtime["public"] == firewalld.permanent("public") == {_RULE}
    assert _open() == opening.Change()
    _open("192.0.2.0/24")
    assert firewalld.runtime["public"] == {_RULE.replace(_CLIENT, "192.0.2.0/24")}
    assert len(requests.close_way().removed) == 3
    assert list(firewalld.own.iterdir()) == []
    assert firewalld.runtime == {"public": set()}
    assert requests.close_way() == opening.Change()


def test_a_file_of_the_owners_stays(firewalld):
    path = firewalld.own / "public.xml"
    path.write_text(_SHIPPED)
    _open()
    requests.close_way()
    assert path.exists()
    # Also one that the owner changed since.
    path.unlink()
    _open()
    path.write_text(path.read_text().replace("ssh", "http"))
    requests.close_way()
    assert "http" in path.read_text()


def test_where_firewalld_does_not_run_it_is_closed_at_boot(firewalld):
    _open()
    firewalld.running = False
    firewalld.runtime["public"].clear()
    requests.close_way()
    assert list(firewalld.own.iterdir()) == []


@pytest.mark.parametrize("at_boot", [True, False])
def test_half_of_it_was_the_owners(firewalld, at_boot):
    firewalld.have(at_boot=at_boot)
    _open()
    assert firewalld.runtime["public"] == firewalld.permanent("public") == {_RULE}
    assert _open() == opening.Change()
    requests.close_way()
    assert (firewalld.permanent("public"), firewalld.runtime["public"]) == (
        ({_RULE}, set()) if at_boot else (set(), {_RULE}))


def test_what_an_earlier_release_remembered(firewalld):
    firewalld.have(at_boot=True)
    firewalld.have(at_boot=False)
    managers.write(requests._STATE, json.dumps({"firewalld": [["public", _RULE]]}))
    assert _open() == opening.Change()
    requests.close_way()
    assert (firewalld.permanent("public"), firewalld.runtime["public"]) == (set(), set())
