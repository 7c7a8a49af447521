# SPDX-License-Identifier: GPL-2.0-or-later
"""The demo."""

from pathlib import Path

from detour_tools.errors import UserError


def run(output: Path) -> int:
    """Run the demo; returns the exit status."""
    raise UserError(f"the demo is not there yet (it would write to {output})")
