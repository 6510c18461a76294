"""`repmatch.toml`: options that need not be typed. It is weaker than the environment, which is weaker than a flag."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from repmatch.errors import RepMatchError, UnknownChoiceError, UsageError

NAME = "repmatch.toml"
VARIABLE = "REPMATCH_CONFIG"
_Given = tuple[Any, str]  # a value of the file, and where it stands


def read_config(group: click.Group) -> dict[str, Any]:
    """Read the configuration of this folder as click's default map.

    The file is `repmatch.toml` in the working folder, or the one that REPMATCH_CONFIG names. Keys are the long names
    of options; in a table named after a command they are that command's, above all tables they are everybody's that has
    the option.

    Args:
        group: the command line.

    Returns:
        Parameter -> value, and command -> the same; empty without a file. Values of another type than the option's are
        given as the text that one would type, for click to refuse.

    Raises:
        UsageError: the file is missing where REPMATCH_CONFIG names it, or is no file or not TOML, or a value can be no
            option's.
        UnknownChoiceError: it names no option or command.
    """
    path = _path()
    if path is None:
        return {}
    content = _content(path)
    found = _of(group, {}, content, path, ())
    _check_options(_given(content, path, ()), _every_option(group), str(path))
    return found


def origin(error: click.ClickException) -> str:
    """Say where a value stands that click refused, if that is in the configuration file.

    Args:
        error: what click raised.

    Returns:
        A line to put below the error; "" for what was typed or came from the environment.
    """
    context, parameter = error.ctx if isinstance(error, click.UsageError) else None, getattr(error, "param", None)
    if context is None or not isinstance(parameter, click.Parameter):
        return ""
    return _place(context, parameter)


def origin_of_refused(error: RepMatchError, context: click.Context) -> str:
    """Say where values stand that the library refused, if that is in the configuration file.

    Args:
        error: what the library raised; its text names the option (`--rank`) or quotes the text that was given.
        context: the command's.

    Returns:
        A line for each value; "" for what was typed or came from the environment, and where the error names none.
    """
    found, inner = "", context
    while True:
        for parameter in inner.command.params:
            if parameter.name and _is_named(parameter, inner.params.get(parameter.name), str(error)):
                found += _place(inner, parameter)
        if inner.parent is None:
            return found
        inner = inner.parent


def _is_named(parameter: click.Parameter, value: Any, text: str) -> bool:
    """Whether a message has an option's long name, or text that is its value or one of its values."""
    values = value if isinstance(value, list | tuple) else (value,)
    words = [flag for flag in parameter.opts if flag.startswith("--")]
    words += [
        word for v in values if isinstance(v, str | Path) for word in {str(v), *str(v).split(",")} if word.strip()
    ]
    return any(re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text) for word in words)


def _place(context: click.Context, parameter: click.Parameter) -> str:
    """Return the line that says where a parameter's value stands in the file; "" where it is not from there."""
    path = _path()
    if path is None or context.get_parameter_source(str(parameter.name)) is not ParameterSource.DEFAULT_MAP:
        return ""
    names: list[str] = []
    while context.parent is not None:
        names.insert(0, str(context.info_name))
        context = context.parent
    keys: set[str] = {flag.lstrip("-") for flag in parameter.opts}
    table, place, found = _content(path), "above all tables", ""
    for depth in range(len(names) + 1):
        for key in sorted(keys & set(table)):
            found = f"\nThe value is that of {key!r} {place} of {path}."
        if depth < len(names):
            table, place = table.get(names[depth], {}), f"in [{'.'.join(names[: depth + 1])}]"
    return found


def _path() -> Path | None:
    """Return the file to read, None where there is none."""
    named = os.environ.get(VARIABLE)
    path = Path(named or NAME)
    if path.is_file():
        return path
    if not os.path.lexists(path):
        if named:
            raise UsageError(f"{VARIABLE} names {named!r}, and there is no such file.")
        return None
    kind = "a folder" if path.is_dir() else "no regular file" if path.exists() else "a link to nothing"
    raise UsageError(f"{path} is {kind}; expected a TOML file. Move it away, or name another with {VARIABLE}.")


def _content(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} cannot be read as TOML: {error}. Save it as UTF-8.") from error
    except RecursionError as error:
        raise UsageError(f"{path} cannot be read as TOML: it is nested too deep.") from error
    except (OSError, ValueError) as error:  # a ValueError also where an integer has thousands of digits
        raise UsageError(f"{path} cannot be read as TOML: {error}") from error


def _of(
    group: click.Group, shared: dict[str, _Given], content: dict[str, Any], path: Path, names: tuple[str, ...]
) -> dict[str, Any]:
    """Return the default map of a group from its table; `shared` is what stands in the tables around it."""
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    shared = {**shared, **_given(content, path, names)}
    found = _values(group, shared)
    wrong = sorted(set(tables) - set(group.commands))
    if wrong:
        where = ".".join((*names, wrong[0]))
        raise UnknownChoiceError.of("command", wrong[0], group.commands, f"[{where}] is a table of {path}")
    for name, command in group.commands.items():
        table, inner = tables.get(name, {}), (*names, name)
        where, given = _where(path, inner), _given(table, path, inner)
        if isinstance(command, click.Group):
            found[name] = _of(command, shared, table, path, inner)
            _check_options(given, _every_option(command), where)
            continue
        nested = sorted(set(table) - set(given))
        if nested:
            raise UsageError(f"{nested[0]!r} in {where} is a table; {name!r} has no commands and takes values only.")
        _check_options(given, set(_options(command)), where)
        found[name] = _values(command, {**shared, **given})
    return found


def _where(path: Path, names: tuple[str, ...]) -> str:
    return f"[{'.'.join(names)}] of {path}" if names else str(path)


def _given(table: dict[str, Any], path: Path, names: tuple[str, ...]) -> dict[str, _Given]:
    """Return a table's values, each with the words for where it stands; not its tables."""
    where = _where(path, names)
    return {key: (value, f"{key!r} in {where}") for key, value in table.items() if not isinstance(value, dict)}


def _check_options(given: Iterable[str], known: set[str], where: str) -> None:
    wrong = sorted(set(given) - known)
    if wrong:
        raise UnknownChoiceError.of("option", wrong[0], known, f"it stands in {where}")


def _values(command: click.Command, given: dict[str, _Given]) -> dict[str, Any]:
    """Return parameter -> value of what is a command's own."""
    options = _options(command)
    return {str(options[key].name): _value(options[key], *given[key]) for key in given if key in options}


def _options(command: click.Command) -> dict[str, click.Option]:
    """Map the long names of a command's options to them; `k` for one that is only `-k`."""
    out = {}
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.expose_value:  # --version does, and has no value
            long = [flag for flag in parameter.opts if flag.startswith("--")]
            for flag in long or parameter.opts:
                out[flag.lstrip("-")] = parameter
    return out


def _every_option(group: click.Group) -> set[str]:
    found = set(_options(group))
    for command in group.commands.values():
        found |= _every_option(command) if isinstance(command, click.Group) else set(_options(command))
    return found


def _value(option: click.Option, value: Any, what: str) -> Any:
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return value if option.multiple else ",".join(value)
    if not isinstance(value, str | int | float):
        raise UsageError(f"{what} is a {type(value).__name__}; expected a text, a number, true or false.")
    if isinstance(value, bool) and not option.is_flag:
        raise UsageError(f"{what} is {str(value).lower()}; {option.opts[0]} is no switch, it takes a value.")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UsageError(f"{what} is an integer beyond 64 bits, which TOML does not have.")
    if isinstance(value, float) and not isinstance(option.type, click.types.FloatParamType):
        value = str(value)  # as typed: int() would cut it
    return [value] if option.multiple else value
