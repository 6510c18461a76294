"""Retraining curves as records: trials, lines of the table, and what they say in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from repmatch.curator.evaluate.leaks import Leak
from repmatch.curator.evaluate.statistics import Interval, interval, paired
from repmatch.datamodels import BadRow

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True)
class Trial:
    """One training of one selection with one seed.

    Attributes:
        candidate: how its rows were chosen.
        size: rows.
        seed: of head, adapters and order.
        ids: the rows.
        key: digest of everything that decides the result.
        accuracy: on the test rows.
        tokens: of the selection.
        steps: optimiser steps.
        imbalance: see `repmatch.curator.evaluate.candidates.imbalance`.
    """

    candidate: str
    size: int
    seed: int
    ids: tuple[str, ...]
    key: str = ""
    accuracy: float = 0.0
    tokens: int = 0
    steps: int = 0
    imbalance: float = 0.0


@dataclass(frozen=True)
class Line:
    """One candidate at one size.

    Attributes:
        candidate: how rows were chosen.
        size: rows.
        accuracies: one a seed.
        accuracy: their mean and 95 % interval.
        against_random: paired difference to as many random rows, seed by seed; None for random itself and the full set.
        imbalance: mean distance of the label shares from the dataset's, 0 to 1.
        tokens: mean tokens of the selection.
        steps: optimiser steps of each training, the same for all.
    """

    candidate: str
    size: int
    accuracies: tuple[float, ...]
    accuracy: Interval
    against_random: Interval | None
    imbalance: float
    tokens: float
    steps: int

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "candidate": self.candidate,
            "size": self.size,
            "accuracy": self.accuracy.mean,
            "low": self.accuracy.low,
            "high": self.accuracy.high,
            "against_random": _json(self.against_random),
            "imbalance": self.imbalance,
            "tokens": self.tokens,
            "steps": self.steps,
            "accuracies": list(self.accuracies),
        }


def _json(found: Interval | None) -> dict[str, float | None] | None:
    return None if found is None else {"mean": found.mean, "low": found.low, "high": found.high}


@dataclass(frozen=True)
class Evaluation:
    """Retraining curves.

    Attributes:
        dataset: what was chosen from.
        lines: candidate by candidate, sizes rising.
        test_rows: rows tested on.
        leaks: test rows left out because they stand in the training data.
        bad: test rows that could not be used.
        notes: what the user should know.
        reused: trainings that the store had already.
    """

    dataset: str
    lines: tuple[Line, ...]
    test_rows: int
    leaks: tuple[Leak, ...]
    bad: tuple[BadRow, ...]
    notes: tuple[str, ...]
    reused: int

    def to_polars(self) -> pl.DataFrame:
        """Return the lines as a frame: candidate, size, accuracy, low, high, difference, its ends, and what it cost."""
        import polars as pl

        records = []
        for line in self.lines:
            other = line.against_random
            records.append(
                {
                    "candidate": line.candidate,
                    "size": line.size,
                    "accuracy": line.accuracy.mean,
                    "low": line.accuracy.low,
                    "high": line.accuracy.high,
                    "difference": None if other is None else other.mean,
                    "difference_low": None if other is None else other.low,
                    "difference_high": None if other is None else other.high,
                    "imbalance": line.imbalance,
                    "tokens": line.tokens,
                    "steps": line.steps,
                }
            )
        return pl.DataFrame(records, schema_overrides={name: pl.Float64 for name in _FLOATS})

    header = ("rows by", "size", "accuracy", "95 %", "against random", "95 %", "imbalance", "tokens")

    def cells(self) -> list[tuple[object, ...]]:
        """Return the table's rows, as `header` names their columns; accuracies in percent, differences in points."""
        return [
            (
                line.candidate,
                line.size,
                f"{100 * line.accuracy.mean:.1f}",
                _range(line.accuracy),
                "" if line.against_random is None else f"{100 * line.against_random.mean:+.1f}",
                "" if line.against_random is None else _range(line.against_random, signed=True),
                f"{line.imbalance:.2f}",
                round(line.tokens),
            )
            for line in self.lines
        ]

    def verdict(self) -> list[str]:
        """Say in words what beats chance, what loses to it, and what cannot be told."""
        said = []
        for size in sorted({line.size for line in self.lines if line.against_random is not None}):
            rivals = [line for line in self.lines if line.size == size and line.against_random is not None]
            better = [r for r in rivals if _clear(r) > 0]
            worse = [r for r in rivals if _clear(r) < 0]
            if better:
                best = max(better, key=lambda r: r.accuracy.mean)
                said.append(f"{size} rows: {_told(best)} better than random; {len(better)} of {len(rivals)} are")
            else:
                said.append(f"{size} rows: none of {len(rivals)} is clearly better than random")
            if worse:
                said.append(f"{size} rows: clearly worse than random: " + ", ".join(r.candidate for r in worse))
        return said


_FLOATS = ("low", "high", "difference", "difference_low", "difference_high")


def _range(found: Interval, *, signed: bool = False) -> str:
    if found.low is None or found.high is None:
        return ""
    sign = "+" if signed else ""
    return f"{100 * found.low:{sign}.1f} to {100 * found.high:{sign}.1f}"


def _clear(line: Line) -> int:
    found = line.against_random
    if found is None or not found.excludes_zero:
        return 0
    return 1 if found.mean > 0 else -1


def _told(line: Line) -> str:
    found = line.against_random
    if found is None or found.low is None or found.high is None:
        return line.candidate
    return f"{line.candidate} is {100 * found.mean:.1f} points ({100 * found.low:.1f} to {100 * found.high:.1f})"


def summarise(trials: Sequence[Trial], order: Sequence[str]) -> list[Line]:
    """Bring trials together, a line for each candidate and size.

    Args:
        trials: done.
        order: candidates in the order of the table.

    Returns:
        The lines.
    """
    groups: dict[tuple[str, int], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.candidate, trial.size), []).append(trial)
    lines = []
    for (name, size), found in sorted(groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        found.sort(key=lambda trial: trial.seed)
        rival = sorted(groups.get(("random", size), []), key=lambda trial: trial.seed)
        accuracies = [trial.accuracy for trial in found]
        against = None
        if name != "random" and rival:
            against = paired(accuracies, [trial.accuracy for trial in rival])
        lines.append(
            Line(
                name,
                size,
                tuple(accuracies),
                interval(accuracies),
                against,
                sum(trial.imbalance for trial in found) / len(found),
                sum(trial.tokens for trial in found) / len(found),
                found[0].steps,
            )
        )
    return lines
