# SPDX-License-Identifier: GPL-2.0-or-later
"""One exchange with a detour by hand."""

import socket
import time

from detour_tools import mproxy
from detour_tools.client.detours import Detour, Exchange
from detour_tools.endpoint import Endpoint
from detour_tools.errors import UserError


def request_mapping(detour: Endpoint, remote: Endpoint, port: int) -> tuple[int, float]:
    """Ask ``detour`` for a mapping to ``remote``, proposing ``port`` (0: any).

    Returns the detour port and the seconds the answer took; raises UserError when none came.
    """
    clock = Exchange(Detour(detour, 0), remote, 0.0, 4)
    question = mproxy.v1.encode(mproxy.v1.Request(remote, port))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as channel:
        try:
            channel.connect((str(detour.address), detour.port))
            while clock.may_retry:
                clock.sent(time.monotonic(), 1.0)
                channel.send(question)
                answered = _await_answer(channel, remote, clock.due)
                if answered is not None:
                    return answered, time.monotonic() - clock.last_sent
        except ConnectionRefusedError:
            raise UserError(f"nothing listens on UDP {detour.port} at {detour.address}",
                            "is detour-server running there?") from None
        except OSError as error:
            raise UserError(f"cannot reach {detour}: {error.strerror}") from None
    raise UserError(f"detour {detour} did not answer",
                    "a firewall may drop UDP there (on the detour run: detour-server firewall "
                    "check), or the detour refuses this client or remote: see its log")


def _await_answer(channel: socket.socket, remote: Endpoint, until: float) -> int | None:
    while (left := until - time.monotonic()) > 0:
        channel.settimeout(left)
        try:
            answer = mproxy.decode(channel.recv(mproxy.MAX_DATAGRAM))
        except TimeoutError:
            break
        except mproxy.MalformedMessageError:
            continue
        if isinstance(answer, mproxy.v1.Response) and answer.remote == remote and (
                answer.detour_port):
            return answer.detour_port
    return None
