"""Reading rows: sources in, chunks of checked rows out, with nothing held but the current chunk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from repmatch.curator.conversations import CONVERSATIONS, messages_in
from repmatch.curator.forms import TaskKind, task_kind
from repmatch.curator.records import BadRecord, Record
from repmatch.curator.rowmaker import MAX_NAME_CHARS, MAX_TEXT_CHARS, RowMaker
from repmatch.curator.sources import Source, find
from repmatch.datamodels import BadRow, Fields, Row, digest
from repmatch.errors import UsageError

__all__ = [
    "MAX_NAME_CHARS",
    "MAX_TEXT_CHARS",
    "ColumnKind",
    "FieldChoice",
    "RowReader",
    "SourceCount",
    "open_rows",
]

ColumnKind = Literal["string", "number", "boolean", "json"]

_CHUNK_ROWS = 1_000
_CHUNK_CHARS = 8 << 20
_SHAPES = 10_000
_KINDS: dict[type, ColumnKind] = {
    str: "string",
    int: "number",
    float: "number",
    bool: "boolean",
    dict: "json",
    list: "json",
}


@dataclass(frozen=True, slots=True)
class FieldChoice:
    """Which columns the user asked for; None: the default.

    Attributes:
        id_field: column with the id. Default: `id` where the first readable row has it, else the digest of the row.
        text_field: column with the text. Default: the task's, for classification `text`, for causal-lm `prompt`, or
            `messages` or `conversations` where the first row has no prompt.
        text_pair_field: column with the second text; "": none. Default: the task's, for classification `text_pair`
            where one of the first rows has it.
        label_field: column with the label. Default: `label`.
    """

    id_field: str | None = None
    text_field: str | None = None
    text_pair_field: str | None = None
    label_field: str | None = None


@dataclass(frozen=True, slots=True)
class SourceCount:
    """What came from one source.

    Attributes:
        name: how the user named it.
        rows: rows that passed.
        bad: rows set aside.
        hash: BLAKE2b-256 over its bytes as they lie on disk (what `b2sum -l 256` prints); of a hub dataset, over its
            rows as JSON lines.
    """

    name: str
    rows: int
    bad: int
    hash: str


def open_rows(
    sources: Sequence[str | Source],
    fields: FieldChoice,
    *,
    resolved: Fields | None = None,
    kind: TaskKind | None = None,
) -> RowReader:
    """Open sources for reading; nothing is read yet, but every source is found.

    Args:
        sources: paths (.jsonl, .ndjson, .json, .csv, .tsv, each also .gz; .parquet), "-" for JSON lines on standard
            input, or hf:NAME[@CONFIG][:SPLIT]; of images also a folder, a class a subfolder. Or what `find` gave.
        fields: the columns the user asked for.
        resolved: the columns that the dataset was ingested with before; they win.
        kind: the task whose rows they are; None: sequence classification.

    Returns:
        The reader, to be iterated once.

    Raises:
        UsageError: no source, a source that is not there or comes twice, a format that is not supported, or columns
            that contradict each other or `resolved`.
        InputError: a source is a directory or cannot be opened.
        MissingExtraError: a hub dataset without the `datasets` library.
    """
    if isinstance(sources, str) or not sources:
        raise UsageError(f"expected a list of at least one source, received {sources!r}")
    named = [str(source) for source in sources]
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice:
        raise UsageError(f"the source {twice[0]!r} is named twice; name each source once")
    _check_choice(fields)
    if resolved is not None:
        _check_resolved(fields, resolved)
    kind = kind or task_kind(None)
    found = resolved or _resolve(fields, [], kind)
    columns = (found.id_field or "id", found.text_field, found.label_field) if found.form == "images" else None
    opened = [source if isinstance(source, Source) else find(source, columns) for source in sources]
    return RowReader(opened, fields, resolved, kind)


class RowReader:
    """Rows of some sources, in order, as chunks of about a thousand.

    Iterate once. Exact duplicates are kept; without an id column their ids are `DIGEST`, `DIGEST-2`, ...
    """

    def __init__(self, sources: Sequence[Source], fields: FieldChoice, resolved: Fields | None, kind: TaskKind) -> None:
        self._sources = sources
        self._kind = kind
        self._choice = fields
        self._fields = resolved
        self._resolved = resolved
        self._maker: RowMaker | None = None
        self._columns: dict[str, set[ColumnKind]] = {}
        self._shapes: set[tuple[Any, ...]] = set()
        self._good, self._bad = Counter[str](), Counter[str]()
        self._state: Literal["new", "reading", "done"] = "new"

    @property
    def fields(self) -> Fields:
        """The columns that are read: final with the first chunk that holds a `Row`, the defaults before."""
        return self._fields or _resolve(self._choice, [], self._kind)

    @property
    def columns(self) -> dict[str, ColumnKind]:
        """Every column of the rows so far and what it holds; "json" for lists, objects and mixtures."""
        return {
            name: next(iter(kinds)) if len(kinds) == 1 else "json" if kinds else "string"
            for name, kinds in self._columns.items()
        }

    @property
    def counts(self) -> tuple[SourceCount, ...]:
        """Rows, bad rows and hash of each source; final at the end."""
        return tuple(
            SourceCount(s.name, self._good[s.name], self._bad[s.name], s.state.hexdigest()) for s in self._sources
        )

    @property
    def input_hash(self) -> str:
        """Digest of the sources' hashes in order, whatever their names.

        Raises:
            UsageError: not every chunk was read.
        """
        if self._state != "done":
            raise UsageError("the input's hash is known at its end only; read every chunk first")
        return digest([count.hash for count in self.counts], size=32)

    def __iter__(self) -> Iterator[list[Row | BadRow]]:
        """Read the chunks.

        Yields:
            Rows and bad rows, at least one.

        Raises:
            UsageError: the rows were read before.
            InputError: a source cannot be read on.
        """
        if self._state != "new":
            raise UsageError("the rows were read before, and a source is read once; call open_rows again")
        self._state = "reading"
        return self._chunks()

    def _chunks(self) -> Iterator[list[Row | BadRow]]:
        held: list[tuple[str, Record | BadRecord]] = []
        size = 0
        for source in self._sources:
            name = source.name
            for record in source.records():
                held.append((name, record))
                size += len(record[1])
                if len(held) >= _CHUNK_ROWS or size >= _CHUNK_CHARS:
                    yield self._rows(held)
                    held, size = [], 0
        if held:
            yield self._rows(held)
        self._state = "done"

    def _rows(self, held: list[tuple[str, Record | BadRecord]]) -> list[Row | BadRow]:
        maker = self._maker or self._decide([r.value for _, r in held if isinstance(r, Record)])
        rows: list[Row | BadRow] = []
        for name, record in held:
            if isinstance(record, BadRecord) or maker is None:
                row: Row | BadRow = BadRow(name, record.line, None, record[1])
            else:
                row = maker.make(name, record)
            if isinstance(row, Row):
                self._good[name] += 1
                self._look(record.value)  # type: ignore[union-attr]
            else:
                self._bad[name] += 1
            rows.append(row)
        return rows

    def _decide(self, values: list[dict[str, Any]]) -> RowMaker | None:
        """Choose the columns from the first readable rows; None while there is none."""
        if not values:
            return None
        if self._fields is None:
            self._fields = _resolve(self._choice, values, self._kind)
        pair = self._fields.text_pair_field
        late = None
        paired = self._fields.form in ("classes", "numbers", "texts")
        if self._resolved is None and self._choice.text_pair_field is None and pair is None and paired:
            late = _default_pair(self._choice)
        self._maker = RowMaker(
            self._fields,
            pair_required=pair is not None and (pair != "text_pair" or self._choice.text_pair_field is not None),
            unexpected_pair=late,
        )
        return self._maker

    def _look(self, value: dict[str, Any]) -> None:
        shape = (*value, *map(type, value.values()))
        if shape in self._shapes:
            return
        if len(self._shapes) >= _SHAPES:
            self._shapes.clear()
        self._shapes.add(shape)
        for name, inner in value.items():
            kinds = self._columns.setdefault(name, set())
            if inner is not None:
                kinds.add(_KINDS[type(inner)])


def _default_pair(choice: FieldChoice) -> str | None:
    return None if "text_pair" in (choice.text_field, choice.label_field, choice.id_field) else "text_pair"


def _resolve(choice: FieldChoice, values: Sequence[Mapping[str, Any]], kind: TaskKind) -> Fields:
    id_field, pair = choice.id_field, choice.text_pair_field
    if id_field is None and values and "id" in values[0] and "id" not in (choice.text_field, choice.label_field, pair):
        id_field = "id"
    text, label, form = choice.text_field or kind.text_field, choice.label_field or "label", kind.form
    if form == "completion":
        if choice.text_field is None and text not in (values[0] if values else ()):
            text = next((column for column in CONVERSATIONS if _has(values, column)), text)
        if values and _talks(values, text, pair or kind.pair_field or ""):
            second = kind.pair_field if pair is None and text == kind.text_field else pair
            answered = second and any(value.get(second) is not None for value in values)
            return Fields(id_field, text, second if answered else None, label, "messages")
        return Fields(id_field, text, pair or kind.pair_field, label, form)
    if form == "images":
        if pair:
            raise UsageError(f"--text-pair-field {pair!r} goes with texts; images have no second text. Leave it out.")
        return Fields(id_field, text, None, label, form)
    if pair is None:
        default = _default_pair(choice)
        pair = default if any(default in value for value in values) else None
    return Fields(id_field, text, pair or None, label, form)


def _has(values: Sequence[Mapping[str, Any]], column: str) -> bool:
    return any(column in value for value in values)


def _talks(values: Sequence[Mapping[str, Any]], text: str, pair: str) -> bool:
    """Whether a column holds conversations: lists, or their JSON text where the completion is none or such text too."""
    if isinstance(values[0].get(text), list):
        return True
    texts = [value for value in values if isinstance(messages_in(value.get(text)), list)]
    return bool(texts) and (
        not _has(values, pair) or any(isinstance(messages_in(value.get(pair)), list) for value in texts)
    )


def _check_choice(choice: FieldChoice) -> None:
    for option, name in (("id", choice.id_field), ("text", choice.text_field), ("label", choice.label_field)):
        if name == "":
            raise UsageError(f"--{option}-field is empty; expected the name of a column")
    text, label, pair = choice.text_field or "text", choice.label_field or "label", choice.text_pair_field
    if text == label:
        raise UsageError(f"the text and the label are both column {text!r}; name two with --text-field, --label-field")
    if pair in (text, label):
        raise UsageError(
            f"--text-pair-field names column {pair!r}, which is the text or the label; name another column"
        )


def _check_resolved(choice: FieldChoice, resolved: Fields) -> None:
    for name in ("id_field", "text_field", "text_pair_field", "label_field"):
        asked, kept = getattr(choice, name), getattr(resolved, name)
        if asked is not None and (asked or None) != kept:
            option = "--" + name.replace("_", "-")
            raise UsageError(
                f"{option} is {asked!r}, but the dataset was ingested with {kept!r}; leave {option} out, or ingest "
                "into a new dataset with --dataset"
            )
