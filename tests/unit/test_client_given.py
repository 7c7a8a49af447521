# SPDX-License-Identifier: GPL-2.0-or-later
"""Which of the detours that were given are used, and what is said of the others."""

from ipaddress import IPv4Address
from random import Random

import pytest

from detour_tools.client.given import LONGEST_PAUSE, GivenDetours, read_host
from detour_tools.endpoint import Endpoint, parse_endpoint
from detour_tools.errors import UserError
from detour_tools.route import NO_ROUTE, Route

NAME = "web1.example"
HERE, THERE, ELSEWHERE = (IPv4Address(f"10.0.{n}.1") for n in (1, 2, 3))
OWN = Route(local=True, broadcast=False, on_link=True)
BROADCAST = Route(local=False, broadcast=True, on_link=True)


def used(detours: GivenDetours) -> list[tuple[str, Endpoint]]:
    return [(given.text, given.endpoint) for given in detours.hopeful if given.endpoint]


@pytest.mark.parametrize(("text", "host", "port"), [
    ("198.51.100.7", IPv4Address("198.51.100.7"), 45672),
    ("198.51.100.7:1", IPv4Address("198.51.100.7"), 1),
    ("detour1.example.net", "detour1.example.net", 45672),
    ("detour1.example.net.:65535", "detour1.example.net.", 65535),
    ("7up_host-1", "7up_host-1", 45672),
    ("bücher.example", "bücher.example", 45672),
    ("240.0.0.1", IPv4Address("240.0.0.1"), 45672),
])
def test_hosts_are_read(text: str, host: IPv4Address | str, port: int) -> None:
    assert read_host(text, 45672) == (host, port)


@pytest.mark.parametrize(("text", "words"), [
    ("2001:db8::1", "is an IPv6 address"),
    ("[2001:db8::1]:45672", "is an IPv6 address"),
    ("fe80::1%eth0", "is an IPv6 address"),
    ("0.0.0.0", "is not the address of a host"),
    ("0.0.0.1", "is not the address of a host"),
    ("224.0.0.1", "is not the address of a host"),
    ("255.255.255.255:1", "is not the address of a host"),
    ("10.1", "is neither an IPv4 address nor a name"),
    ("300.1.1.1", "is neither an IPv4 address nor a name"),
    ("45672", "is neither an IPv4 address nor a name"),
    ("two words", "is neither an IPv4 address nor a name"),
    ("root@web1", "is neither an IPv4 address nor a name"),
    ("10.0.0.0/8", "is neither an IPv4 address nor a name"),
    ("a..b", "is neither an IPv4 address nor a name"),
    ("x" * 64, "is neither an IPv4 address nor a name"),
    ("-x", "is neither an IPv4 address nor a name"),
    ("a\0b", "is neither an IPv4 address nor a name"),
    ("a\nb", "is neither an IPv4 address nor a name"),
    ("web1:0", "is not a port"),
    ("http://web1/", "is not a port"),
    ("", "has no host"),
])
def test_what_is_no_host_is_said_in_one_line(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        read_host(text, 45672)
    assert caught.value.status == 2
    assert "\n" not in str(caught.value)


def test_a_wrong_text_leaves_the_others() -> None:
    detours = GivenDetours(["::1", "127.0.0.1", "10.0.1.1", "web1"])
    assert [given.text for given in detours.hopeful] == ["10.0.1.1", "web1"]
    assert [given.order for given in detours.hopeful] == [2, 3]
    ipv6, loopback = detours.wrong
    assert ipv6.startswith("detour '::1' cannot be used: ::1 is an IPv6 address")
    assert loopback.startswith("detour '127.0.0.1' cannot be used: 127.0.0.1 is an address of this")
    assert detours.warnings()[:3] == ["no detour can be used yet, so connections get none",
                                      ipv6, loopback]


def test_a_name_is_used_once_it_is_known() -> None:
    detours = GivenDetours([NAME, NAME])
    [web] = detours.hopeful
    assert f"no name server has an answer for '{NAME}'" in detours.warnings()[1]
    detours.not_found(web, UserError("no such name", "check the spelling"))
    assert detours.warnings()[1] == (
        f"detour '{NAME}' is not used yet: no such name (check the spelling)")
    assert detours.found(web, [(HERE, NO_ROUTE)]) == parse_endpoint("10.0.1.1:45672")
    assert detours.warnings() == []


def test_of_several_addresses_the_first_that_will_do_is_taken() -> None:
    detours = GivenDetours(["web1:1000"])
    assert detours.found(detours.hopeful[0], [
        (HERE, OWN), (THERE, BROADCAST), (ELSEWHERE, NO_ROUTE), (IPv4Address("10.0.4.1"), NO_ROUTE)
    ]) == Endpoint(ELSEWHERE, 1000)


@pytest.mark.parametrize(("route", "words"), [
    (OWN, "10.0.1.1 is an address of this host itself"),
    (BROADCAST, "10.0.1.1 is a network's broadcast address"),
])
def test_what_moved_here_may_move_on(route: Route, words: str) -> None:
    detours = GivenDetours(["10.0.1.1"])
    [given] = detours.hopeful
    assert detours.found(given, [(HERE, route)]) is None
    assert words in detours.warnings()[1]
    assert detours.found(given, [(HERE, NO_ROUTE)]) is not None


@pytest.mark.parametrize("again", ["10.0.1.1:1000", "web1", "10.0.1.1:45672"])
def test_each_address_is_used_once(again: str) -> None:
    detours = GivenDetours(["10.0.1.1", again])
    first, second = detours.hopeful
    assert detours.found(first, [(HERE, NO_ROUTE)])
    assert detours.found(second, [(HERE, NO_ROUTE)]) is None
    assert used(detours) == [("10.0.1.1", parse_endpoint("10.0.1.1:45672"))]
    assert detours.warnings() == [f"detour '{again}' is not used yet: 10.0.1.1:45672 is used "
                                  "already, as detour '10.0.1.1' (give each host once)"]


def test_pauses_double_within_bounds() -> None:
    [given] = GivenDetours([NAME]).hopeful
    random, pauses = Random(1), []
    for given.failures in (1, 2, 3, 5, 6, 1000):
        pauses.append(given.pause(random))
    for pause, nominal in zip(pauses, (2, 4, 8, 32, LONGEST_PAUSE, LONGEST_PAUSE), strict=True):
        assert 0.9 * nominal <= pause <= 1.1 * nominal
