"""Estimators: apricot's names and definitions, without scikit-learn."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from oracle_selectors import Scipy, greedy, squared_cosines

from repmatch.errors import SelectionError
from repmatch.selectors import Constraints, facility_location, random
from repmatch.selectors.estimators import (
    BaseGraphSelection,
    BaseSelection,
    CustomGraphSelection,
    CustomSelection,
    FacilityLocationSelection,
    FeatureBasedSelection,
    GraphCutSelection,
    MaxCoverageSelection,
    MixtureSelection,
    SaturatedCoverageSelection,
    Selector,
    SumRedundancySelection,
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
    whole = GraphCutSelection(5, "precomputed").fit(kernel).ranking.tolist()  # what apricot saves time by is exact here
    for optimizer in ("greedi", "modular", "bidirectional", "approximate-lazy", "sieve"):
        shortcut = GraphCutSelection(5, "precomputed", optimizer=optimizer)  # type: ignore[arg-type]
        assert shortcut.fit(kernel).ranking.tolist() == whole
    for make in (FacilityLocationSelection, GraphCutSelection):
        chance = make(5, "precomputed", optimizer="random", random_state=3).fit(kernel)
        assert chance.ranking.tolist() == random(40, 5, 3).indices.tolist()
    with pytest.raises(SelectionError, match="no optimizer 'magic'"):
        GraphCutSelection(5, "precomputed", optimizer="magic").fit(kernel)  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="no metric 'magic'"):
        FacilityLocationSelection(5, "magic").fit(X)  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="k = 41 exceeds"):
        FacilityLocationSelection(41).fit(X)
    with pytest.raises(SelectionError, match="can't be compared"):
        FacilityLocationSelection(4).fit(np.full((5, 2), np.nan))


def test_arguments_of_apricots_that_change_nothing() -> None:
    unused = {"optimizer_kwds": {}, "reservoir": None, "max_reservoir_size": 9, "n_jobs": 4, "verbose": True}
    some = FacilityLocationSelection(5, "cosine", **unused).fit(X, None, np.ones(40))
    assert some.ranking.tolist() == FacilityLocationSelection(5, "cosine").fit(X).ranking.tolist()
    with pytest.raises(TypeError, match="no argument 'n_job'"):
        FacilityLocationSelection(5, n_job=4)


def test_coverage_redundancy_and_functions_of_similarities() -> None:
    kernel = literal("cosine")
    most = MaxCoverageSelection(5, 1.5).fit(X).ranking.tolist()
    assert most == greedy(lambda s: np.minimum(X[s].sum(axis=0), 1.5).sum(), 40, 5)
    products = X @ X.T  # a diagonal without ties
    unlike = SumRedundancySelection(5, "precomputed").fit(products).ranking.tolist()
    assert unlike == greedy(lambda s: -products[np.ix_(s, s)].sum(), 40, 5)
    own = CustomGraphSelection(4, lambda rows, power: float((rows**power).max(axis=0).sum()), metric="cosine")
    own.set_params(function_kwds={"power": 2})
    assert own.fit(X).ranking.tolist() == greedy(lambda s: (kernel[s] ** 2).max(axis=0).sum(), 40, 4)
    for concave, value in (("sigmoid", lambda x: x / (1 + x)), (np.cbrt, np.cbrt)):
        found = FeatureBasedSelection(5, concave).fit(X).ranking.tolist()  # type: ignore[arg-type]
        assert found == greedy(lambda s, value=value: value(X[s].sum(axis=0)).sum(), 40, 5)  # type: ignore[misc]


def test_sparse_rows() -> None:
    rows = np.where(X > 1, X, 0.0)
    for concave in ("sqrt", "log", "sigmoid"):
        exact = FeatureBasedSelection(5, concave).fit(rows).ranking.tolist()  # type: ignore[arg-type]
        assert FeatureBasedSelection(5, concave).fit(Scipy(rows)).ranking.tolist() == exact  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="'precomputed' takes it, not 'cosine'"):
        FacilityLocationSelection(5, "cosine").fit(Scipy(rows))


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
