"""Records made into checked rows, with their ids and hashes."""

from __future__ import annotations

import hashlib
import json
import math
from array import array
from collections.abc import Mapping
from json.encoder import encode_basestring_ascii
from typing import Any

from repmatch.curator import forms, pictures
from repmatch.curator.conversations import conversation
from repmatch.curator.records import Record, RowProblem, not_finite, shown
from repmatch.datamodels import BadRow, Fields, Row
from repmatch.errors import quote_list

MAX_TEXT_CHARS = 200_000
"""Characters a text may have; a longer one is quarantined."""

MAX_NAME_CHARS = 1_000
"""Characters an id or a label may have."""

# What `datamodels.canonical_json` does, with the encoder made once: three times as fast on short rows.
_CANONICAL = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False, check_circular=False
)


class Occurrences:
    """Counts how often each row digest came, in about 17 to 32 bytes a distinct digest.

    The first 64 bits of every digest lie in one packed open-addressing table; only digests that came again are keys of
    a dict. Two different rows among a million share 64 bits with probability 3e-8; the later one would be called a
    second occurrence, which is harmless.
    """

    def __init__(self) -> None:
        self._table = array("Q", bytes(8 << 12))
        self._used = 0
        self._again: dict[str, int] = {}

    def name(self, row_hash: str) -> str:
        """Count one occurrence and name it.

        Args:
            row_hash: digest of the row, hexadecimal.

        Returns:
            The digest for its first occurrence, then `DIGEST-2`, `DIGEST-3`, ...
        """
        if self._first(int(row_hash[:16], 16) or 1):
            return row_hash
        count = self._again.get(row_hash, 1) + 1
        self._again[row_hash] = count
        return f"{row_hash}-{count}"

    def _first(self, key: int) -> bool:
        if not _add(self._table, key):
            return False
        self._used += 1
        if 2 * self._used > len(self._table):
            larger = array("Q", bytes(16 * len(self._table)))
            for old in self._table:
                if old:
                    _add(larger, old)
            self._table = larger
        return True


def _add(table: array[int], key: int) -> bool:
    mask = len(table) - 1
    slot = key & mask
    while found := table[slot]:
        if found == key:
            return False
        slot = (slot + 1) & mask
    table[slot] = key
    return True


class RowMaker:
    """Makes checked rows of the records of one run.

    Args:
        fields: the columns to read.
        pair_required: whether a row without the pair's column is bad.
        unexpected_pair: a column that no row had when the fields were chosen; a value in it is bad, because it would
            be dropped in silence. None: no such column.
    """

    def __init__(self, fields: Fields, *, pair_required: bool = False, unexpected_pair: str | None = None) -> None:
        self._fields = fields
        self._pair_required = pair_required
        self._unexpected_pair = unexpected_pair
        self._seen = Occurrences()

    def make(self, source: str, record: Record) -> Row | BadRow:
        """Check one record.

        Args:
            source: where it came from.
            record: the record.

        Returns:
            The row, or why it is set aside.
        """
        line, text, value = record
        try:
            return self._make(source, line, text, value)
        except RowProblem as problem:
            return BadRow(source, line, self._readable_id(value), str(problem))

    def _make(self, source: str, line: int, raw: str, value: dict[str, Any]) -> Row:
        fields = self._fields
        text, pair, label, task = self._task(value, source)
        given = None if fields.id_field is None else _id(value, fields.id_field)
        try:
            canonical = _CANONICAL.encode(value)
        except ValueError:
            raise not_finite(value) from None
        row_hash = _hash(canonical)
        row_id = self._seen.name(row_hash) if given is None else given
        return Row(row_id, raw, text, pair, label, row_hash, _hash(task), source, line)

    def _task(self, value: dict[str, Any], source: str) -> tuple[str, str | None, str, str]:
        """Text, second text, label, and the JSON text of all that the task reads."""
        fields, form = self._fields, self._fields.form
        if form == "messages":
            talk = conversation(value, fields.text_field, fields.text_pair_field)
            return talk.prompt, talk.answer, forms.optional_label(value.get(fields.label_field)), talk.identity()
        encode = encode_basestring_ascii  # canonical JSON of a str
        if form == "images":
            picture, label = self._picture(value), self._label(value)
            found = pictures.image_digest(picture, source, fields.text_field)
            return picture.name, None, label, f"[{encode(found)},{encode(label)}]"
        text = self._text(value)
        second = self._pair(value)
        if form == "completion" and second is None:
            raise _text_problem(value, str(fields.text_pair_field), "--text-pair-field")
        pair_json = "null" if second is None else encode(second)
        if form in ("completion", "texts"):
            label = forms.optional_label(value.get(fields.label_field))
            return text, second, label, f"[{encode(text)},{pair_json}]"
        if form == "numbers":
            if fields.label_field not in value:
                raise _missing(value, fields.label_field, "--label-field")
            label = forms.number_text(value[fields.label_field], fields.label_field)
        else:
            label = self._label(value)
        return text, second, label, f"[{encode(text)},{pair_json},{encode(label)}]"

    def _text(self, value: dict[str, Any]) -> str:
        text = value.get(self._fields.text_field)
        if type(text) is not str or not text or len(text) > MAX_TEXT_CHARS or text.isspace():
            raise _text_problem(value, self._fields.text_field, "--text-field")
        return text

    def _picture(self, value: dict[str, Any]) -> pictures.Picture:
        column = self._fields.text_field
        picture = pictures.picture_of(value.get(column))
        if picture is not None and len(picture.name) <= MAX_TEXT_CHARS:
            return picture
        if column in value and not isinstance(value[column], str):
            raise RowProblem(
                f"column {column!r} holds {shown(value[column])} ({_kind(value[column])}); expected an image: the path "
                "of its file, its bytes, or an object with bytes or path. Fix the row, or name another column with "
                "--text-field."
            )
        raise _text_problem(value, column, "--text-field")

    def _label(self, value: dict[str, Any]) -> str:
        column = self._fields.label_field
        label = value.get(column)
        if type(label) is not str:
            label = _as_text(value, column, "label", "--label-field")
        if not label or len(label) > MAX_NAME_CHARS or label.isspace():
            raise _name_problem(label, column, "label", "--label-field")
        return label

    def _pair(self, value: dict[str, Any]) -> str | None:
        column = self._fields.text_pair_field
        if column is None:
            late = self._unexpected_pair
            if late is not None and value.get(late) is not None and value[late] != "":
                raise RowProblem(
                    f"column {late!r} holds {shown(value[late])}, but the first rows had no such column, so the input "
                    f"is read as single texts. Name it with --text-pair-field {late}, or leave the column out."
                )
            return None
        pair = value.get(column)
        if type(pair) is str and pair and len(pair) <= MAX_TEXT_CHARS and not pair.isspace():
            return pair
        if pair is None and (column in value or not self._pair_required):
            return None
        if type(pair) is str and len(pair) <= MAX_TEXT_CHARS:
            return None  # blank: CSV has no other way to say null
        raise _text_problem(value, column, "--text-pair-field")

    def _readable_id(self, value: dict[str, Any]) -> str | None:
        if self._fields.id_field is None:
            return None
        try:
            return _id(value, self._fields.id_field)
        except RowProblem:
            return None


def _hash(canonical: str) -> str:
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def _missing(value: Mapping[str, Any], column: str, option: str) -> RowProblem:
    return RowProblem(
        f"there is no column {column!r}; the row has {quote_list([shown(c).strip(chr(39)) for c in value]) or 'none'}. "
        f"Name the column to read with {option}."
    )


def _text_problem(value: Mapping[str, Any], column: str, option: str) -> RowProblem:
    if column not in value:
        return _missing(value, column, option)
    text = value[column]
    if not isinstance(text, str):
        return RowProblem(
            f"column {column!r} holds {shown(text)} ({_kind(text)}); expected text. "
            f"Fix the row, or name another column with {option}."
        )
    if len(text) > MAX_TEXT_CHARS:
        return RowProblem(
            f"column {column!r} holds {len(text):,} characters, starting {shown(text[:40])}; expected at most "
            f"{MAX_TEXT_CHARS:,}. Split the text."
        )
    return RowProblem(
        f"column {column!r} is empty or blank ({shown(text)}); expected text. Remove the row, or name another column "
        f"with {option}."
    )


def _name_problem(name: str, column: str, what: str, option: str) -> RowProblem:
    if len(name) > MAX_NAME_CHARS:
        return RowProblem(
            f"the {what} in column {column!r} has {len(name):,} characters, starting {shown(name[:40])}; expected at "
            f"most {MAX_NAME_CHARS:,}. Name another column with {option}."
        )
    return RowProblem(
        f"the {what} in column {column!r} is empty or blank ({shown(name)}); expected text, a number or a boolean. "
        f"Fix the row, or name another column with {option}."
    )


def _as_text(value: Mapping[str, Any], column: str, what: str, option: str) -> str:
    """The text form of an id or a label that is no string: as JSON writes it."""
    if column not in value:
        raise _missing(value, column, option)
    found = value[column]
    if isinstance(found, str):
        return found
    if isinstance(found, bool | int) or (isinstance(found, float) and math.isfinite(found)):
        return json.dumps(found)
    if isinstance(found, float):
        raise not_finite(value)
    raise RowProblem(
        f"the {what} in column {column!r} is {shown(found)} ({_kind(found)}); expected text, a number or a boolean. "
        f"Fix the row, or name another column with {option}."
    )


def _id(value: dict[str, Any], column: str) -> str:
    found = value.get(column)
    if type(found) is not str:
        found = _as_text(value, column, "id", "--id-field")
    if not found or len(found) > MAX_NAME_CHARS or found.isspace():
        raise _name_problem(found, column, "id", "--id-field")
    return found


def _kind(value: object) -> str:
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)
