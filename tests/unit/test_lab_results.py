# SPDX-License-Identifier: GPL-2.0-or-later
"""Reading captures and reports, and what the demo claims of them."""

import io
import json
from ipaddress import ip_address
from pathlib import Path

import dpkt
import pytest
from rich.console import Console

from detour_tools.endpoint import parse_endpoint
from detour_tools.errors import UserError
from detour_tools.lab import captures, report
from detour_tools.lab.results import Results
from detour_tools.lab.transfers import Transfer, received_mbps


def frame(source: str, destination: str, payload: int, options: bytes = b"") -> bytes:
    a, b = parse_endpoint(source), parse_endpoint(destination)
    tcp = dpkt.tcp.TCP(sport=a.port, dport=b.port, flags=dpkt.tcp.TH_ACK, data=b"x" * payload,
                       opts=options, off=5 + len(options) // 4)
    if a.address.version == 4:
        packet = dpkt.ip.IP(src=a.address.packed, dst=b.address.packed, p=6, data=tcp)
        packet.len = len(packet)
        return bytes(dpkt.ethernet.Ethernet(data=packet, type=dpkt.ethernet.ETH_TYPE_IP))
    packet = dpkt.ip6.IP6(src=a.address.packed, dst=b.address.packed, nxt=6, data=tcp,
                          plen=len(tcp))
    return bytes(dpkt.ethernet.Ethernet(data=packet, type=dpkt.ethernet.ETH_TYPE_IP6))


def capture(path: Path, frames: list[tuple[float, bytes]], snaplen: int = 96) -> Path:
    with path.open("wb") as stream:
        dpkt.pcap.Writer(stream, snaplen=snaplen)  # writes the file header
        for when, each in frames:
            # As tcpdump -s does it: the record knows the full length, the file has the start.
            header = dpkt.pcap.LEPktHdr(tv_sec=int(when), tv_usec=round(when % 1 * 1e6),
                                        caplen=min(len(each), snaplen), len=len(each))
            stream.write(bytes(header) + each[:snaplen])
    return path


def test_segments_of_a_truncated_capture(tmp_path: Path):
    options = b"\x01\x01\x08\x0a" + bytes(8)
    path = capture(tmp_path / "c.pcap", [
        (10.5, frame("10.0.1.1:5000", "10.0.3.2:80", 1400, options)),
        (11.0, frame("[fd00::1]:5000", "[fd00::2]:80", 7)),
        (11.5, b"\xff" * 12 + b"\x08\x06" + bytes(28)),  # ARP
    ])
    first, second = captures.segments(path)
    assert (first.time, str(first.source), str(first.destination), first.payload,
            first.options) == (10.5, "10.0.1.1:5000", "10.0.3.2:80", 1400, options)
    assert (str(second.source), second.payload) == ("[fd00::1]:5000", 7)


@pytest.mark.parametrize("content", [b"", b"not a capture at all, but long enough to be one"])
def test_what_is_no_capture(tmp_path: Path, content: bytes):
    (tmp_path / "c.pcap").write_bytes(content)
    with pytest.raises(UserError, match="is not a capture"):
        list(captures.segments(tmp_path / "c.pcap"))


def test_bytes_by_peer(tmp_path: Path):
    client, server, detour = map(ip_address, ("10.0.1.1", "10.0.3.2", "10.0.6.2"))
    path = capture(tmp_path / "c.pcap", [
        (99.9, frame("10.0.1.1:5", "10.0.3.2:80", 1000)),  # before
        (100.0, frame("10.0.1.1:5", "10.0.3.2:80", 100)),
        (100.4, frame("10.0.1.1:6", "10.0.6.2:80", 10)),
        (100.5, frame("10.0.1.1:5", "10.0.3.2:80", 200)),
        (100.6, frame("10.0.3.2:80", "10.0.1.1:5", 5)),  # the other way
        (100.7, frame("10.0.1.1:5", "10.0.3.2:80", 0)),
        (101.0, frame("10.0.1.1:5", "10.0.3.2:80", 1000)),  # after
    ])
    assert captures.bytes_by_peer(path, client, 100, 101, 0.5, sent=True) == {
        server: [100, 200], detour: [10, 0]}
    assert captures.bytes_by_peer(path, client, 100, 101, 0.5, sent=False) == {server: [0, 5]}


def iperf3_report(sizes: list[int]) -> dict[str, object]:
    return {"server_output_json": {"intervals": [
        {"sum": {"bytes": size, "seconds": 1.0}} for size in sizes]}}


def test_received_mbps_leaves_out_the_first_second_and_what_comes_late():
    assert received_mbps(iperf3_report([9_000_000, *[1_250_000] * 9, 77_000])) == 10.0


@pytest.mark.parametrize(("given", "complaint"), [
    ({"error": "unable to connect"}, "unable to connect"),
    ({}, "intervals are missing"),
    ({"server_output_json": None}, "intervals are missing"),
    (iperf3_report([1] * 9), "only 9 intervals"),
])
def test_received_mbps_of_a_report_without_it(given, complaint):
    with pytest.raises(ValueError, match=complaint):
        received_mbps(given)


def results(mptcp: float, detour_bytes: int = 1000) -> Results:
    made = Results(netem=False)
    for direction, of in made.transfers.items():
        of |= {"tcp": Transfer(9.5, 0, 10), "tcp_nat": Transfer(9.5, 10, 20),
               "mptcp_nat": Transfer(mptcp, 20, 30)}
        made.series[direction] = {"direct": [1500, 1500], "detour": [detour_bytes, 0]}
    return made


@pytest.mark.parametrize(("mptcp", "detour_bytes", "holds"), [
    (18.8, 1000, True), (18.06, 1000, True), (18.04, 1000, False), (18.8, 0, False)])
def test_the_claim(mptcp: float, detour_bytes: int, holds: bool):
    assert results(mptcp, detour_bytes).holds is holds


def test_the_claim_in_words():
    assert results(15.2).claim() == (
        "Multipath TCP sent 15.20 Mbit/s, 80.0 % of what plain TCP reached on the two paths "
        "together (9.50 + 9.50; at least 95.0 % is wanted)")
    assert "detour path unused in the upload" in results(18.8, 0).claim()


def test_chart_and_files(tmp_path: Path):
    shown = io.StringIO()
    report.print_chart(results(19.0), Console(file=shown, width=80, soft_wrap=True))
    lines = shown.getvalue().splitlines()
    bars = [line.count("█") for line in lines if "Mbit/s" in line and "█" in line]
    assert bars == [19, 19, 38] * 2
    assert max(map(len, lines)) <= 80
    report.write(results(19.0), tmp_path.joinpath)
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.json", "throughput.png", "throughput-over-time.png"}
    stored = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert stored["holds"] is True
    assert stored["upload"]["mptcp_bytes_by_path"] == {"direct": 3000, "detour": 1000}
