"""Whatever is interrupted: picks that were made are kept, and nothing is claimed that was not found out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from oracle_selectors import Scipy, squared_cosines
from oracle_similarity import make_factors

import repmatch
from repmatch.output import Output
from repmatch.selectors import (
    Constraints,
    DenseKernel,
    FactorKernel,
    Features,
    Problem,
    facility_location,
    k_medoids,
    saturated_coverage,
    strategies,
    thin,
)
from repmatch.selectors.baselines import UNKNOWN

KERNEL = squared_cosines(40)
FACTORS = make_factors(60, (64, 64), 1, "sign")
OWN: dict[str, dict[str, Any]] = {
    "mixture": {"mix": {"facility-location": 1.0}},
    "feature-coverage": {"features": Features.of_matrix(Scipy(np.random.default_rng(0).random((60, 5))))},
}
PASSES = [
    *((name, "auto") for name in strategies() if name not in ("facility-location", "k-medoids", "thin")),
    ("facility-location", "stochastic"),
    ("facility-location", "partitioned"),
]


def stop(*_: object) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("name", "algorithm"), PASSES)
def test_picks_outlive_the_pass_that_finds_who_represents_whom(name: str, algorithm: str) -> None:
    if not strategies()[name].solve.__module__.startswith("repmatch."):
        pytest.skip("registered by the documentation's examples")

    def solve(told: list[str], broken: bool) -> Any:
        kernel = FactorKernel(FACTORS)

        def tell(what: str, done: int, total: int) -> None:
            told.append(what)
            if broken and what == "representing":
                raise KeyboardInterrupt

        kernel.progress = tell
        scores = np.arange(60.0)
        return strategies()[name].solve(Problem(60, 9, kernel, scores, algorithm=algorithm, **OWN.get(name, {})))

    told: list[str] = []
    whole, part = solve(told, False), solve([], True)
    assert "representing" in told
    assert whole.complete
    assert not part.complete
    assert part.indices.tolist() == whole.indices.tolist()
    assert part.gains.tolist() == whole.gains.tolist()
    assert (part.value, part.bound) == (whole.value, whole.bound)
    assert part.notes == (*whole.notes, UNKNOWN)
    assert (part.representative == -1).all()
    assert not part.similarity.any()
    assert not part.weights.any()
    assert len(part.representative) == len(whole.representative) == 60


def test_picks_outlive_their_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    from repmatch.selectors import greedy

    whole = facility_location(KERNEL, 9)
    monkeypatch.setattr(greedy, "_closer", stop)
    part = facility_location(KERNEL, 9)
    assert part.indices.tolist() == whole.indices.tolist()
    assert not part.complete
    assert part.notes == ("interrupted after 9 of 9 picks",)
    assert part.bound == pytest.approx(np.sort(KERNEL.sum(axis=0, dtype=np.float64))[-9:].sum(), rel=1e-3)
    assert np.array_equal(part.representative, whole.representative)


def test_the_first_of_two_greedies_outlives_the_second() -> None:
    rules, seen = Constraints(costs=np.arange(1.0, 41.0), budget=60.0), []

    def tell(done: int, wanted: int) -> None:
        seen.append(done)
        if len(seen) > 1 and done == 1:  # the second greedy's first pick
            raise KeyboardInterrupt

    part = facility_location(KERNEL, 40, constraints=rules, progress=tell)
    assert not part.complete
    assert part.notes[-1] == "interrupted in the second greedy, by gain per cost"
    assert part.algorithm == "incremental"
    assert part.cost is not None
    assert part.cost <= 60.0
    assert len(part) == max(seen)


def test_swaps_that_are_interrupted_halfway_are_kept() -> None:
    kernel = squared_cosines(60, seed=4)
    whole = k_medoids(kernel, 5)
    for at in range(1, 6):
        count = 0

        class Broken(DenseKernel):
            def columns(self, indices: Any) -> Any:
                nonlocal count
                count += 1
                if count == at:  # noqa: B023
                    raise KeyboardInterrupt
                return super().columns(indices)

        part = k_medoids(Broken(kernel), 5)
        if count < at:
            assert part.complete
            assert part.indices.tolist() == whole.indices.tolist()
        else:
            assert not part.complete
            assert "interrupted, so that more may help" in part.notes[-1]
        reached = np.maximum(kernel[:, part.indices], 0.0).max(axis=1)
        assert part.value == pytest.approx(reached.sum(dtype=np.float64))
        assert part.gains.sum() == pytest.approx(part.value)
        assert np.array_equal(part.similarity, reached)
        assert np.array_equal(part.representative, kernel[:, part.indices].argmax(axis=1))


def test_thinning_that_is_interrupted_keeps_its_picks() -> None:
    class Broken(DenseKernel):
        left = 3

        def columns(self, indices: Any) -> Any:
            self.left -= 1
            return super().columns(indices) if self.left >= 0 else stop()

    whole, part = thin(KERNEL, 0.6), thin(Broken(KERNEL), 0.6)
    assert part.indices.tolist() == whole.indices[:3].tolist()
    assert part.notes == ("interrupted after 3 picks",)
    assert not part.complete
    assert part.representative.max() == 2
    strategy = strategies()["thin"].solve(Problem(40, 20, Broken(KERNEL), constraints=Constraints(apart=0.6)))
    assert strategy.notes == part.notes


def test_a_pick_that_was_not_finished_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from repmatch.selectors.objectives import SaturatedCoverage

    rules = Constraints(costs=np.full(40, 0.1), budget=2.0)
    whole, add = saturated_coverage(KERNEL, 9, constraints=rules), SaturatedCoverage.add

    def fifth(self: SaturatedCoverage, index: int) -> None:
        if index == whole.indices[4]:
            raise KeyboardInterrupt
        add(self, index)

    monkeypatch.setattr(SaturatedCoverage, "add", fifth)
    part = saturated_coverage(KERNEL, 9, constraints=rules)
    assert part.indices.tolist() == whole.indices[:4].tolist()
    assert part.cost == pytest.approx(0.4)
    assert len(part.gains) == 4


@pytest.mark.parametrize(
    "words", [("--strategy", "herding"), ("--represent", "toy[stars = 1]"), ("--algorithm", "stochastic")]
)
def test_the_command_keeps_all_picks(
    run: Any, toy_store: Any, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    command = ("--store", toy_store, "select", "toy", "-k", 12, *words, "--json")
    whole = [row["id"] for row in run(*command).objects]
    assert len(whole) == 12

    def tell(self: Output, stage: str, done: int, total: int | None) -> None:
        if stage == "representing toy":
            raise KeyboardInterrupt

    monkeypatch.setattr(Output, "progress", tell)
    result = run(*command, "--name", "part")
    assert result.code == 130
    assert UNKNOWN in result.err
    assert [row["id"] for row in result.objects] == whole
    assert {row["represents"] for row in result.objects} == {0}
    monkeypatch.undo()
    with repmatch.open(toy_store, mode="r") as store:
        kept = store.coreset("part")
    assert list(kept.ids) == whole
    assert kept.arguments["complete"] is False
    again = run("--store", toy_store, "select", "toy", "-k", 12, "--include", "part", "--json")
    assert [row["id"] for row in again.objects] == whole
    assert sum(row["represents"] for row in again.objects) == 60
