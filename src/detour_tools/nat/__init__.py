# SPDX-License-Identifier: GPL-2.0-or-later
"""NAT back ends: how a mapping becomes a rule of the kernel."""
