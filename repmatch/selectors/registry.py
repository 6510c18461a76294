"""Strategies by name, for the command line and for strategies of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from repmatch.errors import SelectionError, UnknownNameError
from repmatch.selectors.baselines import random, top
from repmatch.selectors.constraints import Constraints
from repmatch.selectors.facility import facility_location
from repmatch.selectors.kernels import Kernel
from repmatch.selectors.large import partitioned
from repmatch.selectors.medoids import k_medoids
from repmatch.selectors.selection import Selection
from repmatch.selectors.strategies import dpp, graph_cut, herding, k_center, saturated_coverage


@dataclass(frozen=True)
class Problem:
    """What a strategy is asked to solve.

    Attributes:
        n: instances.
        k: picks wanted.
        kernel: similarities, where there are any.
        scores: (n,) floats, one an instance, where there are any.
        constraints: quotas that the picks must respect.
        seed: for strategies that draw.
    """

    n: int
    k: int
    kernel: Kernel | None = None
    scores: NDArray[np.floating] | None = None
    constraints: Constraints = field(default_factory=Constraints)
    seed: int = 0

    def need_kernel(self) -> Kernel:
        """Return the kernel.

        Raises:
            SelectionError: there is none.
        """
        if self.kernel is None:
            raise SelectionError("this strategy needs a kernel: pass Problem(kernel=...)")
        return self.kernel

    def need_scores(self) -> NDArray[np.floating]:
        """Return the scores.

        Raises:
            SelectionError: there are none.
        """
        if self.scores is None:
            raise SelectionError("this strategy needs scores: pass Problem(scores=...)")
        return self.scores


Strategy = Callable[[Problem], Selection]


@dataclass(frozen=True)
class Entry:
    """A registered strategy.

    Attributes:
        name: what users call it.
        solve: the strategy.
        summary: one sentence for lists.
        needs: "kernel", "scores" or neither.
    """

    name: str
    solve: Strategy
    summary: str
    needs: tuple[str, ...] = ()


_entries: dict[str, Entry] = {}


def register(name: str, summary: str, *, needs: tuple[str, ...] = ()) -> Callable[[Strategy], Strategy]:
    """Register a strategy under a name, as a decorator.

    Args:
        name: what users call it, for example "facility-location".
        summary: one sentence for lists.
        needs: "kernel", "scores" or neither.

    Returns:
        A decorator that returns the strategy unchanged.

    Raises:
        SelectionError: the name is taken.
    """

    def add(solve: Strategy) -> Strategy:
        if name in _entries:
            raise SelectionError(f"a strategy named {name!r} is registered already: choose another name")
        _entries[name] = Entry(name, solve, summary, needs)
        return solve

    return add


def strategies() -> dict[str, Entry]:
    """Return every registered strategy by name, in order of names."""
    return dict(sorted(_entries.items()))


def strategy(name: str) -> Entry:
    """Return a strategy by name.

    Args:
        name: what users call it.

    Returns:
        Its entry.

    Raises:
        UnknownNameError: no strategy has that name.
    """
    if name not in _entries:
        raise UnknownNameError.of("strategy", name, _entries)
    return _entries[name]


def select(name: str, problem: Problem) -> Selection:
    """Solve a problem with the strategy of a name.

    Args:
        name: the strategy.
        problem: what to solve.

    Returns:
        The selection.
    """
    return strategy(name).solve(problem)


@register("facility-location", "Picks that resemble every instance (greedy, exact).", needs=("kernel",))
def _facility_location(problem: Problem) -> Selection:
    return facility_location(problem.need_kernel(), problem.k, constraints=problem.constraints)


@register("top", "The highest scores.", needs=("scores",))
def _top(problem: Problem) -> Selection:
    return top(problem.need_scores(), problem.k, constraints=problem.constraints, kernel=problem.kernel)


@register("random", "A draw by chance.")
def _random(problem: Problem) -> Selection:
    return random(problem.n, problem.k, problem.seed, constraints=problem.constraints, kernel=problem.kernel)


@register("k-medoids", "Facility location, improved by swaps.", needs=("kernel",))
def _k_medoids(problem: Problem) -> Selection:
    return k_medoids(problem.need_kernel(), problem.k, constraints=problem.constraints)


@register("herding", "Picks whose mean is that of all (maximum mean discrepancy).", needs=("kernel",))
def _herding(problem: Problem) -> Selection:
    return herding(problem.need_kernel(), problem.k, constraints=problem.constraints)


@register("k-center", "No instance is far from a pick (farthest first).", needs=("kernel",))
def _k_center(problem: Problem) -> Selection:
    return k_center(problem.need_kernel(), problem.k, constraints=problem.constraints)


@register("graph-cut", "Picks that resemble all and differ from each other.", needs=("kernel",))
def _graph_cut(problem: Problem) -> Selection:
    return graph_cut(problem.need_kernel(), problem.k, constraints=problem.constraints)


@register("saturated-coverage", "All picks together cover every instance up to a limit.", needs=("kernel",))
def _saturated_coverage(problem: Problem) -> Selection:
    return saturated_coverage(problem.need_kernel(), problem.k, constraints=problem.constraints)


@register("dpp", "Picks that span a large volume (determinantal point process, greedy).", needs=("kernel",))
def _dpp(problem: Problem) -> Selection:
    return dpp(problem.need_kernel(), problem.k, constraints=problem.constraints)


@register("partitioned", "Facility location in parts, for very many instances.", needs=("kernel",))
def _partitioned(problem: Problem) -> Selection:
    if problem.constraints.names():
        raise SelectionError("the partitioned strategy takes no rules: use facility-location with them")
    return partitioned(problem.need_kernel(), problem.k, seed=problem.seed)
