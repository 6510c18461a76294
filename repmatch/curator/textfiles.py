"""Rows in text: JSON lines, one JSON array, CSV and TSV, each streamed from bytes."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from typing import BinaryIO

from repmatch.curator.records import BadRecord, Record, Records, RowProblem, parse, parse_line, shown, to_json
from repmatch.errors import InputError, quote_list

MAX_ROW_BYTES = 16 << 20
"""Bytes (or characters) of one row that are read at most; the rest of a longer one is skipped unread."""

_FIELD_CHARS = 1 << 20
_PIECE = 1 << 20
_WHITE = b" \t\r\n"
_BREAK = re.compile(r"[ \t\r\n]*[\r\n][ \t\r\n]*")
_CR_ALONE = re.compile(rb"\}[ \t]*\r\s*\{")
_NOT_WHITE = re.compile(r"[^ \t\r\n]")
# Finds where an element ends, and nothing else: it takes whatever `parse` refuses by name, so that one bad element
# doesn't end the array.
_SPLITTER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)


def _too_long() -> str:
    return (
        f"the row has more than {MAX_ROW_BYTES:,} bytes and was skipped; expected at most that. "
        "Is a line end or a closing quote missing? Otherwise split the row or leave the large column out."
    )


def read_jsonl(stream: BinaryIO) -> Records:
    """Read JSON lines: one object a line, blank lines skipped, a byte order mark allowed.

    Args:
        stream: the bytes, buffered.

    Yields:
        A record a line, its JSON exactly as it came.

    Raises:
        InputError: it is one object over several lines, or its lines end in CR alone.
    """
    readline = stream.readline
    number = 0
    while raw := readline(MAX_ROW_BYTES + 1):
        number += 1
        if number == 1 and not raw.endswith(b"\n") and _CR_ALONE.search(raw):
            raise InputError(
                "its lines end in CR alone; expected LF, or CR and LF. Convert it, for instance with: tr '\\r' '\\n'"
            )
        if len(raw) > MAX_ROW_BYTES and not raw.endswith(b"\n"):
            del raw
            while (rest := readline(_PIECE)) and not rest.endswith(b"\n"):
                pass
            yield BadRecord(number, _too_long())
            continue
        if number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
            if raw.strip(_WHITE) == b"{":
                raise InputError(
                    "the first line is only '{', so this is one JSON object over several lines; expected one object a "
                    "line, or a .json file that is one array. Convert it, for instance with: jq -c '.rows[]'"
                )
        raw = raw.strip(_WHITE)
        if not raw:
            continue
        try:
            text, value = parse_line(raw)
        except RowProblem as problem:
            yield BadRecord(number, str(problem))
        else:
            yield Record(number, text, value)


# --------------------------------------------------------------------------------------------------- one array


def read_array(stream: BinaryIO) -> Records:
    """Read one JSON array of objects without holding it whole.

    Args:
        stream: the bytes, buffered.

    Yields:
        A record an element, numbered from 1; its JSON as it came, on one line.

    Raises:
        InputError: the array's own syntax is broken, so that nothing after that place can be read.
    """
    window = _Window(stream)
    if window.next() != "[":
        raise InputError("expected a JSON array, which starts with '['")
    window.skip()
    number = 0
    more = window.next() != "]"
    while more:
        number += 1
        text = window.element(number)
        try:
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                byte = ord(text[error.start]) - 0xDC00
                raise RowProblem(
                    f"invalid UTF-8: byte 0x{byte:02x} at character {error.start + 1} of the element. "
                    "Convert the file, for instance with: iconv -f ISO-8859-1 -t UTF-8"
                ) from None
            yield Record(number, text, parse(text))
        except RowProblem as problem:
            yield BadRecord(number, str(problem))
        head = window.next()
        if head not in (",", "]"):
            raise InputError(f"expected ',' or ']' after element {number} of the JSON array, found {head!r}")
        more = head == ","
        if more:
            window.skip()
    window.skip()
    if head := window.next():
        raise InputError(f"the JSON array ends after {number} elements, but {head!r} follows; expected nothing more")


class _Window:
    """The part of a JSON text that is in memory, and a position in it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape")
        self._text = ""
        self._at = 0
        self._ended = False

    def _grow(self, amount: int) -> None:
        raw = self._stream.read(amount)
        self._ended = not raw
        self._text = self._text[self._at :] + self._decoder.decode(raw, final=self._ended)
        self._at = 0

    def next(self) -> str:
        """Return the next character that is not white, without consuming it; "" at the end."""
        while True:
            found = _NOT_WHITE.search(self._text, self._at)
            if found:
                self._at = found.start()
                return found.group()
            self._at = len(self._text)
            if self._ended:
                return ""
            self._grow(_PIECE)

    def skip(self) -> None:
        """Consume one character."""
        self._at += 1

    def element(self, number: int) -> str:
        """Consume one JSON value.

        Args:
            number: its number, for messages.

        Returns:
            Its text on one line.

        Raises:
            InputError: it is not JSON, or too long to be read.
        """
        self.next()
        while True:
            problem = "is not complete"
            try:
                _, end = _SPLITTER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                near = self._text[max(self._at, error.pos - 20) : error.pos + 20]
                problem = f"is not JSON ({error.msg} near {near!r})"
            except RecursionError:
                raise InputError(f"element {number} of the JSON array is nested too deeply to be read") from None
            else:
                if end < len(self._text) or self._ended:
                    text, self._at = self._text[self._at : end], end
                    return _BREAK.sub(" ", text)  # a raw line end is never inside a JSON string
            held = len(self._text) - self._at
            if self._ended or held > MAX_ROW_BYTES:
                raise InputError(
                    f"element {number} of the JSON array {problem}, and nothing after it can be read; expected objects "
                    f"of at most {MAX_ROW_BYTES:,} characters. Fix it, or convert the file to JSON lines."
                )
            self._grow(max(held, _PIECE))


# ------------------------------------------------------------------------------------------------------ CSV, TSV


class _Lines:
    """Lines for csv.reader: counted, and bounded a row.

    Attributes:
        number: lines given out.
        left: characters the current row may still take; the caller resets it.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        self.number = 0
        self.left = MAX_ROW_BYTES

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._text.readline(self.left + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) > self.left:
            while line and not line.endswith(("\n", "\r")):
                line = self._text.readline(_PIECE)
            raise RowProblem(_too_long())
        self.left -= len(line)
        return line


def read_csv(stream: BinaryIO, delimiter: str) -> Records:
    """Read comma- or tab-separated values with a header; every value stays a string.

    Args:
        stream: the bytes, buffered.
        delimiter: what separates the columns.

    Yields:
        A record a row, with the number of the line it starts on.

    Raises:
        InputError: the header cannot be used.
    """
    # The limit is the process's; raising it (never lowering) is what lets texts above 131,072 characters through.
    csv.field_size_limit(max(csv.field_size_limit(), _FIELD_CHARS))
    lines = _Lines(stream)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = _header(next((row for row in rows if row), []))
    except (csv.Error, RowProblem) as error:
        raise InputError(f"the header cannot be read: {error}") from None
    while True:
        start = lines.number + 1
        lines.left = MAX_ROW_BYTES
        try:
            cells = next(rows)
            if not cells:
                continue
            if len(cells) != len(header):
                raise RowProblem(
                    f"the row has {len(cells)} columns, the first {shown(cells[0])}; expected {len(header)} as in the "
                    "header. Quote values that hold the separator or a line end."
                )
            value = dict(zip(header, cells, strict=True))
            yield Record(start, to_json(value), value)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadRecord(
                start,
                f"not readable as CSV from line {start} to {lines.number}: {error}; expected quotes around a whole "
                'value, doubled ("") inside it. Fix the quotes, or convert the file to JSON lines.',
            )
        except RowProblem as problem:
            yield BadRecord(start, str(problem))


def _header(cells: list[str]) -> list[str]:
    header: list[str] = []
    for position, cell in enumerate(cells, 1):
        name = cell or f"column_{position}"  # pandas writes its index under an empty name
        if name in header:
            raise InputError(f"the header has the column {name!r} twice; expected different names. Rename one.")
        header.append(name)
    bad = [name for name in header if not name.isprintable()]
    if bad:
        raise InputError(f"the header has names that are not printable: {quote_list(bad)}; expected a line of names")
    return header
