# SPDX-License-Identifier: GPL-2.0-or-later
"""The iptables back end: chains of ours in the legacy tables, for hosts without nftables.

Each mapping is two rules. The kernel takes legacy tables only as a whole and goes through rules
one by one, so that both a commit and the first packet of a flow get dearer with the number of
mappings: fine for thousands, not for more. Flows are limited by client only: connlimit would look
at all of them for each that begins.
"""

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import importlib
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from detour_tools.endpoint import Network
from detour_tools.errors import UserError
from detour_tools.mapping import Mapping, flow_key
from detour_tools.nat import xtables
from detour_tools.nat.base import FORWARD, POSTROUTING, PREROUTING, NatError, Terms

log = logging.getLogger(__name__)

# Table: the kernel's chain, and ours that it jumps to.
_CHAINS = {
    "nat": (("PREROUTING", PREROUTING), ("POSTROUTING", POSTROUTING)),
    "filter": (("FORWARD", FORWARD),),
}

_TABLES = Path("/proc/net/ip_tables_names")
_LOCK = Path("/run/xtables.lock")
_LOCK_SECONDS = 5.0
_ATTEMPTS = 5

# Above so many removals at once the chains are filled anew instead: finding one rule takes as
# long as there are rules.
_REMOVE_ONE_BY_ONE = 32

# Compare all that libiptc compares; it wants as many bytes as the longest rule.
_WHOLE_RULE = b"\xff" * 4096


class _LockedError(NatError):
    """Another program is at it."""


class IptablesBackend:
    """Mappings as rules of two chains, through python-iptables' access to libiptc."""

    name = "iptables"
    quick_changes = 0

    def __init__(self) -> None:
        self._tables: dict[str, Any] = {}
        self._error: type[Exception] = NatError
        self._present: dict[Mapping, None] = {}
        self._label = True
        self._refused_before = 0

    def open(self) -> None:
        """Load libiptc and the kernel's legacy tables."""
        self._load(_CHAINS)

    def _load(self, names: Iterable[str]) -> None:
        try:
            iptc = importlib.import_module("iptc")
        except Exception as error:  # whatever its loading of libraries raises
            raise UserError(f"the iptables back end needs python-iptables and libiptc: {error}",
                            "apt install python3-iptables, or use --backend nftables") from None
        self._error = iptc.IPTCError
        try:
            for name in names:
                self._tables[name] = iptc.Table(name, autocommit=False)
        except self._error as error:
            raise UserError(f"this kernel's legacy iptables cannot be used: {error}",
                            "modprobe -a iptable_nat iptable_filter, or use --backend nftables"
                            ) from None

    def leftovers(self) -> list[bytes] | None:
        """The mappings of our DNAT rules."""
        try:
            # Without this a mere look would load the legacy tables into the kernel.
            loaded = [name for name in _TABLES.read_text(encoding="ascii").split()
                      if name in _CHAINS]
        except (FileNotFoundError, PermissionError):  # only root, who may read it, makes rules
            return None
        self._load(loaded)
        self._refresh()
        ours = [chain for name, table in self._tables.items()
                for _, chain in _CHAINS[name] if table.is_chain(chain)]
        if PREROUTING not in ours:
            return [] if ours else None
        return [flow_key(found) for rule, _ in self._rules("nat", PREROUTING)
                if (found := xtables.read_dnat(rule)) is not None]

    def adopt(self, capacity: int, terms: Terms) -> bool:
        """Legacy tables are made anew."""
        del capacity, terms
        return False

    def whole(self) -> bool:
        """Nothing is ever adopted."""
        return False

    def install(self, mappings: Collection[Mapping], capacity: int, terms: Terms) -> None:
        """Make our chains and the jumps into them anew; legacy tables have no limit."""
        del capacity
        nat = {PREROUTING: xtables.jump_for_local(PREROUTING, terms.relay),
               POSTROUTING: xtables.jump_for_translated(POSTROUTING)}

        def translate() -> None:
            self._renew("nat", nat)
            self._append(mappings)

        # What drops comes first: nothing passes in between that is not to.
        unlimited = dataclasses.replace(terms, flows_per_client=0)
        for tried in (terms, unlimited, None):
            self._label = tried is not None
            try:
                self._transaction("filter", partial(self._forward, tried))
                self._transaction("nat", translate)
                break
            except _LockedError:
                raise
            except NatError:  # maybe of a kernel without connlimit, or without labels
                if tried is None:
                    raise
        if tried != terms:
            log.warning("flows are not limited: this kernel does not count them (xt_connlimit)"
                        if tried else "this kernel has no conntrack labels (xt_connlabel): flows "
                        "are not limited, and SYN/ACKs without MPTCP are not dropped")
        self._present = dict.fromkeys(mappings)

    def commit(self, add: Sequence[Mapping], remove: Sequence[Mapping]) -> None:
        """Remove, then add rules in one replacement of the table."""
        present = dict(self._present) if remove else self._present
        for mapping in remove:
            present.pop(mapping, None)

        def change() -> None:
            table = self._tables["nat"]
            if len(remove) > _REMOVE_ONE_BY_ONE:
                for _, chain in _CHAINS["nat"]:
                    table.flush_entries(chain)
                self._append(present)
            else:
                for mapping in remove:
                    table.delete_entry(PREROUTING, self._dnat(mapping), _WHOLE_RULE)
                    table.delete_entry(POSTROUTING, xtables.masquerade(mapping), _WHOLE_RULE)
            self._append(add)

        self._transaction("nat", change)
        present.update(dict.fromkeys(add))
        self._present = present

    def intact(self) -> bool:
        """Whether our chains are jumped into."""
        try:
            self._refresh()
        except NatError:
            return True  # busy: no reason to think so
        return all(any(target == chain for _, target in self._rules(name, builtin))
                   for name, chains in _CHAINS.items() if name == "nat" or self._label
                   for builtin, chain in chains)

    def refused_flows(self) -> int:
        """What the rule that refuses has met, and those before it."""
        self._refresh("filter")
        return self._refused_before + self._counted()

    def admit(self, clients: Sequence[Network]) -> None:
        """Nothing: the server alone tells who may ask."""

    def dropped_requests(self) -> int:
        """None."""
        return 0

    def _counted(self) -> int:
        if not self._tables["filter"].is_chain(FORWARD):
            return 0
        return sum(xtables.packets(rule) for rule, target in self._rules("filter", FORWARD)
                   if target == "REJECT")

    def uninstall(self) -> None:
        """Remove our chains and the jumps into them."""
        for name in self._tables:
            self._transaction(name, partial(self._clear, name))
        self._present = {}

    def _append(self, mappings: Collection[Mapping]) -> None:
        for mapping in mappings:
            self._tables["nat"].append_entry(PREROUTING, self._dnat(mapping))
            self._tables["nat"].append_entry(POSTROUTING, xtables.masquerade(mapping))

    def _dnat(self, mapping: Mapping) -> bytes:
        return xtables.dnat(mapping, label=self._label)

    def _forward(self, terms: Terms | None) -> None:
        """What is dropped of mapped flows; they cannot be told without labels (None)."""
        if terms is None:
            self._clear("filter")
            return
        self._refused_before += self._counted()
        self._renew("filter", {FORWARD: xtables.jump_for_mapped(FORWARD) if terms.router
                               else xtables.jump_for_all(FORWARD)})
        rules = [] if terms.router else [xtables.drop_others()]
        if terms.relay == "joins":
            rules.append(xtables.drop_plain())
        if terms.flows_per_client:
            rules.append(xtables.refuse_above(terms.flows_per_client))
        for rule in rules:
            self._tables["filter"].append_entry(FORWARD, rule)

    def _renew(self, name: str, jumps: dict[str, bytes]) -> None:
        self._clear(name)
        for builtin, chain in _CHAINS[name]:
            self._tables[name].create_chain(chain)
            self._tables[name].insert_entry(builtin, jumps[chain], 0)

    def _clear(self, name: str) -> None:
        table = self._tables[name]
        for builtin, chain in _CHAINS[name]:
            numbers = [number for number, (_, target) in enumerate(self._rules(name, builtin))
                       if target == chain]
            for number in reversed(numbers):
                self._delete_number(table, builtin, number)
            if table.is_chain(chain):
                table.flush_entries(chain)
                table.delete_chain(chain)

    def _delete_number(self, table: Any, chain: str, number: int) -> None:
        # python-iptables wraps every call of libiptc but this one.
        if table._iptc.iptc_delete_num_entry(chain.encode(), number, table._handle) != 1:
            raise self._error(f"can't delete rule {number + 1} of {chain}")

    def _rules(self, name: str, chain: str) -> list[tuple[bytes, str]]:
        found = []
        table = self._tables[name]
        entry = table.first_rule(chain)
        while entry:
            target = table.get_target(entry) or b""
            found.append((ctypes.string_at(ctypes.addressof(entry), entry.next_offset),
                          target.decode(errors="replace")))
            entry = table.next_rule(entry)
        return found

    def _refresh(self, *names: str) -> None:
        try:
            with _xtables_lock():
                for name in names or self._tables:
                    self._tables[name].refresh()
        except self._error as error:
            raise NatError(str(error)) from None

    def _transaction(self, name: str, change: Callable[[], None]) -> None:
        table = self._tables[name]
        for attempt in range(_ATTEMPTS):
            with _xtables_lock():
                try:
                    table.refresh()
                    change()
                    table.commit()
                    return
                except self._error as error:
                    # EAGAIN: somebody who does not take the lock changed the table meanwhile.
                    if attempt == _ATTEMPTS - 1 or os.strerror(errno.EAGAIN) not in str(error):
                        raise NatError(str(error)) from None


@contextlib.contextmanager
def _xtables_lock() -> Iterator[None]:
    """Hold the lock that iptables holds while it changes a table; raises NatError."""
    try:
        fd = os.open(_LOCK, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _LockedError(f"cannot open {_LOCK}: {error.strerror}") from None
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise _LockedError(f"another program holds {_LOCK}") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(fd)
