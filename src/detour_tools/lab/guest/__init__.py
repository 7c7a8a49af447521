# SPDX-License-Identifier: GPL-2.0-or-later
"""What runs inside a virtual machine of the lab: ``init``, then ``agent`` as process 1."""
