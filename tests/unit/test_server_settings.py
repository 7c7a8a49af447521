# SPDX-License-Identifier: GPL-2.0-or-later
"""Ports and addresses as people write them."""

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
    for name in ("forbid_port", "deny_port"):
        said = rf"{name.replace('_', '-')}: '.*' is not a port or range"
        with pytest.raises(ValueError, match=said):
            Settings(**{name: (text,)})
