# SPDX-License-Identifier: GPL-2.0-or-later
"""The inventory of programs, scripts/programs.toml, knows what the code calls."""

import fnmatch
import re
import subprocess
import tomllib
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
INVENTORY = tomllib.loads((ROOT / "scripts/programs.toml").read_text(encoding="utf-8"))
PARTS: list[dict[str, Any]] = INVENTORY["part"]
FOLDERS = (".ci", "src", "tests", "kernel", "scripts", "molecule", "roles")


@pytest.fixture(scope="module", name="calls")
def _calls() -> ModuleType:
    loader = SourceFileLoader("calls", str(ROOT / "scripts/calls"))
    spec = spec_from_loader("calls", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def _files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*"))
            if path.is_file() and path.suffix not in {".pyc", ".patch", ".md"}]


def _part(name: str) -> dict[str, Any] | None:
    return next((part for part in PARTS
                 if any(fnmatch.fnmatchcase(name, each) for each in part["files"])), None)


def test_each_program_that_is_called_is_listed(calls: ModuleType):
    unknown = []
    for path in _files():
        name = str(path.relative_to(ROOT))
        part = _part(name)
        if part is not None and not part["targets"]:
            continue  # it runs on machines
        known = {*INVENTORY["everywhere"], *INVENTORY["words"]}
        if part is not None:
            known |= {*part["programs"], *part.get("elsewhere", [])}
        unknown += [f"{name}:{line}: {program}" for line, program in calls.calls(path)
                    if program not in known]
    assert not unknown, (
        "list these in scripts/programs.toml, under the part that their file belongs to (or as "
        "words, if they are no programs), and have scripts/setup bring them:\n" +
        "\n".join(unknown))


def test_each_listed_program_is_named_in_the_code():
    for part in PARTS:
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in
                 [*_files(), ROOT / "Makefile"] if _part(str(path.relative_to(ROOT))) is part]
        for program in {*part["programs"], *part.get("elsewhere", [])}:
            pattern = rf"(?<![\w-]){re.escape(program)}(?![\w-])"
            assert any(re.search(pattern, text) for text in texts), f"{part['what']}: {program}"


def test_each_target_of_the_makefile_is_checked():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):.* ## ", text, re.M)) - {"help"}
    assert {target for part in PARTS for target in part["targets"]} == targets


@pytest.mark.parametrize(("source", "found"), [
    ("subprocess.run(['frobnicate', '-x'])", "frobnicate"),
    ("host.run(['frobnicate'])", "frobnicate"),
    ("net.run('c', 'frobnicate', 'on')", "frobnicate"),
    ("vm.run('true && frobnicate on')", "frobnicate"),
    ("command = ['frobnicate', *more]", "frobnicate"),
    ("shutil.which('frobnicate')", "frobnicate"),
    ("_TOOLS: Final = {'frobnicate': 'frob-utils'}", "frobnicate"),
    ("call(['sh', '-c', 'x=1 frobnicate on'])", "sh"),
])
def test_a_call_in_python_is_seen(calls: ModuleType, tmp_path: Path, source: str, found: str):
    path = tmp_path / "it.py"
    path.write_text(source + "\n")
    assert (1, found) in list(calls.calls(path))


@pytest.mark.parametrize("line", [
    "frobnicate", "x=$(frobnicate on)", "if frobnicate; then :; fi", "ls | frobnicate",
    "LC_ALL=C frobnicate", "! frobnicate || exit", "exec frobnicate on", "(cd /; frobnicate)",
    "while frobnicate; do :; done", "case $x in a) frobnicate ;; esac",
    "command -v x && frobnicate",
])
def test_a_call_in_shell_is_seen(calls: ModuleType, tmp_path: Path, line: str):
    path = tmp_path / "it"
    path.write_text(f"#!/bin/sh\n# frobnicate it\n{line}\n")
    assert (3, "frobnicate") in list(calls.calls(path)), line


def test_each_call_is_printed():
    done = subprocess.run([ROOT / "scripts/calls", ROOT / "scripts/mirrors"], check=True,
                          capture_output=True, text=True)
    assert done.stdout.endswith("awk\n"), done.stdout
