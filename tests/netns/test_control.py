# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket between parties that do not trust each other."""

import contextlib
import itertools
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from detour_tools import control, runtime
from detour_tools.errors import UserError
from detour_tools.lab import namespaces
from detour_tools.lab.network import Host
from tests.netns import asking

PROGRAM = f"impostor-{os.getpid()}"

Impostor = Callable[[Callable[[socket.socket], None]], None]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """The socket of a daemon that is none."""
    folder = runtime.make_directory(PROGRAM)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        made.bind(str(control.socket_path(PROGRAM)))
        made.listen()
        yield made
    shutil.rmtree(folder.parent)


@pytest.fixture
def impostor(listener: socket.socket) -> Impostor:
    """A daemon that answers what it likes: ``impostor(lambda connection: ...)``."""
    def answer(how: Callable[[socket.socket], None]) -> None:
        def serve() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(1024)
                    how(connection)
        threading.Thread(target=serve, daemon=True).start()
    return answer


@pytest.mark.parametrize(("answer", "words"), [
    (b'{"error": "\\u001b]0;owned\\u0007\\u009b2J"}\n', r"\\x1b\]0;owned\\x07\\x9b2J"),
    (b"[]\n", "an answer that is none"),
    (b"[" * 100_000 + b"\n", "did not answer"),
    (b'{"result": ', "did not answer"),
    (b"\xff\n", "did not answer"),
    (b"", "ended while it was asked"),
])
def test_a_bad_answer_is_one_harmless_line(impostor: Impostor, answer: bytes, words: str):
    impostor(lambda connection: connection.sendall(answer))
    with pytest.raises(UserError, match=words) as caught:
        control.call(PROGRAM, "status")
    assert str(caught.value).isprintable()


def test_what_is_printed_of_an_answer_is_escaped(impostor: Impostor):
    impostor(lambda connection: connection.sendall(
        b'{"result": {"listen": ["\\u001b[2J", "\\u202e", "10.0.0.1:1"]}}\n'))
    assert control.call(PROGRAM, "status") == {
        "listen": ["\\x1b[2J", "\\u202e", "10.0.0.1:1"]}


def test_an_endless_answer_is_not_kept(impostor: Impostor, monkeypatch):
    monkeypatch.setattr(control, "_ANSWER_LIMIT", 1 << 20)

    def endless(connection: socket.socket) -> None:
        while True:
            connection.sendall(b"x" * 65536)

    impostor(endless)
    with pytest.raises(UserError, match="too long"):
        control.call(PROGRAM, "status")


def test_an_answer_bit_by_bit_is_given_up(impostor: Impostor, monkeypatch):
    monkeypatch.setattr(control, "_SECONDS", 1.0)

    def dripping(connection: socket.socket) -> None:
        for _ in range(100):
            connection.sendall(b" ")
            time.sleep(0.1)

    impostor(dripping)
    with pytest.raises(UserError, match="did not answer"):
        control.call(PROGRAM, "status")


def test_another_user_in_the_folder_is_not_asked(impostor: Impostor, listener: socket.socket):
    os.seteuid(65534)
    try:
        listener.listen()  # who does so is the peer (unix(7), SO_PEERCRED)
    finally:
        os.seteuid(0)
    impostor(lambda connection: connection.sendall(b'{"result": 1}\n'))
    with pytest.raises(UserError, match="user 65534 answers"):
        control.call(PROGRAM, "status")


def test_silent_connections_leave_room_for_others(lab, start_server):
    detour = lab.host("detour")
    server = start_server(detour)

    def status() -> str:
        return detour.run(["detour-server", "status"], check=False).stderr

    with namespaces.inside(detour.namespace), contextlib.ExitStack() as stack:
        path = str(control.socket_path("detour-server"))

        def refused() -> bool:  # whoever looked whether it is ready may still have a place
            for _ in range(40):
                silent = stack.enter_context(socket.socket(socket.AF_UNIX))
                silent.connect(path)
            return "too many ask at once" in status()

        asking.in_time("a refusal", (refused() for _ in itertools.count()))
        asking.in_time("an answer", (status() == "" for _ in itertools.count()), timeout=30.0)
    assert "Traceback" not in server.output


def test_why_nobody_reads_is_told(listener: socket.socket, monkeypatch):
    """A daemon that is too busy says so, reads nothing and is gone before it is asked: EPIPE."""
    gone, check = threading.Event(), control._check_peer

    def refuse() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b'{"error": "too many ask at once"}\n')
        gone.set()

    def check_when_gone(*arguments) -> None:
        check(*arguments)
        assert gone.wait(30.0)

    monkeypatch.setattr(control, "_check_peer", check_when_gone)
    threading.Thread(target=refuse, daemon=True).start()
    with pytest.raises(UserError, match=r"^too many ask at once$"):
        control.call(PROGRAM, "status")


def test_who_hangs_up_before_the_answer_leaves_no_trace(lab, start_server):
    """Once before it is written, and once in the midst of it."""
    detour = lab.host("detour")
    server = start_server(detour)
    with namespaces.inside(detour.namespace):
        path = str(control.socket_path("detour-server"))
    for number in range(100):
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(path)
            caller.sendall(b'{"command": "status"}\n' * (1 if number % 2 else 1000))
            if number % 4 > 1:
                caller.recv(1)
    asking.in_time("an answer", (
        detour.run(["detour-server", "status"], check=False).returncode == 0
        for _ in itertools.count()))
    assert server.stop() == 0
    assert not server.matching("Traceback|exception|Broken pipe|reset by peer|never retrieved")


@pytest.fixture
def stand_in(lab, start):
    """A program of ours on the lab's detour that answers so: ``stand_in(program, answer)``."""
    def run(program: str, answer: str) -> Host:
        host = lab.host("detour")
        code = f"""
import asyncio, sys
from detour_tools import control
async def main():
    server = control.ControlServer({program!r}, {{}}, None)
    server._answer = answer
    await server.start()
    print("ready", flush=True)
    await asyncio.Event().wait()
async def answer(line):
    return control.json.loads({answer!r})
asyncio.run(main())
"""
        start(host, [sys.executable, "-c", code]).wait_line("ready")
        return host
    return run


_PAGE = '{"result": {"columns": ["client", "detour_port", "remote", "unused_s"], '


@pytest.mark.parametrize(("command", "answer"), [
    ("detour-server status", '{"result": {}}'),
    ("detour-server status", '{"result": [1]}'),
    ("detour-server status", '{"result": {"listen": 1, "surprise": 2}}'),
    ("detour-server list", _PAGE + '"mappings": []}}'),
    ("detour-server list --json", _PAGE + '"mappings": [[]], "next": 0}}'),
    ("detour-server list --json", _PAGE + '"mappings": "abc", "next": null}}'),
    ("detour-server list", _PAGE + '"mappings": [["10.0.0.1"]], "next": null}}'),
    ("detour-server flush", '{"result": {}}'),
    ("detour-server flush", '{"result": 7}'),
    ("detour-client status", '{"result": {}}'),
    ("detour-client status", '{"result": {"counters": {}, "path_manager": 1, "detours": [{}], '
                             '"connections": []}}'),
])
def test_an_answer_that_lacks_something_is_one_line(stand_in, command, answer):
    done = stand_in(command.split()[0], answer).run(command.split(), check=False, timeout=60)
    assert done.returncode == 1
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.endswith(
        "gave an answer that is none (it may be of another version: restart it)"), line


def test_check_says_that_the_daemon_gave_no_answer(stand_in):
    done = stand_in("detour-client", '{"result": {}}').run(["detour-client", "check"], check=False)
    assert "Traceback" not in done.stderr
    assert "daemon: detour-client gave an answer that is none" in done.stdout


def test_half_a_character_can_be_printed(stand_in):
    answer = '{"result": {"flushed": "\\ud800"}}'
    done = stand_in("detour-server", answer).run(["detour-server", "flush"], check=False)
    assert (done.stdout, done.stderr) == ("flushed \\ud800 mappings\n", "")


def test_a_folder_that_is_a_link_is_not_asked(impostor: Impostor):
    folder = control.socket_path(PROGRAM).parent
    elsewhere = folder.rename(folder.with_name(f"{folder.name}-elsewhere"))
    folder.symlink_to(elsewhere)
    impostor(lambda connection: connection.sendall(b'{"result": 1}\n'))
    try:
        with pytest.raises(UserError, match="is no folder"):
            control.call(PROGRAM, "status")
    finally:
        folder.unlink()
        elsewhere.rename(folder)
