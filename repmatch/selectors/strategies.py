"""One function a strategy, for the objectives that share the greedy loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repmatch.datamodels import Factors
from repmatch.errors import SelectionError
from repmatch.selectors.constraints import Constraints, Positions, positions
from repmatch.selectors.features import Concave, FeatureCoverage, Features
from repmatch.selectors.greedy import Objective, Progress, Search, Searched, solve
from repmatch.selectors.kernels import Kernel, as_kernel
from repmatch.selectors.objectives import (
    GraphCut,
    LogDeterminant,
    MeanMatch,
    SaturatedCoverage,
)
from repmatch.selectors.selection import Selection


def maximize(
    make: Callable[[], Objective],
    k: int,
    *,
    strategy: str = "objective",
    search: Search = "auto",
    constraints: Constraints | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Selection:
    """Select k instances by greedy maximisation of any objective.

    Args:
        make: makes the objective, without picks.
        k: how many to pick.
        strategy: its name, for the result.
        search: "plain", "lazy" (gains that never rise; same picks), "stochastic" (a sample a pick), or "auto".
        constraints: rules for the picks.
        seed: for the stochastic search.
        progress: called after each pick with picks made and wanted.

    Returns:
        The selection.
    """

    def state() -> Searched:
        return Searched(make(), search, k=k, seed=seed)

    return solve(state, k, strategy=strategy, constraints=constraints, progress=progress)


def graph_cut(
    kernel: Kernel | Factors | ArrayLike,
    k: int,
    *,
    trade: float = 2.0,
    constraints: Constraints | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Select instances that resemble all and differ from each other.

    Args:
        kernel: similarities of all instances with each other, at least 0.
        k: how many to pick.
        trade: λ; the smaller, the more the picks differ; a bound is given for λ ≥ 2.
        constraints: rules for the picks.
        progress: called after each pick with picks made and wanted.

    Returns:
        The selection.
    """
    given = as_kernel(kernel)
    return maximize(
        lambda: GraphCut(given, trade=trade), k, strategy="graph-cut", constraints=constraints, progress=progress
    )


def saturated_coverage(
    kernel: Kernel | Factors | ArrayLike,
    k: int,
    *,
    saturation: float = 0.1,
    search: Search = "auto",
    constraints: Constraints | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Selection:
    """Select instances that together cover every instance up to a share of its total similarity.

    Args:
        kernel: similarities, at least 0.
        k: how many to pick.
        saturation: the share, above 0, at most 1.
        search: how the best candidate is found.
        constraints: rules for the picks.
        seed: for the stochastic search.
        progress: called after each pick with picks made and wanted.

    Returns:
        The selection.
    """
    given = as_kernel(kernel)
    return maximize(
        lambda: SaturatedCoverage(given, saturation=saturation),
        k,
        strategy="saturated-coverage",
        search=search,
        constraints=constraints,
        seed=seed,
        progress=progress,
    )


def feature_coverage(
    features: Features | ArrayLike,
    k: int,
    *,
    weights: ArrayLike | None = None,
    concave: Concave = "sqrt",
    kernel: Kernel | None = None,
    constraints: Constraints | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Select instances in which every feature is present.

    Args:
        features: (n, f) floats of at least 0, a sparse matrix of scipy's kind, or `Features`.
        k: how many to pick.
        weights: (f,) floats of at least 0; those of the features, or 1 each, by default.
        concave: how returns fall, "sqrt" or "log".
        kernel: for the representatives only; without it every pick stands for itself alone.
        constraints: rules for the picks.
        progress: called after each pick with picks made and wanted.

    Returns:
        The selection.
    """
    return maximize(
        lambda: FeatureCoverage(features, weights=weights, concave=concave, kernel=kernel),
        k,
        strategy="feature-coverage",
        constraints=constraints,
        progress=progress,
    )


def dpp(
    kernel: Kernel | Factors | ArrayLike,
    k: int,
    *,
    ridge: float = 1e-6,
    constraints: Constraints | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Select instances that span a large volume: the greedy MAP of a determinantal point process.

    Args:
        kernel: positive semi-definite similarities of all instances with each other.
        k: how many to pick.
        ridge: added to the diagonal.
        constraints: rules for the picks.
        progress: called after each pick with picks made and wanted.

    Returns:
        The selection; the value is log det(K_S + ridge·I).
    """
    given = as_kernel(kernel)
    return maximize(
        lambda: LogDeterminant(given, ridge=ridge), k, strategy="dpp", constraints=constraints, progress=progress
    )


def herding(
    kernel: Kernel | Factors | ArrayLike,
    k: int,
    *,
    represented: Factors | None = None,
    constraints: Constraints | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Select instances whose mean is that of all (or of a target): greedy on the maximum mean discrepancy.

    Args:
        kernel: similarities of all candidates with each other; of factors no n × n pass is made.
        k: how many to pick.
        represented: factors of the target, where `kernel` is factors too; the candidates by default.
        constraints: rules for the picks.
        progress: called after each pick with picks made and wanted.

    Returns:
        The selection; the value is the squared length of the target's mean minus MMD² of the picks with the target.
    """
    given = as_kernel(kernel)
    means = None if represented is None else as_kernel(kernel, represented).means()
    return maximize(
        lambda: MeanMatch(given, means=means), k, strategy="herding", constraints=constraints, progress=progress
    )


class _Farthest(Objective):
    """Distance to the nearest pick: √(K_ii + K_jj − 2 K_ij), the distance in the kernel's space."""

    cheap = True
    monotone = False

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.n = kernel, kernel.shape[1]
        self.own, self.first = kernel.diagonal(), kernel.means()
        self.distance: NDArray[np.float64] | None = None

    def gains(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return each candidate's distance to the nearest pick; before the first, its mean similarity with all."""
        return (self.first if self.distance is None else self.distance)[indices]

    def add(self, index: int) -> None:
        """Note a pick."""
        column = self.kernel.columns(np.array([index], np.int64))[:, 0] if self.kernel is not None else self.own
        distance = np.sqrt(np.maximum(self.own + self.own[index] - 2.0 * column, 0.0))
        distance[index] = 0.0
        self.distance = distance if self.distance is None else np.minimum(self.distance, distance)


def k_center(
    kernel: Kernel | Factors | ArrayLike,
    k: int,
    *,
    constraints: Constraints | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Select instances so that none is far from a pick: farthest first (Gonzalez 1985).

    The first pick is the instance most similar to all on average.

    Args:
        kernel: positive semi-definite similarities of all instances with each other.
        k: how many to pick.
        constraints: rules for the picks.
        progress: called after each pick with picks made and wanted.

    Returns:
        The selection. Gains are each pick's distance from the picks before it; value is minus the radius, the largest
        distance of an instance from its nearest pick; without constraints no selection of k has a radius below half of
        it, so bound is minus half the radius.
    """
    given = as_kernel(kernel)
    kept: list[_Farthest] = []

    def make() -> Objective:
        kept.append(_Farthest(given))
        return kept[-1]

    if constraints is not None and constraints.costs is not None:
        raise SelectionError("k-center takes no budget: distances are no gains that a cost could be weighed against")
    out = maximize(make, k, strategy="k-center", constraints=constraints, progress=progress)
    distance = kept[-1].distance
    radius = np.inf if distance is None else float(distance.max(initial=0.0))
    gains = out.gains.copy()
    if len(gains) and (constraints is None or not len(constraints.given)):
        gains[0] = 0.0
    free = constraints is None or not constraints.names()
    bound = -radius / 2.0 if free and len(out) == k else None
    return replace(out, gains=gains, value=-radius, bound=bound)


def thin(
    kernel: Kernel | Factors | ArrayLike,
    most: float,
    *,
    scores: ArrayLike | None = None,
    limit: int | None = None,
    exclude: Positions = (),
) -> Selection:
    """Select instances of which no two are more similar than a limit, best scores first.

    Args:
        kernel: similarities of all instances with each other.
        most: two picks have at most this similarity.
        scores: (n,) floats; higher ones are considered first. In order of position by default.
        limit: most picks.
        exclude: positions that are never picked.

    KeyboardInterrupt ends it early, with the picks so far.

    Returns:
        The selection, as large as the order allows; every instance left out is more similar than `most` to a pick,
        unless `limit` was reached. Gains are the scores, or 1 each.
    """
    given = as_kernel(kernel)
    n = given.shape[1]
    values = np.ones(n) if scores is None else np.asarray(scores, np.float64)
    if values.shape != (n,) or not np.isfinite(values).all():
        raise SelectionError(
            f"scores of shape {values.shape} can't order {n} instances: expected ({n},) finite numbers"
        )
    picks: list[int] = []
    free = np.ones(n, np.bool_)
    free[positions(exclude, n, "exclude")] = False
    representative, similarity = np.full(n, -1, np.int64), np.zeros(n, np.float32)
    complete = True
    try:
        for index in np.argsort(-values, kind="stable").tolist():
            if limit is not None and len(picks) >= limit:
                break
            if free[index]:
                column = given.columns(np.array([index], np.int64))[:, 0]
                free &= column <= most
                free[index] = False
                better, position = column > similarity, len(picks)
                representative[better], similarity[better] = position, column[better]
                picks.append(index)  # at once, whenever it is interrupted
    except KeyboardInterrupt:
        complete = False
    gains = values[picks]
    return Selection(
        np.array(picks, np.int64), gains, float(gains.sum()), None, representative, similarity, "thin", "in order",
        () if complete else (f"interrupted after {len(picks)} picks",), complete,
    )  # fmt: skip
