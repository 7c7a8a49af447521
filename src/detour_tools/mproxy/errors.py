# SPDX-License-Identifier: GPL-2.0-or-later
"""What every version of the codec raises."""


class MalformedMessageError(ValueError):
    """A datagram that is no MPROXY message; the text says why."""
