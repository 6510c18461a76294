"""Every algorithm that claims exactness picks what a literal float64 greedy picks, and survives degenerate input."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given as given_data
from hypothesis import settings
from hypothesis import strategies as st
from oracle_selectors import Scipy, coverage, facility_greedy, greedy, squared_cosines
from oracle_similarity import make_factors

from repmatch.datamodels import Factors
from repmatch.errors import SelectionError
from repmatch.selectors import (
    Constraints,
    Coverage,
    DenseKernel,
    FactorKernel,
    FeatureCoverage,
    Features,
    GraphCut,
    LogDeterminant,
    MeanMatch,
    Objective,
    Problem,
    SaturatedCoverage,
    ScoreSum,
    SetFunction,
    SparseKernel,
    facility_location,
    feature_coverage,
    k_medoids,
    maximize,
    random,
    represent,
    sieve_streaming,
    strategies,
    thin,
)
from repmatch.selectors.pruning import above

N, K = 200, 25
KERNEL = squared_cosines(N, dtype="float64")
FEATURES = np.random.default_rng(0).random((N, 9))
Value = Callable[[list[int]], float]


def saturated(s: list[int]) -> float:
    return np.minimum(KERNEL[:, s].sum(axis=1), 0.1 * KERNEL.sum(axis=1)).sum()


def volume(s: list[int]) -> float:
    return np.linalg.slogdet(KERNEL[np.ix_(s, s)] + 1e-2 * np.eye(len(s)))[1]


def mean_match(s: list[int]) -> float:
    return 2 * KERNEL[:, s].mean() - KERNEL[np.ix_(s, s)].mean()


OBJECTIVES: dict[str, tuple[Value, Callable[[], Objective]]] = {
    "coverage": (lambda s: coverage(KERNEL, s), lambda: Coverage(DenseKernel(KERNEL))),
    "graph cut": (
        lambda s: 2.0 * KERNEL[:, s].sum() - KERNEL[np.ix_(s, s)].sum(),
        lambda: GraphCut(DenseKernel(KERNEL)),
    ),
    "saturated": (saturated, lambda: SaturatedCoverage(DenseKernel(KERNEL))),
    "features": (lambda s: np.sqrt(FEATURES[s].sum(axis=0)).sum(), lambda: FeatureCoverage(FEATURES)),
    "log features": (
        lambda s: np.log1p(FEATURES[s].sum(axis=0)).sum(),
        lambda: FeatureCoverage(FEATURES, concave="log"),
    ),
    "volume": (volume, lambda: LogDeterminant(DenseKernel(KERNEL), ridge=1e-2)),
    "mean": (mean_match, lambda: MeanMatch(DenseKernel(KERNEL))),
    "scores": (lambda s: FEATURES[s, 0].sum(), lambda: ScoreSum(FEATURES[:, 0])),
    "function": (lambda s: float(len({i % 50 for i in s})), lambda: SetFunction(lambda p: len(set(p % 50)), N)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_hundred_instances_as_a_literal_greedy(name: str) -> None:
    value, make = OBJECTIVES[name]
    expected = greedy(value, N, K)
    for search in ("plain", "lazy") if make().falling else ("plain",):
        found = maximize(make, K, search=search)  # type: ignore[arg-type]
        assert found.indices.tolist() == expected
        assert found.value == pytest.approx(value(expected), rel=1e-9)
        assert found.cumulative[-1] == pytest.approx(found.value)


@settings(max_examples=25, deadline=None)
@given_data(st.sampled_from([n for n, (_, make) in OBJECTIVES.items() if make().falling]), st.data())
def test_gains_only_fall(name: str, data: st.DataObject) -> None:
    few = data.draw(st.lists(st.integers(0, N - 1), max_size=6, unique=True))
    more = data.draw(st.lists(st.integers(0, N - 1), max_size=6, unique=True))
    objective, everyone = OBJECTIVES[name][1](), np.arange(N)
    for j in few:
        objective.add(j)
    before = objective.gains(everyone)
    for j in sorted(set(more) - set(few)):
        objective.add(j)
    rest = np.setdiff1d(everyone, [*few, *more])
    assert (objective.gains(everyone)[rest] <= before[rest] + 1e-9).all()
    if objective.monotone:
        assert before.min() >= -1e-12


@pytest.mark.parametrize("limit", [40_000, 4 << 30])
def test_a_pruned_kernel_of_many_blocks(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr("repmatch.selectors.pruning.ROWS", 32)
    monkeypatch.setattr("repmatch.selectors.pruning.COLUMNS", 64)
    monkeypatch.setattr("repmatch.selectors.facility.DEFAULT_LIMIT", limit)
    kernel = squared_cosines(N)
    for array in (DenseKernel(kernel), DenseKernel(kernel[:90], rectangular=True)):
        expected = facility_greedy(array.array, 60)[0]
        found = facility_location(array, 60, algorithm="pruned")
        assert found.indices.tolist() == expected
        assert found.value == pytest.approx(coverage(array.array, expected), rel=1e-12)
    floor = np.random.default_rng(0).random(N) * 0.5
    kept = above(DenseKernel(kernel), floor)
    assert np.array_equal(kept.columns(np.arange(N)), np.where(kernel > floor[:, None], kernel, 0.0))
    assert all(np.diff(kept.neighbours[lo:hi]).min(initial=1) > 0 for lo, hi in pairwise(kept.starts))


def test_a_pruned_factor_kernel_equals_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repmatch.selectors.pruning.ROWS", 64)
    monkeypatch.setattr("repmatch.selectors.pruning.COLUMNS", 128)
    factors = make_factors(300, (64, 70), 1, "sign", zeros=3)
    whole = facility_location(FactorKernel(factors), 80)
    assert whole.algorithm == "incremental"
    few = FactorKernel(factors, memory_limit=300_000)  # below 360,000 for the whole, enough for what is kept
    pruned = facility_location(few, 80)
    assert pruned.algorithm == "pruned"
    assert pruned.indices.tolist() == whole.indices.tolist()
    assert np.array_equal(pruned.representative, whole.representative)
    assert np.array_equal(pruned.similarity, whole.similarity)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sparse_matrices(dtype: str) -> None:
    kernel = squared_cosines(60, dtype=dtype)
    kernel[kernel < 0.4] = 0.0
    found = facility_location(Scipy(kernel), 12)  # type: ignore[arg-type]
    assert found.algorithm == "sparse"
    assert found.reason == "the kernel is sparse"
    assert found.indices.tolist() == facility_greedy(kernel, 12)[0]
    some = SparseKernel.of_matrix(Scipy(kernel)).rows(np.array([5, 50, 7]))
    assert np.array_equal(some.columns(np.arange(60)), kernel[[5, 50, 7]])


DEGENERATE = {
    "identical": np.ones((9, 9)),
    "orthogonal": np.eye(9),
    "zero": np.zeros((9, 9)),
    "duplicates": np.kron(np.eye(3), np.ones((3, 3))),
    "one": np.ones((1, 1)),
}


def problem_of(kernel: np.ndarray, k: int, name: str) -> Problem:
    n = len(kernel)
    more: dict[str, Any] = {"mixture": {"mix": {"facility-location": 1.0}}}.get(name, {})
    if name == "thin":
        more = {"constraints": Constraints(apart=1.0)}
    if name == "feature-coverage":
        more = {"features": Features.of_matrix(Scipy(np.abs(kernel)))}
    return Problem(n, k, DenseKernel(kernel), np.zeros(n), **more)


@pytest.mark.parametrize("name", [n for n, e in strategies().items() if e.solve.__module__.startswith("repmatch.")])
@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_kernels(name: str, kind: str) -> None:
    kernel = DEGENERATE[kind]
    for k in sorted({0, 1, len(kernel) - 1, len(kernel)}):
        found = strategies()[name].solve(problem_of(kernel, k, name))
        picks = found.indices.tolist()
        assert len(set(picks)) == len(picks) == k
        assert np.isfinite(found.gains).all()
        assert found.representative.max(initial=-1) < max(k, 1)
        frozen = kernel.copy(order="F")
        frozen.flags.writeable = False
        assert strategies()[name].solve(problem_of(frozen, k, name)).indices.tolist() == picks
    with pytest.raises(SelectionError):
        strategies()[name].solve(problem_of(kernel, len(kernel) + 1, name))


def test_what_is_not_a_number_is_refused() -> None:
    bad = np.full((3, 3), np.nan)
    for build in (
        lambda: DenseKernel(bad),
        lambda: FeatureCoverage(bad),
        lambda: FeatureCoverage(Scipy(bad)),
        lambda: ScoreSum(bad[0]),
        lambda: thin(np.eye(3), 0.5, scores=bad[0]),
        lambda: sieve_streaming([bad], 1),
        lambda: SparseKernel(np.array([0, 1]), np.zeros(1, np.int32), bad[0, :1], 3),
        lambda: Constraints(apart=np.nan).tracker(3, 1),
        lambda: Constraints(min_gain=np.nan).tracker(3, 1),
        lambda: Constraints(coverage=np.nan).tracker(3, 1),
    ):
        with pytest.raises(SelectionError):
            build()


def test_layouts_of_features() -> None:
    expected = feature_coverage(FEATURES, 10).indices.tolist()
    frozen = np.asfortranarray(FEATURES)
    frozen.flags.writeable = False
    assert feature_coverage(frozen, 10).indices.tolist() == expected
    assert feature_coverage(np.repeat(FEATURES, 2, axis=0)[::2], 10).indices.tolist() == expected


def test_users_kernels_need_no_memory_limit() -> None:
    class Streamed:
        """A kernel of one's own that is never whole."""

        shape, symmetric, resolution = (N, N), True, 0.0

        def columns(self, indices: np.ndarray) -> np.ndarray:
            return KERNEL[:, indices]

        def dense(self) -> None:
            return None

        def sums(self) -> None:
            return None

        def rows(self, indices: np.ndarray) -> DenseKernel:
            return DenseKernel(KERNEL[indices], rectangular=True)

        def diagonal(self) -> np.ndarray:
            return np.diag(KERNEL)

        def means(self) -> np.ndarray:
            return KERNEL.mean(axis=0)

    found = facility_location(Streamed(), 30)
    assert found.algorithm == "pruned"
    assert found.indices.tolist() == facility_greedy(KERNEL, 30)[0]


def test_the_largest_kernels_are_selected_from_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repmatch.selectors.facility.MOST_PAIRS", 1000)
    monkeypatch.setattr("repmatch.selectors.large.PART", 100)
    monkeypatch.setattr("repmatch.selectors.large.MOST_PAIRS", 20_000)
    factors: Factors = make_factors(500, (64, 64), 1, "sign")
    small = FactorKernel(factors, memory_limit=1000)
    found = facility_location(small, 20)
    assert (found.algorithm, found.seed) == ("partitioned", 0)
    assert "more than an exact pass" in found.reason
    exact = facility_location(FactorKernel(factors), 20)

    def value(picks: np.ndarray) -> float:
        return float(represent(FactorKernel(factors), picks, 500)[1].sum())

    chance = np.mean([value(random(500, 20, seed).indices) for seed in range(5)])
    assert value(found.indices) > chance + 0.5 * (exact.value - chance)
    stopped = facility_location(small, 20, constraints=Constraints(min_gain=0.0))
    assert stopped.algorithm == "pruned"
    assert stopped.indices.tolist() == exact.indices.tolist()


def test_k_medoids_of_a_represented_set() -> None:
    cross = DenseKernel(KERNEL[:40], rectangular=True)
    assert k_medoids(cross, 5).value >= facility_location(cross, 5).value - 1e-9


def _wide(n: int, spread: float) -> np.ndarray:
    generator = np.random.default_rng(3)
    x = generator.standard_normal((40, 24))[generator.integers(0, 40, n)] + spread * generator.standard_normal((n, 24))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    kernel = np.square(x @ x.T).astype(np.float32)
    return np.maximum(kernel, kernel.T)


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_a_whole_kernel_read_once_gives_the_picks_of_columns_computed_one_by_one(spread: float) -> None:
    kernel = _wide(700, spread)
    whole, lazy = facility_location(kernel, 300), facility_location(kernel, 300, algorithm="lazy")
    assert whole.algorithm == "incremental"
    assert whole.indices.tolist() == lazy.indices.tolist()
    np.testing.assert_allclose(whole.gains, lazy.gains, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(DenseKernel(kernel).means(), kernel.mean(axis=0, dtype=np.float64), rtol=1e-9)


@pytest.mark.parametrize("survey", [False, True])
def test_one_entry_decides_whether_a_large_kernel_is_symmetric_and_finite(survey: bool) -> None:
    kernel = _wide(600, 1.0)
    assert DenseKernel(kernel, survey=survey).symmetric
    assert (DenseKernel(kernel, survey=survey).positive_sums is not None) == survey
    kernel[17, 503] = np.nextafter(kernel[17, 503], np.float32(2.0))
    assert not DenseKernel(kernel, survey=survey).symmetric
    kernel[17, 503] = kernel[503, 17] = -np.inf
    with pytest.raises(SelectionError, match="17, 503"):
        DenseKernel(kernel, survey=survey)


def _words(n: int, width: int, density: float) -> np.ndarray:
    return (np.random.default_rng(1).random((n, width)) < density).astype(np.float64)


def test_equal_gains_go_by_position_whatever_their_rounding() -> None:
    """Features that are there or not make many gains equal: here the best of eighty picks are."""
    x = _words(800, 400, 0.01).astype(np.longdouble)
    total, expected, tied = np.zeros(400, np.longdouble), [], 0
    for _ in range(300):
        gains = x @ (np.sqrt(total + 1) - np.sqrt(total))
        gains[expected] = -1
        best = gains >= gains.max() - 1e-13
        tied += best.sum() > 1
        expected.append(int(best.argmax()))
        total += x[expected[-1]]
    assert tied >= 80
    for features in (
        x.astype(np.float64),
        x[:, ::-1].astype(np.float64),
        Features.of_matrix(Scipy(x.astype(np.float64))),
    ):
        for search in ("plain", "lazy"):
            found = maximize(lambda f=features: FeatureCoverage(f), 300, search=search)  # type: ignore[misc]
            assert found.indices.tolist() == expected
            assert found.value == pytest.approx(float(np.sqrt(total).sum()), rel=1e-12)


def test_equal_gains_of_saturated_coverage_go_by_position() -> None:
    kernel = np.maximum(_words(150, 150, 0.05), _words(150, 150, 0.05).T)
    exact, limit = kernel.astype(np.int64), 3 * kernel.sum(axis=1).astype(np.int64)  # in tenths
    cover, expected = np.zeros(150, np.int64), []
    for _ in range(60):
        gains = np.minimum(10 * exact, (limit - cover)[:, None]).sum(axis=0)
        gains[expected] = -1
        expected.append(int(gains.argmax()))
        cover = np.minimum(cover + 10 * exact[:, expected[-1]], limit)
    for search in ("plain", "lazy"):
        found = maximize(lambda: SaturatedCoverage(DenseKernel(kernel), saturation=0.3), 60, search=search)  # type: ignore[arg-type]
        assert found.indices.tolist() == expected
