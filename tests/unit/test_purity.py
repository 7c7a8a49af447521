# SPDX-License-Identifier: GPL-2.0-or-later
"""Pure modules stay pure, and so does all of the project that they import."""

import ast
import re
from pathlib import Path

import pytest

import detour_tools

PACKAGE = Path(detour_tools.__file__).parent
PURE = ("mproxy/__init__.py", "mproxy/v1.py", "mproxy/errors.py", "server/table.py",
        "server/ports.py", "server/policy.py", "server/unproven.py", "server/waiting.py",
        "server/decide.py",
        "server/status.py", "route.py", "warnings.py",
        "endpoint.py", "mapping.py", "nat/xtables.py", "firewall/packet.py", "firewall/judge.py",
        "firewall/nft.py", "firewall/legacy.py", "firewall/opening.py", "firewall/forwarders.py",
        "client/given.py", "client/machine.py", "client/offers.py", "client/detours.py",
        "netlink/codec.py", "pathmanager/codec.py", "pathmanager/detour_codec.py",
        "lab/topology.py", "lab/graph.py")
IMPURE = {"socket", "asyncio", "time", "subprocess", "threading", "select", "pyroute2", "signal"}
# What makes a module impure for others to import; its own import of these is checked above.
_ROOT = "detour_tools"


def imported_modules(path: Path) -> set[str]:
    """The modules that a file imports, also within functions; by full name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def file_of(module: str) -> Path | None:
    """The project's file of a module, None when it is not the project's or no module."""
    if module.partition(".")[0] != _ROOT:
        return None
    path = PACKAGE.joinpath(*module.split(".")[1:])
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            return candidate
    return None


def with_all_it_imports(path: Path) -> set[Path]:
    """The file and every file of the project that it imports, near or far."""
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += [file for module in imported_modules(current)
                        if (file := file_of(module)) is not None
                        and file != PACKAGE / "__init__.py"]
    return found


@pytest.mark.parametrize("name", PURE)
def test_is_pure(name):
    for path in with_all_it_imports(PACKAGE / name):
        tops = {module.partition(".")[0] for module in imported_modules(path)}
        assert not tops & IMPURE, f"{name} imports {path.name}, which imports {tops & IMPURE}"


def test_the_check_sees_what_is_hidden(tmp_path):
    hidden = tmp_path / "hidden.py"
    hidden.write_text("def f():\n    from time import monotonic\n    import asyncio.events\n")
    assert {"time", "asyncio.events"} <= imported_modules(hidden)
    assert PACKAGE / "errors.py" in with_all_it_imports(PACKAGE / "mproxy" / "v1.py")


def test_who_says_so_is_listed():
    """Modules tell it in their first sentences, such as "...; pure." or "Pure: ..."."""
    said = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")
            if re.search(r"[.;]\s[Pp]ure[.:]",
                         ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")}
    assert {"client/machine.py", "mapping.py"} <= said
    assert not said - set(PURE)
