# SPDX-License-Identifier: GPL-2.0-or-later
"""The client's machine on a path manager that joins by itself: event in, commands out."""

import errno
import itertools
from ipaddress import ip_address, ip_network
from random import Random

import pytest

from detour_tools import mproxy
from detour_tools.client import machine as machine_module
from detour_tools.client import offers as offers_module
from detour_tools.client.detours import ATTEMPTS, DetourState
from detour_tools.client.machine import Machine, SendDatagram, Snapshot
from detour_tools.client.settings import ClientSettings
from detour_tools.endpoint import Endpoint, parse_endpoint
from detour_tools.pathmanager.base import CreateSubflow, Offer, Offered, SubflowClosed, Withdraw
from tests.unit.test_machine import FAR, LOCAL, NEAR, OTHER, SERVER, THIRD, asks, snapshot
from tests.unit.test_machine import Script as AnyScript

CONFIRM = 60.0
LIFETIME = 190


class Script(AnyScript):
    """A machine on a path manager that joins by itself."""

    def __init__(self, detours=(NEAR,), **settings):
        self.now = 1000.0
        self.machine = Machine(detours, ClientSettings(**settings), Random(1),
                               joins_by_itself=True)

    def wanted(self, remote=SERVER, on_link=False):
        return self._commands(self.machine.wanted(remote, on_link, self.now))

    def live(self, seconds, silent=()):
        """Let time pass; detours answer, but for the silent ones. Returns what is not asked."""
        end, commands = self.now + seconds, []
        while self.now < end:
            pending = self.wait(0.05)
            for command in pending:
                if not isinstance(command, SendDatagram):
                    commands.append(command)
                elif command.detour not in silent:
                    remote = mproxy.decode(command.payload).remote
                    pending += self.answer(command.detour, remote, remote.port)
        return commands

    def resynchronise(self, *connections, offered=()):
        return self._commands(self.machine.resynchronise(connections, self.now, offered))


def offers(detour=NEAR, port=80, remote=SERVER, lifetime=LIFETIME):
    return Offer(remote, Endpoint(detour.address, port), lifetime)


def withdraws(detour=NEAR, port=80, remote=SERVER):
    return Withdraw(remote, Endpoint(detour.address, port))


def stands(detour=NEAR, port=80, remote=SERVER, lifetime=100):
    return Offered(remote, Endpoint(detour.address, port), lifetime)


def test_asks_when_created_and_offers_what_the_detour_answers():
    script = Script()
    assert script.created() == [asks()]
    assert script.answer() == [offers()]
    assert script.wanted() == []
    assert script.established() == []
    assert script.joined() == []
    counters = script.machine.counters
    assert (counters.joins, counters.joins_established, counters.detours_wanted) == (1, 1, 1)


def test_a_second_connection_finds_what_stands_offered():
    script = Script().with_subflow()
    assert script.created(token=2) == []
    assert script.wanted() == []
    assert script.established(token=2) == []


def test_many_requests_for_one_remote_ask_once():
    script = Script()
    assert script.wanted() == [asks()]
    assert [script.wanted() for _ in range(100)] == [[]] * 100
    assert script.answer() == [offers()]
    assert [script.wanted() for _ in range(100)] == [[]] * 100
    assert script.machine.counters.requests == 1


def test_a_request_alone_gets_as_many_detours_as_a_connection():
    script = Script((NEAR, FAR, THIRD), prefer="order", max_subflows=2)
    assert script.wanted() == [asks(NEAR), asks(FAR)]
    assert script.answer(FAR) == [offers(FAR)]
    assert script.answer(NEAR) == [offers(NEAR)]


@pytest.mark.parametrize(("remote", "on_link"), [
    (SERVER, True),
    (Endpoint(NEAR.address, 22), False),
    (parse_endpoint("10.9.9.9:80"), False),
    (parse_endpoint("[2001:db8::1]:80"), False),
])
def test_requests_that_get_no_detour(remote, on_link):
    script = Script(exclude=(ip_network("10.9.0.0/16"),))
    assert script.wanted(remote, on_link) == []


def test_no_join_is_ever_commanded():
    script = Script((NEAR, FAR)).with_subflow()
    commands = script.lost(after=100) + script.live(600)
    script.machine.subflow_closed(SubflowClosed(1, LOCAL, SERVER, errno.ECONNRESET), script.now)
    commands += script.live(600)
    assert not [each for each in commands if isinstance(each, CreateSubflow)]
    assert {each.detour.address for each in commands if isinstance(each, Offer)} == {
        NEAR.address, FAR.address}  # it knows no direct joins


def test_what_is_in_use_is_confirmed_and_renewed_in_time():
    script = Script().with_subflow()
    renewals = []
    for _ in range(1200):
        commands = script.wait(1)
        if asks() in commands:
            renewals.append(script.now)
            assert script.answer() == [offers()]
        else:
            assert commands == []
    gaps = [after - before for before, after in itertools.pairwise(renewals)]
    assert max(gaps) <= LIFETIME / 3
    assert min(gaps) >= CONFIRM - 1


def test_what_nobody_uses_lapses_and_is_offered_again_from_memory():
    script = Script().with_subflow()
    script.machine.closed(1)
    assert script.wait(LIFETIME + 1) == []
    assert script.machine.stop() == []
    assert script.created(token=2) == [offers()]


def test_what_stands_offered_is_not_repeated_until_it_lapsed():
    script = Script().with_subflow()
    script.machine.closed(1)
    script.wait(LIFETIME - 1)
    assert script.created(token=2) == []
    script.machine.closed(2)
    script.wait(1.1)
    assert script.created(token=3) == [offers()]


def test_a_detour_that_falls_silent_is_withdrawn_and_comes_back():
    script = Script(probe_interval=30.0).with_subflow()
    script.created(token=2, remote=OTHER)
    script.answer(remote=OTHER, port=443)
    script.established(token=2, remote=OTHER)
    script.joined(port=443, token=2)
    script.live(200)
    assert script.live(CONFIRM + 10, silent=[NEAR]) == [
        withdraws(), withdraws(port=443, remote=OTHER)]
    assert script.machine.detours[0].state == DetourState.DOWN
    assert script.live(100, silent=[NEAR]) == []
    back = script.live(40)
    assert offers(port=443, remote=OTHER) in back
    assert script.machine.detours[0].state == DetourState.UP
    script.created(token=3)
    assert {each.remote for each in script.machine._offers} == {SERVER, OTHER}


def test_another_detour_takes_the_place_of_a_silent_one():
    script = Script((NEAR, FAR), prefer="order", max_subflows=1)
    script.created()
    script.answer(NEAR)
    script.established()
    script.joined(NEAR)
    script.created(token=2)
    assert script.live(CONFIRM + 10, silent=[NEAR]) == [withdraws(NEAR), offers(FAR)]


def test_a_mapping_that_moved_is_replaced():
    script = Script().with_subflow()
    script.wait_for(asks(), at_most=CONFIRM + 1)
    assert script.answer(port=50001) == [withdraws(), offers(port=50001)]


def test_a_mapping_that_a_live_detour_gives_no_more_is_withdrawn():
    script = Script().with_subflow()
    script.created(token=2, remote=OTHER)
    script.answer(remote=OTHER, port=443)
    seen = []
    for _ in range(200):
        commands = script.wait(0.5)
        seen += commands
        if asks(remote=OTHER) in commands:
            script.answer(remote=OTHER, port=443)
        if withdraws() in commands:
            break
    assert seen.count(asks()) == ATTEMPTS
    assert withdraws(port=443, remote=OTHER) not in seen
    assert script.machine.detours[0].mapping(SERVER) is None
    assert script.machine.detours[0].state == DetourState.UP


def test_a_refused_join_withdraws_and_asks_again_once():
    script = Script()
    script.created()
    script.answer()
    script.established()
    assert script.lost(error=errno.ECONNREFUSED) == [withdraws(), asks()]
    assert script.answer() == [offers()]  # new to the kernel, so that it tries
    assert script.lost(error=errno.ECONNREFUSED) == []
    assert script.wait(machine_module.REPLACE_DELAY * 2 + 1) == [withdraws(), offers()]


def test_a_hundred_refused_joins_ask_once():
    script = Script()
    for token in range(100):
        script.created(token=token)
    script.answer()
    for token in range(100):
        script.established(token=token)
    commands = [each for token in range(100)
                for each in script.lost(token=token, error=errno.ECONNREFUSED)]
    assert commands == [withdraws(), asks()]
    assert script.answer(port=50001) == [offers(port=50001)]
    assert [script.joined(port=50001, token=token) for token in range(100)] == [[]] * 100


def test_a_join_that_fails_late_is_not_held_against_a_newer_mapping():
    script = Script()
    for token in (1, 2):
        script.created(token=token)
    script.answer()
    for token in (1, 2):
        script.established(token=token)
    assert script.lost(token=1, error=errno.ECONNREFUSED) == [withdraws(), asks()]
    assert script.answer(port=50001) == [offers(port=50001)]
    assert script.lost(token=2, error=errno.ECONNREFUSED) == []
    assert script.lost(token=2, port=50001, error=errno.ECONNREFUSED) == []
    assert script.wait(7) == [withdraws(port=50001), offers(port=50001)]


def test_joins_by_a_new_offer_before_their_time_are_seen():
    script = Script()
    for token in (1, 2):
        script.created(token=token)
    script.answer()
    for token in (1, 2):
        script.established(token=token)
        script.joined(token=token)
    script.wait(50)
    script.lost(token=1, error=errno.ETIMEDOUT)
    script.live(2)
    script.lost(token=2, error=errno.ETIMEDOUT)
    assert script.live(1.5) == [withdraws(), offers()]  # for the first one; both try it
    script.joined(token=1)
    script.joined(token=2)
    assert script.machine.counters.joins == script.machine.counters.joins_established == 4
    script.live(100)
    script.lost(token=2, error=errno.ETIMEDOUT)
    assert script.live(4)[-2:] == [withdraws(), offers()]


def test_joins_that_were_never_tried_are_offered_once_the_detour_is_back():
    script = Script()
    later = parse_endpoint("10.0.3.4:22")
    for token, remote in ((1, SERVER), (2, OTHER), (3, later)):
        if remote == later:
            script.live(30)
        script.created(token=token, remote=remote)
        script.answer(remote=remote, port=remote.port)
        script.established(token=token, remote=remote)
    script.live(40, silent=[NEAR])
    assert not list(script.machine._offers)
    assert {each.remote for each in script.live(60)} == {SERVER, OTHER, later}


def test_a_hundred_lost_subflows_are_replaced_by_one_new_offer():
    script = Script()
    for token in range(100):
        script.created(token=token)
    script.answer()
    for token in range(100):
        script.established(token=token)
        script.joined(token=token)
    script.wait(50)
    for token in range(100):
        assert script.lost(token=token, error=errno.ETIMEDOUT) == []
    assert script.wait(machine_module.REPLACE_DELAY + 0.1) == [withdraws(), offers()]
    for token in range(100):
        script.joined(token=token)
    assert script.machine.counters.joins_established == 200
    assert script.machine.counters.joins == 200


def test_the_servers_limit_is_respected():
    script = Script().with_subflow()
    assert script.lost(after=0.05) == []  # reset right after its handshake
    assert withdraws() not in script.live(59)
    assert script.live(2)[-2:] == [withdraws(), offers()]


def test_joins_that_nobody_counted_on_count():
    script = Script((NEAR, FAR), prefer="order", max_subflows=1)
    script.created()
    script.wait(0.6)  # both are asked
    assert script.answer(FAR) == [offers(FAR)]
    assert script.answer(NEAR) == [offers(NEAR)]
    script.established()
    script.joined(NEAR)
    # The kernel tries the spare one, too, and is refused.
    assert script.lost(FAR, error=errno.ECONNREFUSED) == [withdraws(FAR)]
    assert script.machine.detours[1].mapping(SERVER) is None


def test_an_idle_connection_waits_for_its_establishment_not_for_another_detour():
    script = Script((NEAR, FAR), prefer="order", max_subflows=1)
    script.created()
    script.answer(NEAR)
    assert offers(FAR) not in script.live(600)
    script.established()
    assert offers(FAR) not in script.live(machine_module.JOIN_PATIENCE - 1)
    assert offers(FAR) in script.live(2)


def test_an_offer_that_the_kernel_does_not_take_is_made_again():
    script = Script()
    script.created()
    [offer] = script.answer()
    assert script.machine.failed(offer, errno.ENOSPC, script.now) == []
    assert script.established() == [offers()]
    assert script.machine.failed(offer, errno.ENOSPC, script.now) == []
    assert script.wait(machine_module.REPLACE_DELAY + 0.1) == [offers()]
    assert script.machine.failed(withdraws(), errno.EPERM, script.now) == []


def test_a_join_that_was_never_sent_is_tried_again():
    """The kernel says nothing of one for which it had no route."""
    script = Script()
    script.created()
    script.answer()
    assert script.established() == []
    assert script.live(machine_module.JOIN_PATIENCE - 1) == []
    assert script.live(machine_module.REPLACE_DELAY + 2) == [withdraws(), offers()]
    script.joined()
    assert withdraws() not in script.live(600)


def test_joins_that_were_never_sent_do_not_hide_that_a_detour_is_silent():
    script = Script()
    script.created()
    script.answer()
    script.established()
    assert script.live(120, silent=[NEAR]) == [withdraws()]
    assert script.machine.detours[0].state == DetourState.DOWN


def test_a_subflow_by_an_interface_is_not_the_direct_one():
    script = Script((NEAR, FAR), prefer="order", max_subflows=1)
    script.created()
    script.established()
    other = Endpoint(ip_address("10.99.0.2"), 1234)
    script.machine.subflow_closed(
        SubflowClosed(1, other, SERVER, errno.ECONNREFUSED, 2), script.now)
    assert script.machine.connections[1].server_limit is None
    assert offers(FAR) in script.live(5, silent=[NEAR])


def test_what_stands_offered_for_what_gets_no_detour_lapses():
    script = Script()
    script.resynchronise(snapshot(on_link=True), offered=[stands()])
    assert script.live(600) == []
    assert not list(script.machine._offers)


def test_a_clean_end_withdraws_everything():
    script = Script((NEAR, FAR), max_subflows=2)
    script.created()
    script.answer(NEAR)
    script.answer(FAR)
    assert script.machine.stop() == [withdraws(NEAR), withdraws(FAR)]
    assert script.machine.stop() == []


# -- restarts and lost events ----------------------------------------------------------------------


def test_after_a_restart_what_is_right_stays_and_is_confirmed():
    script = Script()
    through = Endpoint(NEAR.address, 80)
    assert script.resynchronise(snapshot(SERVER, through), offered=[stands()]) == []
    assert script.wait(0) == [asks()]
    assert script.answer() == [offers()]
    assert script.machine.stop() == [withdraws()]


def test_after_a_restart_a_thousand_questions_take_their_time():
    script = Script()
    remotes = [Endpoint(ip_address(f"198.18.{n // 250}.{n % 250}"), 80) for n in range(1000)]
    found = [Snapshot(n, LOCAL, remote, False, False, True,
                      frozenset([remote, Endpoint(NEAR.address, 80)]))
             for n, remote in enumerate(remotes)]
    script.resynchronise(*found, offered=[stands(remote=remote) for remote in remotes])
    commands, first_second = [], 0
    while script.now < 1021:
        pending = script.wait(0.05)
        commands += pending
        first_second += len(pending) if script.now < 1001 else 0
        for command in pending:
            if isinstance(command, SendDatagram):
                remote = mproxy.decode(command.payload).remote
                commands += script.answer(remote=remote, after=0)
    assert first_second <= 51
    assert {each.remote for each in commands if isinstance(each, Offer)} == set(remotes)


def test_after_a_restart_what_moved_is_replaced():
    script = Script()
    script.resynchronise(snapshot(SERVER, Endpoint(NEAR.address, 80)), offered=[stands()])
    script.wait(0)
    assert script.answer(port=50001) == [withdraws(), offers(port=50001)]


def test_after_a_restart_what_stands_for_a_detour_that_comes_late_is_left_until_then():
    script = Script(())
    found, offered = snapshot(SERVER, Endpoint(NEAR.address, 80)), [stands()]
    assert script.resynchronise(found, offered=offered) == []
    script.machine.add(NEAR, 0)
    assert script.resynchronise(found, offered=offered) == []
    assert script.wait(0) == [asks()]
    assert script.answer() == [offers()]


def test_after_a_restart_a_silent_detour_is_withdrawn():
    script = Script()
    script.resynchronise(snapshot(SERVER, Endpoint(NEAR.address, 80)), offered=[stands()])
    assert withdraws() in script.wait(10)


def test_after_a_restart_what_nobody_uses_lapses():
    script = Script()
    assert script.resynchronise(offered=[stands(lifetime=100)]) == []
    assert script.wait(99) == []
    assert list(script.machine._offers)
    assert script.wait(2) == []
    assert not list(script.machine._offers)


def test_what_stands_for_ever_for_a_detour_of_ours_gets_a_lifetime():
    script = Script()
    assert script.resynchronise(offered=[stands(lifetime=None)]) == [offers()]


@pytest.mark.parametrize("offered", [
    stands(parse_endpoint("10.0.99.2:1")), stands(parse_endpoint("10.0.99.2:1"), lifetime=None),
    Offered(parse_endpoint("[2001:db8::2]:80"), parse_endpoint("[2001:db8::1]:80"), None)])
def test_what_others_offered_is_left_alone(offered):
    script = Script()
    assert script.resynchronise(snapshot(SERVER), offered=[offered]) == [asks()]
    assert script.machine.stop() == []


def test_what_policy_forbids_by_now_is_withdrawn():
    script = Script(exclude=(ip_network("10.0.3.0/24"),))
    assert script.resynchronise(offered=[stands()]) == [withdraws()]


def test_of_two_ports_of_one_detour_one_goes():
    script = Script()
    assert script.resynchronise(offered=[stands(), stands(port=50001)]) == [
        withdraws(port=50001)]


def test_connections_that_lost_their_subflow_unheard_get_one_new_offer():
    script = Script()
    found = [snapshot(SERVER, token=token) for token in range(50)]
    assert script.resynchronise(*found, offered=[stands()]) == [withdraws(), offers()]
    assert script.machine.counters.joins == 50


def test_what_was_deleted_by_hand_is_offered_again_when_it_is_wanted():
    script = Script().with_subflow()
    assert script.resynchronise(snapshot(SERVER, Endpoint(NEAR.address, 80))) == []
    assert script.created(token=2) == [offers()]


def test_lost_events_change_nothing_that_is_right():
    script = Script().with_subflow()
    assert script.resynchronise(snapshot(SERVER, Endpoint(NEAR.address, 80)),
                                offered=[stands()]) == []
    assert script.machine.stop() == [withdraws()]


# -- bounds ----------------------------------------------------------------------------------------


def test_the_least_used_make_room(monkeypatch):
    monkeypatch.setattr(offers_module, "MAX_OFFERS", 10)
    script = Script()
    remotes = [Endpoint(ip_address(f"198.18.0.{number}"), 80) for number in range(11)]
    for token, remote in enumerate(remotes[:10]):
        script.created(token=token, remote=remote)
        script.answer(remote=remote)
    script.created(token=20, remote=remotes[0])  # used again
    script.created(token=21, remote=remotes[10])
    assert script.answer(remote=remotes[10]) == [
        withdraws(remote=remotes[1]), offers(remote=remotes[10])]
    assert len(list(script.machine._offers)) == 10


def test_memory_is_given_back():
    script = Script()
    for number in range(100):
        remote = Endpoint(ip_address(f"198.18.0.{number}"), 80)
        script.created(token=number, remote=remote)
        script.answer(remote=remote)
        script.machine.closed(number)
    script.wait(LIFETIME + 10)
    assert not list(script.machine._offers)
    assert script.machine.deadline() is None
