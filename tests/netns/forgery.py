# SPDX-License-Identifier: GPL-2.0-or-later
"""Sends forged requests: python -m tests.netns.forgery DETOUR NETWORK RATE

From random addresses of NETWORK, for random public remotes, RATE a second (0: as fast as it goes),
until it is stopped.
"""

import itertools
import random
import socket
import struct
import sys
import time
from ipaddress import ip_address, ip_network

from detour_tools import mproxy
from detour_tools.endpoint import Endpoint
from detour_tools.mproxy import v1


def main(detour: str, network: str, rate: str) -> None:
    sources, destination = ip_network(network), socket.inet_aton(detour)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as sender:
        start = time.monotonic()
        for number in itertools.count():
            remote = Endpoint(ip_address(0x2D000000 + random.randrange(1 << 24)), 443)
            request = v1.encode(v1.Request(remote, 443))
            # IPv4 and UDP headers (RFC 791, RFC 768); the kernel fills the rest in.
            source = sources[random.randrange(sources.num_addresses)].packed
            sender.sendto(struct.pack("!BBHHHBBH4s4sHHHH", 0x45, 0, 0, 0, 0, 64,
                                      socket.IPPROTO_UDP, 0, source, destination,
                                      40000, mproxy.PORT, 8 + len(request), 0) + request,
                          (detour, 0))
            if rate != "0" and number % max(1, int(rate) // 1000) == 0:  # evenly
                time.sleep(max(0.0, start + number / int(rate) - time.monotonic()))


if __name__ == "__main__":
    main(*sys.argv[1:])
