# SPDX-License-Identifier: GPL-2.0-or-later
"""What all tests stand on."""

import signal

# A shell without job control has what it starts in the background ignore SIGINT, and the programs
# under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
