# SPDX-License-Identifier: GPL-2.0-or-later
"""Modules and plugins of roles, which no package holds."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

_ROLES = Path(__file__).parents[2] / "roles"


def load(path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Execute the file, such as ``bridge/library/detour_bridges.py``; a module for this test."""
    spec = spec_from_file_location(Path(path).stem, _ROLES / path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module
