"""Strategies by name, for the command line and for strategies of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from repmatch.errors import SelectionError, SelectionUsageError, UnknownChoiceError
from repmatch.selectors.constraints import Constraints
from repmatch.selectors.features import Features
from repmatch.selectors.greedy import Progress
from repmatch.selectors.kernels import Kernel
from repmatch.selectors.selection import Selection


@dataclass(frozen=True)
class Problem:
    """What a strategy is asked to solve.

    Attributes:
        n: instances.
        k: picks wanted.
        kernel: similarities, where there are any.
        scores: (n,) floats, one an instance, where there are any.
        features: of the instances, where there are any.
        constraints: rules that the picks must respect.
        seed: for strategies that draw.
        algorithm: how a strategy that knows several finds its picks; "auto" lets it choose.
        parameters: numbers of the strategy's own, such as graph cut's trade.
        mix: strategy -> weight, for the mixture.
        progress: called after each pick with picks made and wanted.
    """

    n: int
    k: int
    kernel: Kernel | None = None
    scores: NDArray[np.floating] | None = None
    constraints: Constraints = field(default_factory=Constraints)
    seed: int = 0
    algorithm: str = "auto"
    parameters: Mapping[str, float] = field(default_factory=dict)
    mix: Mapping[str, float] = field(default_factory=dict)
    progress: Progress | None = None
    features: Features | None = None

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

    def need_features(self) -> Features:
        """Return the features.

        Raises:
            SelectionError: there are none.
        """
        if self.features is None:
            raise SelectionError("this strategy needs features: pass Problem(features=...)")
        return self.features


Strategy = Callable[[Problem], Selection]


@dataclass(frozen=True)
class Entry:
    """A registered strategy.

    Attributes:
        name: what users call it.
        solve: the strategy.
        summary: one sentence for lists.
        needs: "kernel", "scores", "features" or none.
        algorithms: what `Problem.algorithm` may say besides "auto".
        parameters: names that `Problem.parameters` may hold.
    """

    name: str
    solve: Strategy
    summary: str
    needs: tuple[str, ...] = ()
    algorithms: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()

    def check(self, problem: Problem) -> None:
        """Refuse what the strategy does not know.

        Args:
            problem: what to solve.

        Raises:
            SelectionError: an algorithm or a parameter that is not the strategy's.
        """
        if problem.algorithm not in ("auto", *self.algorithms):
            known = ", ".join(("auto", *self.algorithms))
            raise SelectionUsageError(f"{self.name} has no algorithm {problem.algorithm!r}: expected {known}")
        for name in problem.parameters:
            if name not in self.parameters:
                known = ", ".join(self.parameters) or "none"
                raise SelectionUsageError(f"{self.name} has no parameter {name!r}: it takes {known}")
        if problem.mix and self.name != "mixture":
            raise SelectionUsageError(f"weights of a mixture go with the strategy mixture, not with {self.name}")


_entries: dict[str, Entry] = {}


def register(
    name: str,
    summary: str,
    *,
    needs: tuple[str, ...] = (),
    algorithms: tuple[str, ...] = (),
    parameters: tuple[str, ...] = (),
) -> Callable[[Strategy], Strategy]:
    """Register a strategy under a name, as a decorator.

    Args:
        name: what users call it, for example "facility-location".
        summary: one sentence for lists.
        needs: "kernel", "scores", "features" or none.
        algorithms: what `Problem.algorithm` may say besides "auto".
        parameters: names that `Problem.parameters` may hold.

    Returns:
        A decorator that returns the strategy unchanged.

    Raises:
        SelectionError: the name is taken.
    """

    def add(solve: Strategy) -> Strategy:
        if name in _entries:
            raise SelectionError(f"a strategy named {name!r} is registered already: choose another name")
        _entries[name] = Entry(name, solve, summary, needs, algorithms, parameters)
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
        UnknownChoiceError: no strategy has that name.
    """
    if name not in _entries:
        raise UnknownChoiceError.of("strategy", name, _entries)
    return _entries[name]


def select(name: str, problem: Problem) -> Selection:
    """Solve a problem with the strategy of a name.

    Args:
        name: the strategy.
        problem: what to solve.

    Returns:
        The selection.

    Raises:
        UnknownChoiceError: no strategy has that name.
        SelectionError: the strategy does not know the algorithm or a parameter, or the rules can't be met.
    """
    entry = strategy(name)
    entry.check(problem)
    return entry.solve(problem)
