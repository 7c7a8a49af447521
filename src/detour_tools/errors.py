# SPDX-License-Identifier: GPL-2.0-or-later
"""The one exception that reaches the user."""


class UserError(Exception):
    """Something the user can mend: printed as one line, never as a traceback.

    ``message`` says what is wrong, ``hint`` (optional) how to mend it, and ``status`` is the
    exit status of the program (1 by default; 2 is for wrong usage and configuration).
    """

    def __init__(self, message: str, hint: str = "", *, status: int = 1) -> None:
        self.message = message
        self.hint = hint
        self.status = status
        super().__init__(f"{message} ({hint})" if hint else message)
