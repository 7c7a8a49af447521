# SPDX-License-Identifier: GPL-2.0-or-later
"""detour-tools: Multipath TCP subflows through detour hosts."""

from importlib.metadata import version

__version__ = version("detour-tools")
