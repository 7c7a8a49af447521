# SPDX-License-Identifier: GPL-2.0-or-later
"""Netlink: the codec, and sockets that speak it."""
