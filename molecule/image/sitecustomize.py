# SPDX-License-Identifier: GPL-2.0-or-later
"""Keep what Python compiles from zip files, in which Ansible brings its modules with every task.

That is two fifths of a task's time on an emulated machine. What is kept goes by the source itself,
and only root writes it.
"""

import hashlib
import marshal
import os
import zipimport
from types import CodeType

_KEPT = "/var/cache/zip-code"
_compile = zipimport._compile_source


def _compile_once(pathname: str, source: bytes) -> CodeType:
    name = pathname.rpartition(".zip/")[2]  # the zip file has another name each time
    path = f"{_KEPT}/{hashlib.sha256(name.encode() + bytes(1) + source).hexdigest()}"
    try:
        with open(path, "rb") as file:
            return marshal.loads(file.read())  # noqa: S302 - root's own
    except (OSError, EOFError, ValueError, TypeError):  # none, or cut short when power went
        code = _compile(pathname, source)
    new = f"{path}.{os.getpid()}"
    try:
        with open(new, "wb") as file:
            file.write(marshal.dumps(code))
        os.replace(new, path)
    except OSError:  # not root, or no room
        pass
    return code


zipimport._compile_source = _compile_once
