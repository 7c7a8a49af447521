# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab's topology: what the reference says, and that packets get where they should."""

import dataclasses
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detour_tools.errors import UserError
from detour_tools.lab import graph, links
from detour_tools.lab.topology import (
    CONFIGS,
    MAX_DETOURS,
    Link,
    Route,
    Topology,
    reference_topology,
)

# host and address, host and address, Mbit/s in core-limited
REFERENCE_LINKS = {
    "L1": ("client 10.0.1.1/24", "r1 10.0.1.2/24", 20),
    "L2": ("r1 10.0.2.1/24", "r2 10.0.2.2/24", 10),
    "L3": ("r2 10.0.3.1/24", "server 10.0.3.2/24", 20),
    "L4": ("r1 10.0.4.1/24", "r3 10.0.4.2/24", 10),
    "L5": ("r2 10.0.5.1/24", "r3 10.0.5.2/24", 10),
    "L6": ("r3 10.0.6.1/24", "detour 10.0.6.2/24", 20),
}


def shown(link: Link) -> tuple[str, str, float | None]:
    a, b = (f"{end.host} {end.interface}" for end in link.ends)
    return a, b, link.rate_mbps


def test_links_of_the_reference():
    topology = reference_topology()
    assert {link.name: shown(link) for link in topology.links} == REFERENCE_LINKS
    assert {link.delay_ms for link in topology.links} == {5.0}
    assert {link.loss_percent for link in topology.links} == {0.0}


def test_symmetric_has_the_same_links_at_10_mbps():
    topology = reference_topology("symmetric")
    assert {link.name: shown(link) for link in topology.links} == {
        name: (a, b, 10) for name, (a, b, _) in REFERENCE_LINKS.items()}


def test_only_routers_forward():
    assert {host.name: host.forwards for host in reference_topology().hosts} == {
        "client": False, "server": False, "detour": False, "r1": True, "r2": True, "r3": True}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("source", "target", "way"), [
    ("client", "server", "L1 L2 L3"),
    ("server", "client", "L3 L2 L1"),
    ("client", "detour", "L1 L4 L6"),
    ("detour", "client", "L6 L4 L1"),
    ("detour", "server", "L6 L5 L3"),
    ("server", "detour", "L3 L5 L6"),
])
def test_paths_of_the_reference(config, source, target, way):
    topology = reference_topology(config)
    assert " ".join(topology.path(source, topology.address(target))) == way


@pytest.mark.parametrize("detours", [1, 2, 3, MAX_DETOURS])
def test_every_host_reaches_every_address(detours):
    topology = reference_topology(detours=detours)
    for host in topology.hosts:
        for link in topology.links:
            for end in link.ends:
                topology.path(host.name, end.address)


@pytest.mark.parametrize("detours", [2, 3, MAX_DETOURS])
def test_each_detour_has_core_links_of_its_own(detours):
    topology = reference_topology(detours=detours)
    assert len(topology.detours()) == detours
    ways = [set(topology.path("client", topology.address(name)))
            | set(topology.path(name, topology.address("server")))
            for name in topology.detours()]
    for index, way in enumerate(ways):
        for other in ways[index + 1:]:
            assert way & other == {"L1", "L3"}
    # Each adds capacity: the access links carry the sum of all core paths.
    assert topology.link("L1").rate_mbps == topology.link("L3").rate_mbps == 10 * (1 + detours)


@given(detours=st.integers(1, MAX_DETOURS))
def test_addresses_and_networks_are_unique(detours):
    topology = reference_topology(detours=detours)
    addresses = [end.address for link in topology.links for end in link.ends]
    assert len(set(addresses)) == len(addresses)
    networks = {link.name: {end.interface.network for end in link.ends} for link in topology.links}
    assert networks == {name: {ip_network(f"10.0.{name[1:]}.0/24")} for name in networks}


def test_third_detour():
    topology = reference_topology(detours=3)
    assert topology.address("detour3") == ip_address("10.0.12.2")
    assert topology.path("client", topology.address("detour3")) == ["L1", "L10", "L12"]


def test_overrides():
    topology = reference_topology(l2_loss=1.5, l2_delay_ms=100, rates_mbps={"L1": 50})
    l1, l2 = topology.link("L1"), topology.link("L2")
    assert (l1.rate_mbps, l1.loss_percent, l1.delay_ms) == (50, 0, 5)
    assert (l2.rate_mbps, l2.loss_percent, l2.delay_ms) == (10, 1.5, 100)
    assert topology.title == ("reference network: core-limited, one detour, L1 50 Mbit/s, "
                              "L2 loses 1.5 %, L2 delays 100 ms")


def test_unshaped_has_no_rate_and_no_delay():
    assert {(link.rate_mbps, link.delay_ms)
            for link in reference_topology(rates_mbps=None).links} == {(None, 0.0)}


@pytest.mark.parametrize(("arguments", "complaint"), [
    ({"config": "star"}, "there is no configuration 'star'"),
    ({"detours": 0}, "0 detours"),
    ({"detours": MAX_DETOURS + 1}, "17 detours"),
    ({"rates_mbps": {"L7": 10}}, "no link 'L7'"),
    ({"rates_mbps": {"L2": 0}}, "rate of L2 must be above 0"),
])
def test_what_makes_no_network_is_refused(arguments, complaint):
    with pytest.raises(UserError, match=complaint):
        reference_topology(**arguments)


@pytest.mark.parametrize("name", ["host", "link"])
def test_unknown_names_list_the_known(name):
    with pytest.raises(UserError, match=r"no (host|link) 'x' \((hosts|links): (client|L1), "):
        getattr(reference_topology(), name)("x")


def test_path_tells_what_is_wrong():
    good = reference_topology()
    without = dataclasses.replace(good, routes=tuple(
        route for route in good.routes if route.host != "client"))
    with pytest.raises(ValueError, match="client has no route"):
        without.path("client", ip_address("10.0.3.2"))
    with pytest.raises(ValueError, match=r"nobody has 10\.0\.3\.9"):
        good.path("client", ip_address("10.0.3.9"))
    loop = dataclasses.replace(good, routes=(
        *good.routes,
        Route("r1", ip_network("10.9.0.0/16"), ip_address("10.0.2.2")),
        Route("r2", ip_network("10.9.0.0/16"), ip_address("10.0.2.1"))))
    with pytest.raises(ValueError, match="routing loop"):
        loop.path("client", ip_address("10.9.0.1"))


@given(st.sampled_from(CONFIGS), st.floats(0, 100), st.integers(1, MAX_DETOURS))
def test_json_round_trip(config, loss, detours):
    topology = reference_topology(config, loss, detours=detours)
    assert Topology.from_json(topology.to_json()) == topology


def test_drawing_shows_every_address_and_rate():
    for detours in (1, 4):
        topology = reference_topology(detours=detours, rates_mbps={"L4": 3.5})
        drawing = "\n".join(graph.draw(topology, frozenset({"L2"})))
        for link in topology.links:
            mark = " CUT" if link.name == "L2" else ""
            assert f" {link.name} {link.rate_mbps:g} Mbit/s{mark}" in drawing
            for end in link.ends:
                assert str(end.address) in drawing
        for host in topology.hosts:
            assert host.name in drawing


def test_drawing_of_one_detour():
    assert graph.draw(reference_topology()) == """\
client ── L1 20 Mbit/s ── r1 ────────────── L2 10 Mbit/s ────────────── r2 ── L3 20 Mbit/s ── server
       10.0.1.1  10.0.1.2    10.0.2.1                          10.0.2.2    10.0.3.1  10.0.3.2
                          │                                             │
                          └───── L4 10 Mbit/s ── r3 ─── L5 10 Mbit/s ───┘
                             10.0.4.1   10.0.4.2    10.0.5.2   10.0.5.1
                                                 │ 10.0.6.1
                                                 │ L6 20 Mbit/s
                                                 detour 10.0.6.2""".splitlines()


def test_another_shape_is_listed_link_by_link():
    topology = reference_topology()
    no_core = dataclasses.replace(
        topology, links=tuple(link for link in topology.links if link.name != "L2"))
    assert graph.draw(no_core, frozenset({"L1"}))[0] == (
        "L1  client 10.0.1.1/24 -- r1 10.0.1.2/24      20 Mbit/s, 5 ms  CUT")


class TestShaping:
    link = reference_topology(l2_loss=1, l2_delay_ms=50).link("L2")

    def test_with_netem_delay_and_loss_are_netems_and_the_rate_is_tbfs(self):
        wanted = links.shaping(self.link, with_netem=True)
        assert (wanted.delay_us, wanted.netem_loss_percent) == (50_000, 1)
        assert wanted.rate_bytes == 1_250_000
        assert wanted.by_netem

    def test_without_netem_only_the_rate_is_left_to_tc(self):
        wanted = links.shaping(self.link, with_netem=False)
        assert not wanted.by_netem
        assert wanted.rate_bytes == 1_250_000

    def test_unshaped_needs_nothing(self):
        wanted = links.shaping(reference_topology(rates_mbps=None).link("L1"), with_netem=True)
        assert not wanted.by_netem
        assert wanted.rate_bytes is None

    @given(st.floats(0.1, 10_000), st.floats(0, 10_000))
    def test_queues_hold_full_frames_and_what_is_under_way(self, rate, delay):
        link = dataclasses.replace(self.link, rate_mbps=rate, delay_ms=delay)
        wanted = links.shaping(link, with_netem=True)
        assert wanted.burst >= 2 * 1514
        assert wanted.limit - wanted.burst >= 10 * 1514
        assert wanted.netem_limit_packets * 1514 >= (wanted.rate_bytes or 0) * delay / 1000
