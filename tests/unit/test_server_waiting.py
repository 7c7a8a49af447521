# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests wait in turn among clients, those that hold mappings first."""

from ipaddress import ip_address

from hypothesis import given
from hypothesis import strategies as st

from detour_tools.server.waiting import Waiting

GOOD, LOUD = ip_address("10.0.1.1"), ip_address("10.0.1.2")


def test_who_asks_much_keeps_nobody_else_waiting():
    waiting = Waiting[str](known=100)
    for number in range(90):
        waiting.put(LOUD, f"loud {number}", known=True)
    waiting.put(GOOD, "good", known=True)
    assert waiting.take(2) == ["loud 0", "good"]
    assert waiting.take(2) == ["loud 1", "loud 2"], "and each in its order"


def test_clients_without_mappings_come_after_but_come():
    waiting = Waiting[int]()
    for number in range(8):
        waiting.put(ip_address(number), -number - 1, known=False)
    for number in range(8):
        waiting.put(GOOD, number, known=True)
    assert waiting.take(8) == [0, 1, 2, -1, 3, 4, 5, -2]
    assert waiting.take(99) == [6, 7, -3, -4, -5, -6, -7, -8]


def test_in_a_full_line_the_oldest_of_many_strangers_goes():
    waiting = Waiting[int](strangers=3)
    kept = [waiting.put(ip_address(number), number, known=False) for number in range(5)]
    assert kept == [True] * 3 + [False] * 2
    assert waiting.take(9) == [2, 3, 4]


def test_a_full_line_takes_the_first_of_another_client():
    waiting = Waiting[str](known=3)
    assert [waiting.put(LOUD, f"loud {n}", known=True) for n in range(4)] == [True] * 3 + [False]
    assert not waiting.put(GOOD, "good", known=True), "one of the loud client is lost for it"
    assert waiting.take(9) == ["loud 0", "good", "loud 1"]


def test_forgets_all():
    waiting = Waiting[int]()
    waiting.put(GOOD, 1, known=True)
    waiting.put(LOUD, 2, known=False)
    waiting.clear()
    assert len(waiting) == 0
    assert waiting.take(9) == []
    assert list(waiting.counts(9)) == []


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans())), st.integers(1, 8))
def test_nothing_is_lost_or_doubled_without_saying_so(puts, most):
    waiting, lost = Waiting[int](known=most, strangers=most), 0
    for number, (client, known) in enumerate(puts):
        lost += not waiting.put(ip_address(client), number, known=known)
    assert len(waiting) == len(puts) - lost <= 2 * most
    assert sum(count for _, count in waiting.counts(99)) == len(waiting)
    taken = waiting.take(999)
    assert len(set(taken)) == len(taken) == len(puts) - lost
