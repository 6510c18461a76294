"""Feature coverage: sparse features as dense ones, and features of a store's rows."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run, toy_rows, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_selectors import Scipy, greedy

import repmatch
from repmatch.curator.select_features import features_of
from repmatch.errors import InputError, SelectionError, UnknownNameError, UsageError
from repmatch.selectors import Constraints, FeatureCoverage, Features, Problem, feature_coverage, select
from repmatch.selectors.estimators import FeatureBasedSelection
from repmatch.store import Store

ROWS = toy_rows()
TEXTS = [str(row["text"]) for row in ROWS]


def dense(features: Features) -> np.ndarray:
    out = np.zeros((len(features), features.width))
    for i in range(len(features)):
        for p in range(features.starts[i], features.starts[i + 1]):
            out[i, features.columns[p]] += features.values[p]
    return out


def words_value(texts: list[str]) -> Any:
    """Σ over words of ln((n + 1) / rows that have it) · √(how often the picks say it)."""
    counts = [Counter(text.casefold().split()) for text in texts]
    have = Counter(word for count in counts for word in count)

    def value(picks: list[int]) -> float:
        said = sum((counts[i] for i in picks), Counter())
        return sum(math.log((len(texts) + 1) / have[word]) * math.sqrt(number) for word, number in said.items())

    return value


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from(["sqrt", "log"]), st.booleans())
def test_sparse_features_are_the_dense_ones(seed: int, concave: Any, weighed: bool) -> None:
    rng = np.random.default_rng(seed)
    array = rng.integers(0, 4, (14, 6)) * (rng.random((14, 6)) < 0.4).astype(np.float64)
    weights = rng.random(6) if weighed else None
    some = [FeatureCoverage(x, weights=weights, concave=concave) for x in (array, Scipy(array))]
    everyone = np.arange(14)
    assert some[0].ceiling() == pytest.approx(some[1].ceiling())
    for pick in (3, 9, 3, 0):
        assert some[0].gains(everyone) == pytest.approx(some[1].gains(everyone), abs=1e-12)
        for one in some:
            one.add(pick)


def test_features_bring_their_weights() -> None:
    array = np.eye(4)
    features = Features.of_matrix(Scipy(array), [1.0, 5.0, 2.0, 3.0])
    assert feature_coverage(features, 3).indices.tolist() == [1, 3, 2]
    assert feature_coverage(features, 3, weights=[9.0, 1.0, 2.0, 3.0]).indices.tolist() == [0, 3, 2]
    assert FeatureBasedSelection(3).fit(Scipy(array)).ranking.tolist() == [0, 1, 2]
    rules = Constraints(balance=[0, 0, 1, 1])
    found = select("feature-coverage", Problem(4, 2, constraints=rules, features=features))
    assert found.indices.tolist() == [1, 3]
    with pytest.raises(SelectionError, match="needs features"):
        select("feature-coverage", Problem(4, 2))
    with pytest.raises(SelectionError, match=r"feature 1 of row 2 is -1\.0"):
        Features.of_matrix(Scipy(np.array([[0.0, 0.0], [3.0, 0.0], [2.0, -1.0]])))


def test_words_of_a_store_are_covered(run: Run, toy_store: Path) -> None:
    rows = run("--store", toy_store, "select", "toy", "-k", 7, "--strategy", "feature-coverage", "--json").objects
    value = words_value(TEXTS)
    expected = greedy(value, 60, 7)
    assert [row["id"] for row in rows] == [f"toy-{i}" for i in expected]
    assert rows[-1]["value"] == pytest.approx(value(expected))
    assert sum(int(str(row["represents"])) for row in rows) == 60  # by their similarity, as for every strategy


def test_rules_hold_for_features(run: Run, toy_store: Path) -> None:
    def ask(*more: object) -> list[str]:
        result = run("--store", toy_store, "select", "toy", "--strategy", "feature-coverage", *more, "--json")
        assert result.code == 0, result.err
        return [str(row["id"]) for row in result.objects]

    value = words_value(TEXTS)
    first = greedy(value, 60, 4)
    given_rest = greedy(lambda s: value([*first, *s]), 60, 3, lambda s, j: j not in first)
    ask("-k", 4, "--name", "first")
    assert ask("-k", 3, "--given", "first") == [f"toy-{i}" for i in given_rest]
    assert len(ask("--coverage", 0.5)) < 60
    assert len(ask("-k", 10, "--balance", "label", "--apart", 0.99)) == 10
    mixed = run("--store", toy_store, "select", "toy", "-k", 5, "--mix", "feature-coverage=1", "--mix", "top=0")
    assert [f"toy-{i}" for i in greedy(value, 60, 5)] == [line.split()[1] for line in mixed.out.splitlines()[1:6]]


def test_columns_are_features(toy_store: Path) -> None:
    with repmatch.open(toy_store, mode="r") as store:
        ids = store.ids("toy")
        stars = dense(features_of(store, [("toy", ids)], ["stars"]))
        assert stars[:, 0].tolist() == [(i % 5) / 4 for i in range(60)]
        groups = features_of(store, [("toy", ids), ("toy", ids[:6])], ["group", "stars"])
        assert len(groups) == 66
        assert groups.weights is not None
        assert groups.weights[0] == pytest.approx(math.log(67 / 11))  # "a": every sixth of 60, and one of 6
        assert (groups.weights == 1.0).sum() == 1
        with pytest.raises(UnknownNameError, match="strs"):
            features_of(store, [("toy", ids)], ["strs"])


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A store with lists, and with numbers that can't be features."""
    path = tmp_path_factory.mktemp("listed")
    rows = [
        {**row, "topics": [i % 3, 0.0, 2.5], "short": [1.0] * (1 + (i == 4)), "below": i - 1.0, "mixed": [i, "x"]}
        for i, row in enumerate(ROWS[:6])
    ]
    with repmatch.open(path / "store") as store:
        repmatch.Curator(store, str(tiny_model)).ingest(write_rows(path / "rows.jsonl", rows), "d")
    return path / "store"


def read(store: Store, column: str) -> np.ndarray:
    return dense(features_of(store, [("d", store.ids("d"))], [column]))


def test_lists_are_features_and_bad_numbers_are_refused(listed: Path) -> None:
    with repmatch.open(listed, mode="r") as store:
        assert sorted(map(tuple, read(store, "topics"))) == sorted([(2.5, i % 3) for i in range(6)])
        for column, message in {
            "below": r"'below' can't be features: it is '-1\.0' at 'toy-0'; expected numbers of at least 0",
            "short": "a list of 2 at 'toy-4'; expected lists of one length, such as 1",
            "mixed": "at 'toy-0'; expected numbers",
        }.items():
            with pytest.raises(InputError, match=message):
                read(store, column)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--features", "stars"], "--features goes with the strategy feature-coverage"),
        (["--strategy", "feature-coverage", "--represent", "toy"], "feature-coverage can't represent another set"),
        (["--strategy", "feature-coverage", "--param", "trade=2"], "feature-coverage has no parameter 'trade'"),
        (["--strategy", "feature-coverage", "--features", "strs"], "stars"),
    ],
)
def test_what_features_can_not_do_is_told(run: Run, toy_store: Path, arguments: list[str], message: str) -> None:
    result = run("--store", toy_store, "select", "toy", "-k", 3, *arguments)
    assert result.code in (1, 2)
    assert message in result.err


def test_texts_without_words_are_refused() -> None:
    class Silent:
        def tasks(self, dataset: str, ids: object) -> list[Any]:
            return [type("Row", (), {"text": None, "text_pair": None})()]

    with pytest.raises(UsageError, match="name columns with --features"):
        features_of(Silent(), [("images", ["1"])])  # type: ignore[arg-type]
