"""The greedy loop that every objective shares: picks, rules, stopping, interruption, certificates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from repmatch.errors import SelectionError
from repmatch.selectors.baselines import Represented, represent, represent_or_stop
from repmatch.selectors.constraints import Constraints, demand, positions
from repmatch.selectors.kernels import Kernel
from repmatch.selectors.selection import Selection
from repmatch.selectors.spacing import Spacing
from repmatch.selectors.tracker import Tracker

Progress = Callable[[int, int], None]
Search = Literal["auto", "plain", "lazy", "stochastic"]
FIRST_BATCH, LAST_BATCH = 8, 512  # candidates that a lazy search evaluates at a time: few at first, then more


class State(ABC):
    """An objective and the picks made so far, as the greedy loop sees it.

    Attributes:
        n: candidates.
        name: the algorithm, for the result.
        bounded: gains never rise and are never negative (monotone, submodular): certificates hold.
        kernel: for representatives, or None.
    """

    n: int
    name = "plain"
    bounded = True
    kernel: Kernel | None = None

    @abstractmethod
    def best(self, allowed: NDArray[np.bool_], costs: NDArray[np.float64] | None = None) -> tuple[int, float]:
        """Return the allowed candidate of the largest gain (with costs: gain per cost), and its gain."""

    @abstractmethod
    def add(self, index: int, position: int) -> None:
        """Note a pick and its position in the pick order (-1: chosen before)."""

    @abstractmethod
    def gain(self, index: int) -> float:
        """Return the gain of one candidate."""

    @abstractmethod
    def upper(self) -> NDArray[np.float64]:
        """Return (n,) upper bounds on the gains left."""

    def beyond(self) -> float:
        """Return how much more than their gains any instances could add together: 0 where gains know of everything."""
        return 0.0

    def ceiling(self) -> float:
        """Return the value of all instances together."""
        raise SelectionError("this objective does not know the value of all instances: coverage can't stop it")

    def represented(self, picks: NDArray[np.int64]) -> Represented:
        """Return each represented instance's pick and its similarity."""
        return represent(self.kernel, picks, self.n)


def solve(
    make: Callable[[], State],
    k: int,
    *,
    strategy: str,
    constraints: Constraints | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Run greedy under rules.

    With a budget, greedy by gain and greedy by gain per cost both run and the better is returned; the first pick of the
    former is the best single item, so no single item beats the result (Leskovec et al. 2007).

    Args:
        make: makes a fresh state.
        k: how many to pick.
        strategy: its name, for the result.
        constraints: the rules.
        progress: called after each pick with picks made and wanted.

    Returns:
        The selection.

    Raises:
        SelectionError: rules that can't be met.
    """
    rules = constraints or Constraints()
    first = make()
    result = run(first, rules, rules.tracker(first.n, k), k, strategy=strategy, progress=progress)
    if rules.costs is None or not result.complete:
        return result
    try:
        other = run(make(), rules, rules.tracker(first.n, k), k, strategy=strategy, progress=progress, by_rate=True)
    except KeyboardInterrupt:
        other = None
    better = result if other is None or other.value <= result.value else other
    if other is None or not other.complete:
        untold = () if better is other else ("interrupted in the second greedy, by gain per cost",)
        return replace(better, complete=False, notes=(*better.notes, *untold))
    bounds = [some.bound for some in (result, other) if some.bound is not None]
    return replace(better, bound=max(better.value, min(bounds)) if bounds else None)


def run(
    state: State,
    rules: Constraints,
    tracker: Tracker,
    k: int,
    *,
    strategy: str,
    progress: Progress | None = None,
    by_rate: bool = False,
) -> Selection:
    """Pick greedily until the rules allow no more.

    Args:
        state: a fresh objective.
        rules: the rules.
        tracker: their tracker.
        k: how many to pick.
        strategy: its name, for the result.
        progress: called after each pick with picks made and wanted.
        by_rate: pick by gain per cost.

    Returns:
        The selection; after KeyboardInterrupt the picks so far, marked incomplete.
    """
    base = 0.0
    near = Spacing(state.kernel, rules, tracker)
    for index in positions(rules.given, state.n, "given"):
        base += state.gain(int(index))
        state.add(int(index), -1)
        near.close(int(index))
    budget, free = tracker.budget, tracker.open.copy()
    certain = state.bounded and not (len(rules.given) and state.beyond() > 0.0)  # else the given's value is not known
    bound = _most(state, free, k, tracker.costs, budget)
    target = np.inf if rules.coverage is None else rules.coverage * state.ceiling()
    made: list[tuple[int, float]] = []
    notes, complete = tracker.notes, True
    try:
        for index, gain in _picks(state, rules, tracker, target - base, by_rate=by_rate):
            tracker.add(index)
            state.add(index, len(made))
            made.append((index, gain))
            near.close(index)
            if progress is not None:
                progress(len(made), k)
        gains = [gain for _, gain in made]
        notes += _ended(state, rules, tracker, gains, k, reached=base + sum(gains) >= target)
        bound = _closer(state, free, made, k, tracker.costs, budget, bound)
    except KeyboardInterrupt:
        complete, notes = False, (*notes, f"interrupted after {len(made)} of {k} picks")
    picks, gains = np.array([index for index, _ in made], np.int64), [gain for _, gain in made]
    value = base + sum(gains)
    found = represent_or_stop(state.kernel, picks, state.n, partial(state.represented, picks) if complete else None)
    return Selection(
        indices=picks,
        gains=np.array(gains, np.float64),
        value=value,
        bound=max(value, base + bound) if certain and np.isfinite(bound) else None,
        representative=found[0],
        similarity=found[1],
        strategy=strategy,
        algorithm=state.name + (", gain per cost" if by_rate else ""),
        notes=(*notes, *found[2]),
        complete=complete and not found[2],
        cost=tracker.cost(picks),
        base=base,
    )


def _closer(
    state: State,
    free: NDArray[np.bool_],
    made: list[tuple[int, float]],
    k: int,
    costs: NDArray[np.float64] | None,
    budget: float,
    first: float,
) -> float:
    """Bound what as many picks can add, now that these are made; `first` bounds what k of `free` can."""
    size, left = len(made) if costs is None else k, free.copy()
    left[[index for index, _ in made]] = False
    bound = sum(gain for _, gain in made) + _most(state, left, size, costs, budget)
    return min(bound, first) if size == k else bound


def _picks(
    state: State, rules: Constraints, tracker: Tracker, missing: float, *, by_rate: bool
) -> Iterator[tuple[int, float]]:
    """Yield picks with their gains, what must be picked first, until a rule ends it; the caller notes each of them."""
    for forced in positions(rules.include, state.n, "include").tolist():
        gain = state.gain(forced)
        missing -= gain
        yield forced, gain
    while tracker.allowed.any():
        index, gain = state.best(tracker.allowed, tracker.costs if by_rate else None) if missing > 0.0 else (-1, 0.0)
        if index < 0 or (rules.min_gain is not None and gain < rules.min_gain):
            if not tracker.only_owed():  # a minimum is met before anything ends the run
                return
            index, gain = state.best(tracker.allowed, tracker.costs if by_rate else None)
        missing -= gain
        yield index, gain


def _ended(
    state: State, rules: Constraints, tracker: Tracker, gains: list[float], k: int, *, reached: bool
) -> tuple[str, ...]:
    """Say why there are fewer picks than wanted; refuse where no rule explains it."""
    made = len(gains)
    notes = _idle(state, rules, gains)
    if made >= k:
        return notes
    if reached and not tracker.owed():
        return (*notes, f"stopped at {made} of {k} picks: coverage {rules.coverage} is reached")
    if rules.min_gain is not None and tracker.allowed.any() and not tracker.owed():
        gain = state.best(tracker.allowed)[1]
        return (*notes, f"stopped at {made} of {k} picks: the next would gain {gain:.4g}")
    return (*notes, *demand(rules, tracker, made, k))


def _idle(state: State, rules: Constraints, gains: list[float]) -> tuple[str, ...]:
    """Say so where the last picks add nothing."""
    if not state.bounded or not gains or gains[-1] > 0.0 or len(gains) <= len(rules.include):
        return ()
    useful = max((i + 1 for i, gain in enumerate(gains) if gain > 0.0), default=0)
    return (f"the last {len(gains) - useful} picks gain nothing: {useful} reach the same",)


def _most(state: State, free: NDArray[np.bool_], k: int, costs: NDArray[np.float64] | None, budget: float) -> float:
    """Bound what any k affordable instances can add: the k largest gains, and the fractional knapsack of all."""
    gains = np.maximum(state.upper()[free], 0.0)
    if not k or not len(gains):
        return state.beyond()
    largest = gains if k >= len(gains) else np.partition(gains, len(gains) - k)[len(gains) - k :]
    out = float(largest.sum())
    if costs is not None and np.isfinite(out):
        prices = costs[free]
        order = np.argsort(-gains / prices, kind="stable")
        paid = np.cumsum(prices[order])
        part = np.clip((budget - (paid - prices[order])) / prices[order], 0.0, 1.0)
        out = min(out, float((gains[order] * part).sum()))
    return out + state.beyond()


class Objective(ABC):
    """A set function with the picks made so far.

    Attributes:
        n: candidates.
        kernel: for representatives, or None.
        falling: gains never rise (submodular): lazy search is exact.
        monotone: gains are never negative: with `falling`, certificates hold.
        cheap: all gains cost about as much as one, for they are kept up to date.
    """

    n: int
    kernel: Kernel | None = None
    falling = True
    monotone = True
    cheap = False

    @abstractmethod
    def gains(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return (c,) float64: what each of some candidates would add."""

    @abstractmethod
    def add(self, index: int) -> None:
        """Note a pick."""

    def noise(self) -> float:
        """Return how far rounding may put a gain off: gains closer than this are equal, and go by position."""
        return 0.0

    def ceiling(self) -> float:
        """Return the value of all instances together."""
        raise SelectionError("this objective does not know the value of all instances: coverage can't stop it")


class Searched(State):
    """An objective with a search for its best candidate: plain, lazy or stochastic."""

    def __init__(self, objective: Objective, search: Search, *, k: int = 1, seed: int = 0, miss: float = 0.01) -> None:
        """Choose the search.

        Args:
            objective: a fresh objective.
            search: "auto" is lazy where that is exact and pays, else plain.
            k: picks wanted; decides the stochastic sample.
            seed: for the stochastic search.
            miss: the stochastic search looks at (n/k)·ln(1/miss) candidates a pick and expects at least
                1 − 1/e − miss of the optimum (Mirzasoleiman et al. 2015).
        """
        if search not in ("auto", "plain", "lazy", "stochastic"):
            raise SelectionError(f"there is no algorithm {search!r}: expected auto, plain, lazy or stochastic")
        if search == "lazy" and not objective.falling:
            raise SelectionError("lazy search needs gains that never rise: use 'plain' with this objective")
        if search == "auto":
            search = "plain" if objective.cheap or not objective.falling else "lazy"
        self.objective, self.name, self.n, self.kernel = objective, search, objective.n, objective.kernel
        self.bounded = objective.falling and objective.monotone
        self.bounds = np.full(self.n, np.inf)
        self.fresh = np.zeros(self.n, np.bool_)
        self.generator = np.random.default_rng(seed)
        self.sample = max(1, int(np.ceil(self.n / max(1, k) * np.log(1.0 / miss))))

    def best(self, allowed: NDArray[np.bool_], costs: NDArray[np.float64] | None = None) -> tuple[int, float]:
        """Return the candidate of the largest gain (per cost) that the search finds; ties go to the lowest position."""
        candidates = np.flatnonzero(allowed)
        if self.name == "stochastic" and self.sample < len(candidates):
            candidates = np.sort(self.generator.choice(candidates, self.sample, replace=False))
        if self.name == "lazy":
            return self._lazy(candidates, costs)
        gains, price = self._evaluate(candidates), np.ones(1) if costs is None else costs[candidates]
        rates, noise = gains / price, self.objective.noise()
        winner = int((rates + noise / price >= rates.max()).argmax())
        return int(candidates[winner]), float(gains[winner])

    def _evaluate(self, candidates: NDArray[np.int64]) -> NDArray[np.float64]:
        gains = self.objective.gains(candidates)
        self.bounds[candidates] = gains
        self.fresh[candidates] = True
        return gains

    def _lazy(self, candidates: NDArray[np.int64], costs: NDArray[np.float64] | None) -> tuple[int, float]:
        price = np.ones(len(candidates)) if costs is None else costs[candidates]
        width, near = FIRST_BATCH, self.objective.noise() / price
        while True:
            rates = self.bounds[candidates] / price
            done = self.fresh[candidates]
            top = rates[done].max(initial=-np.inf)
            waiting = np.flatnonzero(~done & (rates + 1e-12 * np.abs(rates) + 3.0 * near >= top))
            if not len(waiting):
                winner = int(np.flatnonzero(done & (rates + near >= top))[0])
                return int(candidates[winner]), float(self.bounds[candidates[winner]])
            if len(waiting) > width:
                waiting = np.sort(waiting[np.argsort(-rates[waiting], kind="stable")[:width]])
            self._evaluate(candidates[waiting])
            width = min(2 * width, LAST_BATCH)

    def add(self, index: int, position: int) -> None:
        """Note a pick."""
        self.objective.add(index)
        self.fresh[:] = False

    def gain(self, index: int) -> float:
        """Return the gain of one candidate."""
        return float(self.objective.gains(np.array([index], np.int64))[0])

    def upper(self) -> NDArray[np.float64]:
        """Return upper bounds on the gains left; infinite where a stochastic search never looked."""
        if self.bounded and self.name != "stochastic" and np.isinf(self.bounds).any():
            self._evaluate(np.arange(self.n))
        return self.bounds

    def ceiling(self) -> float:
        """Return the value of all instances together."""
        return self.objective.ceiling()
