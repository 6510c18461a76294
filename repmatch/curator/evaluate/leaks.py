"""Rows of a test set that stand in the training data too, to the letter or nearly."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from repmatch.datamodels import Row

_WORD = re.compile(r"\w+")
NEAR = 0.8


@dataclass(frozen=True)
class Leak:
    """A test row that stands in the training data too.

    Attributes:
        test_id: the test row.
        train_id: the training row most like it.
        similarity: Jaccard similarity of their pairs of neighbouring words; 1 for the same words in the same order.
    """

    test_id: str
    train_id: str
    similarity: float

    @property
    def exact(self) -> bool:
        """Whether the words are the same, in the same order or nearly so."""
        return self.similarity == 1.0


def find_leaks(train: Iterable[Row], test: Sequence[Row], near: float = NEAR) -> list[Leak]:
    """Find test rows whose text, or texts, are nearly those of a training row.

    Letters' case, punctuation and blanks do not count. Two rows are near where the Jaccard similarity of their sets of
    neighbouring words reaches `near`; such a pair shares a rare pair of words, so only rows that share one of the
    rarest are compared, which misses none (prefix filtering, Chaudhuri, Ganti and Kaushik 2006).

    Args:
        train: rows that may be trained on, read once.
        test: held-out rows.
        near: the similarity from which on rows are near, above 0 and at most 1.

    Returns:
        The leaks, each test row at most once, in the order of `test`.
    """
    shingles = [_shingles(row) for row in test]
    count: dict[str, int] = defaultdict(int)
    for found in shingles:
        for piece in found:
            count[piece] += 1
    # The order in which pieces are looked at: rare ones of the test set first.
    index: dict[str, list[int]] = defaultdict(list)
    for at, found in enumerate(shingles):
        rare = sorted(found, key=lambda piece: (count[piece], piece))
        for piece in rare[: len(found) - _ceil(near * len(found)) + 1]:
            index[piece].append(at)
    best: dict[int, tuple[float, str]] = {}
    for row in train:
        mine = _shingles(row)
        seen: set[int] = set()
        for piece in mine:
            seen.update(index.get(piece, ()))
        for at in seen:
            shared = len(mine & shingles[at])
            similarity = shared / (len(mine) + len(shingles[at]) - shared)
            if similarity >= near and similarity > best.get(at, (0.0, ""))[0]:
                best[at] = similarity, row.id
    return [Leak(test[at].id, best[at][1], best[at][0]) for at in sorted(best)]


def _ceil(value: float) -> int:
    return math.ceil(value - 1e-9)  # 0.7 · 10 is a little above 7


def _shingles(row: Row) -> frozenset[str]:
    words = ["\x02", *_WORD.findall(row.text.casefold()), "\x03"]
    if row.text_pair is not None:
        words += [*_WORD.findall(row.text_pair.casefold()), "\x03"]
    if len(words) == 2:  # nothing but punctuation: the text itself
        words.insert(1, row.text.strip())
    return frozenset(f"{a} {b}" for a, b in pairwise(words))
