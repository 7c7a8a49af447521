# SPDX-License-Identifier: GPL-2.0-or-later
"""detour-tools: Multipath TCP subflows through detour hosts."""


def version() -> str:
    """The version that is installed."""
    from importlib.metadata import version as installed  # noqa: PLC0415 - 30 ms

    return installed("detour-tools")
