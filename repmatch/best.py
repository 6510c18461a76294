"""Candidates of an exact top-k, kept while scores of many queries stream by."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from repmatch.compiled import compiled_exactly, in_chunks
from repmatch.errors import InputError

BUFFER_BYTES = 256 << 20  # of candidates, before equal scores are settled early
ROOM = 1 << 16  # candidates to begin with, all queries together
Settle = Callable[[int, NDArray[np.int64]], NDArray[np.int64]]


@compiled_exactly
def _collect(
    scores: NDArray[np.float32],
    first: int,
    k: int,
    slack: float,
    skip: NDArray[np.int64],
    start: NDArray[np.int64],
    bars: NDArray[np.float32],
    counts: NDArray[np.int64],
    found: NDArray[np.float32],
    places: NDArray[np.int64],
) -> None:
    """Add scores to the candidates of each query; `start` tells how far each came, −1: met what is no number."""
    room = found.shape[1]
    for q in range(scores.shape[0]):
        n, bar, j = counts[q], bars[q], start[q]
        line = scores[q]
        while j < scores.shape[1]:
            score = line[j]
            if score >= bar:
                if n == room:
                    bar = np.float32(np.partition(found[q], n - k)[n - k] - slack)
                    n = 0
                    for i in range(room):
                        if found[q, i] >= bar:
                            found[q, n], places[q, n] = found[q, i], places[q, i]
                            n += 1
                    if n > room - room // 8:
                        break
                    continue  # the same score again, against the higher bar
                if first + j != skip[q]:
                    found[q, n], places[q, n] = score, first + j
                    n += 1
            elif score != score:
                j = -1
                break
            j += 1
        counts[q], bars[q], start[q] = n, bar, j


class Best:
    """Keeps, for each of many queries, whatever can still be among its k best of a stream of scores.

    Args:
        queries: how many queries.
        k: how many are wanted of each, 1 or more.
        slack: how far below the k-th best score a candidate may lie: what the scores may be off by.
        skip: (queries,) position that a query must not find, −1 for none.
        settle: called with (query, positions) where more candidates are equal than fit; returns k of them, the best.
    """

    def __init__(self, queries: int, k: int, slack: float, skip: NDArray[np.int64], settle: Settle) -> None:
        self.k = k
        self._slack = slack
        self._skip = skip
        self._settle = settle
        room = max(2 * k + 64, ROOM // max(1, queries))
        self._bars = np.full(queries, -np.inf, np.float32)
        self._counts = np.zeros(queries, np.int64)
        self._found = np.empty((queries, room), np.float32)
        self._places = np.empty((queries, room), np.int64)

    def add(self, scores: NDArray[np.float32], first: int) -> None:
        """Take in the next scores.

        Args:
            scores: (queries, b) float32 of b successive positions.
            first: the first of these positions.

        Raises:
            InputError: a score is not a number.
        """
        start = np.zeros(len(scores), np.int64)
        while True:
            in_chunks(lambda lo, hi: self._add(scores, first, start, lo, hi), len(scores), least=16)
            if (start < 0).any():
                raise InputError("a score is not a number: a stored factor or the query holds NaN")
            stuck = np.flatnonzero(start < scores.shape[1])
            if len(stuck) == 0:
                return
            self._make_room(stuck)

    def _add(self, scores: NDArray[np.float32], first: int, start: NDArray[np.int64], lo: int, hi: int) -> None:
        cut = slice(lo, hi)
        state = (self._bars[cut], self._counts[cut], self._found[cut], self._places[cut])
        _collect(scores[cut], first, self.k, self._slack, self._skip[cut], start[cut], *state)

    def _make_room(self, stuck: NDArray[np.int64]) -> None:
        if 2 * (self._found.nbytes + self._places.nbytes) <= BUFFER_BYTES:
            self._found = np.concatenate([self._found, np.empty_like(self._found)], axis=1)
            self._places = np.concatenate([self._places, np.empty_like(self._places)], axis=1)
            return
        for q in stuck.tolist():
            places = self._places[q, : self._counts[q]].copy()
            kept = self._settle(q, places)
            scores = dict(zip(places.tolist(), self._found[q, : len(places)].tolist(), strict=True))
            self._places[q, : len(kept)] = kept
            self._found[q, : len(kept)] = [scores[place] for place in kept.tolist()]
            self._counts[q] = len(kept)

    def candidates(self, query: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return what may be among the k best of a query.

        Args:
            query: its number.

        Returns:
            Positions and float32 scores: the k best and all that lie no more than the slack below them.
        """
        n = int(self._counts[query])
        found, places = self._found[query, :n], self._places[query, :n]
        if n > self.k:
            near = found >= np.float32(np.partition(found, n - self.k)[n - self.k] - self._slack)
            found, places = found[near], places[near]
        return places.copy(), found.copy()
