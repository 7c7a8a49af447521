# SPDX-License-Identifier: GPL-2.0-or-later
"""TOML configuration files, read into dataclasses; the command line overrides them.

A settings dataclass is the single place where names, types and defaults of a program's
settings stand. In TOML its fields are spelt with dashes or underscores. Ranges of numbers are
checked by the dataclass's own ``__post_init__``, which raises ValueError.
"""

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from detour_tools.endpoint import Network, parse_network
from detour_tools.errors import UserError

Settings = TypeVar("Settings")


def load(kind: type[Settings], path: Path | None,
         overrides: Mapping[str, Any] | None = None) -> Settings:
    """Read ``path`` (none: defaults alone) into ``kind``; overrides that are None do not count.

    Raises UserError (status 2), naming the key, for anything that is wrong.
    """
    values: dict[str, Any] = {}
    if path is not None:
        for key, value in _read(path).items():
            name = _field_name(kind, key, path)
            if name in values:
                raise UserError(f"{path}: '{key}' is given twice, in two spellings",
                                f"keep one '{name.replace('_', '-')}'", status=2)
            values[name] = _convert(typing.get_type_hints(kind)[name], value, f"{path}: {key}")
    values |= {key: value for key, value in (overrides or {}).items() if value is not None}
    try:
        return kind(**values)
    except ValueError as error:
        where = f"{path}: " if path is not None else ""
        raise UserError(f"{where}{error}", status=2) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no file {path}", "see --config", status=2) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}", status=2) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", status=2) from None


def _field_name(kind: type[Any], key: str, path: Path) -> str:
    names = [field.name for field in dataclasses.fields(kind)]
    name = key.replace("-", "_")
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean '{near[0].replace('_', '-')}'?" if near else (
        "known: " + ", ".join(sorted(n.replace("_", "-") for n in names)))
    raise UserError(f"{path}: unknown key '{key}'", hint, status=2)


def _convert(wanted: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(wanted)
    if origin is types.UnionType and wanted != Network:  # X | None
        wanted = next(a for a in typing.get_args(wanted) if a is not type(None))
        origin = typing.get_origin(wanted)
    if origin is tuple:
        if not isinstance(value, list):
            raise UserError(f"{where}: must be a list", status=2)
        item = typing.get_args(wanted)[0]
        return tuple(_convert(item, each, where) for each in value)
    if origin is typing.Literal:
        choices = typing.get_args(wanted)
        if value not in choices:
            raise UserError(f"{where}: must be one of {', '.join(map(str, choices))}", status=2)
        return value
    if wanted == Network:
        try:
            # ip_network would make an address of a number, too
            return parse_network(value if isinstance(value, str) else repr(value))
        except UserError as error:
            raise UserError(f"{where}: {error.message}", error.hint, status=2) from None
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
        raise UserError(f"{where}: must be {names.get(wanted, wanted.__name__)}", status=2)
    return value
