# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests wait in turn among clients, those that are better known first."""

from ipaddress import ip_address

from hypothesis import given
from hypothesis import strategies as st

from detour_tools.server.table import Rank
from detour_tools.server.waiting import Waiting

GOOD, LOUD = ip_address("10.0.1.1"), ip_address("10.0.1.2")


def test_who_asks_much_keeps_nobody_else_waiting():
    waiting = Waiting[str](known=100)
    for number in range(90):
        waiting.put(LOUD, f"loud {number}", Rank.KNOWN)
    waiting.put(GOOD, "good", Rank.KNOWN)
    assert waiting.take(2) == ["loud 0", "good"]
    assert waiting.take(2) == ["loud 1", "loud 2"], "and each in its order"


def test_clients_without_mappings_come_after_but_come():
    waiting = Waiting[int]()
    for number in range(8):
        waiting.put(ip_address(number), -number - 1, Rank.STRANGER)
    for number in range(8):
        waiting.put(GOOD, number, Rank.KNOWN)
    assert waiting.take(8) == [0, 1, 2, -1, 3, 4, 5, -2]
    assert waiting.take(99) == [6, 7, -3, -4, -5, -6, -7, -8]


def test_clients_with_flows_come_first():
    """Of very many that hold mappings most may be forged."""
    waiting = Waiting[str]()
    for number in range(8):
        waiting.put(ip_address(number), f"known {number}", Rank.KNOWN)
        waiting.put(LOUD, f"proven {number}", Rank.PROVEN)
    waiting.put(GOOD, "stranger", Rank.STRANGER)
    assert waiting.take(8) == ["proven 0", "known 0", "proven 1", "stranger",
                               "proven 2", "known 1", "proven 3", "proven 4"]
    full = Waiting[int](known=1)
    assert full.put(GOOD, 1, Rank.PROVEN)
    assert full.put(ip_address(1), 2, Rank.KNOWN)
    assert not full.put(ip_address(2), 3, Rank.KNOWN)
    assert full.take(9) == [1, 3]


def test_in_a_full_line_the_oldest_of_many_strangers_goes():
    waiting = Waiting[int](strangers=3)
    kept = [waiting.put(ip_address(number), number, Rank.STRANGER) for number in range(5)]
    assert kept == [True] * 3 + [False] * 2
    assert waiting.take(9) == [2, 3, 4]


def test_a_full_line_takes_the_first_of_another_client():
    waiting = Waiting[str](known=3)
    assert [waiting.put(LOUD, f"loud {n}", Rank.KNOWN) for n in range(4)] == [True] * 3 + [False]
    assert not waiting.put(GOOD, "good", Rank.KNOWN), "one of the loud client is lost for it"
    assert waiting.take(9) == ["loud 0", "good", "loud 1"]


def test_forgets_all():
    waiting = Waiting[int]()
    waiting.put(GOOD, 1, Rank.KNOWN)
    waiting.put(LOUD, 2, Rank.STRANGER)
    waiting.clear()
    assert len(waiting) == 0
    assert waiting.take(9) == []
    assert list(waiting.counts(9)) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(Rank))), st.integers(1, 8))
def test_nothing_is_lost_or_doubled_without_saying_so(puts, most):
    waiting, lost = Waiting[int](known=most, strangers=most), 0
    for number, (client, rank) in enumerate(puts):
        lost += not waiting.put(ip_address(client), number, rank)
    assert len(waiting) == len(puts) - lost <= 3 * most
    assert sum(count for _, count in waiting.counts(99)) == len(waiting)
    taken = waiting.take(999)
    assert len(set(taken)) == len(taken) == len(puts) - lost
