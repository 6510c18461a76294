from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given as given_data
from hypothesis import settings
from hypothesis import strategies as st
from oracle_selectors import Scipy, coverage, facility_greedy, greedy, optimum, squared_cosines
from oracle_similarity import kernel as literal_kernel
from oracle_similarity import make_factors

from repmatch.blocks import take
from repmatch.errors import SelectionError
from repmatch.selectors import (
    Constraints,
    Coverage,
    DenseKernel,
    FeatureCoverage,
    Features,
    GraphCut,
    LogDeterminant,
    MeanMatch,
    Mixture,
    Objective,
    Problem,
    SaturatedCoverage,
    Selection,
    Selector,
    SparseKernel,
    dpp,
    facility_location,
    feature_coverage,
    graph_cut,
    herding,
    k_center,
    k_medoids,
    maximize,
    partitioned,
    random,
    saturated_coverage,
    select,
    share,
    sieve_streaming,
    strategies,
    thin,
    top,
)

KERNEL = squared_cosines(12, dtype="float64")
FEATURES = np.random.default_rng(0).random((12, 5))
Value = Callable[[list[int]], float]


def graph_cut_value(s: list[int]) -> float:
    return 2.0 * KERNEL[:, s].sum() - KERNEL[np.ix_(s, s)].sum()


def saturated_value(s: list[int]) -> float:
    return np.minimum(KERNEL[:, s].sum(axis=1), 0.2 * KERNEL.sum(axis=1)).sum()


def feature_value(s: list[int]) -> float:
    return np.sqrt(FEATURES[s].sum(axis=0)).sum()


def volume_value(s: list[int]) -> float:
    return np.linalg.slogdet(KERNEL[np.ix_(s, s)] + 1e-6 * np.eye(len(s)))[1] if s else 0.0


def mean_value(s: list[int]) -> float:
    if not s:
        return 0.0
    discrepancy = KERNEL.mean() - 2 * KERNEL[:, s].mean() + KERNEL[np.ix_(s, s)].mean()
    return KERNEL.mean() - discrepancy


def mixture_value(s: list[int]) -> float:
    return 0.5 * coverage(KERNEL, s) + 2.0 * feature_value(s)


OBJECTIVES: dict[str, tuple[Value, Callable[[], Objective]]] = {
    "coverage": (lambda s: coverage(KERNEL, s), lambda: Coverage(DenseKernel(KERNEL))),
    "graph cut": (graph_cut_value, lambda: GraphCut(DenseKernel(KERNEL))),
    "saturated": (saturated_value, lambda: SaturatedCoverage(DenseKernel(KERNEL), saturation=0.2)),
    "features": (feature_value, lambda: FeatureCoverage(FEATURES)),
    "volume": (volume_value, lambda: LogDeterminant(DenseKernel(KERNEL))),
    "mean": (mean_value, lambda: MeanMatch(DenseKernel(KERNEL))),
    "mixture": (
        mixture_value,
        lambda: Mixture([(0.5, Coverage(DenseKernel(KERNEL))), (2.0, FeatureCoverage(FEATURES))]),
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("search", ["auto", "plain", "lazy"])
def test_objectives_pick_like_a_literal_greedy(name: str, search: str) -> None:
    value, make = OBJECTIVES[name]
    if search == "lazy" and not make().falling:
        with pytest.raises(SelectionError, match="never rise"):
            maximize(make, 3, search="lazy")
        return
    selection = maximize(make, 6, search=search)  # type: ignore[arg-type]
    assert selection.indices.tolist() == greedy(value, 12, 6)
    assert selection.value == pytest.approx(value(selection.indices.tolist()), rel=1e-6, abs=1e-9)
    assert selection.gains.sum() == pytest.approx(selection.value, rel=1e-9)
    if selection.bound is not None:
        assert selection.bound >= optimum(value, 12, 6) - 1e-9
    assert (selection.bound is None) == (not (make().falling and make().monotone))


def test_named_strategies_are_their_objectives() -> None:
    assert graph_cut(KERNEL, 5).indices.tolist() == greedy(graph_cut_value, 12, 5)
    assert saturated_coverage(KERNEL, 5, saturation=0.2).indices.tolist() == greedy(saturated_value, 12, 5)
    assert feature_coverage(FEATURES, 5).indices.tolist() == greedy(feature_value, 12, 5)
    assert dpp(KERNEL, 5).indices.tolist() == greedy(volume_value, 12, 5)
    assert herding(KERNEL, 5).indices.tolist() == greedy(mean_value, 12, 5)
    assert graph_cut(KERNEL, 5, trade=0.5).bound is None


@pytest.mark.parametrize("encoding", ["float32", "sign"])
def test_strategies_on_factors_equal_the_dense_kernel(encoding: str) -> None:
    factors = make_factors(25, (64, 70), 1, encoding, zeros=1)
    kernel = literal_kernel(factors, factors)
    np.fill_diagonal(kernel, np.round(np.diag(kernel), 5))
    for name in ("herding", "k-center", "graph-cut", "saturated-coverage", "dpp", "k-medoids"):
        dense = select(name, Problem(25, 8, DenseKernel(kernel)))
        made = Selector(8, strategy=name).fit(factors).selection_
        assert made.value == pytest.approx(dense.value, rel=1e-3, abs=1e-4), name
    target = make_factors(9, (64, 70), 1, encoding, seed=4)
    picks = herding(factors, 6, represented=target).indices.tolist()
    cross = literal_kernel(target, factors)

    def discrepancy(s: list[int]) -> float:
        return -(kernel[np.ix_(s, s)].mean() - 2 * cross[:, s].mean()) if s else 0.0

    assert discrepancy(picks) == pytest.approx(discrepancy(greedy(discrepancy, 25, 6)), abs=1e-4)


def test_stochastic_search() -> None:
    kernel = squared_cosines(200)
    exact = facility_location(kernel, 20)
    first = facility_location(kernel, 20, algorithm="stochastic", seed=1)
    assert first.algorithm == "stochastic"
    assert first.indices.tolist() == facility_location(kernel, 20, algorithm="stochastic", seed=1).indices.tolist()
    assert first.indices.tolist() != facility_location(kernel, 20, algorithm="stochastic", seed=2).indices.tolist()
    assert 0.9 * exact.value < first.value <= exact.value * (1 + 1e-9) + 1
    assert first.value == pytest.approx(coverage(kernel, first.indices), rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_k_medoids_is_at_least_greedy_and_swap_optimal(seed: int) -> None:
    kernel = squared_cosines(12, seed=seed)
    start, end = facility_location(kernel, 4), k_medoids(kernel, 4)
    picks = end.indices.tolist()
    assert start.value - 1e-9 <= end.value <= end.bound + 1e-9
    assert end.value == pytest.approx(coverage(kernel, picks), rel=1e-6)
    assert end.bound >= optimum(lambda s: coverage(kernel, s), 12, 4) - 1e-6
    for i in range(4):
        for j in set(range(12)) - set(picks):
            swapped = [*picks[:i], j, *picks[i + 1 :]]
            assert coverage(kernel, swapped) <= end.value * (1 + 1e-6)
    labels = np.arange(12) % 2
    fair = k_medoids(kernel, 4, constraints=Constraints(balance=labels, include=[3], exclude=[0]))
    assert sorted(labels[fair.indices].tolist()) == [0, 0, 1, 1]
    assert 3 in fair.indices
    assert 0 not in fair.indices
    with pytest.raises(SelectionError, match="can't keep costs"):
        k_medoids(kernel, 4, constraints=Constraints(costs=np.ones(12), budget=3))


def test_k_center_is_farthest_first() -> None:
    distance = np.sqrt(np.maximum(np.diag(KERNEL)[:, None] + np.diag(KERNEL) - 2 * KERNEL, 0.0))
    selection = k_center(KERNEL, 4)
    picks = [int(KERNEL.mean(axis=0).argmax())]
    while len(picks) < 4:
        picks.append(int(distance[:, picks].min(axis=1).argmax()))
    assert selection.indices.tolist() == picks
    radius = distance[:, picks].min(axis=1).max()
    best = min(distance[:, list(s)].min(axis=1).max() for s in combinations(range(12), 4))
    assert selection.value == pytest.approx(-radius, abs=1e-6)
    assert -selection.bound <= best + 1e-9
    assert radius <= 2 * best + 1e-9
    with pytest.raises(SelectionError, match="no budget"):
        k_center(KERNEL, 3, constraints=Constraints(costs=np.ones(12), budget=3))


def test_thinning() -> None:
    scores = np.arange(12.0)[::-1]
    for limit in (0.2, 0.5, 0.9):
        picks = thin(KERNEL, limit, scores=scores).indices
        among = KERNEL[np.ix_(picks, picks)] - np.diag(np.diag(KERNEL)[picks])
        assert among.max(initial=0.0) <= limit
        others = np.setdiff1d(np.arange(12), picks)
        assert (KERNEL[np.ix_(others, picks)].max(axis=1) > limit).all()
        assert picks.tolist() == sorted(picks.tolist())
    assert len(thin(KERNEL, 0.9, limit=2)) == 2
    assert thin(np.ones((4, 4)), 0.5).representative.tolist() == [0, 0, 0, 0]
    with pytest.raises(SelectionError, match="finite"):
        thin(KERNEL, 0.5, scores=np.full(12, np.nan))


def test_sparse_kernels() -> None:
    kernel = squared_cosines(80)
    whole = SparseKernel.nearest(DenseKernel(kernel), 80)
    assert np.array_equal(whole.columns(np.arange(80)), kernel)
    exact = facility_location(kernel, 10)
    for algorithm in ("auto", "lazy"):
        selection = facility_location(whole, 10, algorithm=algorithm)  # type: ignore[arg-type]
        assert selection.indices.tolist() == exact.indices.tolist()
        assert selection.value == pytest.approx(exact.value)
    kept = SparseKernel.nearest(DenseKernel(kernel), 9)
    array = np.where(kernel >= np.sort(kernel, axis=1)[:, [-9]], kernel, 0.0)
    assert np.array_equal(kept.columns(np.arange(80)), array)
    sparse = facility_location(kept, 10)
    assert sparse.algorithm == "sparse"
    assert sparse.indices.tolist() == facility_greedy(array, 10)[0]
    assert sparse.bound >= sparse.value == pytest.approx(coverage(array, sparse.indices))
    assert kept.means() == pytest.approx(array.mean(axis=0))
    assert kept.diagonal() == pytest.approx(np.diag(kernel))
    assert facility_location(kernel, 10, algorithm="sparse").value <= exact.value * (1 + 1e-9)
    cross = np.random.default_rng(0).random((7, 80))
    rows = SparseKernel.nearest(DenseKernel(cross, rectangular=True), 80)
    assert rows.columns(np.arange(80)) == pytest.approx(cross.astype(np.float32))
    with pytest.raises(SelectionError, match="outside 0 to 3"):
        SparseKernel(np.array([0, 1]), np.array([4], np.int32), np.ones(1, np.float32), 4)


def test_partitioned() -> None:
    kernel = squared_cosines(300)
    exact = facility_location(kernel, 12)
    assert partitioned(kernel, 12, parts=1, oversample=25.0).value == pytest.approx(exact.value)
    split = partitioned(kernel, 12, parts=5)
    assert split.algorithm == "partitioned"
    assert split.value == pytest.approx(coverage(kernel, split.indices), rel=1e-6)
    assert split.value > random_value(kernel, 12) + 0.5 * (exact.value - random_value(kernel, 12))
    sampled = partitioned(kernel, 12, parts=5, represented=150)
    assert len(sampled.representative) == 300
    assert sampled.value == pytest.approx(coverage(kernel, sampled.indices), rel=0.2)
    factors = make_factors(90, (64,), 1, "sign")
    assert len(partitioned(factors, 7, parts=3)) == 7
    with pytest.raises(SelectionError, match="expected 1 to 300 parts"):
        partitioned(kernel, 3, parts=0)


def random_value(kernel: np.ndarray, k: int) -> float:
    return float(np.mean([coverage(kernel, random(len(kernel), k, seed).indices) for seed in range(5)]))


@settings(max_examples=30, deadline=None)
@given_data(st.integers(0, 10_000), st.integers(1, 6))
def test_sieve_streaming_keeps_its_promise(seed: int, k: int) -> None:
    kernel = squared_cosines(11, seed=seed, dtype="float64")
    best = optimum(lambda s: coverage(kernel, s), 11, k)
    selection = sieve_streaming((kernel[:, lo : lo + 4] for lo in range(0, 11, 4)), k, epsilon=0.1)
    assert len(selection) <= k
    assert selection.value == pytest.approx(coverage(kernel, selection.indices), rel=1e-9)
    assert (0.5 - 0.1) * best - 1e-9 <= selection.value <= best + 1e-9
    assert selection.bound >= best - 1e-9
    assert sieve_streaming([], k).indices.tolist() == []


@settings(max_examples=60, deadline=None)
@given_data(st.integers(0, 10_000), st.integers(0, 80), st.sampled_from(["incremental", "lazy"]))
def test_budgets_are_never_exceeded(seed: int, tenths: int, algorithm: str) -> None:
    budget = tenths / 10  # a budget less than a rounding error below a whole number counts as that
    rng = np.random.default_rng(seed)
    kernel, costs = squared_cosines(9, seed=seed), rng.integers(1, 5, 9).astype(float)
    rules = Constraints(costs=costs, budget=budget)
    selection = facility_location(kernel, 9, constraints=rules, algorithm=algorithm)  # type: ignore[arg-type]
    assert costs[selection.indices].sum() <= budget
    subsets = [list(s) for r in range(10) for s in combinations(range(9), r) if costs[list(s)].sum() <= budget]
    best = max(coverage(kernel, s) for s in subsets)
    assert selection.bound >= best - 1e-6
    assert selection.value >= 0.5 * (1 - 1 / np.e) * best - 1e-9
    single = max((coverage(kernel, [j]) for j in range(9) if costs[j] <= budget), default=0.0)
    assert selection.value >= single - 1e-6
    lengths = feature_coverage(rng.random((9, 3)), 9, constraints=rules)
    assert costs[lengths.indices].sum() <= budget


@settings(max_examples=60, deadline=None)
@given_data(st.data())
def test_rules_hold_together_or_are_refused(data: st.DataObject) -> None:
    n = 14
    labels = data.draw(st.lists(st.sampled_from("abc"), min_size=n, max_size=n))
    low = {v: data.draw(st.integers(0, 3)) for v in sorted(set(labels))}
    high = {v: data.draw(st.integers(low[v], 6)) for v in low}
    k = data.draw(st.integers(0, n))
    spots = data.draw(st.lists(st.integers(0, n - 1), max_size=5, unique=True))
    include, exclude = spots[:2], spots[2:]
    rules = Constraints(groups=labels, at_least=low, at_most=high, include=include, exclude=exclude)
    sizes = {v: sum(labels[i] == v and i not in exclude for i in range(n)) for v in low}
    needed = {v: max(low[v], sum(labels[i] == v for i in include)) for v in low}
    possible = all(needed[v] <= min(high[v], sizes[v]) for v in low) and sum(needed.values()) <= k <= sum(
        min(high[v], sizes[v]) for v in low
    )
    for run in (
        lambda: facility_location(squared_cosines(n), k, constraints=rules),
        lambda: top(np.arange(n), k, constraints=rules),
        lambda: random(n, k, constraints=rules),
    ):
        if not possible:
            with pytest.raises(SelectionError):
                run()
            continue
        picks = run().indices.tolist()
        assert len(picks) == k
        assert picks[: len(include)] == include
        assert not set(picks) & set(exclude)
        for v in low:
            assert low[v] <= sum(labels[i] == v for i in picks) <= high[v]


def test_an_instance_that_must_be_picked_is_never_skipped() -> None:
    rules = Constraints(groups=["a", "a", "b"], at_most={"a": 1}, include=[0, 1])
    for run in (
        lambda: facility_location(squared_cosines(3), 2, constraints=rules),
        lambda: top(np.arange(3), 2, constraints=rules),
        lambda: random(3, 2, constraints=rules),
    ):
        with pytest.raises(SelectionError, match="position 1 can't be picked"):
            run()


def test_what_is_given_is_not_picked_again() -> None:
    kernel = squared_cosines(30)
    for algorithm in ("incremental", "lazy", "sparse"):
        rules = Constraints(given=[4, 9])
        more = facility_location(kernel, 5, constraints=rules, algorithm=algorithm)  # type: ignore[arg-type]
        cover, expected = kernel[:, [4, 9]].max(axis=1).astype(np.float64), []
        start = cover.sum()
        for _ in range(5):
            gains = np.maximum(kernel - cover[:, None], 0.0).sum(axis=0)
            gains[[4, 9, *expected]] = -1.0
            expected.append(int(gains.argmax()))
            cover = np.maximum(cover, kernel[:, expected[-1]])
        assert more.indices.tolist() == expected
        assert more.value == pytest.approx(cover.sum(), rel=1e-9)
        assert more.gains.sum() == pytest.approx(cover.sum() - start, rel=1e-9)
        better = kernel[:, [4, 9]].max(axis=1) >= kernel[:, expected].max(axis=1)
        assert (more.representative[better] == -1).all()


def test_stopping() -> None:
    kernel = squared_cosines(30)
    whole = facility_location(kernel, 30)
    threshold = whole.gains[6]
    stopped = facility_location(kernel, 30, constraints=Constraints(min_gain=threshold))
    assert stopped.indices.tolist() == whole.indices[:7].tolist()
    assert "stopped at 7 of 30 picks" in stopped.notes[0]
    for algorithm in ("incremental", "lazy"):
        rules = Constraints(coverage=0.8)
        covered = facility_location(kernel, 30, constraints=rules, algorithm=algorithm)  # type: ignore[arg-type]
        assert covered.value >= 0.8 * whole.value > covered.value - covered.gains[-1]
        assert "coverage 0.8" in covered.notes[0]


@pytest.mark.parametrize("algorithm", ["incremental", "lazy", "stochastic", "sparse"])
def test_an_interrupted_run_keeps_its_picks(algorithm: str) -> None:
    kernel = squared_cosines(40)
    seen: list[tuple[int, int]] = []

    def stop(done: int, wanted: int) -> None:
        seen.append((done, wanted))
        if done == 5:
            raise KeyboardInterrupt

    part = facility_location(kernel, 20, algorithm=algorithm, progress=stop)  # type: ignore[arg-type]
    assert not part.complete
    assert seen == [(i, 20) for i in range(1, 6)]
    assert part.notes[-1] == "interrupted after 5 of 20 picks"
    whole = facility_location(kernel, 20, algorithm=algorithm)  # type: ignore[arg-type]
    assert part.indices.tolist() == whole.indices[:5].tolist()
    assert part.bound is None or part.bound >= whole.value - 1e-9


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (Constraints(include=[1], exclude=[1]), "position 1 is to be picked and excluded"),
        (Constraints(include=[1, 2, 3, 4]), "4 instances must be included, more than k = 3"),
        (Constraints(include=[1, 1]), "twice"),
        (Constraints(exclude=[99]), "positions from 0 to 11"),
        (Constraints(exclude=range(10)), "exceeds the 2 instances that are left"),
        (Constraints(at_least={"a": 1}), "need groups"),
        (Constraints(groups=["a"] * 12, at_least={"b": 1}), "no instance has the label 'b'"),
        (Constraints(groups=["a"] * 12, at_most={"a": 2}), "allow 2 picks, fewer than k = 3"),
        (Constraints(groups=["a"] * 12, at_least={"a": 4}), "minimums sum to 4"),
        (Constraints(budget=3), "belong together"),
        (Constraints(costs=np.zeros(12), budget=3), "cost at 0 is 0.0"),
        (Constraints(costs=np.ones(11), budget=3), r"shape \(11,\)"),
        (Constraints(costs=np.ones(12), budget=float("nan")), "budget is nan"),
    ],
)
def test_rules_that_can_not_be_met(rules: Constraints, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        facility_location(KERNEL, 3, constraints=rules)


def test_selector() -> None:
    selector = Selector(0.25, strategy="facility-location")
    assert selector.fit(KERNEL).ranking_.tolist() == facility_location(KERNEL, 3).indices.tolist()
    assert selector.gains_.shape == (3,)
    assert np.array_equal(selector.transform(np.arange(12)), selector.ranking_)
    assert selector.fit_transform(KERNEL).shape == (3, 12)
    assert Selector(**selector.get_params()).strategy == "facility-location"
    assert selector.set_params(n_select=2).fit(KERNEL).ranking_.shape == (2,)
    assert Selector(2, strategy="top").fit(KERNEL, np.arange(12)).ranking_.tolist() == [11, 10]
    with pytest.raises(SelectionError, match="no parameter 'k'"):
        selector.set_params(k=3)
    with pytest.raises(SelectionError, match="call fit"):
        Selector(1).transform([1])
    assert [share(10, p) for p in (0.0, 0.01, 0.25, 1.0)] == [0, 1, 3, 10]
    with pytest.raises(SelectionError, match="0 to 1"):
        share(10, 2.0)


def test_every_registered_strategy_solves_a_problem() -> None:
    scores = np.arange(12.0)
    for name, entry in strategies().items():
        if not (entry.solve.__module__ or "").startswith("repmatch."):
            continue  # registered by the documentation's examples
        own = {
            "mixture": {"mix": {"facility-location": 1.0, "top": 0.5}},
            "thin": {"constraints": Constraints(apart=0.9)},
            "feature-coverage": {"features": Features.of_matrix(Scipy(FEATURES))},
        }
        more: dict[str, Any] = own.get(name, {})
        selection: Selection = entry.solve(Problem(12, 4, DenseKernel(KERNEL), scores, **more))
        assert selection.strategy == name
        assert len(set(selection.indices.tolist())) == 4
        assert len(selection.representative) == 12
        again = entry.solve(Problem(12, 4, DenseKernel(KERNEL), scores, **more))
        assert np.array_equal(selection.indices, again.indices)
        if name != "thin":
            more |= {"constraints": Constraints(balance=np.arange(12) % 2)}
            fair = entry.solve(Problem(12, 4, DenseKernel(KERNEL), scores, **more))
            assert sorted((fair.indices % 2).tolist()) == [0, 0, 1, 1]


def test_duplicated_factors_do_not_break_the_volume() -> None:
    factors = take(make_factors(5, (64,), 1, "sign"), [0, 1, 2, 3, 4] * 3)
    picks = dpp(factors, 8).indices.tolist()
    assert sorted(i % 5 for i in picks[:5]) == [0, 1, 2, 3, 4]
    assert len(set(picks)) == 8
