# SPDX-License-Identifier: GPL-2.0-or-later
"""Variables that no role knows are told before anything changes; what an empty group means."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml

from detour_tools.client.settings import ClientSettings
from detour_tools.server.settings import RELOADABLE, Settings
from tests.unit import role_modules

ROOT = Path(__file__).parents[2]
_THIS_HOST: dict[str, object] = {"ansible_connection": "local",
                                 "ansible_python_interpreter": "/usr/bin/python3"}
_CONTRADICTION = ("monitoring_state is the old name of capture_state, and both are set, to "
                  "different values: keep capture_state")
_PLAYBOOK = Path(sys.executable).with_name("ansible-playbook")


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return role_modules.load("supported/filter_plugins/detour_variables.py", monkeypatch)


@pytest.mark.parametrize(("name", "said"), [
    ("detour_client_exlude", ["detour_client_exlude (is detour_client_exclude meant?)"]),
    ("detour_cleint_exclude", ["detour_cleint_exclude (is detour_client_exclude meant?)"]),
    ("detour_adress", ["detour_adress (is detour_address meant?)"]),
    ("mptcp_kernel_reboot", ["mptcp_kernel_reboot (is mptcp_kernel_reboot_ok meant?)"]),
    ("ip_forward_xyz_quite_another", ["ip_forward_xyz_quite_another"]),
    ("bridge_bridge", ["bridge_bridge (is bridge_bridges meant?)"]),
    ("monitoring_authorised_keys",
     ["monitoring_authorised_keys (is capture_authorized_keys meant?)"]),
    # Old names.
    ("monitoring_authorized_keys", []), ("monitoring_state", []),
    # Others' variables, and what our roles note for themselves.
    ("monitoring_server", []), ("capture_output", []), ("bridge_ports", []), ("ansible_host", []),
    ("detour", []),
    ("detour_address", []), ("detour_common_release", []), ("ip_forward_opened", []),
    ("mptcp_kernel_reboot_required", []), ("detour_server_port", []),
])
def test_names(program: ModuleType, name: str, said: list[str]) -> None:
    assert program.misspelt([name]) == [f"no role knows {each}" for each in said]


@pytest.mark.parametrize(("value", "said"), [
    ("8443", "detour_server_forbid_port is '8443', and is to be a list: [8443]"),
    (8443, "detour_server_forbid_port is 8443, and is to be a list: [8443]"),
    ({"a": 1}, "detour_server_forbid_port is {'a': 1}, and is to be a list: [{'a': 1}]"),
    ([8443], None), ((8443,), None), ([], None),
])
def test_what_is_no_list(program: ModuleType, value: object, said: str | None) -> None:
    variables = {"detour_server_forbid_port": value}
    assert program.unlisted(variables, variables) == ([said] if said else [])


def test_what_is_no_dictionary(program: ModuleType) -> None:
    wrong = "mptcp_sysctls is 'a=1', and is to be a dictionary: {key: value}"
    for value, said in (("a=1", [wrong]), ({}, [])):
        variables = {"mptcp_sysctls": value}
        assert program.unlisted(variables, variables) == said


def test_what_a_variable_is_made_of_is_looked_at_unless_that_is_a_look_up(
        program: ModuleType) -> None:
    values = {"detour_client_include": "10.0.0.0/8"}
    made = {"detour_client_include": "{{ mine }}"}
    assert program.unlisted(made, values) == [
        "detour_client_include is '10.0.0.0/8', and is to be a list: [10.0.0.0/8]"]
    assert program.unlisted({"detour_client_include": "{{ lookup('pipe', 'slow') }}"}, values) == []
    assert program.unlisted(made, {}) == [], "not known yet"


def test_old_names_and_those_of_now(program: ModuleType) -> None:
    assert program.renamed(("capture_state", "monitoring_server"), ("capture", "all")) == []
    assert ", ".join(program.renamed(("monitoring_state", "capture_state"), ("monitoring",))) == (
        "monitoring_state (use capture_state), tag monitoring (use capture)")
    assert program.both(("monitoring_state", "capture_authorized_keys")) == []
    assert tuple(program.both(("monitoring_state", "capture_state", "detour_address"))) == (
        "monitoring_state", "capture_state")


@pytest.mark.parametrize(("values", "wrong"), [
    ({"monitoring_state": "absent"}, False), ({"capture_state": "absent"}, False),
    ({"monitoring_state": "absent", "capture_state": "absent"}, False),
    ({"monitoring_state": "absent", "capture_state": "present"}, True)])
def test_both_names_and_different_values(program: ModuleType, values: dict[str, str],
                                         wrong: bool) -> None:
    assert program.contradicting(values) == [_CONTRADICTION] * wrong


def test_a_text_for_a_list_by_its_old_name(program: ModuleType) -> None:
    values = {"monitoring_authorized_keys": "ssh-ed25519 AAAA"}
    assert program.unlisted(values, values) == [
        "monitoring_authorized_keys is 'ssh-ed25519 AAAA', and is to be a list: [ssh-ed25519 AAAA]"]


def test_groups_that_are_nearly_ours(program: ModuleType) -> None:
    assert program.near(("all", "ungrouped", "clinets", "site_berlin", "detours"),
                        ("clients", "detours")) == ["Is 'clients' meant by group 'clinets'?"]


_EXAMPLE = ROOT / "inventories/example"


def test_what_stands_behind_a_number_sign_in_the_example_is_the_default() -> None:
    options: dict[str, Any] = {}
    for path in ROOT.glob("roles/*/meta/argument_specs.yml"):
        specs = yaml.safe_load(path.read_text(encoding="utf-8"))["argument_specs"]
        options |= specs["main"].get("options", {})
    told = {}
    for path in _EXAMPLE.glob("**/*.yml"):
        for line in path.read_text(encoding="utf-8").splitlines():
            found = re.fullmatch(r"# *(\w+: .*|\w+:)", line)
            if found and (setting := yaml.safe_load(found[1])).keys() <= options.keys():
                told |= setting
    assert len(told) > 20
    assert told == {name: options[name]["default"] for name in told}


def test_nothing_of_the_example_is_set_that_is_easily_overlooked(program: ModuleType) -> None:
    # A copy keeps what holds for all hosts of our groups; those of a site or a host bear its name.
    for path in [*_EXAMPLE.glob("group_vars/all/*.yml"), *(
            _EXAMPLE / f"group_vars/{group}.yml" for group in ("detours", "clients"))]:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        assert not content.keys() - {"ansible_user"}, path
    hosts = yaml.safe_load((_EXAMPLE / "hosts.yml").read_text(encoding="utf-8"))
    assert not [name for name in re.findall(r"\w+", json.dumps(hosts))
                if name in program.known()[0] and name != "detour_address"]


@pytest.mark.parametrize(("variables", "address", "endpoint"), [
    ({}, "one", "one"),
    ({"ansible_host": "192.0.2.1"}, "192.0.2.1", "192.0.2.1"),
    ({"ansible_host": "10.0.0.1", "detour_address": "192.0.2.1"}, "192.0.2.1", "192.0.2.1"),
    ({"detour_address": "", "ansible_host": "192.0.2.1"}, "192.0.2.1", "192.0.2.1"),
    ({"detour_address": "192.0.2.1", "detour_server_listen": "0.0.0.0:4000"},
     "192.0.2.1", "192.0.2.1:4000"),
    ({"detour_address": "192.0.2.1", "detour_server_listen": "10.0.0.1"}, "192.0.2.1", "192.0.2.1"),
])
def test_where_a_host_is_reached(program: ModuleType, variables: dict[str, str], address: str,
                                 endpoint: str) -> None:
    host = {"inventory_hostname": "one"} | variables
    assert program.addresses([host]) == [address]
    assert program.endpoints([host]) == [endpoint]


def test_all_that_the_project_sets_itself_is_known(program: ModuleType) -> None:
    for path in [*ROOT.glob("inventories/**/*.yml"), *ROOT.glob("molecule/**/*_vars/*.yml")]:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert program.misspelt(content or []) == [], path


@pytest.mark.parametrize(("role", "settings", "others"), [
    # The others have the same default.
    ("detour_server", Settings, {"allow_client", "own_address"}),
    ("detour_client", ClientSettings, {"detours"})])
def test_each_setting_is_a_variable_of_the_role(role: str, settings: type,
                                                others: set[str]) -> None:
    folder = ROOT / "roles" / role
    options = yaml.safe_load((folder / "meta/argument_specs.yml").read_text(encoding="utf-8"))[
        "argument_specs"]["main"]["options"]
    [template] = [path.read_text(encoding="utf-8")
                  for path in (folder / "templates").glob("*.toml.j2")]
    kinds = get_type_hints(settings)
    for field in fields(settings):
        option = options[f"{role}_{field.name}"]
        assert re.search(rf"^{field.name.replace('_', '-')} = ", template, re.MULTILINE)
        if get_origin(kinds[field.name]) is Literal:
            assert tuple(option["choices"]) == get_args(kinds[field.name])
        if field.name not in others:
            wanted = list(field.default) if isinstance(field.default, tuple) else (
                "" if field.default is None else field.default)
            assert option["default"] == wanted, field.name


def test_what_no_reload_changes_restarts_the_server() -> None:
    unit = (ROOT / "roles/detour_server/templates/detour-server.service.j2").read_text()
    [named] = re.findall(r"^X-Restart-For={{ \[(.*)\]", unit, re.MULTILINE)
    assert {name.removeprefix("detour_server_") for name in named.split(", ")} == {
        field.name for field in fields(Settings)} - set(RELOADABLE)


def _play(folder: Path, *arguments: object, groups: dict[str, list[str]] | None = None,
          **variables: object) -> str:
    """What ansible-playbook says of an inventory with one detour, this host, and ``groups``."""
    children: dict[str, Any] = {"detours": {"hosts": {"one": _THIS_HOST | variables}}}
    for name, hosts in (groups or {}).items():
        children[name] = {"hosts": dict.fromkeys(hosts)}
    (folder / "hosts.yml").write_text(json.dumps({"all": {"children": children}}))
    return _run(folder, *arguments)


def _run(folder: Path, *arguments: object) -> str:
    """What ansible-playbook says, in check mode, of the inventory in the folder."""
    done = subprocess.run(
        [_PLAYBOOK, "-i", folder / "hosts.yml", "--check", *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "LC_ALL": "C.UTF-8", "HOME": str(folder)})
    return " ".join((done.stdout + done.stderr).split())


def test_a_misspelt_variable_is_found_before_anything_changes(tmp_path: Path) -> None:
    said = _play(tmp_path, "site.yml", detour_server_allow_clinet=["192.0.2.1"])
    assert ("Variables of one are wrong: no role knows "
            "detour_server_allow_clinet (is detour_server_allow_client meant?)") in said
    assert "Detours translate" not in said


def test_a_text_for_a_list_is_found_before_anything_changes(tmp_path: Path) -> None:
    said = _play(tmp_path, "site.yml", detour_server_forbid_port="8443")
    assert ("Variables of one are wrong: detour_server_forbid_port is '8443', and is to be a list: "
            "[8443].") in said
    assert "Detours translate" not in said


@pytest.mark.parametrize("variables", [
    {"detour_server_forbid_port": "8443"}, {"detour_server_deny_port": 25},
    {"detour_server_allow_client": "{{ ['192.0.2.1'] | first }}"}])
def test_so_it_is_for_a_role_in_a_playbook_of_ones_own(
        tmp_path: Path, variables: dict[str, object]) -> None:
    (tmp_path / "own.yml").write_text(json.dumps(
        [{"hosts": "one", "gather_facts": False, "roles": ["ip_forward"]}]))
    said = _play(tmp_path, tmp_path / "own.yml", "--tags=none", **variables)
    assert f"Variables of one are wrong: {next(iter(variables))} is " in said


def test_hosts_in_groups_of_other_names_are_told(tmp_path: Path) -> None:
    said = _play(tmp_path, "site.yml", "--tags=none", groups={"clinets": ["two"]})
    said = said.replace("''", "'")  # as YAML has it
    assert ("two: nothing is done there, as none of these is in any of the groups detours, "
            "clients, vm_hosts, kernel_builders. Is 'clients' meant by group 'clinets'?") in said
    assert said.count("nothing is done there") == 1


def test_so_it_is_in_a_playbook_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "own.yml").write_text(json.dumps(
        [{"hosts": "one", "gather_facts": False, "roles": ["ip_forward"]}]))
    said = _play(tmp_path, tmp_path / "own.yml", "--tags=none", ip_forward_firewal=True)
    assert "ip_forward_firewal (is ip_forward_firewall meant?)" in said


@pytest.mark.parametrize(("variables", "line", "told"), [
    ({}, "allow-client = []", True),
    ({"detour_server_allow_client": ["192.0.2.1"]}, 'allow-client = ["192.0.2.1"]', False),
])
def test_an_empty_group_of_clients_lets_nobody_in(
        tmp_path: Path, variables: dict[str, object], line: str, told: bool) -> None:
    template = "roles/detour_server/templates/server.toml.j2"
    show = {"debug": {"msg": f"{{{{ lookup('template', '{template}') | split('\\n') }}}}"}}
    (tmp_path / "own.yml").write_text(json.dumps([{
        "hosts": "one", "gather_facts": False, "vars": {"detour_common_release": "r1"}, "tasks": [
            {"import_role": {"name": "detour_server", "tasks_from": "preflight.yml"}}, show]}]))
    (tmp_path / "roles").symlink_to(ROOT / "roles")
    said = _play(tmp_path, tmp_path / "own.yml", **variables)
    assert line in said.replace("\\", ""), said
    assert ("one lets nobody in: detour_server_allow_client is empty. Put hosts" in said) == told
    # Nor is the firewall opened for anybody else.
    assert "10.0.0.0/8" not in (ROOT / "roles/detour_server/tasks/configure.yml").read_text("utf-8")


@pytest.mark.parametrize(("host", "missing"), [
    ({"ansible_host": "2001:db8::7"}, "2001:db8::7"),
    ({"ansible_host": "nobody-knows.invalid"}, "nobody-knows.invalid"),
    ({"ansible_host": "nobody-knows.invalid", "detour_server_listen": "0.0.0.0:4000"},
     "nobody-knows.invalid"),
    ({"ansible_host": "2001:db8::7", "detour_address": "192.0.2.7"}, None),
    ({"detour_address": "localhost"}, None),
])
def test_a_detour_that_clients_cannot_ask_is_told_before_anything_changes(
        tmp_path: Path, host: dict[str, str], missing: str | None) -> None:
    (tmp_path / "hosts.yml").write_text(json.dumps({"all": {"children": {
        "detours": {"hosts": {"good": {"detour_address": "192.0.2.1"}, "bad": host}},
        "clients": {"hosts": {"one": _THIS_HOST}}}}}))
    (tmp_path / "own.yml").write_text(json.dumps([{
        "hosts": "one", "gather_facts": False, "vars": {"detour_common_release": "r1"}, "tasks": [
            {"import_role": {"name": "detour_client", "tasks_from": "preflight.yml"}}]}]))
    (tmp_path / "roles").symlink_to(ROOT / "roles")
    said = _run(tmp_path, tmp_path / "own.yml")
    assert ("failed=0" in said) == (missing is None), said
    if missing is not None:
        assert f"one finds no IPv4 address of {missing}, and would ask no detour there; set " \
               "detour_address of the host" in said


_KEYS = ["ssh-ed25519 AAAA old"], ["ssh-ed25519 AAAA new"]
_OLD_NAMES = "These names are old, and still hold: "


def _capture(folder: Path, *arguments: str, play: dict[str, object] | None = None,
             **variables: object) -> str:
    """What ansible-playbook says of role capture's preflight, and of what its variables are."""
    show = {"debug": {"msg": "It is {{ capture_state }}: {{ capture_authorized_keys | join }}."},
            "tags": ["always"]}
    (folder / "own.yml").write_text(json.dumps([{
        "hosts": "one", "gather_facts": False, "vars": play or {}, "roles": ["capture"],
        "post_tasks": [show]}]))
    return _play(folder, folder / "own.yml", *(arguments or ("--tags=preflight",)), **variables)


@pytest.mark.parametrize(("variables", "state", "keys", "old"), [
    ({}, "present", "", None),
    ({"capture_state": "absent", "capture_authorized_keys": _KEYS[1]}, "absent", _KEYS[1][0], None),
    ({"monitoring_state": "absent"}, "absent", "", "monitoring_state (use capture_state)"),
    ({"monitoring_authorized_keys": _KEYS[0]}, "present", _KEYS[0][0],
     "monitoring_authorized_keys (use capture_authorized_keys)"),
    ({"monitoring_state": "absent", "capture_state": "absent"}, "absent", "",
     "monitoring_state (use capture_state)"),
])
def test_an_old_name_holds_where_the_new_one_is_not_set(
        tmp_path: Path, variables: dict[str, object], state: str, keys: str,
        old: str | None) -> None:
    said = _capture(tmp_path, **variables)
    assert f"It is {state}: {keys}." in said, said
    assert said.count(_OLD_NAMES) == (old is not None)
    assert old is None or f"{_OLD_NAMES}{old}." in said


@pytest.mark.parametrize("by_play", [False, True])
def test_two_values_by_the_two_names_are_refused(tmp_path: Path, by_play: bool) -> None:
    new: dict[str, object] = {"capture_state": "absent"}
    said = (_capture(tmp_path, play=new, monitoring_state="present") if by_play
            else _capture(tmp_path, monitoring_state="present", **new))
    assert f"Variables of one are wrong: {_CONTRADICTION}." in said
    assert "It is" not in said


def test_two_values_by_the_two_names_are_refused_before_anything_changes(tmp_path: Path) -> None:
    said = _play(tmp_path, "site.yml", monitoring_state="present", capture_state="absent")
    assert f"Variables of one are wrong: {_CONTRADICTION}." in said
    assert "Detours translate" not in said


def test_the_old_tag_selects_what_the_new_one_does(tmp_path: Path) -> None:
    listed = {tag: re.findall(r"capture : [^\[]*", _play(
        tmp_path, "site.yml", f"--tags={tag}", "--list-tasks"))
        for tag in ("capture", "monitoring")}
    assert len(listed["capture"]) > 3
    assert listed["monitoring"] == listed["capture"]
    said = _capture(tmp_path, "--tags=monitoring", "--skip-tags=install,configure")
    assert f"{_OLD_NAMES}tag monitoring (use capture)." in said


@pytest.mark.parametrize("limit", [(), ("--limit=one",)])
def test_all_is_taken_away_whatever_an_old_name_says(
        tmp_path: Path, limit: tuple[str, ...]) -> None:
    said = _play(tmp_path, "playbooks/uninstall.yml", "--tags=capture", *limit,
                 monitoring_state="present", ansible_become=False)
    assert "capture : Remove the command" in said
    assert "failed=0" in said
    assert "failed=1" not in said
    assert said.count(f"{_OLD_NAMES}monitoring_state (use capture_state).") == 1
