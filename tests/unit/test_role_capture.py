# SPDX-License-Identifier: GPL-2.0-or-later
"""detour-capture: only what is meant for tcpdump reaches it."""

import os
import subprocess
import sys
import threading
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

_PATH = Path(__file__).parents[2] / "roles/capture/files/detour-capture"


@pytest.fixture(scope="module")
def program():
    spec = spec_from_loader("detour_capture", SourceFileLoader("detour_capture", str(_PATH)))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_request_is_read_and_bounded(program):
    asked = "-i eth0 -c 5 --seconds 9 --bytes 5000 -s 96 tcp port 80"
    request = program.parse(asked.split())
    assert (request.interface, request.count, request.seconds) == ("eth0", 5, 9)
    assert (request.bytes, request.snaplen) == (5000, 96)
    assert request.filter == ["tcp", "port", "80"]
    # As root it is read again.
    assert program.parse(program.words_of(request)) == request


@pytest.mark.parametrize("words", [
    "tcp", "host 192.0.2.1 and port 80", "src 192.0.2.1 or dst host 2001:db8::1", "not (udp)",
    "net 192.0.2.0/24 and portrange 80-90", "( tcp or icmp ) and not src port 22", ""])
def test_good_filters(program, words):
    found = program.check_filter(words.split())
    assert "".join(found) == words.replace(" ", "")


@pytest.mark.parametrize(("words", "tells"), [
    ("-i eth0 -w /etc/passwd", "-w"),
    ("-i eth0 -z reboot tcp", "-z"),
    ("-i eth0 tcp -- -w x", "-w"),
    ("-i eth0 --sec 5", "--sec"),
    ("-i -w tcp", "-i"),
    ("-i ../x", "no name of an interface"),
    ("-i eth0 --seconds 3601", "--seconds"),
    ("-i eth0 --bytes 99999999999", "--bytes"),
    ("-i eth0 --count 0", "--count"),
    ("-i eth0 --count ²", "--count"),
    ("tcp", "--interface"),
    ("-i eth0 greater 5", "'greater'"),
    ("-i eth0 tcp;id", "'tcp;id'"),
    ("-i eth0 tcp[13]", "'tcp[13]'"),
    ("-i eth0 host example.net", "'host' wants an address"),
    ("-i eth0 host fe80::1%eth0", "'host' wants an address"),
    ("-i eth0 net 192.0.2.1/24", "'net' wants a network"),
    ("-i eth0 port 65536", "'port' wants a port"),
    ("-i eth0 port " + "1" * 5000, "'port' wants a port"),
    ("-i eth0 portrange 1-" + "0" * 5000, "'portrange' wants ports"),
    ("-i eth0 port http", "'port' wants a port"),
    ("-i eth0 portrange 5", "'portrange' wants ports"),
    ("-i eth0 192.0.2.1", "may not stand there"),
    ("-i eth0 tcp port", "'port' wants a port"),
    ("-i eth0 " + "tcp " * 65, "65 words"),
])
def test_what_is_refused_is_told_in_one_line(program, words, tells):
    with pytest.raises(program.RequestError) as caught:
        program.parse(words.split())
    assert tells in str(caught.value)
    assert "\n" not in str(caught.value)


def test_over_ssh_its_own_connection_is_left_out(program):
    ask = program.from_ssh({
        "SSH_ORIGINAL_COMMAND": "detour-capture -i eth0 'tcp or udp'",
        "SSH_CONNECTION": "192.0.2.9 50000 192.0.2.1 22"})
    assert " ".join(ask.filter) == (
        "( tcp or udp ) and not ( host 192.0.2.9 and host 192.0.2.1 and tcp port 50000 and tcp "
        "port 22 )")
    # tcpdump knows no zones.
    ask = program.from_ssh({
        "SSH_ORIGINAL_COMMAND": "-i eth0",
        "SSH_CONNECTION": "fe80::9%eth0 50000 fe80::1%eth0 22"})
    assert " ".join(ask.filter).startswith("not ( host fe80::9 and host fe80::1 and ")
    with pytest.raises(program.RequestError, match="--interface"):
        program.from_ssh({})
    with pytest.raises(program.RequestError, match="cannot read"):
        program.from_ssh({"SSH_ORIGINAL_COMMAND": "-i 'eth0"})


def _file(*sizes: int) -> bytes:
    records = (b"\0" * 8 + size.to_bytes(4, "little") * 2 + b"x" * size for size in sizes)
    return b"H" * 24 + b"".join(records)


def _relay(program, data: bytes, most: int, piece: int) -> tuple[bytes, str]:
    (source, feed), (drain, target) = os.pipe(), os.pipe()

    def write() -> None:
        for start in range(0, len(data), piece):
            os.write(feed, data[start:start + piece])
        os.close(feed)

    writer = threading.Thread(target=write)
    writer.start()
    over = ""
    try:
        program.relay(source, target, most)
    except program.Over as error:
        over = str(error)
    writer.join()
    os.close(target)
    os.close(source)
    with os.fdopen(drain, "rb") as stream:
        return stream.read(), over


@pytest.mark.parametrize("piece", [1, 7, 40, 4096])
def test_whole_records_are_passed_on(program, piece):
    data = _file(10, 0, 300, 1500)
    assert _relay(program, data, 10_000, piece) == (data, "")
    # 24 and 26 bytes fit, 16 more do, 316 do not.
    assert _relay(program, data, 100, piece) == (data[:66], "66 bytes")


def test_nobody_reads_any_more(program):
    (source, feed), (drain, target) = os.pipe(), os.pipe()
    os.close(drain)
    try:
        with pytest.raises(BrokenPipeError):
            program.relay(source, target, 1000)
    finally:
        for each in (source, feed, target):
            os.close(each)


_HOLD = """
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
program = SourceFileLoader("detour_capture", sys.argv[1]).load_module()
try:
    program.take_place(Path(sys.argv[2]))
except program.RequestError as error:
    sys.exit(str(error))
print("holds", flush=True)
sys.stdin.read()
"""


def test_captures_at_once_are_bounded(program, tmp_path):
    def start():
        return subprocess.Popen([sys.executable, "-c", _HOLD, _PATH, tmp_path / "places"],
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True)

    running = [start() for _ in range(program.MOST_CAPTURES)]
    try:
        assert [each.stdout.readline() for each in running] == ["holds\n"] * len(running)
        refused = start()
        _, said = refused.communicate()
        assert refused.returncode == 1
        said, = (line for line in said.splitlines() if "captures run" in line)
        assert "wait until one ends" in said
        # Killed, it leaves its place to the next.
        running[0].kill()
        running[0].wait()
        running.append(start())
        assert running[-1].stdout.readline() == "holds\n"
    finally:
        for each in running:
            each.kill()
            each.communicate()


def test_a_link_in_a_place_is_not_followed(program, tmp_path):
    (tmp_path / "0").symlink_to(tmp_path / "made")
    with pytest.raises(OSError, match="symbolic link"):
        program.take_place(tmp_path)
    assert not (tmp_path / "made").exists()
