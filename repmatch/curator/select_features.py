"""Features for feature coverage: the words of texts, and columns of numbers."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from repmatch.errors import InputError, UnknownNameError, UsageError
from repmatch.selectors import Features
from repmatch.store.filters import visible_columns

if TYPE_CHECKING:
    from repmatch.store import Store

_WORD = re.compile(r"\w+")

Entries = dict[Hashable, float]


def features_of(store: Store, sets: Sequence[tuple[str, Sequence[str]]], columns: Sequence[str] = ()) -> Features:
    """Return the features of instances.

    A text gives one feature a word, its count, weighed by ln((n + 1) / instances that have it): rare words count more.
    A column of numbers is one feature, as a share of its largest value, and a column of lists of numbers one feature a
    place, as it stands; they weigh 1.

    Args:
        store: the store.
        sets: datasets and ids of theirs; features are the same for all.
        columns: of the user's rows; empty: the texts that the task reads.

    Returns:
        The features of all instances, one set after another.

    Raises:
        UsageError: there are no words.
        UnknownNameError: a dataset has no such column.
        InputError: a number that is missing or below 0, or lists of several lengths.
    """
    rows: list[Entries] = [{} for _, ids in sets for _ in ids]
    words: set[Hashable] = set()
    if not columns:
        _count(_texts(store, sets), "", rows, words)
        if not words:
            raise UsageError("the task reads no text, so that there are no words: name columns with --features.")
    for name in columns:
        _read(store, sets, name, rows, words)
    return _packed(rows, words)


def _texts(store: Store, sets: Sequence[tuple[str, Sequence[str]]]) -> Iterator[str]:
    for dataset, ids in sets:
        for row in store.tasks(dataset, ids=ids):
            yield f"{row.text or ''} {row.text_pair or ''}"


def _read(
    store: Store, sets: Sequence[tuple[str, Sequence[str]]], name: str, rows: list[Entries], words: set[Hashable]
) -> None:
    """Add the features of one column."""
    kinds: set[str] = set()
    values: list[str | None] = []
    names: list[str] = []
    for dataset, ids in sets:
        known, sources = store.dataset(dataset).columns, visible_columns(store.dataset(dataset).columns)
        if name not in sources:
            raise UnknownNameError.of("column", name, sources, f"columns are those of the rows of {dataset!r}")
        column = dict(zip(store.ids(dataset), store.column(dataset, name), strict=True))
        kinds.add(known.get(sources[name] or "", "string"))
        values += [column[i] for i in ids]
        names += ids
    if kinds == {"number"}:
        numbers = [_numbers(name, i, value) for i, value in zip(names, values, strict=True)]
        most = max((number for (number,) in numbers), default=0.0)
        numbers = [[number / most if most else 0.0] for (number,) in numbers]
    elif kinds == {"json"}:
        numbers = [_numbers(name, i, value) for i, value in zip(names, values, strict=True)]
    else:
        _count((value or "" for value in values), name, rows, words)
        return
    for i, row, some in zip(names, rows, numbers, strict=True):
        if len(some) != len(numbers[0]):
            raise _unusable(name, i, f"a list of {len(some)}", f"lists of one length, such as {len(numbers[0])}")
        row.update({(name, place): number for place, number in enumerate(some) if number})


def _numbers(name: str, ident: str, value: str | None) -> list[float]:
    try:
        found: Any = json.loads(value or "")
        numbers = [float(number) for number in (found if isinstance(found, list) else [found])]
    except (ValueError, TypeError):
        numbers = [math.nan]
    if not all(math.isfinite(number) and number >= 0.0 for number in numbers):
        raise _unusable(name, ident, repr(value), "numbers of at least 0 in every row")
    return numbers


def _unusable(name: str, ident: str, value: str, expected: str) -> InputError:
    return InputError(
        f"the column {name!r} can't be features: it is {value} at {ident!r}; expected {expected}. Select from rows "
        "that have them with DATASET[SQL]."
    )


def _count(texts: Iterator[str], name: str, rows: list[Entries], words: set[Hashable]) -> None:
    """Add the words of one text an instance."""
    for row, text in zip(rows, texts, strict=True):
        found = {(name, word): float(count) for word, count in Counter(_WORD.findall(text.casefold())).items()}
        row.update(found)
        words.update(found)


def _packed(rows: list[Entries], words: set[Hashable]) -> Features:
    """Return features in order of their first occurrence."""
    number: dict[Hashable, int] = {}
    columns = [number.setdefault(key, len(number)) for row in rows for key in row]
    have = np.bincount(columns, minlength=len(number)) if columns else np.zeros(0)
    weights = np.array(
        [math.log((len(rows) + 1) / count) if key in words else 1.0 for key, count in zip(number, have, strict=True)]
    )
    return Features(
        starts=np.cumsum([0, *map(len, rows)], dtype=np.int64),
        columns=np.array(columns, np.int32),
        values=np.array([value for row in rows for value in row.values()], np.float64),
        width=len(number),
        weights=weights,
    )
