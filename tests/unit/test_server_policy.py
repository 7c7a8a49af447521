# SPDX-License-Identifier: GPL-2.0-or-later
"""Who may ask, how often, how much, and where to."""

from ipaddress import IPv4Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detour_tools.endpoint import Endpoint, parse_endpoint
from detour_tools.mapping import Mapping
from detour_tools.route import Route
from detour_tools.server.policy import (
    HostAddresses,
    NetworkSet,
    Policy,
    RateLimiter,
    Refusal,
    Rules,
    SecondAttempts,
)

CLIENT = IPv4Address("10.0.1.1")
REMOTE = parse_endpoint("130.104.230.45:80")
AWAY = Route(local=False, broadcast=False, on_link=False)
NOWHERE = HostAddresses(frozenset(), NetworkSet(()))


def policy(**rules) -> Policy:
    return Policy(Rules(**{"max_per_client": 10, "max_mappings": 100,
                           "idle_timeout": 3600.0} | rules))


def networks(*texts):
    return tuple(ip_network(text) for text in texts)


@pytest.mark.parametrize(("client", "allowed"), [
    ("10.0.0.0", True), ("10.255.255.255", True), ("172.16.0.1", True), ("172.31.255.255", True),
    ("192.168.7.7", True), ("fd00::1", True),
    ("9.255.255.255", False), ("11.0.0.0", False), ("172.15.255.255", False),
    ("172.32.0.0", False), ("192.167.255.255", False), ("192.169.0.0", False),
    ("127.0.0.1", False), ("169.254.1.1", False), ("0.0.0.0", False), ("100.64.0.1", False),
    ("8.8.8.8", False), ("255.255.255.255", False), ("2001:db8::1", False),
])
def test_private_clients_only_by_default(client, allowed):
    checked = policy()
    refusal = checked.check_client(ip_address(client), REMOTE, 0.0)
    assert refusal is (None if allowed else Refusal.CLIENT)
    assert checked.refused[Refusal.CLIENT] == (not allowed)


def test_the_administrator_says_who_instead():
    checked = policy(allow_clients=networks("198.51.100.0/24", "203.0.113.5/32"))
    assert checked.check_client(IPv4Address("198.51.100.9"), REMOTE, 0.0) is None
    assert checked.check_client(IPv4Address("203.0.113.5"), REMOTE, 0.0) is None
    assert checked.check_client(IPv4Address("203.0.113.6"), REMOTE, 0.0) is Refusal.CLIENT
    assert checked.check_client(CLIENT, REMOTE, 0.0) is Refusal.CLIENT


def test_an_empty_list_of_clients_is_nobody():
    checked = policy(allow_clients=())
    assert checked.check_client(CLIENT, REMOTE, 0.0) is Refusal.CLIENT
    assert not checked.permits(Mapping(CLIENT, 80, parse_endpoint("8.8.8.8:80")), NOWHERE)


@pytest.mark.parametrize(("remote", "refusal"), [
    ("8.8.8.8:80", None), ("130.104.230.45:80", None), ("192.0.2.1:80", None),
    ("223.255.255.255:80", None),
    ("0.0.0.0:80", Refusal.UNSPECIFIED), ("0.1.2.3:80", Refusal.RESERVED),
    ("127.0.0.1:80", Refusal.LOOPBACK), ("127.255.0.1:80", Refusal.LOOPBACK),
    ("169.254.169.254:80", Refusal.LINK_LOCAL),
    ("224.0.0.1:80", Refusal.MULTICAST), ("239.255.255.255:80", Refusal.MULTICAST),
    ("240.0.0.1:80", Refusal.RESERVED), ("255.255.255.254:80", Refusal.RESERVED),
    ("255.255.255.255:80", Refusal.BROADCAST),
    ("10.0.3.2:80", Refusal.PRIVATE), ("172.16.0.1:80", Refusal.PRIVATE),
    ("192.168.0.1:80", Refusal.PRIVATE), ("100.64.0.1:80", Refusal.PRIVATE),
    ("198.18.0.1:80", Refusal.PRIVATE), ("192.0.0.8:80", Refusal.PRIVATE),
    ("[::1]:80", Refusal.LOOPBACK), ("[fe80::1]:80", Refusal.LINK_LOCAL),
    ("[ff02::1]:80", Refusal.MULTICAST), ("[fd00::1]:80", Refusal.PRIVATE),
    ("[2001:db8::1]:80", None),
])
def test_where_to(remote, refusal):
    checked = policy()
    assert checked.check_remote(parse_endpoint(remote), AWAY) is refusal
    assert sum(checked.refused.values()) == (refusal is not None)


def test_port_0_is_no_remote():
    remote = Endpoint(IPv4Address("8.8.8.8"), 0)
    assert policy().check_remote(remote, AWAY) is Refusal.PORT


def test_the_detour_itself_and_broadcast_are_refused_even_where_allowed():
    remote = parse_endpoint("10.0.3.2:80")
    checked = policy(allow_remotes=networks("10.0.0.0/8", "127.0.0.0/8", "0.0.0.0/0"))
    assert checked.check_remote(remote, AWAY) is None
    assert checked.check_remote(remote, AWAY._replace(local=True)) is Refusal.DETOUR
    assert checked.check_remote(remote, AWAY._replace(broadcast=True)) is Refusal.BROADCAST
    assert checked.check_remote(parse_endpoint("127.0.0.1:80"), AWAY) is Refusal.LOOPBACK


def test_private_remotes_where_allowed_only():
    checked = policy(allow_remotes=networks("10.0.3.0/24"))
    assert checked.check_remote(parse_endpoint("10.0.3.2:80"), AWAY) is None
    assert checked.check_remote(parse_endpoint("10.0.4.2:80"), AWAY) is Refusal.PRIVATE
    assert checked.check_remote(parse_endpoint("8.8.8.8:80"), AWAY) is None


@pytest.mark.parametrize(("remote", "rules", "refusal"), [
    ("203.0.113.9:80", {}, Refusal.ON_LINK),
    ("203.0.113.9:80", {"allow_remotes": ("203.0.113.0/24",)}, None),
    ("10.0.3.2:80", {}, Refusal.PRIVATE),
])
def test_remotes_on_the_detours_links_where_allowed_only(remote, rules, refusal):
    checked = policy(**{name: networks(*texts) for name, texts in rules.items()})
    endpoint = parse_endpoint(remote)
    assert checked.check_remote(endpoint, AWAY._replace(on_link=True)) is refusal
    host = HostAddresses(frozenset(), NetworkSet(networks("203.0.113.0/24", "10.0.3.0/24")))
    assert checked.permits(Mapping(CLIENT, 5000, endpoint), host) == (refusal is None)


@pytest.mark.parametrize(("rules", "remote", "refusal"), [
    ({}, "168.63.129.16:80", Refusal.PLATFORM),
    ({"allow_remotes": networks("168.63.129.16/32")}, "168.63.129.16:80", None),
    ({"deny_remotes": networks("8.8.8.0/24")}, "8.8.8.8:80", Refusal.DENIED),
    ({"deny_remotes": networks("8.8.8.0/24")}, "8.8.9.8:80", None),
    ({"deny_remotes": networks("10.0.3.2/32"), "allow_remotes": networks("10.0.0.0/8")},
     "10.0.3.2:80", Refusal.DENIED),
    ({"deny_ports": (range(25, 26), range(6660, 6670))}, "8.8.8.8:25", Refusal.DENIED_PORT),
    ({"deny_ports": (range(25, 26), range(6660, 6670))}, "8.8.8.8:6669", Refusal.DENIED_PORT),
    ({"deny_ports": (range(25, 26), range(6660, 6670))}, "8.8.8.8:26", None),
    ({"own_addresses": networks("198.51.100.7/32")}, "198.51.100.7:80", Refusal.DETOUR),
    ({"own_addresses": networks("198.51.100.7/32")}, "198.51.100.8:80", None),
])
def test_what_is_denied(rules, remote, refusal):
    checked = policy(**rules)
    endpoint = parse_endpoint(remote)
    assert checked.check_remote(endpoint, AWAY) is refusal
    assert checked.permits(Mapping(CLIENT, 5000, endpoint), NOWHERE) == (refusal is None)


def test_transcript_of_a_rate_of_5():
    limiter = RateLimiter(5.0)
    assert [limiter.allows(CLIENT, 0.0) for _ in range(7)] == [True] * 5 + [False] * 2
    assert not limiter.allows(CLIENT, 0.1)
    assert limiter.allows(CLIENT, 0.2)
    assert not limiter.allows(CLIENT, 0.3)
    assert limiter.allows(ip_address("10.0.1.2"), 0.3), "another client is not concerned"
    assert [limiter.allows(CLIENT, 60.0) for _ in range(6)] == [True] * 5 + [False]


def test_a_rate_below_1_still_lets_one_through():
    limiter = RateLimiter(0.5)
    assert limiter.allows(CLIENT, 0.0)
    assert not limiter.allows(CLIENT, 1.9)
    assert limiter.allows(CLIENT, 4.0)


def test_no_rate_is_no_limit_and_no_memory():
    limiter = RateLimiter(0.0)
    assert all(limiter.allows(CLIENT, 0.0) for _ in range(1000))
    assert len(limiter) == 0


def test_forged_sources_cannot_fill_the_memory():
    limiter = RateLimiter(5.0, buckets=100)
    for number in range(1000):
        limiter.allows(ip_address(number), 0.0)
    assert len(limiter) == 100


def test_clients_that_may_not_ask_get_no_bucket():
    checked = policy(rate=5.0)
    for number in range(100):
        checked.check_client(ip_address(0x08000000 + number), REMOTE, 0.0)
    assert len(checked._limiter) == 0


def test_what_the_rate_refused_passes_when_it_comes_again():
    """So forged requests, each for another remote, do not use a client up."""
    checked, now, passed = policy(rate=10.0), 0.0, 0
    for number in range(200):
        now = number / 50
        checked.check_client(CLIENT, Endpoint(ip_address(0x08000000 + number), 1), now)
        if number >= 50 and number % 10 == 0:  # a remote of its own, until it is served
            own = Endpoint(ip_address(0x09000000 + number), 1)
            passed += any(checked.check_client(CLIENT, own, now + later) is None
                          for later in (0.0, 0.3))
    assert passed == 15


def test_what_comes_again_at_once_or_late_is_no_second_attempt():
    again = SecondAttempts(100.0)
    assert [again.allows(CLIENT, REMOTE, now) for now in (0.0, 0.05, 0.2, 0.3)] == [
        False, False, True, False]
    assert not again.allows(CLIENT, REMOTE, 5.0)
    assert not again.allows(ip_address("10.0.1.2"), REMOTE, 5.2), "another client's is another"
    assert again.allows(CLIENT, REMOTE, 5.2)


def test_second_attempts_have_a_rate_and_a_bounded_memory():
    again = SecondAttempts(8.0, most=100)
    remotes = [Endpoint(ip_address(0x08000000 + number), 1) for number in range(1000)]
    assert not any(again.allows(CLIENT, remote, 0.0) for remote in remotes)
    assert len(again) == 100
    assert sum(again.allows(CLIENT, remote, 0.5) for remote in remotes[-100:]) == 2


def test_a_flood_at_full_speed_has_no_second_attempt_forgotten():
    again = SecondAttempts(100.0)
    assert not again.allows(CLIENT, REMOTE, 0.0)
    # 90,000 a second, for as long as a client waits.
    assert not any(again.allows(CLIENT, Endpoint(ip_address(0x08000000 + number), 1), 0.1)
                   for number in range(27000))
    assert again.allows(CLIENT, REMOTE, 0.3)


@given(st.lists(st.floats(0, 2), max_size=60), st.floats(1, 20))
def test_never_more_than_the_rate_and_one_burst(gaps, rate):
    limiter, now, passed = RateLimiter(rate), 0.0, 0
    for gap in gaps:
        now += gap
        passed += limiter.allows(CLIENT, now)
    assert passed <= rate + now * rate + 1e-6


def test_a_crowded_table_forgets_sooner():
    assert [policy().idle_limit(in_all) for in_all in (0, 90, 91, 100)] == [3600, 3600, 60, 60]
    assert policy(idle_timeout=7.0).idle_limit(100) == 7


def test_permits_is_what_would_not_be_refused():
    checked = policy(allow_clients=networks("10.0.1.0/24"), allow_remotes=networks("10.0.3.0/24"))
    for client, remote, allowed in (
            ("10.0.1.1", "10.0.3.2:80", True), ("10.0.1.1", "8.8.8.8:80", True),
            ("10.0.2.1", "8.8.8.8:80", False), ("10.0.1.1", "10.0.4.2:80", False),
            ("10.0.1.1", "127.0.0.1:80", False), ("10.0.1.1", "8.8.8.8:0", False)):
        mapping = Mapping(IPv4Address(client), 80, Endpoint(
            IPv4Address(remote.partition(":")[0]), int(remote.partition(":")[2])))
        assert checked.permits(mapping, NOWHERE) == allowed, mapping
    assert not checked.refused
