# SPDX-License-Identifier: GPL-2.0-or-later
"""The iptables back end: two chains of ours in the legacy nat table, for hosts without nftables.

Each mapping is two rules. The kernel takes legacy tables only as a whole and goes through rules
one by one, so that both a commit and the first packet of a flow get dearer with the number of
mappings: fine for thousands, not for more.
"""

import contextlib
import ctypes
import errno
import fcntl
import importlib
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from detour_tools.errors import UserError
from detour_tools.mapping import Mapping
from detour_tools.nat import xtables
from detour_tools.nat.base import NatError

PREROUTING = "DETOUR-PREROUTING"
POSTROUTING = "DETOUR-POSTROUTING"

_JUMPS = (("PREROUTING", PREROUTING, xtables.jump_for_local(PREROUTING)),
          ("POSTROUTING", POSTROUTING, xtables.jump_for_translated(POSTROUTING)))

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

    def __init__(self) -> None:
        self._table: Any = None
        self._error: type[Exception] = NatError
        self._present: dict[Mapping, None] = {}
        self._label = True

    def open(self) -> None:
        """Load libiptc and the kernel's legacy nat table."""
        try:
            iptc = importlib.import_module("iptc")
        except Exception as error:  # whatever its loading of libraries raises
            raise UserError(f"the iptables back end needs python-iptables and libiptc: {error}",
                            "apt install python3-iptables, or use --backend nftables") from None
        self._error = iptc.IPTCError
        try:
            self._table = iptc.Table("nat", autocommit=False)
        except self._error as error:
            raise UserError(f"this kernel's legacy iptables cannot be used: {error}",
                            "modprobe iptable_nat, or use --backend nftables") from None

    def leftovers(self) -> list[Mapping] | None:
        """The mappings of our DNAT rules."""
        try:
            # Without this a mere look would load the legacy tables into the kernel.
            if "nat" not in _TABLES.read_text(encoding="ascii").split():
                return None
        except (FileNotFoundError, PermissionError):  # only root, who may read it, makes rules
            return None
        if self._table is None:
            self.open()
        self._refresh()
        if not any(self._table.is_chain(chain) for _, chain, _ in _JUMPS):
            return None
        if not self._table.is_chain(PREROUTING):
            return []
        return [found for rule, _ in self._rules(PREROUTING)
                if (found := xtables.read_dnat(rule)) is not None]

    def install(self, mappings: Collection[Mapping], capacity: int) -> None:
        """Make our chains and the jumps into them anew; legacy tables have no limit."""
        del capacity

        def change() -> None:
            self._clear()
            for builtin, chain, jump in _JUMPS:
                self._table.create_chain(chain)
                self._table.insert_entry(builtin, jump, 0)
            self._append(mappings)

        try:
            self._transaction(change)
        except _LockedError:
            raise
        except NatError:  # maybe of a kernel without labels, which does as well without
            self._label = False
            self._transaction(change)
        self._present = dict.fromkeys(mappings)

    def commit(self, add: Sequence[Mapping], remove: Sequence[Mapping]) -> None:
        """Remove, then add rules in one replacement of the table."""
        present = dict(self._present) if remove else self._present
        for mapping in remove:
            present.pop(mapping, None)

        def change() -> None:
            if len(remove) > _REMOVE_ONE_BY_ONE:
                for _, chain, _ in _JUMPS:
                    self._table.flush_entries(chain)
                self._append(present)
            else:
                for mapping in remove:
                    self._table.delete_entry(PREROUTING, self._dnat(mapping), _WHOLE_RULE)
                    self._table.delete_entry(POSTROUTING, xtables.masquerade(mapping),
                                             _WHOLE_RULE)
            self._append(add)

        self._transaction(change)
        present.update(dict.fromkeys(add))
        self._present = present

    def intact(self) -> bool:
        """Whether our chains are jumped into."""
        try:
            self._refresh()
        except NatError:
            return True  # busy: no reason to think so
        return all(any(target == chain for _, target in self._rules(builtin))
                   for builtin, chain, _ in _JUMPS)

    def uninstall(self) -> None:
        """Remove our chains and the jumps into them."""
        self._transaction(self._clear)
        self._present = {}

    def _append(self, mappings: Collection[Mapping]) -> None:
        for mapping in mappings:
            self._table.append_entry(PREROUTING, self._dnat(mapping))
            self._table.append_entry(POSTROUTING, xtables.masquerade(mapping))

    def _dnat(self, mapping: Mapping) -> bytes:
        return xtables.dnat(mapping, label=self._label)

    def _clear(self) -> None:
        for builtin, chain, _ in _JUMPS:
            numbers = [number for number, (_, target) in enumerate(self._rules(builtin))
                       if target == chain]
            for number in reversed(numbers):
                self._delete_number(builtin, number)
            if self._table.is_chain(chain):
                self._table.flush_entries(chain)
                self._table.delete_chain(chain)

    def _delete_number(self, chain: str, number: int) -> None:
        # python-iptables wraps every call of libiptc but this one.
        libiptc = self._table._iptc
        if libiptc.iptc_delete_num_entry(chain.encode(), number, self._table._handle) != 1:
            raise self._error(f"can't delete rule {number + 1} of {chain}")

    def _rules(self, chain: str) -> list[tuple[bytes, str]]:
        found = []
        entry = self._table.first_rule(chain)
        while entry:
            target = self._table.get_target(entry) or b""
            found.append((ctypes.string_at(ctypes.addressof(entry), entry.next_offset),
                          target.decode(errors="replace")))
            entry = self._table.next_rule(entry)
        return found

    def _refresh(self) -> None:
        try:
            with _xtables_lock():
                self._table.refresh()
        except self._error as error:
            raise NatError(str(error)) from None

    def _transaction(self, change: Callable[[], None]) -> None:
        for attempt in range(_ATTEMPTS):
            with _xtables_lock():
                try:
                    self._table.refresh()
                    change()
                    self._table.commit()
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
