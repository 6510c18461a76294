from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repmatch.curator.evaluate.leaks import find_leaks
from repmatch.curator.evaluate.statistics import Interval, interval, paired
from repmatch.datamodels import Row
from repmatch.errors import UsageError

stats = pytest.importorskip("scipy.stats")


def row(ident: str, text: str, pair: str | None = None) -> Row:
    return Row(ident, "{}", text, pair, "x", "", "", "rows", 1)


def literal(train: list[Row], test: list[Row], near: float) -> dict[str, float]:
    """Compare every pair."""

    def pieces(r: Row) -> set[tuple[str, str]]:
        words = ["<", *r.text.split(), ">"]
        return set(pairwise(words))

    best: dict[str, float] = {}
    for a, b in product(test, train):
        left, right = pieces(a), pieces(b)
        similarity = len(left & right) / len(left | right)
        if similarity >= near:
            best[a.id] = max(similarity, best.get(a.id, 0.0))
    return best


def test_case_punctuation_and_blanks_do_not_hide_a_leak() -> None:
    train = [row("a", "A dull , endless film ."), row("b", "good")]
    found = find_leaks(train, [row("t", "a dull, endless   FILM"), row("u", "endless film, a dull"), row("v", "bad")])
    assert [(leak.test_id, leak.train_id, leak.exact) for leak in found] == [("t", "a", True)]


def test_both_texts_of_a_pair_count() -> None:
    train = [row("a", "the cat sat on the mat", "a cat sat"), row("b", "the cat sat on the mat", "nothing is here")]
    (leak,) = find_leaks(train, [row("t", "the cat sat on the mat", "nothing is here")])
    assert (leak.train_id, leak.similarity) == ("b", 1.0)


def test_texts_without_words_are_compared_as_they_are() -> None:
    assert [leak.test_id for leak in find_leaks([row("a", "?!")], [row("t", "?!"), row("u", "...")])] == ["t"]


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.4, 0.6, 0.8, 1.0]))
def test_no_near_pair_is_missed(seed: int, near: float) -> None:
    rng = np.random.default_rng(seed)

    def draw(name: str) -> Row:
        return row(name, " ".join(rng.choice(list("abcd"), rng.integers(1, 8))))

    train, test = [draw(f"a{i}") for i in range(20)], [draw(f"t{i}") for i in range(10)]
    found = {leak.test_id: leak.similarity for leak in find_leaks(train, test, near)}
    assert found == pytest.approx(literal(train, test, near))


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_intervals_are_those_of_scipy(level: float) -> None:
    values = [0.61, 0.72, 0.66, 0.69, 0.58]
    found = interval(values, level)
    low, high = stats.t.interval(level, 4, np.mean(values), stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(values), low, high))


def test_pairs_decide_as_the_paired_t_test_does() -> None:
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.5, 1.0, 2.0):
        a, b = rng.normal(shift, 1, 6).tolist(), rng.normal(0, 1, 6).tolist()
        found = paired(a, b)
        test = stats.ttest_rel(a, b)
        low, high = test.confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((low, high))
        assert found.excludes_zero == (test.pvalue < 0.05)


def test_one_value_has_no_spread_and_none_no_mean() -> None:
    assert interval([0.5]) == Interval(0.5, None, None, 1)
    assert not interval([0.5]).excludes_zero
    assert interval([0.5, 0.5]) == Interval(0.5, 0.5, 0.5, 2)
    with pytest.raises(UsageError, match="at least one value"):
        interval([])
    with pytest.raises(UsageError, match="equally many"):
        paired([1.0], [1.0, 2.0])
    with pytest.raises(UsageError, match="level"):
        interval([1.0, 2.0], 1.5)
