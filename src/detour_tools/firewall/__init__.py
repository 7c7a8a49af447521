# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads the host's firewall, judges what it does to the detour's packets, and opens the way."""
