# SPDX-License-Identifier: GPL-2.0-or-later
"""The mapping table: the protocol's four rules, and that it always holds together."""

import time
from ipaddress import IPv4Address, ip_address
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from detour_tools.endpoint import Endpoint, parse_endpoint
from detour_tools.mapping import Mapping
from detour_tools.server import ports
from detour_tools.server.ports import PortPool
from detour_tools.server.table import Decision, MappingTable, NoFreePortError, Outcome, Rank

ALICE = IPv4Address("10.0.1.1")
BOB = IPv4Address("10.0.1.2")
WEB = parse_endpoint("203.0.113.7:80")
OTHER = parse_endpoint("203.0.113.8:80")
THIRD = parse_endpoint("203.0.113.9:443")


def nothing(_: int) -> bool:
    return False


def new_table() -> MappingTable:
    return MappingTable(Random(1))


def request(table, client, remote, proposed, now, forbidden):
    """As decide() has it: what there is, or else a new one."""
    found = table.find(client, remote)
    if found is None:
        return table.add(client, remote, proposed, now, forbidden)
    table.touch(found, now)
    return Decision(Outcome.EXISTING, found)


def ask(table, client, remote, proposed, forbidden=nothing, now=0.0):
    outcome, entry = request(table, client, remote, proposed, now, forbidden)
    assert entry.mapping.client == client
    assert entry.mapping.remote == remote
    return outcome.value, entry.mapping.detour_port


def test_transcript_of_the_four_rules():
    table = new_table()
    # as asked
    assert ask(table, ALICE, WEB, 80) == ("new", 80)
    # existing, whatever is proposed
    assert ask(table, ALICE, WEB, 80) == ("existing", 80)
    assert ask(table, ALICE, WEB, 8080) == ("existing", 80)
    assert ask(table, ALICE, WEB, 0) == ("existing", 80)
    # the client uses the port for another remote
    outcome, port = ask(table, ALICE, OTHER, 80)
    assert outcome == "moved"
    assert ports.FIRST <= port <= ports.LAST
    # which says nothing about another client
    assert ask(table, BOB, OTHER, 80) == ("new", 80)
    # the detour listens on it
    outcome, port = ask(table, BOB, WEB, 443, forbidden={443}.__contains__)
    assert outcome == "moved"
    assert ports.FIRST <= port <= ports.LAST
    # no proposal
    outcome, port = ask(table, BOB, parse_endpoint("203.0.113.9:1"), 0)
    assert outcome == "new"
    assert ports.FIRST <= port <= ports.LAST
    assert len(table) == 5
    assert (table.count(ALICE), table.count(BOB), table.clients) == (2, 3, 2)


def test_a_removed_mapping_frees_its_port():
    table = new_table()
    table.remove(request(table, ALICE, WEB, 80, 0.0, nothing).entry)
    assert len(table) == table.clients == 0
    assert ask(table, ALICE, OTHER, 80) == ("new", 80)


def test_a_mapping_taken_over_keeps_its_port():
    table = new_table()
    assert table.insert(Mapping(ALICE, 50000, WEB), 0.0) is not None
    assert ask(table, ALICE, WEB, 80) == ("existing", 50000)
    assert table.insert(Mapping(ALICE, 50000, OTHER), 0.0) is None, "the port is taken"
    assert table.insert(Mapping(ALICE, 50001, WEB), 0.0) is None, "the remote has one"
    assert len(table) == 1


def test_forbidden_ports_are_never_picked():
    table = new_table()
    allowed = range(60000, 60020)
    picked = {ask(table, ALICE, Endpoint(WEB.address, number), 0,
                  forbidden=lambda port: port not in allowed)[1] for number in range(1, 21)}
    assert picked == set(allowed)
    with pytest.raises(NoFreePortError):
        ask(table, ALICE, Endpoint(WEB.address, 21), 0, forbidden=lambda port: port not in allowed)
    assert len(table) == 20


def test_all_ports_of_a_client_can_be_picked_and_then_none():
    table = new_table()
    assert ask(table, ALICE, OTHER, 2000) == ("new", 2000)
    picked = [ask(table, ALICE, Endpoint(WEB.address, number), 2000)[1]
              for number in range(1, 65536 - ports.FIRST_OTHER)]
    dynamic = set(range(ports.FIRST, ports.LAST + 1))
    assert set(picked[:ports.COUNT]) == dynamic, "these come first"
    assert set(picked) == set(range(ports.FIRST_OTHER, 65536)) - {2000}
    with pytest.raises(NoFreePortError):
        ask(table, ALICE, THIRD, 0)
    assert ask(table, ALICE, THIRD, 80) == ("new", 80)
    assert ask(table, BOB, OTHER, 0)[0] == "new"


def test_a_port_above_1023_that_comes_free_is_picked_again():
    table = new_table()
    entries = [request(table, ALICE, Endpoint(WEB.address, number), 0, 0.0, nothing).entry
               for number in range(1, 65537 - ports.FIRST_OTHER)]
    gone = next(entry for entry in entries if entry.mapping.detour_port == 1024)
    table.remove(gone)
    assert ask(table, ALICE, OTHER, 0) == ("new", 1024)


def test_a_port_costs_the_same_when_few_are_left_and_100000_mappings_are_there():
    table = new_table()
    for number in range(100_000):
        request(table, ip_address(0x0A000000 + number // 1000),
                Endpoint(WEB.address, number % 1000), 0, 0.0, nothing)

    def cost(client: IPv4Address, first: int) -> float:
        best = 1.0
        for round_ in range(5):
            start = time.perf_counter()
            for number in range(200):
                request(table, client, Endpoint(OTHER.address, first + 200 * round_ + number), 0,
                              0.0, nothing)
            best = min(best, time.perf_counter() - start)
        return best

    few = cost(ALICE, 0)
    for number in range(2000, ports.COUNT - 1000):
        request(table, ALICE, Endpoint(OTHER.address, number), 0, 0.0, nothing)
    many = cost(ALICE, 20000)
    assert many < 5 * few


def test_the_longest_unused_come_first():
    table = new_table()
    first, second, third = (request(table, ALICE, Endpoint(WEB.address, port), 0, float(port),
                                          nothing).entry for port in (1, 2, 3))
    assert list(table.unused_since(2.0, 2.0)) == [first, second]
    request(table, ALICE, Endpoint(WEB.address, 1), 0, 4.0, nothing)
    assert list(table.unused_since(3.0, 3.0)) == [second, third]
    table.touch(second, 5.0)
    assert list(table.unused_since(3.0, 3.0)) == [third]
    assert [entry.serial for entry in table.entries(after=1)] == [2, 3]
    table.remove(third)
    assert not table.holds(third)
    assert list(table.unused_since(9.0, 9.0)) == [first, second]


def test_a_flow_proves_a_mapping():
    table = new_table()
    first, second, third = (request(table, ALICE, Endpoint(WEB.address, port), 0, float(port),
                                          nothing).entry for port in (1, 2, 3))
    table.prove(second, 4.0)
    assert list(table.unproven) == [first, third]
    assert list(table.unused_since(0.0, 9.0)) == [first, third]
    assert list(table.unused_since(9.0, 0.0)) == [second]
    table.prove(second, 5.0)
    assert second.last_used == 5.0
    table.remove(second)
    table.remove(first)
    assert list(table.unused_since(9.0, 9.0)) == [third]


def test_how_well_a_client_is_known():
    table = new_table()
    assert table.rank(ALICE) is Rank.STRANGER
    first, second = (request(table, ALICE, Endpoint(WEB.address, port), 0, float(port),
                             nothing).entry for port in (1, 2))
    assert table.rank(ALICE) is Rank.KNOWN
    for _ in range(2):
        table.prove(second, 3.0)
    assert (table.rank(ALICE), table.rank(BOB)) == (Rank.PROVEN, Rank.STRANGER)
    table.remove(first)
    assert table.rank(ALICE) is Rank.PROVEN
    table.remove(second)
    assert table.rank(ALICE) is Rank.STRANGER
    table.insert(second.mapping, 4.0)
    assert table.rank(ALICE) is Rank.KNOWN


def test_who_has_a_port():
    table = new_table()
    for client in (ALICE, BOB):
        ask(table, client, WEB, 5000)
    ask(table, ALICE, OTHER, 5001)
    assert [entry.mapping.client for entry in table.of_port(5000)] == [ALICE, BOB]
    assert not table.of_port(5002)


def test_idle_clients_leave_nothing_behind():
    table = new_table()
    for number in range(1000):
        client = ip_address(0x0A000000 + number)
        table.remove(request(table, client, WEB, 0, 0.0, nothing).entry)
    assert table.clients == 0


class AgainstAModel(RuleBasedStateMachine):
    """Any sequence of requests and removals keeps the rules of the protocol."""

    def __init__(self):
        super().__init__()
        self.table = new_table()
        self.model: dict[tuple[IPv4Address, Endpoint], int] = {}
        self.now = 0.0

    clients = st.sampled_from([ALICE, BOB])
    remotes = st.builds(Endpoint, st.just(WEB.address), st.integers(1, 6))
    proposals = st.sampled_from([0, 80, 443, ports.FIRST, ports.LAST, ports.LAST - 1])
    listening = st.sets(st.sampled_from([80, 443, ports.FIRST, ports.LAST]))

    @rule(client=clients, remote=remotes, proposed=proposals, listening=listening)
    def request(self, client, remote, proposed, listening):
        self.now += 1
        used = {port for (owner, _), port in self.model.items() if owner == client}
        known = self.model.get((client, remote))
        outcome, entry = request(self.table, client, remote, proposed, self.now,
                                            listening.__contains__)
        port = entry.mapping.detour_port
        if known is not None:
            assert (outcome, port) == (Outcome.EXISTING, known)
        elif proposed and proposed not in used and proposed not in listening:
            assert (outcome, port) == (Outcome.NEW, proposed)
        else:
            assert outcome is (Outcome.MOVED if proposed else Outcome.NEW)
            assert ports.FIRST <= port <= ports.LAST
            assert port not in used | listening
        self.model[client, remote] = port

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data):
        client, remote = data.draw(st.sampled_from(sorted(self.model)))
        self.table.remove(self.table.find(client, remote))
        del self.model[client, remote]

    @invariant()
    def same(self):
        assert {(m.client, m.remote): m.detour_port for m in self.table.mappings()} == self.model
        assert len(self.table) == len(self.model)


TestAgainstAModel = AgainstAModel.TestCase
TestAgainstAModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.lists(st.one_of(st.none(), st.integers(0, 40)), max_size=120), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_a_pool_deals_each_port_once(steps, seed):
    pool, random, out = PortPool(), Random(seed), []
    for step in steps:
        if step is None or not out:
            port = pool.draw(random)
            assert port not in out
            assert ports.FIRST <= port <= ports.LAST
            out.append(port)
        elif step % 2:
            pool.put_back(out.pop(step % len(out)))
        else:
            port = ports.FIRST + step
            if port not in out:
                pool.take(port)
                out.append(port)
        assert len(pool) == ports.COUNT - len(out)
    rest = set()
    while (port := pool.draw(random)) is not None:
        rest.add(port)
    assert rest == set(range(ports.FIRST, ports.LAST + 1)) - set(out)
