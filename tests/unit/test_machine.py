# SPDX-License-Identifier: GPL-2.0-or-later
"""The client's machine, told as transcripts: event in, commands out."""

import errno
from ipaddress import ip_address, ip_network
from random import Random

import pytest

from detour_tools import mproxy
from detour_tools.client import machine as machine_module
from detour_tools.client.detours import ATTEMPTS, DetourState
from detour_tools.client.machine import CreateSubflow, Machine, Note, SendDatagram, Snapshot
from detour_tools.client.settings import ClientSettings
from detour_tools.endpoint import Endpoint, parse_endpoint
from detour_tools.pathmanager.base import (
    ConnectionCreated,
    ConnectionEstablished,
    SubflowClosed,
    SubflowEstablished,
)

LOCAL = parse_endpoint("10.0.1.1:40000")
SERVER = parse_endpoint("10.0.3.2:80")
OTHER = parse_endpoint("10.0.3.3:443")
NEAR, FAR, THIRD = (parse_endpoint(f"10.0.{n}.2:45672") for n in (6, 7, 8))


class Script:
    """A machine, its clock, and short words for what happens to it."""

    def __init__(self, detours=(NEAR,), **settings):
        self.machine = Machine(detours, ClientSettings(**settings), Random(1))
        self.now = 1000.0

    def created(self, token=1, remote=SERVER, on_link=False, **flags):
        return self._commands(self.machine.created(
            ConnectionCreated(token, LOCAL, remote, **flags), on_link, self.now))

    def established(self, token=1, remote=SERVER, **flags):
        return self._commands(self.machine.established(
            ConnectionEstablished(token, LOCAL, remote, **flags), self.now))

    def answer(self, detour=NEAR, remote=SERVER, port=80, after=0.02):
        self.now += after
        return self._commands(self.machine.datagram(
            detour, mproxy.v1.encode(mproxy.v1.Response(remote, port)), self.now))

    def joined(self, detour=NEAR, port=80, token=1):
        return self._commands(self.machine.subflow_established(
            SubflowEstablished(token, LOCAL, Endpoint(detour.address, port)), self.now))

    def lost(self, detour=NEAR, port=80, token=1, error=0, reason=None, after=0.0):
        self.now += after
        return self._commands(self.machine.subflow_closed(SubflowClosed(
            token, LOCAL, Endpoint(detour.address, port), error, reason), self.now))

    def wait(self, seconds):
        """Let time pass, timer by timer."""
        end, commands = self.now + seconds, []
        while (due := self.machine.deadline()) is not None and due <= end:
            self.now = max(self.now, due)
            commands += self._commands(self.machine.tick(self.now))
        self.now = end
        return commands

    def wait_for(self, command, at_most=60.0):
        """Let time pass until the command is given."""
        for _ in range(int(at_most / 0.01)):
            if command in self.wait(0.01):
                return
        pytest.fail(f"{command} was not given in {at_most} s")

    def with_subflow(self, **settings):
        """A connection whose subflow through NEAR is up."""
        self.created()
        self.answer()
        self.established()
        self.joined()
        return self

    @staticmethod
    def _commands(commands):
        return [command for command in commands if not isinstance(command, Note)]


def asks(detour=NEAR, remote=SERVER):
    return SendDatagram(detour, mproxy.v1.encode(mproxy.v1.Request(remote, remote.port)))


def joins(detour=NEAR, port=80, token=1):
    return CreateSubflow(token, LOCAL.address, Endpoint(detour.address, port), detour)


DIRECT_JOIN = CreateSubflow(1, LOCAL.address, SERVER, None)


def test_asks_when_created_and_joins_when_established():
    script = Script()
    assert script.created() == [asks()]
    assert script.answer() == []
    assert script.established() == [joins()]
    assert script.joined() == []
    assert script.wait(3600) == []


def test_joins_when_the_answer_comes_after_establishment():
    script = Script()
    assert script.created() == [asks()]
    assert script.established() == []
    assert script.answer(port=50001) == [joins(port=50001)]


def test_a_second_connection_needs_no_round_trip():
    script = Script().with_subflow()
    assert script.created(token=2) == []
    assert script.established(token=2) == [joins(token=2)]


def test_two_connections_share_one_question():
    script = Script()
    assert script.created(token=1) == [asks()]
    assert script.created(token=2) == []
    script.established(token=1)
    script.established(token=2)
    assert sorted(script.answer(), key=lambda c: c.token) == [joins(token=1), joins(token=2)]


def test_a_connection_that_closed_before_it_was_established_is_gone():
    script = Script()
    assert script.created() == [asks()]
    script.answer()
    script.machine.closed(1)
    assert script.established() == []
    assert script.machine.connections == {}


@pytest.mark.parametrize(("remote", "on_link", "flags"), [
    (SERVER, False, {"server_side": True}),
    (SERVER, False, {"deny_join": True}),
    (SERVER, True, {}),
    (parse_endpoint("127.0.0.1:80"), False, {}),
    (Endpoint(NEAR.address, 22), False, {}),
    (parse_endpoint("10.9.9.9:80"), False, {}),
    (parse_endpoint("[2001:db8::1]:80"), False, {}),
])
def test_no_detour_for(remote, on_link, flags):
    script = Script(exclude=(ip_network("10.9.0.0/16"),))
    assert script.created(remote=remote, on_link=on_link, **flags) == []
    assert script.established(remote=remote, **flags) == []
    assert script.wait(3600) == []


def test_include_allows_an_on_link_remote():
    script = Script(include=(ip_network("10.0.3.0/24"),))
    assert script.created(on_link=True) == [asks()]


def test_retransmits_with_growing_pauses_then_calls_the_detour_down():
    script = Script()
    script.created()
    times = [script.now for _ in range(1000) for _ in script.wait(0.01)]
    assert script.machine.detours[0].state == DetourState.DOWN
    assert len(times) == ATTEMPTS - 1
    first, second = times[1] - times[0], times[2] - times[1]
    assert 1.6 < second / first < 2.5


def test_a_silent_detour_is_probed_slowly_and_used_when_it_answers():
    script = Script(probe_interval=30.0)
    script.created()
    script.established()
    script.wait(10)
    assert script.machine.detours[0].state == DetourState.DOWN
    probes = script.wait(600)
    assert set(probes) == {asks()}
    assert 20 <= len(probes) <= 45  # two datagrams a probe
    script.wait_for(asks())
    assert script.answer() == [joins()]
    assert script.machine.detours[0].state == DetourState.UP


def test_a_remote_that_a_live_detour_does_not_serve_is_not_held_against_the_detour():
    script = Script().with_subflow()
    assert script.created(token=2, remote=OTHER) == [asks(remote=OTHER)]
    script.wait(0.01)
    script.wait_for(asks())  # what the detour did serve, to see whether it is there
    assert script.answer() == []
    assert script.machine.detours[0].state == DetourState.UP
    assert script.created(token=3, remote=OTHER) == []  # remembered
    script.wait_for(asks(remote=OTHER), at_most=61)  # but not for ever
    assert script.answer(remote=OTHER) == []
    assert script.established(token=3, remote=OTHER) == [joins(port=80, token=3)]


def test_a_remote_that_is_never_served_is_asked_for_ever_more_rarely():
    script = Script().with_subflow()
    script.created(token=2, remote=OTHER)
    asked = 0
    for _ in range(36000):
        commands = script.wait(0.1)
        asked += commands.count(asks(remote=OTHER))
        if asks() in commands:
            script.answer()
    assert 3 * ATTEMPTS <= asked <= 7 * ATTEMPTS


def test_a_detour_that_fails_a_connection_makes_room_for_another():
    script = Script((NEAR, FAR), prefer="order", max_subflows=1)
    script.created()
    script.answer(NEAR)
    assert script.established() == [joins(NEAR)]
    script.joined(NEAR)
    script.lost(NEAR, after=0.5)  # as a server at its limit does it, or a broken detour
    script.wait_for(asks(FAR), at_most=61)
    assert script.answer(FAR) == [joins(FAR)]
    script.joined(FAR)
    assert joins(NEAR) not in script.wait(3600)


@pytest.mark.parametrize("code", [errno.ENOTCONN, errno.ECONNREFUSED])
def test_failing_for_years_is_no_problem(code):
    script = Script()
    script.created()
    script.answer()
    commands = script.established()
    for _ in range(3000):
        joins_made = [command for command in commands if isinstance(command, CreateSubflow)]
        for command in joins_made:
            script.machine.join_failed(command, code, script.now)
        commands = script.wait(3600)
        if asks() in commands:
            commands += script.answer()
    assert script.machine.counters.joins > 1000


def test_refused_remotes_do_not_keep_a_detour_down():
    script = Script()
    script.created(token=1, remote=OTHER)
    script.created(token=2)
    script.wait(20)
    assert script.machine.detours[0].state == DetourState.DOWN
    for token in range(3, 20):  # connections to the refused remote come and go
        script.created(token=token, remote=OTHER)
        if asks() in script.wait(10):
            break
        script.machine.closed(token)
    else:
        pytest.fail("the remote that is served was never asked for")


def test_a_detour_whose_first_remote_was_refused_still_gets_another_chance_soon():
    script = Script()
    script.created(remote=OTHER)
    script.wait(10)
    assert script.machine.detours[0].state == DetourState.DOWN
    script.created(token=2)
    script.wait_for(asks(), at_most=6)
    script.established(token=2)
    assert joins(token=2) in script.answer()


def test_forged_late_and_malformed_answers_change_nothing():
    script = Script()
    script.created()
    script.established()
    counters = script.machine.counters
    assert script.answer(detour=FAR) == []
    assert script.answer(remote=OTHER) == []
    assert script.answer(port=0) == []
    request = mproxy.v1.encode(mproxy.v1.Request(SERVER, 80))
    assert script.machine.datagram(NEAR, request, script.now) == []
    assert counters.answers_unmatched == 4
    assert script.machine.datagram(NEAR, b"\1\1", script.now) == []
    assert counters.datagrams_malformed == 1
    assert script.answer() == [joins()]
    assert script.answer() == []
    assert counters.answers_late == 1
    assert script.answer(port=666) == []
    assert counters.answers_unmatched == 5
    assert script.machine.detours[0].mapping(SERVER) == 80


def test_round_trip_times_are_not_taken_from_retransmitted_requests():
    script = Script()
    script.created()
    script.wait(0.6)  # one retransmission
    script.answer()
    assert script.machine.detours[0].rtt is None
    script.created(token=2, remote=OTHER)
    script.answer(remote=OTHER, after=0.02)
    assert script.machine.detours[0].rtt == pytest.approx(0.02)


def test_uses_as_many_detours_as_it_may():
    script = Script((NEAR, FAR, THIRD), prefer="order", max_subflows=2)
    assert script.created() == [asks(NEAR), asks(FAR)]
    script.answer(NEAR)
    script.answer(FAR)
    assert script.established() == [joins(NEAR), joins(FAR)]


def test_prefers_the_nearest_detours_once_it_knows_them():
    script = Script((NEAR, FAR, THIRD), prefer="rtt", max_subflows=2)
    script.created()
    script.answer(NEAR, after=0.3)
    script.answer(FAR, after=0.01)
    assert script.created(token=2, remote=OTHER) == [asks(THIRD, OTHER), asks(NEAR, OTHER)]
    script.answer(THIRD, OTHER, after=0.05)
    assert script.machine.detours[1].rtt > script.machine.detours[0].rtt
    third = parse_endpoint("10.0.3.4:80")
    assert script.created(token=3, remote=third) == [asks(THIRD, third), asks(NEAR, third)]


def test_a_slow_answer_keeps_no_other_detour_waiting():
    script = Script((NEAR, FAR), prefer="order", max_subflows=1)
    assert script.created() == [asks(NEAR)]
    assert script.wait(0.6) == [asks(NEAR), asks(FAR)]
    script.established()
    assert script.answer(FAR) == [joins(FAR)]
    assert script.answer(NEAR) == []  # remembered for the next connection


def test_a_refused_join_asks_again_once():
    script = Script()
    script.created()
    script.answer()
    script.established()
    assert script.lost(error=errno.ECONNREFUSED) == [asks()]
    assert script.answer(port=50001) == [joins(port=50001)]
    assert script.lost(port=50001, error=errno.ECONNREFUSED) == []
    later = script.wait(600)
    assert all(isinstance(command, CreateSubflow) for command in later)
    script.joined(port=50001)


def test_refused_joins_become_rare():
    script = Script()
    script.created()
    script.answer()
    script.established()
    refused = 0
    for _ in range(3600):
        for command in script.wait(1):
            if isinstance(command, CreateSubflow):
                refused += 1
                script.lost(error=errno.ETIMEDOUT)
            else:
                script.answer()
        if not refused:
            script.lost(error=errno.ETIMEDOUT)
            refused = 1
    assert refused < 16  # in an hour


def test_the_servers_limit_is_respected():
    detours = (NEAR, FAR, THIRD)
    script = Script(detours, prefer="order", max_subflows=3)
    script.created()
    for detour in detours:
        script.answer(detour)
    assert script.established() == [joins(detour) for detour in detours]
    for detour in detours:
        script.joined(detour)
    assert script.lost(THIRD, after=0.05) == []  # reset right after its handshake
    assert script.wait(59) == []
    retried = [c for c in script.wait(3600) if isinstance(c, CreateSubflow)]
    assert retried == [joins(THIRD)]  # tried again, later and later (here it is not answered)


def test_a_server_that_refused_one_detour_is_not_tried_through_another():
    detours = (NEAR, FAR, THIRD)
    script = Script(detours, prefer="order", max_subflows=2)
    for detour in script.machine.detours:  # all mappings are known
        detour.remember(SERVER, 80)
    script.created()
    assert script.established() == [joins(NEAR), joins(FAR)]
    script.joined(NEAR)
    script.joined(FAR)
    assert script.lost(FAR, after=0.05) == []
    assert script.wait(59) == []


def test_room_at_the_server_is_used_again():
    detours = (NEAR, FAR, THIRD)
    script = Script(detours, prefer="order", max_subflows=3)
    script.created()
    for detour in detours:
        script.answer(detour)
    script.established()
    for detour in detours:
        script.joined(detour)
    script.lost(THIRD, after=0.05)
    script.wait(30)
    assert script.lost(NEAR, after=1) == []
    commands = script.wait(machine_module.REPLACE_DELAY)
    assert joins(NEAR) in commands


def test_a_lost_subflow_is_replaced_after_a_delay():
    script = Script().with_subflow()
    script.wait(100)
    assert script.lost(error=errno.ETIMEDOUT) == []
    assert script.wait(machine_module.REPLACE_DELAY - 0.1) == []
    assert script.wait(0.2) == [joins()]


def test_the_direct_path_is_replaced_too():
    script = Script().with_subflow()
    script.wait(100)
    assert script.machine.subflow_closed(
        SubflowClosed(1, LOCAL, SERVER, errno.ECONNRESET), script.now) == []
    assert script.wait(5) == [DIRECT_JOIN]


def test_a_join_that_hangs_makes_room_for_another_detour():
    script = Script((NEAR, FAR), prefer="order", max_subflows=1)
    script.created()
    script.answer(NEAR)
    assert script.established() == [joins(NEAR)]
    assert script.wait(machine_module.JOIN_PATIENCE + 0.1) == [asks(FAR)]
    assert script.answer(FAR) == [joins(FAR)]


def test_a_join_that_the_kernel_refuses_is_tried_later():
    script = Script()
    script.created()
    script.answer()
    [join] = script.established()
    assert script.machine.join_failed(join, errno.ENOTCONN, script.now) == []
    assert script.wait(5) == []
    assert joins() in script.wait(60)


def test_a_closed_connection_is_forgotten():
    script = Script()
    script.created()
    script.established()
    script.machine.closed(1)
    assert script.answer() == []
    assert script.machine.connections == {}
    assert script.wait(3600) == []


def snapshot(*subflows, token=1, **flags):
    values = {"passive": False, "on_link": False, "established": True} | flags
    return Snapshot(token, LOCAL, SERVER, subflow_remotes=frozenset(subflows), **values)


def test_resynchronising_adopts_connections_and_their_subflows():
    script = Script()
    found = snapshot(SERVER, Endpoint(NEAR.address, 50001))
    assert script.machine.resynchronise([found], script.now) == []
    assert script.machine.detours[0].mapping(SERVER) == 50001
    assert script.lost(port=50001, after=100) == []
    assert script.wait(5) == [joins(port=50001)]


def test_resynchronising_gives_missed_connections_their_detours():
    script = Script()
    assert script.machine.resynchronise([snapshot(SERVER)], script.now) == [asks()]
    assert script.created() == []  # its event was still in the queue
    assert script.answer() == [joins()]


def test_resynchronising_drops_what_is_gone():
    script = Script().with_subflow()
    script.created(token=2, remote=OTHER)
    script.answer(remote=OTHER)
    assert script.machine.resynchronise([snapshot(SERVER)], script.now) == []
    assert set(script.machine.connections) == {1}
    assert joins() in script.wait(5)  # its subflow died unheard


def test_resynchronising_leaves_incoming_connections_alone():
    script = Script()
    assert script.machine.resynchronise([snapshot(SERVER, passive=True)], script.now) == []


def test_a_detour_that_comes_late_serves_the_connections_that_are_there():
    script = Script(())
    assert script.created() == []
    assert script.established() == []
    script.machine.add(NEAR, 0)
    assert script.machine.resynchronise([snapshot(SERVER)], script.now) == [asks()]
    assert script.answer() == [joins()]


def test_a_detour_that_comes_late_has_its_place_in_the_order():
    script = Script((), prefer="order", max_subflows=1)
    script.machine.add(FAR, 1)
    script.machine.add(NEAR, 0)
    assert [detour.endpoint for detour in script.machine.detours] == [NEAR, FAR]
    assert script.created() == [asks(NEAR)]


def test_a_detour_that_comes_late_is_not_asked_about_itself():
    script = Script((FAR,))
    script.created(remote=Endpoint(NEAR.address, 22))
    script.machine.add(NEAR, 1)
    connection = script.machine.connections[1]
    assert connection.reason_for_none == "it goes to a detour itself"
    assert NEAR not in [command.detour for command in script.wait(60)]


def test_a_subflow_that_somebody_else_made_counts():
    script = Script((NEAR, FAR), prefer="order", max_subflows=1)
    script.created()
    script.joined(NEAR, port=1234)
    assert script.established() == []


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr("detour_tools.client.detours.MAX_MAPPINGS", 10)
    script = Script()
    for number in range(100):
        remote = Endpoint(ip_address(f"198.18.0.{number}"), 80)
        script.created(token=number, remote=remote)
        script.answer(remote=remote)
        script.machine.closed(number)
    detour = script.machine.detours[0]
    assert detour.mapping_count == 10
    assert not detour.exchanges
    assert not script.machine.connections
    script.wait(60)
    assert script.machine.deadline() is None
