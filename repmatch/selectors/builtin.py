"""The strategies that repmatch brings, under the names that users call them by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np

from repmatch.errors import SelectionError, SelectionUsageError
from repmatch.selectors.baselines import random, top
from repmatch.selectors.constraints import check_size
from repmatch.selectors.facility import Algorithm, facility_location
from repmatch.selectors.features import FeatureCoverage
from repmatch.selectors.greedy import Objective, Search
from repmatch.selectors.medoids import k_medoids
from repmatch.selectors.objectives import Coverage, GraphCut, MeanMatch, Mixture, SaturatedCoverage, ScoreSum
from repmatch.selectors.registry import Problem, register
from repmatch.selectors.selection import Selection
from repmatch.selectors.strategies import (
    dpp,
    feature_coverage,
    graph_cut,
    herding,
    k_center,
    maximize,
    saturated_coverage,
    thin,
)

KERNEL = ("kernel",)
SEARCHES = ("plain", "lazy", "stochastic")


def _shared(problem: Problem) -> dict[str, Any]:
    return {"constraints": problem.constraints, "progress": problem.progress, **problem.parameters}


@register(
    "facility-location",
    "Picks that together resemble every instance.",
    needs=KERNEL,
    algorithms=("incremental", "pruned", "lazy", "stochastic", "sparse", "partitioned"),
)
def _facility_location(problem: Problem) -> Selection:
    algorithm = cast(Algorithm, problem.algorithm)
    kernel = problem.need_kernel()
    return facility_location(kernel, problem.k, algorithm=algorithm, seed=problem.seed, **_shared(problem))


@register("k-medoids", "Facility location, improved by swaps.", needs=KERNEL)
def _k_medoids(problem: Problem) -> Selection:
    return k_medoids(problem.need_kernel(), problem.k, **_shared(problem))


@register("herding", "Picks whose mean is that of all (maximum mean discrepancy).", needs=KERNEL)
def _herding(problem: Problem) -> Selection:
    return herding(problem.need_kernel(), problem.k, **_shared(problem))


@register("k-center", "No instance is far from a pick (farthest first).", needs=KERNEL)
def _k_center(problem: Problem) -> Selection:
    return k_center(problem.need_kernel(), problem.k, **_shared(problem))


@register("graph-cut", "Picks that resemble all and differ from each other.", needs=KERNEL, parameters=("trade",))
def _graph_cut(problem: Problem) -> Selection:
    return graph_cut(problem.need_kernel(), problem.k, **_shared(problem))


@register(
    "saturated-coverage",
    "All picks together cover every instance up to a limit.",
    needs=KERNEL,
    algorithms=SEARCHES,
    parameters=("saturation",),
)
def _saturated_coverage(problem: Problem) -> Selection:
    search = cast(Search, problem.algorithm)
    kernel = problem.need_kernel()
    return saturated_coverage(kernel, problem.k, search=search, seed=problem.seed, **_shared(problem))


@register(
    "dpp",
    "Picks that span a large volume (determinantal point process, greedy).",
    needs=KERNEL,
    parameters=("ridge",),
)
def _dpp(problem: Problem) -> Selection:
    return dpp(problem.need_kernel(), problem.k, **_shared(problem))


@register("feature-coverage", "Picks in which every word (or other feature) occurs.", needs=("features",))
def _feature_coverage(problem: Problem) -> Selection:
    return feature_coverage(problem.need_features(), problem.k, kernel=problem.kernel, **_shared(problem))


@register("mixture", "A weighted sum of objectives.", needs=KERNEL, algorithms=SEARCHES)
def _mixture(problem: Problem) -> Selection:
    parts = _parts(problem)
    return maximize(
        lambda: Mixture([(weight, make()) for weight, make in parts]),
        problem.k,
        strategy="mixture",
        search=cast(Search, problem.algorithm),
        constraints=problem.constraints,
        seed=problem.seed,
        progress=problem.progress,
    )


@register("thin", "Instances of which no two are too similar, best score or first row first.", needs=KERNEL)
def _thin(problem: Problem) -> Selection:
    rules = problem.constraints
    others = [name for name in rules.names() if name not in ("apart", "exclude")]
    if rules.apart is None or others:
        raise SelectionError(
            "thin takes a limit of similarity, apart, and what to exclude; "
            + (f"{others[0]} goes with top or facility-location, and so does apart" if others else "give apart")
        )
    check_size(problem.n, problem.k)
    kernel = problem.need_kernel()
    found = thin(kernel, rules.apart, scores=problem.scores, limit=problem.k, exclude=rules.exclude)
    if found.complete and len(found) < problem.k:
        note = f"{len(found)} of {problem.k} picks: every other instance is more similar than {rules.apart} to a pick"
        found = replace(found, notes=(note,))
    return found


@register("top", "The highest scores.", needs=("scores",))
def _top(problem: Problem) -> Selection:
    return top(problem.need_scores(), problem.k, constraints=problem.constraints, kernel=problem.kernel)


@register("random", "A draw by chance.")
def _random(problem: Problem) -> Selection:
    return random(problem.n, problem.k, problem.seed, constraints=problem.constraints, kernel=problem.kernel)


def _makers(problem: Problem) -> Mapping[str, Callable[[], Objective]]:
    return {
        "facility-location": lambda: Coverage(problem.need_kernel()),
        "graph-cut": lambda: GraphCut(problem.need_kernel()),
        "saturated-coverage": lambda: SaturatedCoverage(problem.need_kernel()),
        "herding": lambda: MeanMatch(problem.need_kernel()),
        "feature-coverage": lambda: FeatureCoverage(problem.need_features(), kernel=problem.kernel),
        "top": lambda: ScoreSum(problem.need_scores(), kernel=problem.kernel),
    }


def _parts(problem: Problem) -> list[tuple[float, Callable[[], Objective]]]:
    """Return the objectives of a mixture with weights that make their best first gains comparable."""
    makers = _makers(problem)
    parts = []
    if not problem.mix:
        raise SelectionUsageError(f"a mixture needs weights: give some of {', '.join(makers)}")
    for name, weight in problem.mix.items():
        if name not in makers:
            raise SelectionUsageError(f"{name!r} can't be mixed: expected some of {', '.join(makers)}")
        if not 0.0 <= weight < np.inf:
            raise SelectionUsageError(f"the weight of {name} is {weight}: expected a finite number of at least 0")
        first = float(makers[name]().gains(np.arange(problem.n)).max(initial=0.0))
        parts.append((weight / first if first > 0.0 else weight, makers[name]))
    return parts
