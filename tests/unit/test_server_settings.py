# SPDX-License-Identifier: GPL-2.0-or-later
"""Ports that are given to nobody."""

import pytest

from detour_tools.server.policy import Policy
from detour_tools.server.settings import Settings


def test_forbidden_ports():
    policy = Policy(Settings(forbid_port=("8080", "9000-9002", "65535")).rules)
    forbidden = [port for port in range(65536) if policy.forbids_port(port)]
    assert forbidden == [8080, 9000, 9001, 9002, 65535]


@pytest.mark.parametrize("text", ["", "0", "65536", "9-8", "1-", "-1", "1-2-3", "http", "1 - 2",
                                  "\N{SUPERSCRIPT TWO}"])
def test_what_is_no_port_is_said(text):
    with pytest.raises(ValueError, match=r"forbid-port: '.*' is not a port or range"):
        Settings(forbid_port=(text,))
