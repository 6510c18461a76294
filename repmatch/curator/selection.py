"""Coresets: a strategy run on a dataset's stored factors, kept under a name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repmatch import __version__
from repmatch.curator.export import write_export
from repmatch.curator.tabular import Tabular
from repmatch.datamodels import Coreset
from repmatch.errors import SelectionError, UsageError
from repmatch.selectors import Constraints, FactorKernel, Problem, Selection, strategy

if TYPE_CHECKING:
    import polars as pl

    from repmatch.store import Store


@dataclass(frozen=True)
class SelectOptions:
    """How a coreset is chosen.

    Attributes:
        k: picks, or a share of the dataset as "5%".
        strategy: its name, see `repmatch.selectors.strategies`.
        balance: column of which every value gets the same number of picks.
        stratify: column whose proportions in the dataset are kept.
        seed: for strategies that draw.
        name: of the coreset; None: made from dataset, strategy and k.
        replace: whether a coreset of that name may be replaced.
    """

    k: int | str
    strategy: str = "facility-location"
    balance: str | None = None
    stratify: str | None = None
    seed: int = 0
    name: str | None = None
    replace: bool = False


@dataclass(frozen=True, repr=False)
class Selected(Tabular):
    """A stored coreset and the selection that made it.

    Attributes:
        coreset: as stored.
        selection: value, bound, algorithm, notes.
        store: where it is kept.
    """

    coreset: Coreset
    selection: Selection
    store: Store

    @property
    def name(self) -> str:
        """Name of the coreset."""
        return self.coreset.name

    @property
    def ids(self) -> tuple[str, ...]:
        """The user's ids in pick order."""
        return self.coreset.ids

    @property
    def gains(self) -> NDArray[np.float64]:
        """(k,) float64, what each pick added."""
        return self.coreset.gains

    def export(self, path: str | Path, *, with_scores: bool = False) -> dict[str, Any]:
        """Write the picked rows as JSON lines, and a manifest beside them.

        Args:
            path: the file.
            with_scores: add rank, gain and score to each row.

        Returns:
            The manifest.
        """
        return write_export(self.store, self.name, Path(path), with_scores=with_scores)

    def to_polars(self) -> pl.DataFrame:
        """Return the picks as a frame: rank, id, gain, represents."""
        import polars as pl

        represents = np.bincount(
            self.coreset.representative[self.coreset.representative >= 0], minlength=len(self.coreset.ids)
        )
        return pl.DataFrame(
            {
                "rank": range(1, len(self.ids) + 1),
                "id": self.ids,
                "gain": self.gains,
                "represents": represents,
            }
        )


def picks_of(k: int | str, n: int) -> int:
    """Turn a size as the user gives it into a number of picks.

    Args:
        k: a number, or a percentage such as "5%".
        n: instances in the dataset.

    Returns:
        Picks; a percentage is rounded to the nearest whole number, and is at least one.

    Raises:
        UsageError: it is neither, or out of range.
    """
    text = str(k).strip()
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)\s*%", text)
    if match is None:
        raise UsageError(f"-k {text!r} is no size; expected a number of picks such as 100, or a share such as 5%.")
    if match[1]:
        picks = int(match[1])
    else:
        share = float(match[2])
        if not 0 < share <= 100:
            raise UsageError(f"-k {text} is out of range; expected a share above 0% and up to 100%.")
        picks = max(1, round(n * share / 100))
    if not 1 <= picks <= n:
        raise UsageError(f"-k {text} is out of range; the dataset has {n} instances.")
    return picks


def select(
    store: Store,
    dataset: str,
    options: SelectOptions,
    scores_of: Callable[[str], dict[str, float]],
) -> Selected:
    """Choose a coreset from a dataset and keep it.

    Args:
        store: the store.
        dataset: the dataset's name.
        options: size, strategy, balance.
        scores_of: gives id -> score of a dataset against its own adapter, for strategies that need it.

    Returns:
        The stored coreset.

    Raises:
        UsageError: the size is no size, or the name is taken.
        UnknownNameError: no such dataset, strategy or column.
        SelectionError: the selection cannot be made.
    """
    entry = strategy(options.strategy)
    if options.balance is not None and options.stratify is not None:
        raise UsageError("--balance and --stratify are two answers to one question; give one of them.")
    name = options.name or default_name(dataset, options)
    replace = options.replace or options.name is None
    if store.is_coreset(name) and not replace:
        raise UsageError(f"there is a coreset {name!r} already; choose another --name, or give --replace.")
    factors = store.factors(dataset)
    n = len(factors)
    if n == 0:
        raise SelectionError(f"the dataset {dataset!r} has no factors to choose from; ingest it first.")
    k = picks_of(options.k, n)
    scores = None
    if "scores" in entry.needs:
        found = scores_of(dataset)
        scores = np.asarray([found[i] for i in factors.ids])
    problem = Problem(
        n=n,
        k=k,
        kernel=FactorKernel(factors),
        scores=scores,
        constraints=_constraints(store, dataset, options, factors.ids),
        seed=options.seed,
    )
    with store.run("select", {"dataset": dataset, "strategy": options.strategy, "k": k, "name": name}):
        selection = entry.solve(problem)
        coreset = Coreset(
            name=name,
            dataset=dataset,
            strategy=options.strategy,
            arguments={
                "k": str(options.k),
                "balance": options.balance,
                "stratify": options.stratify,
                "seed": options.seed,
                "algorithm": selection.algorithm,
                "value": selection.value,
                "bound": selection.bound,
                "notes": list(selection.notes),
                "version": __version__,
            },
            ids=tuple(factors.ids[i] for i in selection.indices),
            gains=selection.gains,
            all_ids=factors.ids,
            representative=selection.representative,
            similarity=selection.similarity,
        )
        store.save_coreset(coreset, replace=replace)
    return Selected(coreset, selection, store)


def default_name(dataset: str, options: SelectOptions) -> str:
    """Return the name of a coreset that was given none.

    Args:
        dataset: the dataset's name.
        options: what it is made with.

    Returns:
        A name that says dataset, strategy, size and balance.
    """
    size = str(options.k).replace(" ", "").replace("%", "pct")
    parts = [dataset, options.strategy, size]
    if options.balance:
        parts.append(f"balance-{options.balance}")
    if options.stratify:
        parts.append(f"stratify-{options.stratify}")
    if options.seed:
        parts.append(f"seed{options.seed}")
    return re.sub(r"[^\w.-]", "_", "-".join(parts))[:100]


def composition(store: Store, dataset: str, ids: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Count labels among the picks and in the dataset.

    Args:
        store: the store.
        dataset: the dataset's name.
        ids: the picks.

    Returns:
        Label -> (picks, instances), in order of labels.
    """
    members = store.members(store.resolve(dataset))
    labels = dict(zip(members.ids, members.labels, strict=True))
    whole, picked = Counter(members.labels), Counter(labels[i] for i in ids)
    return {label: (picked[label], whole[label]) for label in sorted(whole)}


def _constraints(store: Store, dataset: str, options: SelectOptions, ids: tuple[str, ...]) -> Constraints:
    field = options.balance or options.stratify
    if field is None:
        return Constraints()
    column = dict(zip(store.ids(dataset), store.column(dataset, field), strict=True))
    values = ["(none)" if column[i] is None else str(column[i]) for i in ids]
    return Constraints(balance=values) if options.balance else Constraints(stratify=values)
