# SPDX-License-Identifier: GPL-2.0-or-later
"""What of the host's firewall stands in the way is said, also when it comes while a server runs."""

import json
import signal

import pytest

from detour_tools.lab.network import Host
from tests.netns import asking
from tests.netns.conftest import PRIVATE

DROPS = {
    "forward": ("{ type filter hook forward priority 0; policy drop; }",
                "chain inet fw late has policy drop: detoured packets"),
    "input": ("{ type filter hook input priority 0; policy drop; }",
              "chain inet fw late has policy drop: clients' requests"),
    "notrack": ("{ type filter hook prerouting priority raw; notrack; }",
                "rule 'notrack' of chain inet fw late leaves detoured packets untracked"),
}


def said(host, words):
    return any(words in text for text in asking.status(host)["warnings"])


@pytest.mark.parametrize("what", DROPS)
def test_a_chain_that_begins_to_drop_is_said(lab, start_server, backend, what):
    text, words = DROPS[what]
    detour = lab.host("detour")
    server = start_server(detour, "--backend", backend, *PRIVATE)
    server.wait_line("serving")
    assert asking.status(detour)["warnings"] == []
    detour.run(["nft", "-f", "-"], input=f"table inet fw {{ chain late {text}; }}")
    server.wait_line(words, timeout=30)
    assert said(detour, words)
    detour.run(["nft", "delete", "table", "inet", "fw"])
    server.wait_line("no longer so: .*" + words, timeout=30)
    assert asking.status(detour)["warnings"] == []


def test_what_was_opened_and_is_gone_once_rules_are_loaded_by_hand_is_said(lab, start_server):
    """Who loads his own rule set again has no reason to think of ours in it."""
    detour = lab.host("detour")
    admins = ("table inet fw\ndelete table inet fw\n"
              "table inet fw { chain late { type filter hook forward priority 0; policy drop; }; }")
    detour.run(["nft", "-f", "-"], input=admins)
    detour.run(["detour-server", "firewall", "open", "flows"])
    server = start_server(detour, *PRIVATE)
    assert asking.status(detour)["warnings"] == []
    detour.run(["nft", "-f", "-"], input=admins)
    words = "chain inet fw late has policy drop: detoured packets"
    server.wait_line(words, timeout=30)
    assert said(detour, words)
    detour.run(["detour-server", "firewall", "open", "flows"])
    server.wait_line("no longer so: .*" + words, timeout=30)


def test_a_latin_1_comment_hides_no_rule(lab, start_server, tmp_path):
    detour = lab.host("detour")
    rules = tmp_path / "rules"
    rules.write_bytes(b'table ip fw { chain f { type filter hook forward priority 0; '
                      b'counter drop comment "caf\xe9"; }; }\n')
    detour.run(["nft", "-f", str(rules)])
    server = start_server(detour, "--backend", "nftables", *PRIVATE)
    server.wait_line("serving")
    server.wait_line("rule 'drop' of chain ip fw f drops detoured packets")
    assert not server.matching("cannot tell")


def check(host: Host, *options):
    done = host.run(["detour-server", "firewall", "check", "--json", *options], check=False)
    return done.returncode, json.loads(done.stdout)["warnings"]


def test_check_without_a_server(lab):
    detour = lab.host("detour")
    assert check(detour) == (0, [])
    detour.run(["nft", "-f", "-"], input=f"table inet fw {{ chain late {DROPS['input'][0]}; }}")
    status, [warning] = check(detour, "--port", "7", "--client", "10.0.1.0/24")
    assert status == 1
    detour.run(warning.split(" with: ")[1].split())
    assert check(detour, "--port", "7", "--client", "10.0.1.0/24") == (0, [])
    assert check(detour)[0] == 1, "another port"
    detour.run(["nft", "flush", "ruleset"])
    detour.run(["nft", "-f", "-"], input="""table ip fw {
        chain f { type filter hook forward priority 0; iifname "x" drop; }
    }""")
    status, [warning] = check(detour)
    assert status == 0
    assert " may drop detoured packets" in warning


@pytest.mark.parametrize("tool", ["iptables-nft", "iptables-legacy"])
def test_what_iptables_made_is_read(lab, tool):
    detour = lab.host("detour")
    for rule in (["-P", "INPUT", "DROP"],
                 ["-A", "INPUT", "-i", "lo", "-j", "ACCEPT"],
                 ["-A", "INPUT", "-p", "udp", "-m", "multiport", "--dports", "53,45672",
                  "-j", "ACCEPT"],
                 ["-P", "FORWARD", "DROP"],
                 ["-A", "FORWARD", "-m", "conntrack", "--ctstate", "DNAT", "-j", "ACCEPT"]):
        detour.run([tool, *rule])
    assert check(detour) == (0, [])
    detour.run([tool, "-t", "raw", "-A", "PREROUTING", "-p", "tcp", "-j", "CT", "--notrack"])
    status, [warning] = check(detour)
    assert status == 1
    assert "leaves detoured packets untracked" in warning
    cure = warning.split(" with: ")[1].split()
    detour.run([tool if cure[0] == "iptables" else cure[0], *cure[1:]])
    assert check(detour) == (0, [])


def test_other_clients_after_a_reload_are_looked_at(lab, start_server, tmp_path):
    detour = lab.host("detour")
    detour.run(["nft", "-f", "-"], input="""table ip fw {
        chain f { type filter hook input priority 0; policy drop;
            ip saddr 10.0.0.0/8 udp dport 45672 accept;
        }
    }""")
    config = tmp_path / "server.toml"
    config.write_text('allow-client = ["10.0.1.0/24"]\n')
    server = start_server(detour, "--config", str(config), *PRIVATE)
    server.wait_line("serving")
    assert asking.status(detour)["warnings"] == []
    config.write_text('allow-client = ["10.0.1.0/24", "192.0.2.0/24"]\n')
    server.process.send_signal(signal.SIGHUP)
    server.wait_line("clients' requests from 192.0.2.0/24 will be dropped", timeout=30)
