# SPDX-License-Identifier: GPL-2.0-or-later
"""status, list and flush: what they say, what they cut, and who may ask."""

import itertools
import json
import re
import stat

import pytest

from detour_tools import control
from detour_tools.cli import server as command
from detour_tools.errors import UserError
from detour_tools.lab import namespaces
from tests.netns import asking
from tests.netns.asking import Asker, Flow, WhoAmI, kernel_mappings, mappings
from tests.netns.conftest import PRIVATE

AS_NOBODY = ("setpriv", "--reuid=65534", "--clear-groups")


@pytest.mark.parametrize("option", ["--client", "--remote"])
def test_flush_of_an_empty_text_is_an_error_and_drops_nothing(lab, serve, asker, option):
    serve()
    asker.ask("10.0.3.2:80", 80)
    done = lab.host("detour").run(["detour-server", "flush", option, ""], check=False)
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert mappings(lab.host("detour")) == {("10.0.1.1", 80, "10.0.3.2:80")}


def test_a_list_of_no_clients_lets_nobody_in(lab, start, tmp_path):
    settings = tmp_path / "server.toml"
    settings.write_text("allow-client = []\n")
    detour = lab.host("detour")
    start(detour, ["detour-server", "--config", settings]).wait_control_socket()
    assert "nobody" in detour.run(["detour-server", "status"]).stdout
    asker = Asker(lab.host("client"), detour.address)
    asker.send_request("130.104.230.45:80", 80)
    assert not list(asker.answers(1.0))
    asking.in_time("the refusal", (asking.status(detour)["refused"] == {"client": 1}
                                   for _ in itertools.count()))


def test_flush_cuts_the_flows_of_what_it_removes(lab, serve, backend):
    serve()
    detour, client, far = lab.host("detour"), lab.host("client"), lab.host("server")
    WhoAmI(far, 80)
    WhoAmI(far, 81)
    askers = {host: Asker(lab.host(host), detour.address) for host in ("client", "r1")}
    flows = {(host, port): Flow(lab.host(host), detour.address,
                                asker.ask(f"10.0.3.2:{port}", port))
             for host, asker in askers.items() for port in (80, 81)}

    def flush(*arguments: str) -> int:
        done = detour.run(["detour-server", "flush", "--json", *arguments])
        return json.loads(done.stdout)["flushed"]

    assert flush("--client", "10.9.9.9") == 0
    assert all(flow.echo() for flow in flows.values())
    assert flush("--client", "10.0.1.1", "--remote", "10.0.3.2:80") == 1
    assert asking.is_cut(flows.pop(("client", 80)))
    assert asking.refuses(client, detour.address, 80)
    assert all(flow.echo() for flow in flows.values())
    assert flush("--remote", "10.0.3.2:81") == 2
    assert asking.is_cut(flows.pop(("client", 81)))
    assert asking.is_cut(flows.pop(("r1", 81)))
    assert flows["r1", 80].echo()
    assert detour.run(["detour-server", "flush"]).stdout == "flushed 1 mappings\n"
    assert asking.is_cut(flows["r1", 80])
    assert kernel_mappings(detour, backend) == []
    assert mappings(detour) == set()
    # And it can be had again.
    assert Flow(client, detour.address, askers["client"].ask("10.0.3.2:80", 80)).echo()


def ask_many(asker: Asker, first: int, end: int) -> set[str]:
    """Mappings to all these ports: the remotes."""
    wanted = {f"10.0.3.2:{port}" for port in range(first, end)}
    missing = sorted(wanted)
    for _ in range(200):
        batch, missing = set(missing[:50]), missing[50:]
        for remote in batch:
            asker.send_request(remote, 0)
        for answer in asker.answers(2.0):
            batch.discard(str(answer.remote))
            if not batch:
                break
        missing += batch  # lost on the way: asked again
        if not missing:
            return wanted
    raise AssertionError(f"no answer for {len(missing)} remotes")


def test_a_list_ends_while_others_make_mappings(lab, start_server, monkeypatch):
    detour = lab.host("detour")
    start_server(detour, *PRIVATE, "--rate", "0", "--max-per-client", "65535")
    asker = Asker(lab.host("client"), detour.address)
    wanted = ask_many(asker, 1001, 3001)
    call, firsts = control.call, iter(range(3001, 13001, 2000))

    def call_while_others_ask(*arguments, **named):
        page = call(*arguments, **named)
        first = next(firsts, None)
        assert first is not None, "pages without end"
        ask_many(asker, first, first + 2000)
        return page

    monkeypatch.setattr(control, "call", call_while_others_ask)
    with namespaces.inside(detour.namespace):
        listed = command._all_mappings()
    assert {remote for _, _, remote, *_ in listed} == wanted
    assert len(listed) == len(wanted)


def test_long_lists_are_whole(lab, serve, backend):
    serve("--rate", "0")
    detour = lab.host("detour")
    asker = Asker(lab.host("client"), detour.address)
    wanted = ask_many(asker, 1001, 3601)
    assert {remote for _, _, remote in mappings(detour)} == wanted
    text = detour.run(["detour-server", "list"]).stdout.splitlines()
    assert len(text) == 2601
    assert re.match(r"CLIENT +DETOUR PORT +REMOTE +UNUSED", text[0])
    assert json.loads(detour.run(["detour-server", "flush", "--json"]).stdout) == {"flushed": 2600}
    assert kernel_mappings(detour, backend) == []
    assert detour.run(["detour-server", "list"]).stdout == "no mappings\n"


def test_a_unit_that_ended_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(control, "_UNITS", tmp_path)
    (tmp_path / "nobody.service").touch()
    with pytest.raises(UserError, match="no nobody runs") as raised:
        control.call("nobody", "status")
    assert raised.value.hint == (
        "systemctl start nobody; journalctl -u nobody tells why it ended")


def test_a_mapping_with_a_flow_is_not_unused(lab, serve):
    serve()
    detour = lab.host("detour")
    asker = Asker(lab.host("client"), detour.address)
    WhoAmI(lab.host("server"), 80)
    flow = Flow(lab.host("client"), detour.address, asker.ask("10.0.3.2:80", 80))
    asker.ask("10.0.3.3:80", 81)

    def unused() -> dict[str, float]:
        listed = json.loads(detour.run(["detour-server", "list", "--json"]).stdout)["mappings"]
        return {each["remote"]: each["unused_s"] for each in listed}

    asking.in_time("only the other is unused", (
        found["10.0.3.3:80"] > 2 and found["10.0.3.2:80"] < 1
        for found in (unused() for _ in itertools.count())))
    assert flow.echo()


def test_status_for_people_and_programs(lab, start_server):
    detour = lab.host("detour")
    start_server(detour, *PRIVATE, "--rate", "7")
    asker = Asker(lab.host("client"), detour.address)
    asker.ask("10.0.3.2:80", 80)
    asker.ask("10.0.3.2:80", 80)
    asker.ask("10.0.3.3:80", 80)
    assert asker.is_refused("127.0.0.1:1", 1)
    found = asking.status(detour)
    assert (found["mappings"], found["clients"], found["backend"]) == (3, 1, "nftables")
    counts = {name: count for name, count in found["requests"].items() if count}
    assert counts == {"received": 5, "new": 2, "moved": 1, "existing": 1, "refused": 1}
    assert found["policy"]["rate"] == 7
    text = detour.run(["detour-server", "status"]).stdout
    for words in ("UDP 0.0.0.0:45672", "nftables", "3 of 131072", "loopback 1", "10.0.0.0/8",
                  "7 requests/s"):
        assert words in text


def test_without_a_server_it_is_one_line(lab):
    done = lab.host("detour").run(["detour-server", "status"], check=False)
    assert done.returncode == 1
    assert done.stderr == ("detour-server: no detour-server runs in this network namespace "
                           "(start it first)\n")


@pytest.mark.parametrize(("arguments", "words"), [
    (("flush", "--client", "nobody"), "'nobody' is not an IP address"),
    (("flush", "--remote", "10.0.0.1"), "has no port"),
])
def test_wrong_questions_are_one_line(lab, start_server, arguments, words):
    detour = lab.host("detour")
    start_server(detour)
    done = detour.run(["detour-server", *arguments], check=False)
    assert done.returncode
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_only_root_may_ask(lab, start_server):
    detour = lab.host("detour")
    start_server(detour)
    with namespaces.inside(detour.namespace):
        path = control.socket_path("detour-server")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    done = detour.run([*AS_NOBODY, "--regid=65534", "detour-server", "status"], check=False)
    assert done.returncode == 1
    assert "may not speak to detour-server" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_control_group_may_ask(lab, start_server):
    detour = lab.host("detour")
    start_server(detour, "--control-group", "adm")
    with namespaces.inside(detour.namespace):
        path = control.socket_path("detour-server")
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert path.group() == "adm"
    done = detour.run([*AS_NOBODY, "--regid=adm", "detour-server", "status", "--json"])
    assert json.loads(done.stdout)["mappings"] == 0
    done = detour.run([*AS_NOBODY, "--regid=65534", "detour-server", "status"], check=False)
    assert "may not speak to detour-server" in done.stderr


def test_nonsense_on_the_control_socket_does_not_hurt(lab, start_server):
    detour = lab.host("detour")
    server = start_server(detour)
    with namespaces.inside(detour.namespace):
        for asked in ("nonsense", "list", "flush"):
            with pytest.raises(control.UserError):
                control.call("detour-server", asked, after="x", client=5, remote=7)
    assert asking.status(detour)["mappings"] == 0
    assert "Traceback" not in server.output
