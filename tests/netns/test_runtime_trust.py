# SPDX-License-Identifier: GPL-2.0-or-later
"""What lies in a runtime folder may be written by a daemon's user, and is read by root."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from detour_tools import runtime, sysctl
from detour_tools.errors import UserError
from detour_tools.lab import namespaces
from tests.netns import asking
from tests.netns.conftest import PRIVATE

FOREIGN = ("net.ipv4.ip_default_ttl", "net/ipv4/conf/../ip_default_ttl",
           "net/ipv4/conf/../../ipv4/ip_default_ttl")


def journal_of(host, program: str) -> Path:
    with namespaces.inside(host.namespace):
        return runtime.directory(program) / f"{program}.sysctls"


def ttl(host) -> str:
    return host.run(["cat", "/proc/sys/net/ipv4/ip_default_ttl"]).stdout.strip()


@pytest.mark.parametrize("name", FOREIGN)
def test_a_server_takes_no_foreign_name_from_its_journal(lab, start_server, name):
    detour = lab.host("detour")
    journal = journal_of(detour, "detour-server")
    start_server(detour, *PRIVATE).kill()
    kept = json.loads(journal.read_text())
    journal.write_text(json.dumps({name: ["77", "64"]} | kept))
    server = start_server(detour, *PRIVATE)
    server.wait_line("names what this program never sets")
    assert len(server.matching("names what this program never sets")) == 1
    assert server.stop() == 0
    assert ttl(detour) == "64"
    assert asking.forwarding(detour) == "0", "its own names are still put back"


def test_a_client_takes_no_foreign_name_from_its_journal(lab, start_client):
    client = lab.host("client")
    journal = journal_of(client, "detour-client")
    start_client(client, "10.0.6.2").kill()
    journal.write_text(json.dumps({"net.ipv4.ip_default_ttl": ["77", "64"]}
                                  | json.loads(journal.read_text())))
    daemon = start_client(client, "10.0.6.2")
    daemon.wait_line("names what this program never sets")
    assert daemon.stop() == 0
    assert ttl(client) == "64"


@pytest.mark.parametrize("value", ["1\n2", "x" * 100, 1, ["1"]])
def test_an_odd_value_is_not_taken(lab, start_server, value):
    detour = lab.host("detour")
    journal = journal_of(detour, "detour-server")
    start_server(detour, *PRIVATE).kill()
    journal.write_text(json.dumps({"net.ipv4.ip_forward": [value, "1"]}))
    server = start_server(detour, *PRIVATE)
    server.wait_line("names what this program never sets")
    assert server.stop() == 0


def test_a_journal_is_written_through_no_link(tmp_path):
    precious, read = tmp_path / "precious", tmp_path / "read"
    precious.write_text("precious")
    read.write_text('{"net.ipv4.ip_default_ttl": ["64", "64"]}')
    journal = tmp_path / "a.sysctls"
    journal.symlink_to(read)
    journal.with_suffix(".new").symlink_to(precious)
    borrowed = sysctl.BorrowedSysctls(journal)
    assert borrowed.found("net.ipv4.ip_default_ttl") is None
    sysctl.write_file(journal, "{}")
    assert precious.read_text() == "precious"
    assert not journal.is_symlink()


def test_a_journal_that_is_a_pipe_keeps_nobody_waiting(tmp_path):
    os.mkfifo(tmp_path / "a.sysctls")
    sysctl.BorrowedSysctls(tmp_path / "a.sysctls")


@pytest.mark.parametrize("name", ["net/ipv4/../../kernel/hostname", "net..ipv4", "/net/ipv4",
                                  "net/./ipv4", ""])
def test_what_is_no_name_of_a_sysctl_is_refused(name):
    with pytest.raises(UserError, match="no name of a sysctl"):
        sysctl.path_of(name)


PROGRAM = f"trust-{os.getpid()}"


@pytest.fixture
def folder() -> Iterator[Path]:
    made = runtime.make_directory(PROGRAM)
    yield made
    if made.parent.is_symlink():
        made.parent.unlink()
    shutil.rmtree(made.parent, ignore_errors=True)


def refused(words: str) -> None:
    with pytest.raises(UserError, match=words):
        runtime.InstanceLock(PROGRAM)


def test_a_folder_of_another_user_is_not_used(folder):
    os.chown(folder, 65534, -1)
    refused("netns-.* belongs to user 65534")
    os.chown(folder, 0, -1)
    os.chown(folder.parent, 65534, -1)
    refused(f"{PROGRAM} belongs to user 65534")
    os.chown(folder, 65534, -1)
    os.seteuid(65534)  # as a unit with User= and RuntimeDirectory=
    try:
        runtime.InstanceLock(PROGRAM).release()
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("level", ["netns", "program"])
def test_a_folder_that_others_may_write_is_not_used(folder, level):
    (folder if level == "netns" else folder.parent).chmod(0o775)
    refused("others may write to")


@pytest.mark.parametrize("level", ["netns", "program"])
def test_a_folder_that_is_a_link_is_not_used(folder, level, tmp_path):
    path = folder if level == "netns" else folder.parent
    shutil.rmtree(path)
    (tmp_path / "elsewhere").mkdir()
    path.symlink_to(tmp_path / "elsewhere")
    refused("is no folder")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("how", [os.symlink, os.link])
def test_a_lock_that_is_a_link_is_neither_emptied_nor_made(folder, how, tmp_path):
    precious = folder / "precious"
    precious.write_text("precious")
    how(precious, folder / f"{PROGRAM}.lock")
    refused("is no file of ours")
    assert precious.read_text() == "precious"


def test_a_wide_umask_makes_no_folder_that_others_may_write(folder):
    shutil.rmtree(folder.parent)
    before = os.umask(0)
    try:
        runtime.InstanceLock(PROGRAM).release()
    finally:
        os.umask(before)
