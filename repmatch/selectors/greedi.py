"""Two-round greedy over many machines, GreeDi (Mirzasoleiman et al. 2013), for facility location and herding.

Random parts propose `oversample` · k picks together, each part by greedy on its own members; greedy among all proposals
makes the selection. Nothing here knows of machines: what solves the parts is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from repmatch.errors import SelectionError
from repmatch.selectors.baselines import represent_or_stop
from repmatch.selectors.constraints import Constraints
from repmatch.selectors.greedy import Objective, Progress
from repmatch.selectors.kernels import Kernel
from repmatch.selectors.large import PROPOSALS, Part, Told, Workers, opened, partitioned, parts_of, propose, split
from repmatch.selectors.objectives import MeanMatch
from repmatch.selectors.registry import Problem
from repmatch.selectors.selection import Selection
from repmatch.selectors.strategies import maximize

HERDING = 6.0  # times k that all parts propose together for herding
STRATEGIES = ("facility-location", "herding")


def solve_part(part: Part) -> NDArray[np.int64]:
    """Return what a part proposes.

    Args:
        part: the part; with means, by herding towards the target they speak of, else by facility location.

    Returns:
        (wanted,) positions among its members, at most.
    """
    if part.means is None:
        return propose(part.kernel, part.wanted, part.rules)
    return _herd(part.kernel, part.means, part.wanted, part.rules).indices


def distributed(
    strategy: str, problem: Problem, workers: Workers, *, parts: int | None = None, oversample: float | None = None
) -> Selection:
    """Select in two rounds, the first of them elsewhere.

    Args:
        strategy: "facility-location" or "herding".
        problem: what to solve.
        workers: given the parts, yield what each proposes, in order.
        parts: how many parts; by default such that a part has about 10,000 instances, which bounds a worker's memory.
        oversample: all parts together propose this many times k; by default 3 (herding 6), and more where k is small.

    Returns:
        The selection; for facility location the picks of the algorithm "partitioned" on one machine.

    Raises:
        SelectionError: another strategy or algorithm, or a kernel or rule that can't be split.
    """
    if strategy not in STRATEGIES:
        raise SelectionError(f"{strategy} can't be selected on a cluster: expected {' or '.join(STRATEGIES)}")
    if problem.algorithm not in ("auto", "partitioned"):
        raise SelectionError(f"a cluster works in parts: the algorithm {problem.algorithm!r} goes with one machine")
    kernel, rules = problem.need_kernel(), problem.constraints
    if strategy == "herding":
        return herding_in_parts(
            kernel, problem.k, workers, parts=parts, oversample=oversample, constraints=rules, seed=problem.seed,
            progress=problem.progress,
        )  # fmt: skip
    found = partitioned(
        kernel,
        problem.k,
        parts=parts,
        oversample=oversample,
        constraints=rules,
        seed=problem.seed,
        progress=problem.progress,
        workers=workers,
    )
    return replace(found, reason="the first round was done on a cluster")


def herding_in_parts(
    kernel: Kernel,
    k: int,
    workers: Workers,
    *,
    parts: int | None = None,
    oversample: float | None = None,
    constraints: Constraints | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Selection:
    """Select k instances whose mean is that of all, in two rounds.

    Every part herds towards the mean of all instances, not of its own: a candidate's mean similarity with all is exact
    and cheap, through mean projectors.

    Args:
        kernel: similarities of all instances with each other, of factors or an array.
        k: how many to pick.
        workers: given the parts, yield what each proposes, in order.
        parts: how many parts; by default such that a part has about 10,000 instances.
        oversample: all parts together propose this many times k; by default 6, and more where k is small.
        constraints: rules that parts can keep.
        seed: for the parts.
        progress: called with picks made and wanted, both rounds together.

    Returns:
        The selection; value and gains are exact.

    Raises:
        SelectionError: a size that can't be met, or a kernel or rule that can't be split.
    """
    n = kernel.shape[1]
    parts = parts_of(n) if parts is None else parts
    # Late picks make up for what the first ones lack, which picks of one part cannot know: more proposals than k help.
    oversample = max(HERDING, PROPOSALS / max(1, k)) if oversample is None else oversample
    rounds, notes = opened(kernel, k, constraints or Constraints(), parts, oversample)
    order = np.random.default_rng(seed).permutation(n)
    tell = Told(progress, parts * math.ceil(oversample * k / parts) + k)
    means = kernel.means()
    pool = rounds.pool(np.concatenate(rounds.elsewhere(order, workers, tell, means)), order)
    wanted, within = rounds.within(pool)
    final = _herd(split(kernel, pool, pool), means[pool], wanted, within, tell.next())
    picks = pool[final.indices]
    representative, similarity, cut = represent_or_stop(kernel, picks, n)
    return replace(
        final,
        indices=picks,
        representative=representative,
        similarity=similarity,
        algorithm="partitioned",
        reason="the first round was done on a cluster",
        notes=(*notes, *final.notes, f"{parts} parts, {len(pool)} candidates in the second round", *cut),
        complete=final.complete and not cut,
        seed=seed,
    )


def _herd(
    kernel: Kernel, means: NDArray[np.float64], k: int, rules: Constraints, progress: Progress | None = None
) -> Selection:
    make: Callable[[], Objective] = lambda: MeanMatch(kernel, means=means)  # noqa: E731
    return maximize(make, k, strategy="herding", constraints=rules, progress=progress)
