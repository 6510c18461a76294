"""Rows of the user's data, good and bad, and the datasets they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from repmatch.datamodels.spaces import Encoding


@dataclass(frozen=True, slots=True)
class Row:
    """One input row that passed every check.

    Attributes:
        id: the user's id, as text.
        json: the row as it came, one JSON object (the very bytes of the line for JSONL).
        text: first text field; the prompt of a completion, the conversation before its last message, the path of an
            image.
        text_pair: second text field or None; the completion, or the last message.
        label: the label as text; "" where the task needs none and the row has none.
        row_hash: digest of the canonical row.
        task_hash: digest of what the task reads (text, text_pair, label; of a conversation messages, tools and which
            are learned): the factors depend on nothing else.
        source: file the row came from.
        line: line (JSONL, CSV) or row number (Parquet, hub) in it, from 1.
    """

    id: str
    json: str
    text: str
    text_pair: str | None
    label: str
    row_hash: str
    task_hash: str
    source: str
    line: int


@dataclass(frozen=True, slots=True)
class BadRow:
    """One input row that was set aside (quarantined), and why.

    Attributes:
        source: file the row came from.
        line: line or row number in it, from 1.
        id: the user's id where it could be read.
        reason: what is wrong, the value, what was expected and the remedy.
    """

    source: str
    line: int
    id: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Fields:
    """Which columns of a row are read.

    Attributes:
        id_field: column with the user's id; None: the id is the digest of the row.
        text_field: column with the text.
        text_pair_field: column with the second text, or the completion's messages; None: single texts, or the
            whole conversation in one column.
        label_field: column with the label.
        form: what the columns hold, see `repmatch.curator.forms`.
    """

    id_field: str | None
    text_field: str
    text_pair_field: str | None
    label_field: str
    form: str = "classes"


@dataclass(frozen=True)
class Dataset:
    """A named set of instances.

    Attributes:
        name: the user's name for it.
        fields: the columns that are read.
        labels: every label, sorted; a label's index decides its row of the head. Fixed at the first ingest.
        columns: column name -> "string", "number", "boolean" or "json", from the rows seen.
        space_id: the space of its instance factors, None before the first.
        encoding: how its factors are kept.
    """

    name: str
    fields: Fields
    labels: tuple[str, ...]
    columns: Mapping[str, str] = field(default_factory=dict)
    space_id: str | None = None
    encoding: Encoding = "float16"
