"""Estimators: apricot's names and definitions, without scikit-learn."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from oracle_selectors import greedy, squared_cosines

from repmatch.errors import SelectionError
from repmatch.selectors import Constraints, facility_location
from repmatch.selectors.estimators import (
    BaseGraphSelection,
    BaseSelection,
    CustomSelection,
    FacilityLocationSelection,
    FeatureBasedSelection,
    GraphCutSelection,
    MixtureSelection,
    SaturatedCoverageSelection,
    Selector,
    similarities,
)

X = np.abs(np.random.default_rng(0).standard_normal((40, 6)))


def literal(metric: str) -> np.ndarray:
    """The similarities of rows, pair by pair."""
    out = np.empty((40, 40))
    for i in range(40):
        for j in range(40):
            a, b = X[i], X[j]
            if metric == "euclidean":
                out[i, j] = -np.sum((a - b) ** 2)
            elif metric == "cosine":
                out[i, j] = (a @ b / np.linalg.norm(a) / np.linalg.norm(b)) ** 2
            else:
                out[i, j] = np.corrcoef(a, b)[0, 1] ** 2
    return out - out.min() if metric == "euclidean" else out


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "corr"])
def test_graph_estimators_are_their_literal_objectives(metric: str) -> None:
    kernel = literal(metric)
    assert similarities(X, metric) == pytest.approx(kernel, abs=1e-9)  # type: ignore[arg-type]
    totals = kernel.sum(axis=1)
    cases = {
        FacilityLocationSelection(6, metric): lambda s: kernel[:, s].max(axis=1).sum(),  # type: ignore[arg-type]
        GraphCutSelection(6, metric, alpha=2.0): lambda s: 2 * kernel[:, s].sum() - kernel[np.ix_(s, s)].sum(),  # type: ignore[arg-type]
        SaturatedCoverageSelection(6, metric): lambda s: np.minimum(kernel[:, s].sum(axis=1), 0.1 * totals).sum(),  # type: ignore[arg-type]
    }
    for estimator, value in cases.items():
        expected = greedy(value, 40, 6)
        found = estimator.fit(X)
        assert found.ranking.tolist() == found.ranking_.tolist() == expected
        assert found.gains.sum() == pytest.approx(value(expected))
        assert np.array_equal(found.transform(X), X[expected])
        rows, labels = estimator.fit_transform(X, np.arange(40))
        assert labels.tolist() == expected
        assert np.array_equal(rows, X[expected])


def test_feature_mixture_and_custom_estimators() -> None:
    assert FeatureBasedSelection(5).fit(X).ranking.tolist() == greedy(lambda s: np.sqrt(X[s].sum(axis=0)).sum(), 40, 5)
    log = FeatureBasedSelection(5, "log").fit(X).ranking.tolist()
    assert log == greedy(lambda s: np.log1p(X[s].sum(axis=0)).sum(), 40, 5)
    kernel = literal("cosine")
    parts: list[BaseSelection] = [FacilityLocationSelection(9, "cosine"), FeatureBasedSelection(9)]
    both = MixtureSelection(5, parts, [2.0, 0.5]).fit(X).ranking.tolist()
    assert both == greedy(lambda s: 2 * kernel[:, s].max(axis=1).sum() + 0.5 * np.sqrt(X[s].sum(axis=0)).sum(), 40, 5)
    own = CustomSelection(4, lambda rows: float(rows.max(axis=0).sum())).fit(X).ranking.tolist()
    assert own == greedy(lambda s: X[s].max(axis=0).sum(), 40, 4)
    with pytest.raises(SelectionError, match="weights for 2 functions"):
        MixtureSelection(5, parts, [1.0]).fit(X)
    with pytest.raises(SelectionError, match="the function is nan"):
        CustomSelection(4, lambda rows: float("nan")).fit(X)


def test_budgets_initial_subsets_and_optimizers() -> None:
    kernel = squared_cosines(40)
    costs = np.arange(1, 41) / 4
    within = FacilityLocationSelection(9, "precomputed").fit(kernel, sample_cost=costs)
    assert costs[within.ranking].sum() <= 9
    assert within.selection_.cost == pytest.approx(costs[within.ranking].sum())
    more = FacilityLocationSelection(5, "precomputed", initial_subset=[3, 4]).fit(kernel)
    expected = facility_location(kernel, 5, constraints=Constraints(given=[3, 4]))
    assert more.ranking.tolist() == expected.indices.tolist()
    exact = FacilityLocationSelection(5, "precomputed").fit(kernel).ranking.tolist()
    for optimizer in ("lazy", "naive", "two-stage"):
        again = FacilityLocationSelection(5, "precomputed", optimizer=optimizer).fit(kernel)  # type: ignore[arg-type]
        assert again.ranking.tolist() == exact
    drawn = FacilityLocationSelection(5, "precomputed", optimizer="stochastic", random_state=1).fit(kernel)
    assert drawn.selection_.algorithm == "stochastic"
    parts = FacilityLocationSelection(5, "precomputed", optimizer="greedi").fit(kernel)
    assert parts.selection_.algorithm == "partitioned"
    near = FacilityLocationSelection(5, "precomputed", n_neighbors=40).fit(kernel)
    assert near.ranking.tolist() == exact
    with pytest.raises(SelectionError, match="facility location only"):
        GraphCutSelection(5, "precomputed", optimizer="greedi").fit(kernel)
    with pytest.raises(SelectionError, match="no optimizer 'magic'"):
        GraphCutSelection(5, "precomputed", optimizer="magic").fit(kernel)  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="no metric 'magic'"):
        FacilityLocationSelection(5, "magic").fit(X)  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="k = 41 exceeds"):
        FacilityLocationSelection(41).fit(X)
    with pytest.raises(SelectionError, match="can't be compared"):
        FacilityLocationSelection(4).fit(np.full((5, 2), np.nan))


def test_parameters_are_scikit_learns() -> None:
    for estimator in (
        Selector(3, algorithm="lazy"),
        FacilityLocationSelection(3, "cosine", n_neighbors=7),
        GraphCutSelection(3, alpha=2.5),
        FeatureBasedSelection(3, "log"),
        CustomSelection(3, lambda rows: 0.0),
    ):
        clone = type(estimator)(**estimator.get_params())
        assert clone.get_params() == estimator.get_params()
    assert isinstance(FacilityLocationSelection().set_params(metric="cosine"), BaseGraphSelection)
    with pytest.raises(SelectionError, match="no parameter 'bogus'"):
        GraphCutSelection().set_params(bogus=1)
    with pytest.raises(SelectionError, match="call fit"):
        FeatureBasedSelection().transform(X)


def test_estimators_need_neither_scikit_learn_nor_torch() -> None:
    script = (
        "import sys\nsys.modules['sklearn'] = None\nsys.modules['scipy'] = None\nimport numpy as np\n"
        "from repmatch.selectors.estimators import FacilityLocationSelection\n"
        "FacilityLocationSelection(2).fit(np.eye(4))\nassert 'torch' not in sys.modules and 'duckdb' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
