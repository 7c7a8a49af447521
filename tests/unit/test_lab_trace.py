# SPDX-License-Identifier: GPL-2.0-or-later
"""The trace of the kernel's path manager, in every order that its two threads may write it."""

from ipaddress import IPv4Address

import pytest

from detour_tools.endpoint import Endpoint
from detour_tools.lab import trace

REMOTE = Endpoint(IPv4Address("10.0.3.2"), 80)
DETOUR = IPv4Address("10.0.6.2")

BEGINS = "[    6.1] detour create_subflow_worker() begins"
REQUEST = "[    6.2] request_detour()"
FINDING = "[    6.3] Finding matching detour for 10.0.3.2:80"
ENDS = "[    6.4] detour create_subflow_worker() ends"
ADDING = "[    6.5] Adding a detour to the entry list."
CHECKING = "[    6.6] Checking detour=10.0.6.2:8080 remote=10.0.3.2:80"
YES = "[    6.7] yes"

USUAL = [BEGINS, REQUEST, FINDING, ENDS, ADDING, BEGINS, FINDING, CHECKING, YES, ENDS]


def missing(log: list[str]) -> list[str]:
    return [pattern.replace("\\", "") for pattern, line in trace.look(log, REMOTE, DETOUR)
            if line is None]


@pytest.mark.parametrize("log", [
    USUAL,
    # Seen on busy machines: the answer within the worker's first run, and before it.
    [BEGINS, REQUEST, FINDING, ADDING, ENDS, BEGINS, FINDING, CHECKING, YES, ENDS],
    [BEGINS, REQUEST, ADDING, FINDING, CHECKING, YES, ENDS],
    [ADDING, BEGINS, REQUEST, FINDING, CHECKING, YES, "[ 6.7] other", ENDS],
    # Other connections' runs about it.
    [BEGINS, "[ 6.1] Finding matching detour for 10.0.3.2:8080", ENDS, *USUAL, BEGINS, ENDS],
])
def test_found(log: list[str]):
    assert missing(log) == []
    assert len(trace.look(log, REMOTE, DETOUR)) == 10


@pytest.mark.parametrize("line", sorted({*USUAL}))
def test_each_line_is_wanted(line: str):
    assert missing([each for each in USUAL if each != line])


@pytest.mark.parametrize("log", [
    [BEGINS, REQUEST, FINDING, ENDS, BEGINS, FINDING, CHECKING, YES, ENDS, ADDING],
    [BEGINS, REQUEST, FINDING, ENDS, ADDING, BEGINS, FINDING, YES, CHECKING, ENDS],
    [BEGINS, REQUEST, FINDING, ENDS, ADDING, BEGINS, FINDING, CHECKING, BEGINS, YES, ENDS],
    [REQUEST, FINDING, BEGINS, ENDS, ADDING, BEGINS, FINDING, CHECKING, YES, ENDS],
    [line.replace("10.0.3.2:80", "10.0.3.2:81") for line in USUAL],
    [line.replace("10.0.6.2:", "10.0.6.3:") for line in USUAL],
    [],
])
def test_wrong(log: list[str]):
    assert missing(log)


def test_what_is_missing_is_named():
    log = [line for line in USUAL if line not in (CHECKING, YES)]
    assert missing(log) == [r"Checking detour=10.0.6.2:d+ remote=10.0.3.2:80$", "yes$"]
