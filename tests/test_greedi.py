from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from repmatch.errors import SelectionError
from repmatch.selectors import Constraints, Problem, facility_location, herding, partitioned, strategy
from repmatch.selectors.greedi import distributed, solve_part
from repmatch.selectors.kernels import DenseKernel, as_kernel
from repmatch.selectors.large import Part


def here(parts: Iterator[Part]) -> Iterator[NDArray[np.int64]]:
    """Workers that are this process."""
    return map(solve_part, parts)


def clustered(n: int = 600, seed: int = 3) -> NDArray[np.float64]:
    """A positive semi-definite kernel of instances in uneven groups: squared cosines of unit vectors."""
    draw = np.random.default_rng(seed)
    sizes = draw.dirichlet(np.full(12, 0.7))
    centres = draw.standard_normal((12, 24))
    points = centres[draw.choice(12, n, p=sizes)] + 0.6 * draw.standard_normal((n, 24))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return (points @ points.T) ** 2


def covered(kernel: NDArray[np.float64], picks: NDArray[np.int64]) -> float:
    """Facility location's objective, as its formula says."""
    return float(kernel[:, picks].max(axis=1).sum())


def discrepancy(kernel: NDArray[np.float64], picks: NDArray[np.int64]) -> float:
    """MMD² of some picks with all instances, as its formula says."""
    return float(kernel.mean() - 2 * kernel[:, picks].mean() + kernel[np.ix_(picks, picks)].mean())


@pytest.mark.parametrize(
    "rules", [Constraints(), Constraints(balance=[str(i % 3) for i in range(600)], exclude=[4, 9], include=[7])]
)
def test_facility_location_elsewhere_makes_the_picks_of_parts_here(rules: Constraints) -> None:
    kernel = clustered()
    local = partitioned(kernel, 15, parts=5, constraints=rules, seed=4)
    told: list[tuple[int, int]] = []
    problem = Problem(
        600, 15, as_kernel(kernel), constraints=rules, seed=4, progress=lambda done, total: told.append((done, total))
    )
    found = distributed("facility-location", problem, here, parts=5)
    np.testing.assert_array_equal(found.indices, local.indices)
    assert (found.value, found.algorithm) == (local.value, "partitioned")
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {total for _, total in told} == {5 * 15 + 15}


@pytest.mark.parametrize("seed", range(4))
def test_two_rounds_reach_95_percent_of_facility_location_in_one(seed: int) -> None:
    kernel = clustered(seed=seed)
    for k in (5, 25):
        found = distributed("facility-location", Problem(600, k, as_kernel(kernel), seed=seed), here, parts=8)
        exact = facility_location(kernel, k)
        assert covered(kernel, found.indices) >= 0.95 * covered(kernel, exact.indices)
        assert found.value == pytest.approx(covered(kernel, found.indices))


@pytest.mark.parametrize("seed", range(4))
def test_two_rounds_reach_95_percent_of_herding_in_one(seed: int) -> None:
    kernel = clustered(seed=seed)
    whole = float(kernel.mean())
    for k in (25, 60):
        found = distributed("herding", Problem(600, k, as_kernel(kernel), seed=seed), here, parts=6, oversample=3.0)
        exact = herding(kernel, k)
        assert whole - discrepancy(kernel, found.indices) >= 0.95 * (whole - discrepancy(kernel, exact.indices))
        assert found.value == pytest.approx(whole - discrepancy(kernel, found.indices))
        chance = np.random.default_rng(seed).choice(600, k, replace=False)
        assert discrepancy(kernel, found.indices) < discrepancy(kernel, chance)
        assert len(set(found.indices.tolist())) == k
        nearest = kernel[:, found.indices].argmax(axis=1)
        np.testing.assert_array_equal(found.representative, nearest)


def test_one_part_that_proposes_everything_is_one_round() -> None:
    kernel = clustered(120)
    for name, exact in (("facility-location", facility_location(kernel, 9)), ("herding", herding(kernel, 9))):
        found = distributed(name, Problem(120, 9, as_kernel(kernel)), here, parts=1, oversample=120 / 9)
        np.testing.assert_array_equal(found.indices, exact.indices)


def test_herding_in_parts_keeps_rules() -> None:
    kernel = clustered(200)
    rules = Constraints(balance=[str(i % 2) for i in range(200)], exclude=[3, 5])
    found = distributed("herding", Problem(200, 10, as_kernel(kernel), constraints=rules), here, parts=4)
    assert sorted(i % 2 for i in found.indices.tolist()) == [0] * 5 + [1] * 5
    assert not {3, 5} & set(found.indices.tolist())


def test_what_cannot_be_selected_in_parts_is_refused() -> None:
    kernel = as_kernel(clustered(50))
    wide = DenseKernel(np.ones((4, 50)), rectangular=True)
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("k-center", {}, "k-center can't be selected on a cluster"),
        ("facility-location", {"algorithm": "lazy"}, "'lazy' goes with one machine"),
        ("herding", {"constraints": Constraints(min_gain=0.1)}, "a selection with min_gain"),
        ("facility-location", {"constraints": Constraints(coverage=0.5)}, "a selection with coverage"),
        ("facility-location", {"kernel": wide}, "neither factors nor a symmetric array"),
    ]
    for name, more, reason in cases:
        with pytest.raises(SelectionError, match=reason):
            distributed(name, Problem(**{"n": 50, "k": 3, "kernel": kernel, **more}), here)
    assert strategy("herding").name == "herding"
