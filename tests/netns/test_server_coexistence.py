# SPDX-License-Identifier: GPL-2.0-or-later
"""Beside other people's rules: theirs stay as they are, ours do no harm, and theirs are seen."""

import sys

import pytest

from detour_tools.lab.network import Host, Lab
from tests.netns import asking
from tests.netns.asking import Asker, Flow, WhoAmI
from tests.netns.conftest import PLAIN, PRIVATE, StartServer

FOREIGN_NFT = """
table ip nat {
    chain prerouting {
        type nat hook prerouting priority dstnat; policy accept;
        tcp dport 8088 dnat to 10.0.3.2:81 comment "somebody's"
    }
    chain postrouting {
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr 192.168.77.0/24 masquerade
    }
}
table inet firewall {
    set banned { type ipv4_addr; elements = { 192.0.2.1, 192.0.2.2 } }
    chain input { type filter hook input priority filter; policy accept; ip saddr @banned drop; }
}
"""
FOREIGN_LEGACY = (
    ("nat", "-N", "SOMEBODY"),
    ("nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "8089", "-j", "SOMEBODY"),
    ("nat", "-A", "SOMEBODY", "-p", "tcp", "-j", "DNAT", "--to-destination", "10.0.3.2:82"),
    ("nat", "-A", "POSTROUTING", "-s", "192.168.78.0/24", "-j", "MASQUERADE"),
    ("filter", "-A", "INPUT", "-s", "192.0.2.3", "-j", "DROP"),
)


def add_foreign_rules(host: Host) -> None:
    host.run(["nft", "-f", "-"], input=FOREIGN_NFT)
    for table, *rule in FOREIGN_LEGACY:
        host.run(["iptables-legacy", "-t", table, *rule])


def test_foreign_rules_stay_byte_for_byte(lab: Lab, start_server: StartServer, backend: str):
    detour = lab.host("detour")
    add_foreign_rules(detour)
    before = asking.rules(detour)
    server = start_server(detour, "--backend", backend, *PRIVATE, *PLAIN)
    asker = Asker(lab.host("client"), detour.address)
    for port in range(1, 20):
        asker.ask(f"10.0.3.2:{port}", port)
    during = asking.rules(detour)
    ours = [line for line in during.splitlines() if line not in before.splitlines()]
    assert ours
    # Without what is ours nothing is missing.
    kept = [line for line in during.splitlines() if line in before.splitlines()]
    assert [line for line in before.splitlines() if line not in kept] == []
    detour.run(["detour-server", "flush", "--remote", "10.0.3.2:1"])
    server.stop()
    assert asking.rules(detour) == before


def test_foreign_rules_stay_after_a_kill_and_a_take_over(lab, start_server, backend):
    detour = lab.host("detour")
    add_foreign_rules(detour)
    before = asking.rules(detour)
    server = start_server(detour, "--backend", backend, *PRIVATE, *PLAIN)
    Asker(lab.host("client"), detour.address).ask("10.0.3.2:1", 1)
    server.kill()
    start_server(detour, "--backend", backend, *PRIVATE, *PLAIN).stop()
    assert asking.rules(detour) == before


def test_a_foreign_dnat_is_neither_hidden_nor_masqueraded(lab, start_server, backend):
    """A port that somebody else forwards to the very remote of a mapping."""
    detour, client, far = lab.host("detour"), lab.host("client"), lab.host("server")
    detour.run(["sysctl", "-qw", "net.ipv4.ip_forward=1"])  # who publishes ports is a router
    add_foreign_rules(detour)
    far.run(["nft", "-f", "-"], input="""table ip seen {
        chain input { type filter hook input priority filter; policy accept;
            ip saddr 10.0.1.1 tcp dport { 81, 82 } counter name as_client
            ip saddr 10.0.6.2 tcp dport { 81, 82 } counter name as_detour
        }
        counter as_client { }
        counter as_detour { }
    }""")
    web = WhoAmI(far, 81)
    start_server(detour, "--backend", backend, *PRIVATE, *PLAIN)
    port = Asker(client, detour.address).ask("10.0.3.2:81", 81)
    # Ours: the far end sees the detour.
    flow = Flow(client, detour.address, port)
    assert flow.seen_as == "10.0.6.2"
    flow.close()
    far.run(["nft", "reset", "counters"])
    # Theirs, in nftables and in legacy iptables: it sees the client (whose answers go another
    # way, so that no connection comes of it here).
    for foreign in (8088, 8089):
        with pytest.raises(OSError, match="timed out"):
            Flow(client, detour.address, foreign, timeout=0.3)
    counters = far.run(["nft", "list", "counters"]).stdout
    as_client, as_detour = counters.split("counter as_detour")
    assert "packets 0" not in as_client, counters
    assert "packets 0" in as_detour, counters
    web.close()


def test_a_foreign_masquerade_of_everything_does_not_get_in_the_way(lab, start_server, backend):
    detour, client = lab.host("detour"), lab.host("client")
    detour.run(["nft", "-f", "-"], input="""table ip nat {
        chain prerouting { type nat hook prerouting priority dstnat; policy accept;
            tcp dport 1-65535 dnat to 10.0.3.2:9;
        }
        chain postrouting { type nat hook postrouting priority srcnat; policy accept;
            snat to 10.0.6.99;
        }
    }""")
    detour.run(["iptables-legacy", "-t", "nat", "-A", "PREROUTING", "-p", "tcp",
                "-j", "REDIRECT", "--to-ports", "9"])
    WhoAmI(lab.host("server"), 80)
    start_server(detour, "--backend", backend, *PRIVATE, *PLAIN)
    port = Asker(client, detour.address).ask("10.0.3.2:80", 80)
    assert Flow(client, detour.address, port).seen_as == "10.0.6.2"


# What stands in the forward chain, a way to name it, and whether a flow comes through.
FIREWALLS = {
    "nft policy": (["nft", "-f", "-"], """table inet fw {
        chain through { type filter hook forward priority mangle; policy drop; }
    }""", "chain inet fw through has policy drop"),
    "nft rule": (["nft", "-f", "-"], """table ip fw {
        chain through { type filter hook forward priority 0; policy accept;
            ct state established,related accept
            reject;
        }
    }""", "rule 'reject' of chain ip fw through drops detoured packets"),
    "iptables-nft": (["iptables-nft", "-P", "FORWARD", "DROP"], "",
                     "chain ip filter FORWARD has policy drop"),
    "iptables-legacy": (["iptables-legacy", "-P", "FORWARD", "DROP"], "",
                        r"chain FORWARD \(legacy iptables\) has policy drop"),
}


@pytest.mark.parametrize("firewall", FIREWALLS)
def test_a_firewall_that_drops_is_named_with_the_cure(lab, start_server, backend, firewall):
    command, text, words = FIREWALLS[firewall]
    detour, client = lab.host("detour"), lab.host("client")
    detour.run(command, input=text)
    WhoAmI(lab.host("server"), 80)
    server = start_server(detour, "--backend", backend, *PRIVATE, *PLAIN)
    warning = server.wait_line(words)
    asker = Asker(client, detour.address)
    port = asker.ask("10.0.3.2:80", 80)
    with pytest.raises(OSError, match=r"timed out|refused"):
        Flow(client, detour.address, port, timeout=0.3)
    server.stop()
    # What it says helps, and it says nothing any more then.
    detour.run(warning.split(" with: ")[1].split())
    server = start_server(detour, "--backend", backend, *PRIVATE, *PLAIN)
    server.wait_line("serving")
    assert not server.matching("detoured packets")
    port = asker.ask("10.0.3.2:80", 80)
    assert Flow(client, detour.address, port).echo()


@pytest.mark.parametrize("tool", ["nft", "iptables-legacy"])
def test_the_cure_opens_no_port_that_the_host_publishes(lab, start_server, backend, tool):
    detour, client = lab.host("detour"), lab.host("client")
    WhoAmI(lab.host("server"), 80)
    detour.run(["nft", "-f", "-"], input="""table ip published {
        chain prerouting { type nat hook prerouting priority dstnat; policy accept;
            fib daddr type local tcp dport 2222 dnat to 10.0.3.2:80;
        }
        chain postrouting { type nat hook postrouting priority srcnat; policy accept;
            tcp dport 80 masquerade;
        }
    }""")
    if tool == "nft":
        detour.run(["nft", "-f", "-"], input=FIREWALLS["nft policy"][1])
    else:
        detour.run(["iptables-legacy", "-P", "FORWARD", "DROP"])
    start_server(detour, "--backend", backend, *PRIVATE, *PLAIN)
    detour.run(["detour-server", "firewall", "open", "flows"])
    port = Asker(client, detour.address).ask("10.0.3.2:80", 80)
    assert Flow(client, detour.address, port).echo()
    with pytest.raises(TimeoutError):
        Flow(client, detour.address, 2222, timeout=1.0)
    detour.run(["detour-server", "firewall", "close", "flows"])
    with pytest.raises(TimeoutError):
        Flow(client, detour.address, port, timeout=1.0)


def test_a_firewall_that_lets_through_is_not_named(lab, start_server, backend):
    detour = lab.host("detour")
    detour.run(["nft", "-f", "-"], input="""table inet fw {
        chain through { type filter hook forward priority 0; policy drop;
            ct state invalid drop
            ct state established,related accept
            ct status dnat accept
            tcp dport 25 drop;
        }
        chain entry { type filter hook input priority 0; policy drop;
            udp dport 45672 accept;
        }
    }""")
    detour.run(["iptables-legacy", "-A", "FORWARD", "-p", "udp", "-j", "DROP"])
    server = start_server(detour, "--backend", backend, *PRIVATE, *PLAIN)
    server.wait_line("serving")
    assert not server.matching("drop")


def test_nftables_alone_does_not_load_legacy_tables(lab, start_server):
    detour = lab.host("detour")
    start_server(detour, "--backend", "nftables", *PRIVATE, *PLAIN).stop()
    assert detour.run(["cat", "/proc/net/ip_tables_names"]).stdout == ""


def test_a_comment_with_a_line_break_does_not_stop_the_server(lab, start_server, backend):
    detour = lab.host("detour")
    detour.run(["iptables-legacy", "-A", "FORWARD", "-m", "comment", "--comment", "two\nlines",
                "-j", "ACCEPT"])
    detour.run(["iptables-legacy", "-A", "FORWARD", "-j", "DROP"])
    server = start_server(detour, "--backend", backend, *PRIVATE, *PLAIN)
    server.wait_line("serving")
    assert "Traceback" not in server.output


def test_a_firewall_that_cannot_be_read_does_not_stop_the_server(lab, start, backend, tmp_path):
    detour = lab.host("detour")
    code = ("from detour_tools.firewall import look; look.warnings = lambda *_: [][0]; "
            "from detour_tools.cli.server import main; main()")
    server = start(detour, [sys.executable, "-c", code, "--backend", backend])
    server.wait_line("cannot tell whether a firewall drops .* list index out of range")
    server.wait_line("serving")
    assert "Traceback" not in server.output


def test_an_element_with_a_comment_is_taken_over(lab, start_server):
    detour = lab.host("detour")
    server = start_server(detour, *PRIVATE, *PLAIN)
    Asker(lab.host("client"), detour.address).ask("10.0.3.2:1", 1)
    server.kill()
    for which, element in (("mappings", '10.0.1.1 . 2 comment "mine" : 10.0.3.2 . 2'),
                           ("mapped", '10.0.1.1 . 2 . 10.0.3.2 . 2 comment "mine"')):
        detour.run(["nft", "add", "element", "ip", "detour-tools", which, f"{{ {element} }}"])
    server = start_server(detour, *PRIVATE, *PLAIN)
    both = {("10.0.1.1", 1, "10.0.3.2:1"), ("10.0.1.1", 2, "10.0.3.2:2")}
    assert asking.mappings(detour) == set(asking.kernel_mappings(detour, "nftables")) == both
