"""Rules hold for every strategy and algorithm, alone and together, or are refused with the reason."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given as given_data
from hypothesis import settings
from hypothesis import strategies as st
from oracle_selectors import coverage, facility_greedy, squared_cosines
from oracle_similarity import kernel as literal_kernel
from oracle_similarity import make_factors

from repmatch.errors import SelectionError
from repmatch.selectors import (
    Constraints,
    DenseKernel,
    FactorKernel,
    Problem,
    SignedKernel,
    dpp,
    facility_location,
    feature_coverage,
    graph_cut,
    herding,
    k_medoids,
    partitioned,
    random,
    saturated_coverage,
    select,
    thin,
    top,
)

KERNEL = squared_cosines(40)


def among(kernel: np.ndarray, picks: np.ndarray) -> float:
    """The largest similarity of two picks."""
    block = kernel[np.ix_(picks, picks)].copy()
    np.fill_diagonal(block, -1.0)
    return float(block.max(initial=-1.0))


@settings(max_examples=40, deadline=None)
@given_data(
    st.integers(0, 999), st.floats(0.05, 1.0), st.integers(0, 30), st.sampled_from(["incremental", "lazy", "pruned"])
)
def test_picks_are_kept_apart(seed: int, limit: float, k: int, algorithm: Any) -> None:
    kernel = squared_cosines(30, seed=seed)
    rules = Constraints(apart=limit, given=[3])
    found = facility_location(kernel, min(k, 29), constraints=rules, algorithm=algorithm)
    assert among(kernel, np.append(found.indices, 3)) <= limit
    if len(found) < min(k, 29):
        rest = np.setdiff1d(np.arange(30), [*found.indices, 3])
        assert (kernel[np.ix_(rest, [*found.indices, 3])].max(axis=1) > limit).all()
        assert f"only {len(found)} of {min(k, 29)} picks" in found.notes[0]


def test_spacing_goes_with_every_strategy_on_a_kernel() -> None:
    limit, rules = 0.6, Constraints(apart=0.6)
    for found in (
        facility_location(KERNEL, 12, constraints=rules),
        graph_cut(KERNEL, 12, constraints=rules),
        saturated_coverage(KERNEL, 12, constraints=rules),
        dpp(KERNEL, 12, constraints=rules),
        herding(KERNEL, 12, constraints=rules),
        partitioned(KERNEL, 12, parts=2, constraints=rules),
        random(40, 12, 1, constraints=rules, kernel=DenseKernel(KERNEL)),
        top(np.arange(40), 12, constraints=rules, kernel=DenseKernel(KERNEL)),
        thin(KERNEL, limit, limit=12),
    ):
        assert 1 < len(found) <= 12
        assert among(KERNEL, found.indices) <= limit
    scores = np.random.default_rng(0).random(40)
    by_score = top(scores, 40, constraints=rules, kernel=DenseKernel(KERNEL))
    assert by_score.indices.tolist() == thin(KERNEL, limit, scores=scores).indices.tolist()
    with pytest.raises(SelectionError, match="similarities with each other"):
        top(scores, 4, constraints=rules)
    with pytest.raises(SelectionError, match="similarities with each other"):
        facility_location(DenseKernel(KERNEL[:7], rectangular=True), 3, constraints=rules)
    near = int(KERNEL[5].argsort()[-2])
    with pytest.raises(SelectionError, match=f"position {near} can't be picked"):
        facility_location(KERNEL, 5, constraints=Constraints(apart=0.5, include=[5, near]))


def test_a_represented_set_keeps_candidates_apart_by_their_own_kernel() -> None:
    factors, target = make_factors(30, (16, 16), 1, "sign"), make_factors(9, (16, 16), 1, "sign", seed=2)
    own = literal_kernel(factors, factors)
    limit = float(np.quantile(own, 0.7))
    found = facility_location(factors, 8, represented=target, constraints=Constraints(apart=limit))
    assert among(own, found.indices) <= limit + 1e-6


def test_top_warns_when_its_picks_crowd() -> None:
    rng = np.random.default_rng(1)
    centres = np.eye(20)
    x = np.repeat(centres, 20, axis=0) + 0.05 * rng.standard_normal((400, 20))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    kernel = DenseKernel(((x @ x.T) ** 2).astype(np.float32))
    one = top(np.arange(400) < 20, 15, kernel=kernel)
    assert "the picks crowd" in one.notes[0]
    spread = top(np.arange(400) % 20 == 0, 15, kernel=kernel)
    assert spread.notes == ()
    assert top(np.arange(400) < 20, 3, kernel=kernel).notes == ()


@settings(max_examples=40, deadline=None)
@given_data(st.integers(0, 999), st.floats(0.0, 12.0), st.data())
def test_budgets_hold_with_other_rules(seed: int, budget: float, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    n = 20
    kernel, costs, labels = squared_cosines(n, seed=seed), rng.integers(1, 6, n) / 2, rng.integers(0, 3, n)
    names = sorted(set(labels.tolist()))
    at_most = {v: data.draw(st.integers(0, 4)) for v in names}
    exclude = data.draw(st.lists(st.integers(0, n - 1), max_size=4, unique=True))
    rules = Constraints(costs=costs, budget=budget, groups=labels, at_most=at_most, exclude=exclude)
    k = n - len(exclude)
    for found in (
        facility_location(kernel, k, constraints=rules),
        facility_location(kernel, k, constraints=rules, algorithm="stochastic"),
        graph_cut(kernel, k, constraints=rules),
        saturated_coverage(kernel, k, constraints=rules),
        feature_coverage(rng.random((n, 4)), k, constraints=rules),
        top(rng.random(n), k, constraints=rules),
        random(n, k, seed, constraints=rules),
    ):
        assert found.cost == pytest.approx(costs[found.indices].sum())
        assert found.cost <= budget
        assert not set(found.indices.tolist()) & set(exclude)
        for v in names:
            assert (labels[found.indices] == v).sum() <= at_most[v]


@settings(max_examples=40, deadline=None)
@given_data(
    st.integers(0, 999),
    st.integers(0, 90),
    st.sampled_from(["incremental", "pruned", "lazy", "stochastic", "sparse", "partitioned"]),
)
def test_no_algorithm_overspends(seed: int, tenths: int, algorithm: Any) -> None:
    budget = tenths / 10  # a budget less than a rounding error below a whole number counts as that
    rng = np.random.default_rng(seed)
    kernel, costs, labels = squared_cosines(16, seed=seed), rng.integers(1, 6, 16).astype(float), rng.integers(0, 2, 16)
    rules = Constraints(costs=costs, budget=budget, groups=labels, at_most={0: 2})
    found = facility_location(kernel, 12, constraints=rules, algorithm=algorithm, seed=seed)
    assert found.cost == costs[found.indices].sum() <= budget
    assert (labels[found.indices] == 0).sum() <= 2
    drawn = saturated_coverage(kernel, 12, search="stochastic", constraints=rules, seed=seed)
    assert drawn.cost == costs[drawn.indices].sum() <= budget
    for other in (top(rng.random(16), 12, constraints=rules), random(16, 12, seed, constraints=rules)):
        assert costs[other.indices].sum() <= budget


@pytest.mark.parametrize(
    ("cost", "budget", "picks"),
    [(0.1, 0.3, 3), (0.1, 0.7, 7), (0.07, 0.77, 11), (0.1, 0.29, 2), (1.0, 2.999999, 2), (1e-3, 0.016, 16)],
)
@pytest.mark.parametrize("algorithm", ["incremental", "pruned", "sparse", "partitioned"])
def test_decimal_costs_may_fill_a_budget_to_the_last_digit(
    cost: float, budget: float, picks: int, algorithm: Any
) -> None:
    rules = Constraints(costs=np.full(16, cost), budget=budget)
    found = facility_location(squared_cosines(16, seed=3), 16, constraints=rules, algorithm=algorithm)
    assert len(found.indices) == picks
    assert found.cost is not None
    assert found.cost <= budget


def test_many_decimal_costs_add_up_as_they_do_by_hand() -> None:
    count = 30_000
    rules = Constraints(costs=np.full(count, 0.1), budget=count / 10)
    assert len(top(np.arange(count, dtype=float), count, constraints=rules).indices) == count


def test_a_budget_takes_the_best_of_three() -> None:
    kernel = np.zeros((4, 9), np.float32)
    costs = np.ones(9)
    kernel[:, 0], costs[0] = 1.0, 10.0  # the best single item takes the whole budget
    kernel[0, 1:] = 0.5
    found = facility_location(
        DenseKernel(kernel, rectangular=True), 9, constraints=Constraints(costs=costs, budget=10.0)
    )
    assert found.indices.tolist() == [0]
    kernel[:, 0] = 0.2  # many small ones are better
    kernel[:, 1:5] = np.eye(4)
    found = facility_location(
        DenseKernel(kernel, rectangular=True), 9, constraints=Constraints(costs=costs, budget=10.0)
    )
    assert set(found.indices.tolist()) >= {1, 2, 3, 4}
    assert found.value == pytest.approx(4.0)


@pytest.mark.parametrize("seed", range(3))
def test_parts_keep_every_rule(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, k = 240, 24
    kernel = squared_cosines(n, seed=seed)
    labels = np.where(rng.random(n) < 0.03, "rare", np.where(rng.random(n) < 0.5, "a", "b"))
    sizes = {v: int((labels == v).sum()) for v in ("rare", "a", "b")}
    include, exclude, given = [5, 77], list(range(100, 120)), [200, 201]

    def count(found: Any) -> dict[str, int]:
        return {v: int((labels[found.indices] == v).sum()) for v in sizes}

    def check(found: Any) -> None:
        assert len(set(found.indices.tolist())) == k
        assert found.indices[:2].tolist() == include
        assert not set(found.indices.tolist()) & {*exclude, *given}

    base = {"include": include, "exclude": exclude, "given": given}
    check(partitioned(kernel, k, parts=4, constraints=Constraints(**base), seed=seed))
    balanced = partitioned(kernel, k, parts=4, constraints=Constraints(balance=labels, **base), seed=seed)
    check(balanced)
    whole = facility_location(kernel, k, constraints=Constraints(balance=labels, **base))
    assert count(balanced) == count(whole)
    stratified = partitioned(kernel, k, parts=4, constraints=Constraints(stratify=labels, **base), seed=seed)
    check(stratified)
    assert count(stratified) == count(facility_location(kernel, k, constraints=Constraints(stratify=labels, **base)))
    quotas = Constraints(groups=labels, at_least={"rare": 3}, at_most={"a": 9}, **base)
    some = partitioned(kernel, k, parts=4, constraints=quotas, seed=seed)
    check(some)
    assert count(some)["rare"] >= 3
    assert count(some)["a"] <= 9
    costs = rng.integers(1, 9, n).astype(float)
    cheap = partitioned(kernel, k, parts=4, constraints=Constraints(costs=costs, budget=40.0), seed=seed)
    assert costs[cheap.indices].sum() <= 40.0
    assert len(cheap) > 5


def test_what_parts_can_not_keep_is_refused() -> None:
    for rules in (
        Constraints(min_gain=0.1),
        Constraints(coverage=0.5),
        Constraints(balance=np.arange(40) % 2, groups=np.arange(40) % 2, at_least={0: 1}),
        Constraints(balance=np.arange(40) % 2, costs=np.ones(40), budget=3.0),
    ):
        with pytest.raises(SelectionError, match="can't be selected from in parts"):
            partitioned(KERNEL, 4, constraints=rules)
    with pytest.raises(SelectionError, match="can't be selected from in parts"):
        partitioned(DenseKernel(KERNEL[:5], rectangular=True), 4)


def test_what_is_given_does_not_flatter_the_certificate() -> None:
    given = facility_location(KERNEL, 5).indices
    more = facility_location(KERNEL, 3, constraints=Constraints(given=given))
    assert more.base == pytest.approx(coverage(KERNEL, given))
    assert more.cumulative.tolist() == pytest.approx((more.base + np.cumsum(more.gains)).tolist())
    best = max(coverage(KERNEL, [*given, *s]) for s in combinations(np.setdiff1d(np.arange(40), given).tolist(), 3))
    assert more.value <= best <= more.bound + 1e-6
    assert more.certainty == pytest.approx((more.value - more.base) / (more.bound - more.base))


def test_a_stopped_run_certifies_as_many_picks_as_it_made() -> None:
    kernel = squared_cosines(12)
    found = facility_location(kernel, 12, constraints=Constraints(coverage=0.7))
    assert 1 < len(found) < 12
    best = max(coverage(kernel, s) for s in combinations(range(12), len(found)))
    assert found.value <= best + 1e-9 <= found.bound + 2e-9


def test_picks_that_gain_nothing_are_told() -> None:
    kernel = np.kron(np.eye(3), np.ones((4, 4)))
    assert facility_location(kernel, 5).notes == ("the last 2 picks gain nothing: 3 reach the same",)
    assert facility_location(kernel, 3).notes == ()


def test_small_and_empty_groups() -> None:
    labels = ["a"] * 37 + ["b"] * 3
    gone = Constraints(balance=labels, exclude=[37, 38, 39])
    found = facility_location(KERNEL, 6, constraints=gone)
    assert all(labels[i] == "a" for i in found.indices)
    assert "'b' has only 0 instances" in found.notes[0]
    with pytest.raises(SelectionError, match="at least 4 of 'b' are asked for, but only 3 exist"):
        facility_location(KERNEL, 6, constraints=Constraints(groups=labels, at_least={"b": 4}))


def test_baselines_refuse_what_needs_an_objective() -> None:
    for rules in (Constraints(coverage=0.5), Constraints(min_gain=1.0)):
        with pytest.raises(SelectionError, match="needs an objective"):
            random(40, 3, constraints=rules)
    with pytest.raises(SelectionError, match="needs an objective"):
        top(np.arange(40), 3, constraints=Constraints(coverage=0.5))
    assert top(np.arange(40), 30, constraints=Constraints(min_gain=35.0)).indices.tolist() == [39, 38, 37, 36, 35]
    assert 39 not in top(np.arange(40), 3, constraints=Constraints(given=[39])).indices


def test_mixtures_weigh_objectives_by_their_best_first_gain() -> None:
    scores = np.random.default_rng(0).random(40)
    alone = facility_location(KERNEL, 6).indices.tolist()

    def mixed(**mix: float) -> list[int]:
        names = {name.replace("_", "-"): weight for name, weight in mix.items()}
        return select("mixture", Problem(40, 6, DenseKernel(KERNEL), scores, mix=names)).indices.tolist()

    assert mixed(facility_location=1.0) == alone
    assert mixed(facility_location=1.0, top=0.0) == alone
    assert mixed(facility_location=1e-9, top=1.0) == top(scores, 6).indices.tolist()
    value = {j: KERNEL[:, j].sum() / KERNEL.sum(axis=0).max() + 0.5 * scores[j] / scores.max() for j in range(40)}
    assert mixed(facility_location=1.0, top=0.5)[0] == max(value, key=lambda j: value[j])
    for bad, message in (
        ({}, "needs weights"),
        ({"dpp": 1.0}, "'dpp' can't be mixed"),
        ({"top": -1.0}, "weight of top"),
    ):
        with pytest.raises(SelectionError, match=message):
            mixed(**bad)


def test_strategies_know_their_algorithms_and_parameters() -> None:
    problem = Problem(40, 6, DenseKernel(KERNEL))
    few = select("graph-cut", Problem(40, 6, DenseKernel(KERNEL), parameters={"trade": 0.5}))
    assert few.indices.tolist() == graph_cut(KERNEL, 6, trade=0.5).indices.tolist()
    for name, more, message in (
        ("graph-cut", {"algorithm": "lazy"}, "graph-cut has no algorithm 'lazy': expected auto"),
        ("facility-location", {"algorithm": "magic"}, "expected auto, incremental, pruned"),
        ("dpp", {"parameters": {"trade": 1.0}}, "dpp has no parameter 'trade': it takes ridge"),
        ("top", {"mix": {"top": 1.0}}, "go with the strategy mixture"),
        ("thin", {}, "thin takes a limit of similarity"),
        ("thin", {"constraints": Constraints(apart=0.5, balance=[1] * 40)}, "balance goes with top"),
    ):
        with pytest.raises(SelectionError, match=message):
            select(name, Problem(**{**vars(problem), **more}))


@pytest.mark.parametrize(("encoding", "rank"), [("float32", 1), ("float16", 1), ("sign", 1), ("float32", 3)])
def test_signed_kernels(encoding: str, rank: int) -> None:
    factors = make_factors(30, (16, 24), rank, encoding, zeros=1)
    kernel = SignedKernel(factors)
    whole = np.asarray(SignedKernel(factors).dense(), np.float64)
    expected = np.zeros((30, 30))
    for m in range(2):
        from repmatch.similarity import directions_of

        moves = np.stack([directions_of(factors, i)[m].ravel() for i in range(30)])
        moves[factors.norms[:, m] == 0] = 0.0
        length = np.linalg.norm(moves, axis=1, keepdims=True)
        unit = moves / np.where(length > 0, length, 1.0)
        expected += unit @ unit.T / 2
    assert whole == pytest.approx(expected, abs=2e-3 if encoding == "float16" else 1e-5)
    assert np.linalg.eigvalsh(whole).min() > -1e-4
    assert whole.min() < -0.1
    assert kernel.means() == pytest.approx(whole.mean(axis=0), abs=1e-4)
    assert kernel.diagonal() == pytest.approx(np.diag(whole), abs=2e-3)
    assert kernel.columns(np.array([3, 1])) == pytest.approx(whole[:, [3, 1]], abs=1e-6)
    found = facility_location(SignedKernel(factors), 8)
    assert found.value == pytest.approx(coverage(whole, found.indices), rel=1e-4)
    few = facility_location(SignedKernel(factors, memory_limit=0), 8)
    assert few.algorithm == "pruned"
    assert few.value == pytest.approx(found.value, rel=1e-4)
    target = make_factors(7, (16, 24), rank, encoding, seed=3)
    some = facility_location(SignedKernel(factors), 3, represented=target)
    assert len(some.representative) == 7
    assert FactorKernel(factors).columns(np.array([0])).min() >= 0.0


def test_the_greedy_of_a_budget_is_that_of_its_oracle() -> None:
    """By gain alone a budget that everything fits is no rule at all."""
    rules = Constraints(costs=np.ones(40), budget=40.0)
    assert facility_location(KERNEL, 7, constraints=rules).indices.tolist() == facility_greedy(KERNEL, 7)[0]


def test_swaps_under_interruption_keep_the_greedy_picks() -> None:
    def stop(done: int, _: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    found = k_medoids(KERNEL, 9, progress=stop)
    assert (len(found), found.complete, found.strategy) == (4, False, "k-medoids")


def test_swaps_that_are_interrupted_leave_all_picks(monkeypatch: pytest.MonkeyPatch) -> None:
    from repmatch.selectors import medoids

    def stop(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(medoids._Swaps, "improve", stop)
    found = k_medoids(KERNEL, 9)
    assert found.indices.tolist() == facility_location(KERNEL, 9).indices.tolist()
    assert found.notes == ("0 swaps after greedy; interrupted, so that more may help",)


def test_parts_that_are_interrupted() -> None:
    def at(stop: int) -> Any:
        def tell(done: int, _: int) -> None:
            if done == stop:
                raise KeyboardInterrupt

        return tell

    with pytest.raises(KeyboardInterrupt):
        partitioned(KERNEL, 6, parts=2, progress=at(4))
    found = partitioned(KERNEL, 6, parts=2, progress=at(12 + 4))  # six proposals of each part first
    assert (len(found), found.complete) == (4, False)
    assert found.indices.tolist() == partitioned(KERNEL, 6, parts=2).indices[:4].tolist()


def test_spacing_looks_at_all_similarities_whatever_an_algorithm_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repmatch.selectors.facility.enough_neighbours", lambda n, k: 3)
    found = facility_location(KERNEL, 12, constraints=Constraints(apart=0.2), algorithm="sparse")
    assert found.algorithm == "sparse"
    assert among(KERNEL, found.indices) <= 0.2


@pytest.mark.parametrize(
    "solve",
    [
        facility_location,
        graph_cut,
        lambda kernel, k, constraints: top(kernel[0], k, constraints=constraints),
        lambda kernel, k, constraints: random(40, k, 1, constraints=constraints),
    ],
)
def test_labels_take_turns_where_nobody_knows_when_the_run_ends(solve: Any) -> None:
    labels = np.array(["a"] * 30 + ["b"] * 6 + ["c"] * 4)
    costs = np.where(labels == "b", 3.0, 1.0)
    for k in (12, 40):
        found = solve(KERNEL, k, constraints=Constraints(balance=labels, costs=costs, budget=15.0))
        counts = [int((labels[found.indices] == v).sum()) for v in "abc"]
        assert counts == [3, 3, 3] if k == 40 else max(counts) - min(counts) <= 1
        assert found.cost == costs[found.indices].sum() <= 15.0
    even = solve(KERNEL, 40, constraints=Constraints(stratify=labels, costs=np.ones(40), budget=20.0))
    assert [int((labels[even.indices] == v).sum()) for v in "abc"] == [15, 3, 2]


def test_minimums_are_met_whatever_ends_the_run() -> None:
    labels = np.array(["a"] * 30 + ["b"] * 10)
    costs = np.where(labels == "b", 4.0, 1.0)
    costs[35] = 2.0
    for rules in (
        {"costs": costs, "budget": 11.0},
        {"min_gain": 1e9},
        {"coverage": 0.05},
    ):
        found = facility_location(KERNEL, 40, constraints=Constraints(groups=labels, at_least={"b": 3}, **rules))
        assert (labels[found.indices] == "b").sum() >= 3
        if "budget" in rules:
            assert 35 in found.indices
            assert found.cost <= 11.0
        else:
            assert len(found) == (3 if "min_gain" in rules else 4)
    for few in (top, random):
        given: Any = (np.arange(40.0)[::-1], 40) if few is top else (40, 40)
        found = few(*given, constraints=Constraints(groups=labels, at_least={"b": 3}, costs=costs, budget=10.0))
        assert (labels[found.indices] == "b").sum() == 3
    some = top(np.arange(40.0)[::-1], 40, constraints=Constraints(groups=labels, at_least={"b": 2}, min_gain=38.0))
    assert some.indices.tolist() == [0, 1, 30, 31]
    with pytest.raises(SelectionError, match="the minimums cost 10 at the least, more than the budget 9"):
        facility_location(
            KERNEL, 40, constraints=Constraints(groups=labels, at_least={"b": 3}, costs=costs, budget=9.0)
        )
    split = partitioned(
        KERNEL, 12, parts=3, constraints=Constraints(groups=labels, at_least={"b": 3}, costs=costs, budget=10.0)
    )
    assert (labels[split.indices] == "b").sum() == 3
