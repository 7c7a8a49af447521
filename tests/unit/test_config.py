# SPDX-License-Identifier: GPL-2.0-or-later
"""Settings from TOML and the command line; what is wrong is said in one line."""

from ipaddress import ip_network
from pathlib import Path

import pytest

from detour_tools import config
from detour_tools.errors import UserError
from detour_tools.server.settings import RELOADABLE, Settings


@pytest.fixture
def load(tmp_path):
    def run(text: str, **overrides) -> Settings:
        path = tmp_path / "server.toml"
        path.write_text(text)
        return config.load(Settings, path, overrides)
    return run


def test_defaults():
    settings = config.load(Settings, None)
    assert settings == Settings()
    assert (settings.listen, settings.backend) == ("0.0.0.0:45672", "auto")
    assert settings.idle_timeout == 3600
    assert settings.allow_client is None
    assert not settings.allow_remote


def test_every_key_with_dashes_or_underscores(load):
    settings = load("""
        listen = "10.0.6.2:1234"
        backend = "iptables"
        allow-client = ["10.0.1.0/24", "10.0.2.1"]
        allow_remote = ["10.0.0.0/8"]
        rate = 5
        max-per-client = 10
        max-mappings = 20
        idle-timeout = 60.5
        control-group = "adm"
    """)
    assert settings == Settings(
        listen="10.0.6.2:1234", backend="iptables",
        allow_client=(ip_network("10.0.1.0/24"), ip_network("10.0.2.1/32")),
        allow_remote=(ip_network("10.0.0.0/8"),), rate=5.0, max_per_client=10, max_mappings=20,
        idle_timeout=60.5, control_group="adm")


def test_the_command_line_overrides_the_file(load):
    settings = load("rate = 5\nmax-mappings = 7", rate=9.0, max_mappings=None)
    assert (settings.rate, settings.max_mappings) == (9.0, 7)


@pytest.mark.parametrize(("text", "words"), [
    ("rte = 5", "unknown key 'rte' (did you mean 'rate'?)"),
    ("zzz = 5", "unknown key 'zzz' (known: allow-client"),
    ("rate = 'fast'", "rate: must be a number"),
    ("rate = true", "rate: must be a number"),
    ("rate = -1", "rate: -1 is not from 0 to"),
    ("max-mappings = 0", "max-mappings: 0 is not from 1"),
    ("max-mappings = 1.5", "max-mappings: must be a whole number"),
    ("max-per-client = 70000", "max-per-client: 70000 is not from 1 to 65535"),
    ("idle-timeout = 0", "idle-timeout: 0 is not from 1"),
    ("rate = nan", "rate"),
    ("backend = 'ipfw'", "backend: must be one of auto, nftables, iptables"),
    ("allow-client = '10.0.0.0/8'", "allow-client: must be a list"),
    ("allow-client = ['10.0.0.0/99']", "'10.0.0.0/99' is not a network"),
    ("allow-client = [5]", "'5' is not a network"),
    ("allow-client = ['203.0.113.7/2']", "203.0.113.7 lies within 192.0.0.0/2 (write 192.0.0.0/2"),
    ("allow-client = []\nallow_client = ['10.0.0.0/8']", "'allow_client' is given twice"),
    ("listen = 'nowhere'", "'nowhere' is not an IP address"),
    ("listen = '10.0.0.1:99999'", "'99999' in '10.0.0.1:99999' is not a port"),
    ("listen = '[::]:45672'", "IPv4 only"),
    ("rate 5", "is not TOML"),
])
def test_what_is_wrong_is_named_in_one_line(load, text, words):
    with pytest.raises(UserError) as caught:
        load(text)
    assert words in str(caught.value)
    assert "server.toml" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.status == 2


def test_files_that_cannot_be_read(tmp_path):
    for path, words in ((tmp_path / "none.toml", "there is no file"), (tmp_path, "cannot read")):
        with pytest.raises(UserError, match=words):
            config.load(Settings, path)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not TOML"):
        config.load(Settings, Path(tmp_path / "bytes.toml"))


def test_what_a_reload_changes_are_settings():
    assert set(RELOADABLE) <= set(Settings.__dataclass_fields__)
