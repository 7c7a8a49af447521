# SPDX-License-Identifier: GPL-2.0-or-later
"""What requests come to: transcripts, with nothing but what they are decided by."""

from ipaddress import IPv4Address, ip_address
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detour_tools.endpoint import Endpoint, parse_endpoint
from detour_tools.route import Route
from detour_tools.server.decide import Facts, Request, decide
from detour_tools.server.policy import Policy, Refusal, Rules
from detour_tools.server.table import MappingTable
from detour_tools.server.unproven import prefix

ALICE = IPv4Address("10.0.1.1")
BOB = IPv4Address("10.0.1.2")
FAR = IPv4Address("172.16.0.1")
AWAY = Route(local=False, broadcast=False, on_link=False)


class Detour:
    """A table, a policy and what the host says; ``ask`` writes the answer as a transcript does."""

    def __init__(self, **rules) -> None:
        self.table = MappingTable(Random(1))
        self.policy = Policy(Rules(**{"max_per_client": 3, "max_mappings": 5,
                                      "idle_timeout": 3600.0} | rules))
        self.listening = frozenset()
        self.now = 0.0

    def ask(self, client, remote, proposed=0, route=AWAY):
        self.now += 1.0
        if isinstance(remote, int):
            remote = f"203.0.113.{remote}:80"
        request = Request(client, parse_endpoint(remote), proposed)
        standing = self.table.find(client, request.remote)
        facts = Facts(None, route, self.listening) if standing is None else Facts(standing)
        answer, gone = decide(request, facts, self.table, self.policy, self.now)
        made_room = "".join(f", for {entry.mapping.client} {entry.mapping.remote.address.packed[3]}"
                            for entry in gone)
        if isinstance(answer, Refusal):
            return answer.key + made_room
        port = answer.entry.mapping.detour_port
        return answer.outcome.value + (f" {port}" if proposed else "") + made_room

    def prove(self, client, number):
        entry = self.table.find(client, parse_endpoint(f"203.0.113.{number}:80"))
        self.table.prove(entry, self.now)


def test_the_four_rules():
    detour = Detour()
    assert detour.ask(ALICE, 1, 5000) == "new 5000"
    assert detour.ask(ALICE, 1, 6000) == "existing 5000"
    assert detour.ask(ALICE, 2, 5000).startswith("moved ")
    assert detour.ask(BOB, 2, 5000) == "new 5000"
    assert detour.ask(BOB, 3) == "new"


def test_ports_that_the_host_listens_on_are_given_to_nobody():
    detour = Detour()
    detour.listening = frozenset({22})
    assert detour.ask(ALICE, 1, 22).startswith("moved ")
    detour.listening = frozenset()
    assert detour.ask(ALICE, 2, 22) == "new 22"


@pytest.mark.parametrize(("route", "answer"), [
    (AWAY, "new"), (AWAY._replace(local=True), "detour"),
    (AWAY._replace(broadcast=True), "broadcast"), (AWAY._replace(on_link=True), "on-link")])
def test_what_the_route_says(route, answer):
    assert Detour().ask(ALICE, 1, route=route) == answer


def test_refusals_change_nothing_and_are_counted():
    detour = Detour()
    assert detour.ask(ALICE, "10.9.9.9:80") == "private"
    assert detour.ask(ALICE, "168.63.129.16:80") == "platform"
    assert len(detour.table) == 0
    assert detour.policy.refused == {Refusal.PRIVATE: 1, Refusal.PLATFORM: 1}


def test_a_client_that_has_its_share_loses_its_own_least_recently_used_one():
    detour = Detour()
    for number in (1, 2, 3):
        assert detour.ask(ALICE, number) == "new"
    assert detour.ask(ALICE, 1) == "existing"
    assert detour.ask(ALICE, 4) == "new, for 10.0.1.1 2"
    assert detour.ask(ALICE, 2) == "new, for 10.0.1.1 3"
    assert detour.table.count(ALICE) == 3


def test_what_had_a_flow_makes_room_for_nobody():
    detour = Detour()
    for number in (1, 2, 3):
        detour.ask(ALICE, number)
        detour.prove(ALICE, number)
    assert detour.ask(ALICE, 4) == "client-full"
    assert detour.ask(ALICE, 1) == "existing"
    assert detour.ask(BOB, 1) == "new"
    detour.prove(BOB, 1)
    detour.ask(BOB, 2)
    assert detour.ask(FAR, 1) == "new, for 10.0.1.2 2"
    detour.prove(FAR, 1)
    assert detour.ask(FAR, 2) == "full"
    assert detour.policy.refused == {Refusal.CLIENT_FULL: 1, Refusal.FULL: 1}


def test_a_full_table_is_made_room_in_where_most_is_unproven():
    detour = Detour(max_mappings=4)
    assert detour.ask(FAR, 1) == "new"
    for number in (1, 2, 3):
        detour.ask(ip_address("10.0.2.0") + number, number)
    assert detour.ask(FAR, 2) == "new, for 10.0.2.1 1", "not its own, which is older"
    assert detour.ask(ALICE, 9) == "new, for 10.0.2.2 2"


def test_a_client_with_no_port_left_gets_the_one_of_its_oldest():
    detour = Detour(max_per_client=65535, max_mappings=65535,
                    forbid_ports=(range(1024, 65534),))
    assert detour.ask(ALICE, 1) == "new"
    assert detour.ask(ALICE, 2) == "new"
    assert detour.ask(ALICE, 3) == "new, for 10.0.1.1 1"
    detour.prove(ALICE, 2)
    assert detour.ask(ALICE, 4) == "new, for 10.0.1.1 3"
    detour.prove(ALICE, 4)
    assert detour.ask(ALICE, 5) == "no-port"


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.booleans()), max_size=60))
def test_never_refused_for_room_while_anything_is_unproven(steps):
    detour = Detour()
    for client_number, number, flow in steps:
        client = ip_address(f"10.{client_number}.0.1")
        unproven = {entry.mapping.client for entry in detour.table.unproven}
        answer = detour.ask(client, number)
        if answer == "client-full":
            assert client not in unproven
        elif answer == "full":
            assert not unproven
        elif flow:
            detour.prove(client, number)
        assert len(detour.table) <= 5
        assert detour.table.count(client) <= 3
        _holds_together(detour.table)


def _holds_together(table: MappingTable) -> None:
    weights = {}
    for entry in table.unproven:
        assert not entry.proven
        network = prefix(entry.mapping.client)
        weights[network] = weights.get(network, 0) + 1
    oldest = table.unproven.oldest_of_heaviest()
    assert (oldest is None) == (not weights)
    if oldest is not None:
        assert weights[prefix(oldest.mapping.client)] == max(weights.values())


def test_a_flood_of_forged_clients_costs_nobody_else():
    detour = Detour(max_per_client=100, max_mappings=1000)
    random = Random(2)
    for number in range(5000):
        forged = ip_address(0x0A000000 + random.randrange(1 << 24))
        remote = Endpoint(IPv4Address("203.0.113.9"), 80)
        answer, _ = decide(Request(forged, remote, 0),
                           Facts(detour.table.find(forged, remote), AWAY),
                           detour.table, detour.policy, float(number))
        assert not isinstance(answer, Refusal)
        if number % 100 == 0:
            client = FAR + number // 100
            assert detour.ask(client, 1).startswith("new")
            detour.prove(client, 1)
    assert len(detour.table) == 1000
    assert all(detour.table.find(FAR + number, parse_endpoint("203.0.113.1:80"))
               for number in range(50))
