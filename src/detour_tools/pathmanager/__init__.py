# SPDX-License-Identifier: GPL-2.0-or-later
"""Path managers: how the kernel tells of connections and is told of subflows."""
