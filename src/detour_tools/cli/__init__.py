# SPDX-License-Identifier: GPL-2.0-or-later
"""The console scripts: parse, call, print."""
