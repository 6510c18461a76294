from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given as given_data
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracle_selectors import coverage, facility_greedy, optimum, squared_cosines
from oracle_similarity import kernel as literal_kernel
from oracle_similarity import make_factors

from repmatch.blocks import take
from repmatch.errors import SelectionError, SpaceMismatchError, UnknownNameError
from repmatch.selectors import (
    Constraints,
    DenseKernel,
    FactorKernel,
    Problem,
    Selection,
    as_kernel,
    facility_location,
    random,
    register,
    registry,
    select,
    strategies,
    strategy,
    top,
)

ALGORITHMS = ["incremental", "lazy", "pruned"]


def check(selection: Selection, kernel: np.ndarray) -> None:
    """What holds for every facility-location result."""
    picks = selection.indices
    assert len(set(picks.tolist())) == len(picks)
    assert selection.value == pytest.approx(coverage(kernel, picks), rel=1e-9, abs=1e-9)
    assert selection.gains.sum() == pytest.approx(selection.value, rel=1e-9, abs=1e-9)
    assert selection.bound is not None
    assert selection.bound >= selection.value
    if len(picks):
        best = np.maximum(kernel[:, picks], 0.0)
        expected = np.where(best.max(axis=1) > 0, best.argmax(axis=1), -1)
        assert np.array_equal(selection.representative, expected)
        assert np.array_equal(selection.similarity, best.max(axis=1).astype(np.float32))
    assert selection.weights.sum() == (selection.representative >= 0).sum()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [1, 2, 30, 200])
def test_picks_equal_a_literal_greedy(algorithm: str, dtype: str, n: int) -> None:
    kernel = squared_cosines(n, seed=n, dtype=dtype)
    k = min(n, 60)
    picks, gains = facility_greedy(kernel, k)
    selection = facility_location(kernel, k, algorithm=algorithm)
    assert selection.indices.tolist() == picks
    assert selection.gains == pytest.approx(gains, rel=1e-12, abs=1e-12)
    assert selection.algorithm == algorithm
    check(selection, kernel)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "kernel",
    [
        np.ones((40, 40), np.float32),
        np.eye(40, dtype=np.float32),
        np.zeros((40, 40), np.float32),
        np.kron(np.eye(8, dtype=np.float32), np.ones((5, 5), np.float32)),
        np.repeat(np.repeat(squared_cosines(10), 4, axis=0), 4, axis=1),
        -squared_cosines(40),
        np.random.default_rng(3).standard_normal((40, 40)),
        np.random.default_rng(4).integers(0, 3, (40, 40)).astype(np.float32),
    ],
    ids=["identical", "orthogonal", "zero", "blocks", "duplicates", "negative", "asymmetric", "ties"],
)
def test_degenerate_kernels_equal_a_literal_greedy(algorithm: str, kernel: np.ndarray) -> None:
    selection = facility_location(kernel, 40, algorithm=algorithm)
    assert selection.indices.tolist() == facility_greedy(kernel, 40)[0]
    check(selection, kernel)


@settings(max_examples=60, deadline=None)
@given_data(arrays(np.float32, (7, 7), elements=st.integers(0, 4).map(float)), st.integers(0, 7))
def test_bound_and_guarantee_against_brute_force(kernel: np.ndarray, k: int) -> None:
    best = optimum(lambda s: coverage(kernel, s), 7, k)
    results = [facility_location(kernel, k, algorithm=a) for a in ALGORITHMS]
    for selection in results:
        assert selection.indices.tolist() == facility_greedy(kernel, k)[0]
        check(selection, kernel)
        assert selection.bound >= best - 1e-9
        assert selection.value >= (1 - 1 / np.e) * best - 1e-9
        assert all(a >= b - 1e-9 for a, b in zip(selection.gains, selection.gains[1:], strict=False))


def test_array_layouts_are_one() -> None:
    kernel = squared_cosines(60)
    expected = facility_location(kernel, 10).indices.tolist()
    frozen = kernel.copy()
    frozen.flags.writeable = False
    big = np.zeros((120, 120), np.float32)
    big[::2, ::2] = kernel
    for array in (np.asfortranarray(kernel), frozen, big[::2, ::2], kernel.tolist()):
        assert facility_location(array, 10).indices.tolist() == expected
    uneven = np.random.default_rng(0).random((50, 50))
    expected = facility_greedy(uneven, 8)[0]
    assert facility_location(np.asfortranarray(uneven), 8).indices.tolist() == expected
    assert np.array_equal(kernel, squared_cosines(60))


@pytest.mark.parametrize(
    ("kernel", "k", "message"),
    [
        (np.ones((3, 4)), 1, r"shape \(3, 4\)"),
        (np.ones(3), 1, r"shape \(3,\)"),
        (np.full((3, 3), np.nan), 1, r"nan at \(0, 0\)"),
        (np.array([[1.0, 0.0], [np.inf, 1.0]]), 1, r"inf at \(1, 0\)"),
        (np.asfortranarray([[1.0, 0.0], [np.inf, 1.0]]), 1, r"inf at \(1, 0\)"),
        (np.array([["a"]]), 1, "expected float32"),
        (np.eye(3), 4, "k = 4 exceeds the 3"),
        (np.eye(3), -1, "k = -1 is negative"),
        (np.eye(3), 1.5, "k = 1.5"),
        (np.eye(3), True, "k = True"),
    ],
)
def test_bad_input_is_refused(kernel: np.ndarray, k: int, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        facility_location(kernel, k)


def test_empty_selections() -> None:
    for algorithm in ALGORITHMS:
        nothing = facility_location(np.eye(3), 0, algorithm=algorithm)
        assert nothing.indices.tolist() == []
        assert nothing.representative.tolist() == [-1, -1, -1]
        assert facility_location(np.empty((0, 0)), 0, algorithm=algorithm).value == 0.0
    with pytest.raises(SelectionError, match="algorithm 'magic'"):
        facility_location(np.eye(3), 1, algorithm="magic")


@pytest.mark.parametrize(("encoding", "rank"), [("float32", 1), ("float16", 1), ("sign", 1), ("float32", 4)])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_factor_kernels(encoding: str, rank: int, algorithm: str) -> None:
    factors = make_factors(60, (70, 32), rank, encoding, zeros=2)
    kernel = literal_kernel(factors, factors)
    selection = facility_location(factors, 20, algorithm=algorithm)
    tolerance = 1e-3 if encoding == "float16" else 1e-5
    cover = np.zeros(60)
    for j in selection.indices:  # late picks tie in pairs up to rounding, so compare gains rather than positions
        gains = np.maximum(kernel - cover[:, None], 0.0).sum(axis=0)
        assert gains[j] >= gains.max() - tolerance
        cover = np.maximum(cover, kernel[:, j])
    if encoding == "sign":  # entries are exact fractions, rounded once: nothing is left to chance
        assert selection.indices.tolist() == facility_greedy(kernel.astype(np.float32), 20)[0]
    assert selection.value == pytest.approx(coverage(kernel, selection.indices), rel=tolerance)
    assert selection.bound >= selection.value


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("encoding", ["float32", "sign"])
def test_duplicate_factors_tie_to_the_lowest(algorithm: str, encoding: str) -> None:
    base = make_factors(9, (70, 33), 1, encoding)
    factors = take(base, list(range(9)) * 7)
    selection = facility_location(factors, 9, algorithm=algorithm)
    assert sorted(selection.indices.tolist()) == list(range(9))


def test_memory_limit_decides_the_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = make_factors(300, (64,), 1, "sign")
    whole = facility_location(FactorKernel(factors), 25)
    monkeypatch.setattr("repmatch.selectors.facility.BATCH", 7)
    blocks = facility_location(FactorKernel(factors, memory_limit=1000), 25)
    assert (whole.algorithm, blocks.algorithm) == ("incremental", "pruned")
    assert "fits in memory" in whole.reason
    assert "exceeds 0.0 GiB" in blocks.reason
    assert whole.indices.tolist() == blocks.indices.tolist()
    assert whole.value == pytest.approx(blocks.value, rel=1e-12)
    with pytest.raises(SelectionError, match="memory limit"):
        facility_location(FactorKernel(factors, memory_limit=1000), 25, algorithm="incremental")


def test_a_large_kernel_is_mirrored_by_blocks() -> None:
    factors = make_factors(1500, (64,), 1, "sign")
    array = FactorKernel(factors).dense()
    assert np.array_equal(array, array.T)
    assert np.array_equal(array[1100:1103], FactorKernel(factors, memory_limit=0).columns(np.arange(1100, 1103)).T)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_represented_set(algorithm: str) -> None:
    factors = make_factors(40, (64, 5), 1, "sign")
    target = make_factors(15, (64, 5), 1, "sign", seed=1)
    cross = literal_kernel(target, factors).astype(np.float32)
    expected = facility_greedy(cross, 6)[0]
    by_array = facility_location(np.eye(40), 6, represented=cross, algorithm=algorithm)
    assert by_array.indices.tolist() == expected
    check(by_array, cross)
    assert facility_location(factors, 6, represented=target, algorithm=algorithm).indices.tolist() == expected
    kernel = squared_cosines(40)
    rows = np.arange(0, 40, 3)
    for given in (rows, np.isin(np.arange(40), rows)):
        some = facility_location(kernel, 6, represented=given, algorithm=algorithm)
        assert some.indices.tolist() == facility_greedy(kernel[rows], 6)[0]
    assert len(some.representative) == len(rows)
    part = facility_location(factors, 6, represented=rows, algorithm=algorithm)
    cross = literal_kernel(take(factors, rows), factors).astype(np.float32)
    assert part.indices.tolist() == facility_greedy(cross, 6)[0]


def test_represented_sets_that_do_not_fit() -> None:
    factors = make_factors(4, (8,))
    with pytest.raises(SelectionError, match=r"expected \(r, 4\)"):
        as_kernel(np.eye(4), np.ones((2, 3)))
    with pytest.raises(SelectionError, match="outside 0 to 3"):
        as_kernel(np.eye(4), [4])
    with pytest.raises(SelectionError, match="kernel of factors"):
        as_kernel(np.eye(4), factors)
    with pytest.raises(SpaceMismatchError):
        as_kernel(factors, make_factors(4, (9,)))
    assert DenseKernel(np.ones((2, 5)), rectangular=True).shape == (2, 5)


def groups_of(selection: Selection, labels: list[str]) -> dict[str, int]:
    found = {name: 0 for name in labels}
    for i in selection.indices:
        found[labels[i]] += 1
    return found


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_balance_and_stratify(algorithm: str) -> None:
    kernel = squared_cosines(30)
    labels = ["a"] * 20 + ["b"] * 8 + ["c"] * 2

    def pick(k: int, **rules: list[str]) -> Selection:
        return facility_location(kernel, k, constraints=Constraints(**rules), algorithm=algorithm)

    assert groups_of(pick(6, balance=labels), labels) == {"a": 2, "b": 2, "c": 2}
    assert groups_of(pick(4, balance=labels), labels) == {"a": 2, "b": 1, "c": 1}
    small = pick(12, balance=labels)
    assert groups_of(small, labels) == {"a": 5, "b": 5, "c": 2}
    assert small.notes == ("'c' has only 2 instances, fewer than its equal share of 4: all taken, others fill up",)
    assert groups_of(pick(30, balance=labels), labels) == {"a": 20, "b": 8, "c": 2}
    assert groups_of(pick(15, stratify=labels), labels) == {"a": 10, "b": 4, "c": 1}
    assert groups_of(pick(4, stratify=labels), labels) == {"a": 3, "b": 1, "c": 0}
    assert pick(15, stratify=labels).notes == ()


@settings(max_examples=80, deadline=None)
@given_data(st.lists(st.sampled_from(["x", "y", "z", None, 3]), min_size=1, max_size=25), st.data())
def test_quotas_are_met(labels: list[object], data: st.DataObject) -> None:
    n = len(labels)
    k = data.draw(st.integers(0, n))
    sizes = {v: labels.count(v) for v in labels}
    balanced = random(n, k, 1, constraints=Constraints(balance=labels))
    counts = {v: sum(labels[i] == v for i in balanced.indices) for v in sizes}
    assert sum(counts.values()) == k
    for v in sizes:
        for w in sizes:  # no group has two more than another that still had instances to give
            assert counts[v] - counts[w] <= 1 or counts[w] == sizes[w]
    shared = top(np.arange(n), k, constraints=Constraints(stratify=labels))
    for v in sizes:
        assert abs(sum(labels[i] == v for i in shared.indices) - k * sizes[v] / n) < 1
    assert len(shared) == k


def test_greedy_under_quotas_equals_a_literal_one() -> None:
    kernel = squared_cosines(40, seed=5)
    labels = np.arange(40) % 3
    picks: list[int] = []
    while len(picks) < 9:
        options = [j for j in range(40) if j not in picks and sum(labels[picks] == labels[j]) < 3]
        picks.append(max(options, key=lambda j: (coverage(kernel, [*picks, j]), -j)))
    for algorithm in ALGORITHMS:
        selection = facility_location(kernel, 9, constraints=Constraints(balance=labels), algorithm=algorithm)
        assert selection.indices.tolist() == picks


def test_bad_constraints() -> None:
    with pytest.raises(SelectionError, match="2 labels for 3"):
        random(3, 1, constraints=Constraints(balance=["a", "b"]))
    with pytest.raises(SelectionError, match="exclude each other"):
        random(2, 1, constraints=Constraints(balance=["a", "b"], stratify=["a", "b"]))


def test_top_and_random() -> None:
    best = top([0.2, 0.9, 0.9, -1.0], 3)
    assert best.indices.tolist() == [1, 2, 0]
    assert best.gains.tolist() == [0.9, 0.9, 0.2]
    assert best.bound == best.value == pytest.approx(2.0)
    assert best.representative.tolist() == [2, 0, 1, -1]
    assert best.weights.tolist() == [1, 1, 1]
    kernel = DenseKernel(squared_cosines(20))
    covered = top(np.arange(20), 5, kernel=kernel)
    assert np.array_equal(covered.representative, kernel.array[:, covered.indices].argmax(axis=1))
    drawn = random(20, 5, 7)
    assert drawn.indices.tolist() == random(20, 5, 7).indices.tolist()
    assert drawn.indices.tolist() != random(20, 5, 8).indices.tolist()
    assert drawn.bound is None
    assert drawn.certainty is None
    with pytest.raises(SelectionError, match="score at 1 is nan"):
        top([1.0, np.nan], 1)
    with pytest.raises(SelectionError, match="expected"):
        top([[1.0]], 1)


def test_registry() -> None:
    assert {"facility-location", "top", "random"} <= set(strategies())
    kernel = DenseKernel(squared_cosines(12))
    problem = Problem(n=12, k=3, kernel=kernel, scores=np.arange(12.0))
    for name in ("facility-location", "top", "random"):
        selection = select(name, problem)
        assert (selection.strategy, len(selection)) == (name, 3)
        assert strategy(name).summary.endswith(".")
    with pytest.raises(UnknownNameError, match="did you mean 'facility-location'"):
        strategy("facility_location")
    for name, need in (("facility-location", "kernel"), ("top", "scores")):
        with pytest.raises(SelectionError, match=f"needs .*{need}"):
            select(name, Problem(n=12, k=3))


def test_a_strategy_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))

    @register("longest", "The longest texts.", needs=("scores",))
    def longest(problem: Problem) -> Selection:
        return top(problem.need_scores(), problem.k, constraints=problem.constraints)

    assert select("longest", Problem(n=3, k=1, scores=np.array([1.0, 5.0, 2.0]))).indices.tolist() == [1]
    with pytest.raises(SelectionError, match="registered already"):
        register("longest", "Again.")(longest)
