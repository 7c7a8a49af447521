# SPDX-License-Identifier: GPL-2.0-or-later
"""The baseline: a detour that runs ``iptables`` twice for each mapping, one request at a time."""

import itertools
import shutil
import socket
import struct
import subprocess
from ipaddress import IPv4Address

_MESSAGE = struct.Struct("!BBH4sHH")


def main() -> None:
    iptables = shutil.which("iptables") or "/usr/sbin/iptables"
    mappings: dict[tuple[str, bytes, int], int] = {}
    ports = itertools.cycle(range(49152, 65536))
    listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    listener.bind(("0.0.0.0", 45672))
    print("serving", flush=True)
    while True:
        data, sender = listener.recvfrom(64)
        _, _, _, rip, rpt, _ = _MESSAGE.unpack(data)
        key = sender[0], rip, rpt
        if key not in mappings:
            port = mappings[key] = next(ports)
            remote = str(IPv4Address(rip))
            for rule in (
                ["PREROUTING", "-s", sender[0], "-p", "tcp", "--dport", str(port),
                 "-j", "DNAT", "--to-destination", f"{remote}:{rpt}"],
                ["POSTROUTING", "-s", sender[0], "-d", remote, "-p", "tcp",
                 "--dport", str(rpt), "-j", "MASQUERADE"],
            ):
                subprocess.run([iptables, "-t", "nat", "-A", *rule], check=True)
        listener.sendto(_MESSAGE.pack(1, 1, 0, rip, rpt, mappings[key]), sender)


if __name__ == "__main__":
    main()
