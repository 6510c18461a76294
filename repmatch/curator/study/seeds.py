"""The noise of the measure: the same data with other seeds, and other data of the same kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repmatch.curator import start
from repmatch.curator.scoring import directions, shared_space
from repmatch.errors import UsageError
from repmatch.similarity import chance, matrix_scores

if TYPE_CHECKING:
    from repmatch.curator.subsets import Trainer
    from repmatch.datamodels import Space


@dataclass(frozen=True)
class SeedStudy:
    """RepMatch between datasets, once for every pair of orders of the data.

    Attributes:
        names: the datasets or subsets, s of them.
        seeds: orders trained with.
        mean: (s, s) float64, mean score; on the diagonal of the same rows in another order (NaN for one seed).
        spread: (s, s) float64, standard deviation over pairs of seeds.
        halves: (s,) float64, score of two random halves of each; NaN where a half is too small to train on.
        chance: of unrelated directions.
    """

    names: tuple[str, ...]
    seeds: int
    mean: NDArray[np.float64]
    spread: NDArray[np.float64]
    halves: NDArray[np.float64]
    chance: float

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""

        def plain(table: NDArray[np.float64]) -> Any:
            return [plain(x) if isinstance(x, np.ndarray) else None if np.isnan(x) else float(x) for x in table]

        return {
            "names": list(self.names),
            "seeds": self.seeds,
            "mean": plain(self.mean),
            "spread": plain(self.spread),
            "halves": plain(self.halves),
            "chance": self.chance,
        }

    def verdict(self) -> list[str]:
        """Say in words how far apart datasets are in units of the noise, signs of failure included."""
        said = []
        for at, name in enumerate(self.names):
            same = self.mean[at, at]
            half = "" if np.isnan(self.halves[at]) else f", of two halves {self.halves[at]:.3f}"
            said.append(f"{name}: the same rows in another order score {same:.3f}{half}; chance {self.chance:.4f}")
            if same < 10 * self.chance:
                said.append(f"{name}: orders hardly agree: training is unstable; use more steps or a lower rate")
        pairs = list(combinations(range(len(self.names)), 2))
        if len(pairs) > 1:
            off = [self.mean[i, j] for i, j in pairs]
            noise = float(np.sqrt(np.mean([self.spread[i, j] ** 2 for i, j in pairs])))
            ranked = sorted(pairs, key=lambda p: -self.mean[p])
            best = ranked[0]
            rest = float(np.mean(sorted(off)[:-1]))
            far = (self.mean[best] - rest) / noise if noise > 0 else float("inf")
            said.append(
                f"most alike: {self.names[best[0]]} and {self.names[best[1]]} ({self.mean[best]:.3f}), {far:.1f} "
                f"spreads of the seeds above the mean of the others ({rest:.3f})"
            )
        for i, j in pairs:
            if self.mean[i, j] < 3 * self.chance:
                said.append(f"{self.names[i]} and {self.names[j]} have next to nothing in common")
        return said


def study_seeds(trainer: Trainer, names: Sequence[str], *, seeds: int = 3, halves: bool = True) -> SeedStudy:
    """Train every dataset's adapter once for each order of its rows, and compare all of them.

    Adapters share head and A: what changes is the order of the rows. They are kept in the store and used again.

    Args:
        trainer: trains adapters.
        names: datasets, subsets, coresets or DATASET[SQL], of one space.
        seeds: orders, two or more.
        halves: whether to train on two random halves of each too.

    Returns:
        The study.

    Raises:
        UsageError: fewer than two seeds, or no name.
        SpaceMismatchError: spaces differ.
    """
    if seeds < 2:
        raise UsageError(f"--seeds {seeds} shows no spread; expected 2 or more.")
    if not names:
        raise UsageError("name one dataset or more.")
    space, _ = shared_space(trainer, names)
    found: list[list[list[NDArray[np.float64]]]] = []
    for name in names:
        own = [
            replace(trainer, recipe=replace(trainer.recipe, seed=s)).adapter(name, space=space) for s in range(seeds)
        ]
        found.append([directions(adapter, space) for adapter in own])
    count = len(names)
    mean, spread = np.full((count, count), np.nan), np.full((count, count), np.nan)
    for i in range(count):
        for j in range(i, count):
            pairs = [(s, t) for s in range(seeds) for t in range(seeds) if (s < t if i == j else True)]
            scores = [float(matrix_scores(found[i][s], found[j][t]).mean()) for s, t in pairs]
            mean[i, j] = mean[j, i] = np.mean(scores)
            spread[i, j] = spread[j, i] = np.std(scores, ddof=1) if len(scores) > 1 else 0.0
    split = np.array([_halves(trainer, name, space) if halves else np.nan for name in names])
    return SeedStudy(tuple(names), seeds, mean, spread, split, chance(space.layout))


def _halves(trainer: Trainer, name: str, space: Space) -> float:
    subset = trainer.store.resolve(name)
    ids = trainer.store.members(subset).ids
    if len(ids) < 4:
        return float("nan")
    order = start.generator(0, "study:halves").permutation(len(ids))
    parts = []
    for half in (order[: len(ids) // 2], order[len(ids) // 2 :]):
        members = tuple(ids[i] for i in sorted(half.tolist()))
        parts.append(trainer.adapter_of(replace(subset, name=f"half of {name}", ids=members, where=None), space))
    left, right = (directions(adapter, space) for adapter in parts)
    return float(matrix_scores(left, right).mean())
