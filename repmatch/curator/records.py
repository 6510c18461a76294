"""One record: the JSON text of a row, parsed strictly.

A record that cannot be used raises `RowProblem`, whose text says what is wrong, the value, what was expected and the
remedy; the reader turns it into a `BadRow`. Nothing here reads a file.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from repmatch.errors import quote_list

MAX_DEPTH = 200
"""Levels of lists and objects in a row: far below what any supported Python can parse, so all of them agree."""


class RowProblem(Exception):  # noqa: N818 - never leaves the reader: it becomes a BadRow
    """Why one row is set aside."""


class Record(NamedTuple):
    """A row that could be parsed.

    Attributes:
        line: line or row number in its source, from 1.
        json: the row as one line of JSON.
        value: the parsed object.
    """

    line: int
    json: str
    value: dict[str, Any]


class BadRecord(NamedTuple):
    """A row that could not be parsed.

    Attributes:
        line: line or row number in its source, from 1.
        reason: what is wrong, the value, what was expected and the remedy.
    """

    line: int
    reason: str


Records = Iterator[Record | BadRecord]


def shown(value: object) -> str:
    """Show a value in a message, shortened.

    Args:
        value: anything.

    Returns:
        Its representation in some eighty characters.
    """
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    short.maxlevel = 2
    return short.repr(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1}) if len(names) < 1000 else []
        raise RowProblem(
            f"a JSON object has a key twice: {quote_list(twice) or 'among many'}; which value is meant is ambiguous. "
            "Keep one of them."
        )
    return found


def _refuse_constant(name: str) -> float:
    raise RowProblem(f"{name} is not JSON; expected a finite number. Write null or leave the column out.")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
_PLAIN = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_line(raw: bytes) -> tuple[str, dict[str, Any]]:
    """Parse one line of a JSON lines file.

    Args:
        raw: the line without surrounding whitespace, not empty.

    Returns:
        The line as text, and the object in it.

    Raises:
        RowProblem: invalid UTF-8, or what `parse` raises.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowProblem(
            f"invalid UTF-8 at byte {error.start + 1} of the line (0x{raw[error.start]:02x}, {error.reason}). "
            "Convert the file, for instance with: iconv -f ISO-8859-1 -t UTF-8"
        ) from None
    return text, parse(text)


def parse(text: str) -> dict[str, Any]:
    """Parse the JSON text of one row.

    Args:
        text: the text without surrounding whitespace.

    Returns:
        The object.

    Raises:
        RowProblem: not JSON, not an object, a key twice, a lone surrogate, NaN or Infinity, nested too deeply, or an
            integer with more digits than Python converts.
    """
    try:
        value, end = _DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        raise _not_json(text, error.msg, error.pos) from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:
        raise RowProblem(
            "an integer has too many digits for Python to convert (4,300 by default). Write it as a string."
        ) from None
    if end != len(text):
        raise _not_json(text, "more data after the first value", end)
    if type(value) is not dict:
        raise RowProblem(
            f"{shown(value)} is JSON but not an object; expected one object a line, such as "
            '{"text": "...", "label": "..."}. A file that is one JSON array must be named .json.'
        )
    if len(text) > 2 * MAX_DEPTH and text.count("{") + text.count("[") > MAX_DEPTH and _deeper_than(value, MAX_DEPTH):
        raise _too_deep()
    if "\\u" in text and _SURROGATE.search(text):
        _encodable(value)
    return value


def to_json(value: Mapping[str, Any]) -> str:
    """Serialise a row that did not come as JSON, its columns in their order.

    Args:
        value: the row, with plain JSON values.

    Returns:
        One line of JSON.

    Raises:
        RowProblem: an infinite number or text that UTF-8 cannot hold.
    """
    try:
        text = _PLAIN.encode(value)
    except ValueError:
        raise not_finite(value) from None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        _encodable(value)
        raise
    return text


def _not_json(text: str, message: str, position: int) -> RowProblem:
    around = text[max(0, position - 20) : position + 20]
    return RowProblem(
        f"not JSON: {message} at character {position + 1}, near {around!r}; expected one complete JSON object a line. "
        "Fix or remove the line."
    )


def _too_deep() -> RowProblem:
    return RowProblem(
        f"lists and objects are nested more than {MAX_DEPTH} levels deep. Flatten the row or leave the column out."
    )


def _deeper_than(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return False
    return True


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _encodable(value: Mapping[str, Any]) -> None:
    for column, inner in value.items():
        for leaf in (column, *_leaves(inner)):
            if not isinstance(leaf, str):
                continue
            try:
                leaf.encode("utf-8")
            except UnicodeEncodeError as error:
                code = ord(leaf[error.start])
                raise RowProblem(_surrogate_reason(column, code, error.start)) from None


def _surrogate_reason(column: str, code: int, position: int) -> str:
    where = f"column {shown(column)}, character {position + 1}"
    if 0xDC80 <= code <= 0xDCFF:  # a byte that the decoder's surrogateescape let through
        return (
            f"invalid UTF-8: byte 0x{code - 0xDC00:02x} in {where}. "
            "Convert the file, for instance with: iconv -f ISO-8859-1 -t UTF-8"
        )
    return f"lone surrogate \\u{code:04x} in {where}: half a character, which UTF-8 cannot hold. Fix the text."


def not_finite(value: Mapping[str, Any]) -> RowProblem:
    """Say which column holds a number that is not finite.

    Args:
        value: the row.

    Returns:
        The problem, ready to raise.
    """
    for column, inner in value.items():
        for leaf in _leaves(inner):
            if isinstance(leaf, float) and not math.isfinite(leaf):
                return RowProblem(
                    f"column {shown(column)} holds a number that is not finite ({leaf}, or too large for a float); "
                    "expected a finite number. Write null, or a string."
                )
    return RowProblem("the row holds a number that is not finite; expected finite numbers. Write null instead.")
