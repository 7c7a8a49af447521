# SPDX-License-Identifier: GPL-2.0-or-later
"""The client daemon: a pure machine, and the service that performs its commands."""
