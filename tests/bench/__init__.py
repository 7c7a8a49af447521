# SPDX-License-Identifier: GPL-2.0-or-later
"""Benchmarks: each brings a lab up, measures, and has its baseline in the same run."""
