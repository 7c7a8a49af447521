# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab: an emulated network of namespaces on this machine."""
