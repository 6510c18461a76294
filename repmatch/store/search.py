"""Exact search over stored factors: one query or a thousand, in one pass over the mapped segments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from repmatch.blocks import take
from repmatch.datamodels import Encoding, Factors, Layout, Space
from repmatch.errors import SpaceMismatchError, StoreError, UnknownNameError, UsageError
from repmatch.ranking import TIE
from repmatch.similarity import against, mean_projectors, mean_scores, similarity_to
from repmatch.store.factors import ATTEMPTS
from repmatch.store.members import MemberTables

if TYPE_CHECKING:
    import polars as pl

    from repmatch.best import Best

SCORE_BYTES = 16 << 20  # of one block of scores: what caches hold
QUERY_BYTES = 64 << 20  # of queries scored together, as float32
_ROWS = (2048, 1 << 16)


class Scorer(Protocol):
    """Scores all pairs of queries and instances."""

    def __call__(self, queries: Factors, factors: Factors, *, signed: bool = False) -> NDArray[np.float32]:
        """Return (q, n) float32, exact for sign codes."""


@dataclass(frozen=True)
class Hits:
    """What a query found, best first, ties by id.

    Attributes:
        ids: the user's ids.
        scores: (k,) float32; RepMatch in [0, 1], or the signed cosine in [−1, 1].
    """

    ids: tuple[str, ...]
    scores: NDArray[np.float32]

    def to_polars(self) -> pl.DataFrame:
        """Return the hits as a frame: rank, id, score."""
        import polars as pl

        return pl.DataFrame({"rank": range(1, len(self.ids) + 1), "id": self.ids, "score": self.scores})


class _DeletedError(StoreError):
    """Hits were deleted between the look-up of the factors and that of the ids."""


class Search:
    """The factors of a dataset as they were committed when the search was opened.

    Ids stay in the catalog: only those of results are read. Segments are mapped, and pages are given back as a scan
    passes them. Instances that are deleted meanwhile are found no more.

    Args:
        store: the store.
        dataset: the dataset.
        where: a SQL condition that found instances must meet; None: all.
        space_id: another space than the dataset's.
        scorer: computes scores of all pairs as `repmatch.similarity.mean_scores` does, on another device for example.
    """

    def __init__(
        self,
        store: Searches,
        dataset: str,
        *,
        where: str | None = None,
        space_id: str | None = None,
        scorer: Scorer = mean_scores,
    ) -> None:
        self._scorer = scorer
        self._store = store
        self.dataset = dataset
        self._all = store._locate(dataset, space_id, None)
        found = self._all
        if where is not None:
            found = found.part(np.isin(found.keys, store._filtered(dataset, where), assume_unique=True))
        order = np.lexsort((found.rows, found.segments))
        self._located = found if bool((np.diff(order) == 1).all()) else found.part(order)

    def __len__(self) -> int:
        return len(self._located.keys)

    @property
    def space(self) -> Space:
        """Space of the factors."""
        return self._all.space

    @property
    def layout(self) -> Layout:
        """Matrices and rank."""
        return self._all.space.layout

    @property
    def encoding(self) -> Encoding:
        """How the factors are kept."""
        return self._all.encoding

    def factors(self, ids: Sequence[str]) -> Factors:
        """Return the factors of instances by id, whether they meet the condition or not.

        Args:
            ids: which, in which order.

        Returns:
            Their factors.

        Raises:
            UnknownNameError: an id is not in the dataset or has no factor.
        """
        return self._factors(ids, self._store._keys(self.dataset, ids))

    def _factors(self, ids: Sequence[str], keys: NDArray[np.int64]) -> Factors:
        places = _places(self._all.keys, np.arange(len(self._all.keys)), keys)
        if len(places) and places.min() < 0:
            raise UnknownNameError(
                f"instance {ids[int(np.argmin(places))]!r} of {self.dataset!r} has no factor in space {self.space.id}. "
                f"Make it with: repmatch ingest FILE --dataset {self.dataset}"
            )
        return self._all.part(places).load(tuple(ids))

    @cached_property
    def _by_key(self) -> NDArray[np.int64]:
        return np.argsort(self._located.keys, kind="stable")

    @property
    def keys(self) -> NDArray[np.int64]:
        """(n,) keys of the instances, in the order of `blocks`."""
        return self._located.keys

    def checked(self, factors: Factors) -> Factors:
        """Return factors as they are where they are of this search's space, and refuse others."""
        if factors.space_id != self.space.id:
            raise SpaceMismatchError(
                f"these factors are of another space than those of {self.dataset!r}.",
                self.space.differences(self._store.space(factors.space_id)),
            )
        return factors

    def nearest_to(self, ids: Sequence[str], k: int, *, signed: bool = False) -> list[Hits]:
        """Find the nearest instances to stored ones; each is left out of its own hits.

        Args:
            ids: the user's ids, one or thousands.
            k: how many each.
            signed: by the cosine of the two ΔW, which sees labels, in place of the RepMatch score.

        Returns:
            Hits for each id, in order.
        """
        keys = self._store._keys(self.dataset, ids)
        return self._nearest(self._factors(ids, keys), k, signed, keys)

    def nearest(
        self, queries: Factors, k: int, *, signed: bool = False, exclude: Sequence[str] | None = None
    ) -> list[Hits]:
        """Find the nearest instances to any factors of this space.

        Args:
            queries: one instance or thousands.
            k: how many each; all where there are fewer.
            signed: by the cosine of the two ΔW in place of the RepMatch score.
            exclude: an id a query that it must not find.

        Returns:
            Exact hits for each query, in order; equal scores in order of their ids.

        Raises:
            UsageError: k is below 1.
            SpaceMismatchError: the queries are of another space.
        """
        return self._nearest(queries, k, signed, None if exclude is None else self._store._keys(self.dataset, exclude))

    def _nearest(self, queries: Factors, k: int, signed: bool, exclude: NDArray[np.int64] | None) -> list[Hits]:
        if k < 1:
            raise UsageError(f"k = {k} is out of range: expected 1 or more")
        for attempt in range(ATTEMPTS):
            try:
                return self._found(queries, k, signed, exclude)
            except _DeletedError:
                if attempt == ATTEMPTS - 1:
                    raise
                self._let_go()
        raise AssertionError("unreachable")

    def _let_go(self) -> None:
        """Leave out the instances that were deleted since the factors were located."""
        left = [key for rows in self._store._chunks(np.sort(self.keys), "i.pk", 65536) for (key,) in rows]
        self._located = self._located.part(np.isin(self.keys, np.asarray(left, np.int64), assume_unique=True))
        for name in ("_by_key", "_breaks"):
            self.__dict__.pop(name, None)

    def _found(self, queries: Factors, k: int, signed: bool, exclude: NDArray[np.int64] | None) -> list[Hits]:
        skip = np.full(len(queries), -1, np.int64)
        if exclude is not None:
            skip = _places(self._located.keys, self._by_key, exclude)
        k = min(k, len(self))
        step = max(1, min(QUERY_BYTES // (4 * self.layout.width), QUERY_BYTES // (24 * max(1, k))))
        out: list[Hits] = []
        for lo in range(0, len(queries), step):
            part = take(queries, slice(lo, lo + step))
            out += self._batch(part, k, signed, skip[lo : lo + step]) if k else [_nothing()] * len(part)
        return out

    def _batch(self, queries: Factors, k: int, signed: bool, skip: NDArray[np.int64]) -> list[Hits]:
        from repmatch.best import Best

        exact = self.encoding == "sign"

        def settle(query: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
            scores = self._exactly(take(queries, slice(query, query + 1)), places, signed)
            ids = self._ids(places)
            order = sorted(range(len(places)), key=lambda i: (-scores[i], ids[int(places[i])]))
            return places[order[:k]]

        best = Best(len(queries), k, 0.0 if exact else TIE, skip, settle)
        for first, block in self.blocks(len(queries)):
            best.add(self._scorer(queries, block, signed=signed), first)
        return self._ranked(queries, best, k, signed)

    def _ranked(self, queries: Factors, best: Best, k: int, signed: bool) -> list[Hits]:
        found = []
        for query in range(len(queries)):
            places, scores = best.candidates(query)
            if self.encoding != "sign":
                scores = self._exactly(take(queries, slice(query, query + 1)), places, signed)
            found.append((places, scores))
        ids = self._ids(np.unique(np.concatenate([places for places, _ in found])))
        out = []
        for places, scores in found:
            named = sorted(zip((-scores).tolist(), [ids[p] for p in places.tolist()], strict=True))[:k]
            out.append(Hits(tuple(n for _, n in named), -np.asarray([s for s, _ in named], np.float32)))
        return out

    def _exactly(self, query: Factors, places: NDArray[np.int64], signed: bool) -> NDArray[np.float32]:
        """Score a few instances so that equal factors get equal scores."""
        rows = self._located.part(places).load()
        if self.encoding == "sign":
            return np.asarray(mean_scores(query, rows, signed=signed)[0])
        return np.asarray(against(query, rows, signed=signed, exact=True).mean(axis=1), np.float32)

    def _ids(self, places: NDArray[np.int64]) -> dict[int, str]:
        keys = self._located.keys[places]
        order = np.argsort(keys, kind="stable")
        names = self._store._ids_of(keys[order])
        if len(names) != len(keys):
            raise _DeletedError(f"instances of {self.dataset!r} are deleted faster than they are searched; try again.")
        return dict(zip(places[order].tolist(), names, strict=True))

    def blocks(self, queries: int = 1) -> Iterator[tuple[int, Factors]]:
        """Stream the factors in the order in which they lie on the disk, without their ids.

        Args:
            queries: how many scores an instance will get: the more, the smaller the blocks.

        Yields:
            (number of the first, factors).
        """
        size = int(np.clip(SCORE_BYTES // (4 * max(1, queries)), *_ROWS))
        if self.encoding != "sign":
            size = min(size, max(256, QUERY_BYTES // (4 * self.layout.width) * 8))
        lo, rest = 0, self._breaks
        while lo < len(self):
            rest = rest[np.searchsorted(rest, lo, side="right") :]
            whole = int(rest[0]) if len(rest) else len(self)  # up to there the rows lie in one piece: no copy
            hi = min(lo + size, whole if whole - lo >= size // 8 else lo + size // 8, len(self))
            part = self._located.part(slice(lo, hi))
            yield lo, part.load()
            edges = [0, *(np.flatnonzero(np.diff(part.segments)) + 1).tolist(), len(part.rows)]
            for start, stop in pairwise(edges):  # in order of segment and row
                first, last = int(part.rows[start]), int(part.rows[stop - 1])
                part.maps[int(part.segments[start])].release(first, last - first + 1)
            lo = hi

    @cached_property
    def _breaks(self) -> NDArray[np.int64]:
        """Where the rows do not go on one after the other in one segment."""
        segments, rows = self._located.segments, self._located.rows
        return np.flatnonzero((segments[1:] != segments[:-1]) | (rows[1:] != rows[:-1] + 1)) + 1


def _places(among: NDArray[np.int64], order: NDArray[np.int64], keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where keys stand among others, −1 where they do not; `order` sorts those."""
    if not len(among):
        return np.full(len(keys), -1, np.int64)
    at = order[np.minimum(np.searchsorted(among, keys, sorter=order), len(order) - 1)]
    return np.where(among[at] == keys, at, -1)


def _nothing() -> Hits:
    return Hits((), np.empty(0, np.float32))


class Searches(MemberTables):
    """Search over the factors of the store."""

    def search(
        self,
        dataset: str,
        *,
        where: str | None = None,
        space_id: str | None = None,
        scorer: Scorer = mean_scores,
    ) -> Search:
        """Open a search over a dataset's factors, for any number of queries.

        Args:
            dataset: the dataset.
            where: a SQL condition that found instances must meet.
            space_id: another space than the dataset's.
            scorer: computes the scores, such as `repmatch.curator.device_scores.DeviceScores("cuda")`.

        Returns:
            The search: a picture of what is committed now.
        """
        return Search(self, dataset, where=where, space_id=space_id, scorer=scorer)

    def nearest(
        self, dataset: str, ids: str | Sequence[str], k: int = 10, *, signed: bool = False, where: str | None = None
    ) -> pl.DataFrame:
        """Find the nearest instances to stored ones, in one pass for all of them.

        Args:
            dataset: the dataset.
            ids: one id or many.
            k: how many each; the instance itself is left out.
            signed: by the cosine of the two ΔW, which sees labels, in place of the RepMatch score.
            where: a SQL condition that found instances must meet.

        Returns:
            query, rank, id, score; queries in the order of `ids`, hits best first, ties by id.
        """
        import polars as pl

        wanted = [ids] if isinstance(ids, str) else list(ids)
        hits = self.search(dataset, where=where).nearest_to(wanted, k, signed=signed)
        columns: dict[str, Any] = {
            "query": [name for name, hit in zip(wanted, hits, strict=True) for _ in hit.ids],
            "rank": [rank for hit in hits for rank in range(1, len(hit.ids) + 1)],
            "id": [name for hit in hits for name in hit.ids],
            "score": np.concatenate([hit.scores for hit in hits]) if hits else np.empty(0, np.float32),
        }
        schema = {"query": pl.String, "rank": pl.Int64, "id": pl.String, "score": pl.Float32}
        return pl.DataFrame(columns, schema=schema)

    def mean_similarity(self, dataset: str, to: str) -> pl.DataFrame:
        """Score every instance by its mean similarity to the instances of a subset, exactly and in one pass.

        Args:
            dataset: the dataset.
            to: a dataset, subset, coreset or `DATASET[SQL]` of the same space.

        Returns:
            id, score (mean kernel value, which at rank 1 is the mean RepMatch score) in the dataset's order.

        Raises:
            UsageError: the subset is empty.
            SpaceMismatchError: the subset's factors are of another space.
        """
        import polars as pl

        subset, search = self.resolve(to), self.search(dataset)
        if subset.ids is None:
            parts: Iterator[Factors] = (part for _, part in self.search(subset.dataset, where=subset.where).blocks())
        else:
            located = self._locate(subset.dataset, None, subset.ids)
            parts = (located.part(slice(lo, lo + _ROWS[1])).load() for lo in range(0, len(located.keys), _ROWS[1]))
        projectors = mean_projectors(search.checked(part) for part in parts)
        scores = [similarity_to(part, projectors) for _, part in search.blocks()]
        keys, found = search.keys, np.concatenate(scores) if scores else np.empty(0, np.float32)
        order = np.argsort(keys, kind="stable")
        names = dict(row for rows in self._chunks(keys[order], "i.pk, i.id", 65536) for row in rows)
        there = order if len(names) == len(keys) else order[np.isin(keys[order], list(names))]  # else some were deleted
        return pl.DataFrame({"id": list(names.values()), "score": found[there]})
