"""What a store holds, as plain values, and whether one such state is another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from repmatch import store as stores


@dataclass
class State:
    """All that is committed to a store, and the files exported beside it.

    Attributes:
        rows: dataset -> id -> (the row as it came, bytes of its factor or None); order is the dataset's, empty ones are
            left out.
        subsets: name -> (dataset, ids in order).
        coresets: name -> (dataset, picks in order).
        scores: (dataset, adapter) -> id -> score.
        adapters: id -> SHA-256 of its values.
        quarantine: dataset -> reasons in order.
        exports: file name -> SHA-256.
    """

    rows: dict[str, dict[str, tuple[str, bytes | None]]] = field(default_factory=dict)
    subsets: dict[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    coresets: dict[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    scores: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)
    quarantine: dict[str, tuple[str, ...]] = field(default_factory=dict)
    exports: dict[str, str] = field(default_factory=dict)

    def copy(self) -> State:
        return State(
            {name: dict(rows) for name, rows in self.rows.items()},
            dict(self.subsets),
            dict(self.coresets),
            {key: dict(values) for key, values in self.scores.items()},
            dict(self.adapters),
            dict(self.quarantine),
            dict(self.exports),
        )

    def of(self, prefix: str) -> State:
        """The part of one writer, whose names all begin alike."""

        def mine(things: dict[Any, Any]) -> dict[Any, Any]:
            return {k: v for k, v in things.items() if str(k if isinstance(k, str) else k[0]).startswith(prefix)}

        return State(*(mine(getattr(self, name)) for name in self.__dataclass_fields__))

    def same(self, other: State) -> bool:
        """Equal, order of rows included."""
        return self == other and all(list(self.rows[name]) == list(other.rows[name]) for name in self.rows)

    def digest(self) -> str:
        """A short name for what queries see of it: everything but factors, adapters and exported files."""
        rows = {name: [(key, raw) for key, (raw, _) in rows.items()] for name, rows in self.rows.items()}
        scores = sorted((*pair, key, value) for pair, values in self.scores.items() for key, value in values.items())
        parts = [sorted(rows.items()), sorted(self.subsets.items()), sorted(self.coresets.items()), scores]
        parts.append(sorted(self.quarantine.items()))
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def missing_from(self, other: State) -> list[str]:
        """Name what this state has and another has not, or has otherwise."""
        out = []
        for name in ("subsets", "coresets", "adapters", "quarantine", "exports"):
            mine, theirs = getattr(self, name), getattr(other, name)
            out += [f"{name} {key!r}" for key, value in mine.items() if theirs.get(key) != value]
        for dataset, rows in self.rows.items():
            there = other.rows.get(dataset, {})
            out += [f"row {dataset}/{key}" for key, value in rows.items() if there.get(key) != value]
            out += [f"dataset {dataset!r}"] if dataset not in other.rows else []
        for pair, values in self.scores.items():
            there_scores = other.scores.get(pair, {})
            out += [f"score {pair}/{key}" for key, value in values.items() if there_scores.get(key) != value]
        return out


def read_state(store: stores.Store, exports: Path | None = None) -> State:
    """Read a store through its public reading; raises what that raises.

    Args:
        store: an open store.
        exports: folder of exported files.
    """
    out = State()
    for name in store.datasets()["name"].to_list():
        values: dict[str, bytes] = {}
        if store.dataset(name).space_id is not None:
            factors = store.factors(name)
            flat = factors.flat if factors.flat is not None else factors.bits
            assert flat is not None
            values = {key: np.asarray(row).tobytes() for key, row in zip(factors.ids, flat, strict=True)}
        rows = {key: (raw, values.get(key)) for key, raw in store.rows(name)}
        if rows:  # a dataset is there a commit before its first rows
            out.rows[name] = rows
    _read_queries(store.sql, out)
    for key in store.adapters()["id"].to_list():
        adapter = store.adapter(key)
        assert adapter is not None
        parts = [part for name in sorted(adapter.b) for part in (adapter.a[name], adapter.b[name])]
        out.adapters[key] = hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()
    if exports is not None and exports.is_dir():
        for path in exports.glob("*.jsonl"):
            out.exports[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return out


def moment(store: stores.Store) -> State:
    """Read one moment of a store by queries of one connection: no factors, adapters and files."""
    out = State()
    with store._reading():
        for dataset, key, raw in store._frame(
            "SELECT dataset, id, json::VARCHAR FROM main.instances ORDER BY dataset, position"
        ).rows():
            out.rows.setdefault(dataset, {})[key] = (raw, None)
        _read_queries(store._frame, out)
    return out


def _read_queries(query: Callable[[str], pl.DataFrame], out: State) -> None:
    for name, dataset, key in query("SELECT name, dataset, id FROM main.subsets ORDER BY name, position").rows():
        out.subsets[name] = (dataset, (*out.subsets.get(name, ("", ()))[1], key))
    for name, dataset, key in query("SELECT coreset, dataset, id FROM main.picks ORDER BY coreset, rank").rows():
        out.coresets[name] = (dataset, (*out.coresets.get(name, ("", ()))[1], key))
    for dataset, adapter, key, score in query("SELECT dataset, adapter, id, score FROM main.scores").rows():
        out.scores.setdefault((dataset, adapter), {})[key] = score
    for dataset, reason in query("SELECT dataset, reason FROM main.quarantine ORDER BY line").rows():
        out.quarantine[dataset] = (*out.quarantine.get(dataset, ()), reason)
