"""`repmatch.toml`: options that need not be typed. It is weaker than the environment, which is weaker than a flag."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import click

from repmatch.errors import UnknownChoiceError, UsageError

NAME = "repmatch.toml"
VARIABLE = "REPMATCH_CONFIG"


def read_config(group: click.Group) -> dict[str, Any]:
    """Read the configuration of this folder as click's default map.

    The file is `repmatch.toml` in the working folder, or the one that REPMATCH_CONFIG names. Keys are the long names
    of options; in a table named after a command they are that command's, above all tables they are everybody's that has
    the option.

    Args:
        group: the command line.

    Returns:
        Parameter -> value, and command -> the same; empty without a file.

    Raises:
        UsageError: the file is missing where REPMATCH_CONFIG names it, or is not TOML, or a value has a wrong type.
        UnknownChoiceError: it names no option or command.
    """
    named = os.environ.get(VARIABLE)
    path = Path(named or NAME)
    if not path.is_file():
        if named:
            raise UsageError(f"{VARIABLE} names {named!r}, and there is no such file.")
        return {}
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} cannot be read as TOML: {error}") from error
    shared = {key: value for key, value in content.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    used: set[str] = set()
    found = _of(group, shared, tables, used, path, "")
    unknown = sorted(set(shared) - used)
    if unknown:
        raise UnknownChoiceError.of("option", unknown[0], _every_option(group), f"it stands in {path}")
    return found


def _of(
    group: click.Group, shared: dict[str, Any], tables: dict[str, Any], used: set[str], path: Path, where: str
) -> dict[str, Any]:
    own = _options(group)
    found: dict[str, Any] = {}
    for key, value in shared.items():
        if key in own:
            used.add(key)
            found[own[key]] = _value(key, value, path)
    wrong = sorted(set(tables) - set(group.commands))
    if wrong:
        raise UnknownChoiceError.of("command", wrong[0], group.commands, f"it is a table of {path}")
    for name, command in group.commands.items():
        table = tables.get(name, {})
        inner = {key: value for key, value in table.items() if not isinstance(value, dict)}
        if isinstance(command, click.Group):
            nested = {key: value for key, value in table.items() if isinstance(value, dict)}
            found[name] = _of(command, {**shared, **inner}, nested, used, path, f"{where}{name}.")
            continue
        options = _options(command)
        for key in inner:
            if key not in options:
                raise UnknownChoiceError.of("option", key, options, f"it stands in [{where}{name}] of {path}")
        mine = {key: value for key, value in shared.items() if key in options}
        used |= set(mine)
        found[name] = {options[key]: _value(key, value, path) for key, value in {**mine, **inner}.items()}
    return found


def _options(command: click.Command) -> dict[str, str]:
    """Map the long names of a command's options to its parameters; `k` for one that is only `-k`."""
    out = {}
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name:
            long = [flag for flag in parameter.opts if flag.startswith("--")]
            for flag in long or parameter.opts:
                out[flag.lstrip("-")] = parameter.name
    return out


def _every_option(group: click.Group) -> set[str]:
    found = set(_options(group))
    for command in group.commands.values():
        found |= _every_option(command) if isinstance(command, click.Group) else set(_options(command))
    return found


def _value(key: str, value: Any, path: Path) -> Any:
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return ",".join(value)
    if not isinstance(value, str | int | float | bool):
        raise UsageError(f"{key!r} in {path} is a {type(value).__name__}; expected a text, a number, true or false.")
    return value
