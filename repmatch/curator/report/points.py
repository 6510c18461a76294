"""The instances that the report's map shows: a sample of each dataset, always with the picks of its coresets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repmatch.blocks import take
from repmatch.curator.report.kernel import affordable, joined
from repmatch.datamodels import Coreset, Factors

if TYPE_CHECKING:
    from repmatch.store import Store

MOST_TEXT = 600
MOST_VALUES = 24
_MOST_COLUMNS = 12
OTHER = "(other)"
NOTHING = "(none)"


@dataclass(frozen=True)
class Points:
    """Instances on the map.

    Attributes:
        factors: n instances, dataset after dataset.
        datasets: name of each one's dataset, n of them.
        ids: the user's ids.
        total: instances that there are.
    """

    factors: Factors
    datasets: tuple[str, ...]
    ids: tuple[str, ...]
    total: int


def choose_points(store: Store, names: Sequence[str], most: int, seed: int, must: dict[str, set[str]]) -> Points:
    """Choose the instances to show.

    Args:
        store: the store.
        names: datasets of one space.
        most: points at most, but for those that must be shown.
        seed: decides the sample.
        must: dataset -> ids that must be shown.

    Returns:
        The points, each dataset in its order.
    """
    whole = [store.factors(name) for name in names]
    total = sum(len(part) for part in whole)
    most = affordable(whole[0], most)
    parts, datasets = [], []
    for i, (name, factors) in enumerate(zip(names, whole, strict=True)):
        share = len(factors) if total <= most else max(1, round(most * len(factors) / total))
        chosen = np.random.default_rng([seed, i]).permutation(len(factors))[:share]
        wanted = must.get(name, set())
        also = [at for at, row_id in enumerate(factors.ids) if row_id in wanted]
        at = np.union1d(chosen, np.asarray(also, np.int64))
        parts.append(factors if len(at) == len(factors) else take(factors, at))
        datasets += [name] * len(at)
    kept = joined(parts)
    return Points(kept, tuple(datasets), kept.ids, total)


def describe(store: Store, points: Points, names: Sequence[str], coresets: Sequence[Coreset]) -> dict[str, Any]:
    """Describe points in columns.

    Args:
        store: the store.
        points: the points.
        names: the datasets.
        coresets: theirs.

    Returns:
        Plain JSON values: text and columns to colour by; per coreset the position of each point's pick.
    """
    texts: list[str] = []
    columns: dict[str, list[Any]] = {"label": [], "score": [], "loss": [], "tokens": []}
    extra: dict[str, dict[str, list[Any]]] = {}
    for name in names:
        ids = [row_id for row_id, dataset in zip(points.ids, points.datasets, strict=True) if dataset == name]
        for row in store.tasks(name, ids=ids):
            texts.append(_cut(row.text if row.text_pair is None else f"{row.text}\n⸺\n{row.text_pair}"))
            columns["label"].append(row.label)
        scores = store.latest_scores(name)
        known = dict(zip(scores["id"].to_list(), scores["score"].to_list(), strict=True))
        columns["score"] += [known.get(row_id) for row_id in ids]
        facts = _facts(store, name)
        columns["loss"] += [facts.get(row_id, (None, None))[0] for row_id in ids]
        columns["tokens"] += [facts.get(row_id, (None, None))[1] for row_id in ids]
        extra[name] = _user_columns(store, name, ids)
    if len(names) > 1:
        columns["dataset"] = list(points.datasets)
    shown = sorted({column for own in extra.values() for column in own} - set(columns))[:_MOST_COLUMNS]
    counts = Counter(points.datasets)
    for column in shown:
        columns[column] = [v for name in names for v in extra[name].get(column, [None] * counts[name])]
    at = {key: i for i, key in enumerate(zip(points.datasets, points.ids, strict=True))}
    picks = {}
    for coreset in coresets:
        picked = [at.get((coreset.dataset, pick), -1) for pick in coreset.ids]
        stands = [-1] * len(points.ids)
        for row_id, place in zip(coreset.all_ids, coreset.representative.tolist(), strict=True):
            here = at.get((coreset.dataset, row_id))
            if here is not None and place >= 0:
                stands[here] = picked[place]
        picks[coreset.name] = {"picked": [p for p in picked if p >= 0], "stands": stands}
    return {
        "ids": list(points.ids),
        "datasets": list(points.datasets),
        "texts": texts,
        "columns": [encode(name, values) for name, values in columns.items() if any(v is not None for v in values)],
        "picks": picks,
    }


def encode(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """Encode a column for the page.

    Args:
        name: its name.
        values: numbers, texts or None.

    Returns:
        A number column with its values, or a category column with names and the position of each value's name; the
        rarest of many names are taken together.
    """
    numbers = [v for v in values if v is not None]
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in numbers):
        return {"name": name, "kind": "number", "values": [None if v is None else _round(float(v)) for v in values]}
    shown = [NOTHING if v is None else str(v) for v in values]
    counts = Counter(shown)
    names = [n for n, _ in counts.most_common(MOST_VALUES)] if len(counts) > MOST_VALUES else sorted(counts)
    known = {n: i for i, n in enumerate(names)}
    if len(counts) > MOST_VALUES:
        names = [*names, OTHER]
    return {
        "name": name,
        "kind": "category",
        "names": [_cut(n, 80) for n in names],
        "values": [known.get(v, MOST_VALUES) for v in shown],
    }


def _round(value: float) -> float | None:
    return float(f"{value:.6g}") if np.isfinite(value) else None


def _cut(text: str, most: int = MOST_TEXT) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _facts(store: Store, name: str) -> dict[str, tuple[float | None, int | None]]:
    found = store.sql("SELECT id, loss, tokens FROM instances WHERE dataset = ?", [name])
    return {row_id: (loss, tokens) for row_id, loss, tokens in found.iter_rows()}


def _user_columns(store: Store, name: str, ids: Sequence[str]) -> dict[str, list[Any]]:
    """Read the user's own columns that can colour a map: numbers, booleans, and texts that repeat."""
    dataset = store.dataset(name)
    fields = dataset.fields
    read = {fields.id_field, fields.text_field, fields.text_pair_field, fields.label_field, "id", "label"}
    everyone = store.ids(name)
    out: dict[str, list[Any]] = {}
    for column, kind in dataset.columns.items():
        if column in read or kind == "json" or len(out) >= _MOST_COLUMNS:
            continue
        known = dict(zip(everyone, store.column(name, column), strict=True))
        values: list[Any] = [known[row_id] for row_id in ids]
        if kind == "number":
            values = [None if v is None else float(v) for v in values]
        elif len({v for v in values if v is not None}) > max(2, len(values) // 4):
            continue  # nearly unique texts say nothing as colours
        out[column] = values
    return out


def groups_of(points: Points, labels: Sequence[str], most: int = MOST_VALUES) -> tuple[list[str], NDArray[np.int64]]:
    """Group points by dataset and label, the largest groups.

    Args:
        points: the points.
        labels: label of each point.
        most: groups at most.

    Returns:
        Names of the groups, and (n,) int64 group of each point, -1: none.
    """
    keys = list(zip(points.datasets, labels, strict=True))
    chosen = sorted(key for key, _ in Counter(keys).most_common(most))
    place = {key: i for i, key in enumerate(chosen)}
    several = len(set(points.datasets)) > 1
    names = [f"{dataset}: {label}" if several else label for dataset, label in chosen]
    return names, np.asarray([place.get(key, -1) for key in keys], np.int64)
