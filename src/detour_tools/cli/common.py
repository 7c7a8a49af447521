# SPDX-License-Identifier: GPL-2.0-or-later
"""What the console scripts share: errors, JSON, argument types."""

import argparse
import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from detour_tools import version
from detour_tools.endpoint import Network, parse_network
from detour_tools.errors import UserError

Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line that points at ``--help``."""

    def error(self, message: str) -> NoReturn:
        """Print the error in one line and exit with status 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As in the base; but what nobody knows is an error of the command that it was given to."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"{parser.prog} {version()}")
        parser.exit()


def parser(prog: str, description: str, epilog: str = "") -> Parser:
    """The top-level parser of a console script."""
    made = Parser(prog=prog, description=description, epilog=epilog, allow_abbrev=False,
                  formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--version", action=_Version, nargs=0,
                      help="show program's version number and exit")
    return made


def add_verbosity(target: argparse.ArgumentParser) -> None:
    """Add ``--verbose`` and ``--quiet`` for log.configure()."""
    group = target.add_mutually_exclusive_group()
    group.add_argument("-v", "--verbose", dest="verbosity", action="store_const", const=1,
                       default=0, help="log every step")
    group.add_argument("-q", "--quiet", dest="verbosity", action="store_const", const=-1,
                       help="log warnings and errors only")


def network(text: str) -> Network:
    """An argument of the form ADDRESS/PREFIX."""
    try:
        return parse_network(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def whole_number(minimum: int, maximum: int) -> Callable[[str], int]:
    """An argument type: a whole number within bounds."""
    return _bounded(int, "whole number", minimum, maximum)


def number(minimum: float, maximum: float) -> Callable[[str], float]:
    """An argument type: a number within bounds."""
    return _bounded(float, "number", minimum, maximum)


def _bounded(kind: Callable[[str], Number], name: str, minimum: Number, maximum: Number
             ) -> Callable[[str], Number]:
    def convert(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a {name}") from None
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"{text} is not from {minimum:.12g} to {maximum:.12g}")
        return value
    return convert


def print_json(value: Any) -> None:
    """Print a result for programs."""
    print(json.dumps(value, indent=2, default=str))


def run(prog: str, main: Callable[[], int | None]) -> NoReturn:
    """Run a console script's main function and exit with its status.

    A UserError becomes one line on stderr; SIGINT ends with 130, a closed pipe silently.
    """
    # None are those that were closed when we started.
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        try:
            status = main() or 0
        finally:
            sys.stdout.flush()
    except UserError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        status = error.status
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        _discard_output()
        status = 141
    except OSError as error:
        if sys.stdout.closed or error.errno != errno.ENOSPC:
            raise
        _discard_output()
        print(f"{prog}: cannot write the output: {error.strerror}", file=sys.stderr)
        status = 1
    sys.exit(status)


def _discard_output() -> None:
    """Keep the interpreter from trying once more to write what nobody takes."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
