"""Coresets: a strategy run on a dataset's stored factors, kept under a name."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repmatch import __version__
from repmatch.curator.export import write_export
from repmatch.curator.ingest import Progress
from repmatch.curator.select_options import SelectArguments, SelectOptions, picks_of
from repmatch.curator.select_problem import Embed, Posed, ScoresOf, pose
from repmatch.curator.tabular import Tabular
from repmatch.datamodels import Coreset
from repmatch.errors import UsageError
from repmatch.selectors import FactorKernel, Selection
from repmatch.selectors import select as solve
from repmatch.selectors.baselines import Represented, represent_or_stop

if TYPE_CHECKING:
    import polars as pl

    from repmatch.curator.cluster.connection import ClusterOptions
    from repmatch.store import Store

__all__ = ["SelectArguments", "SelectOptions", "Selected", "composition", "picks_of", "select"]


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

    @property
    def weights(self) -> NDArray[np.int64]:
        """(k,) int64, how many instances of the dataset each pick represents: weights for training on the coreset."""
        kept = self.coreset.representative[self.coreset.representative >= 0]
        return np.bincount(kept, minlength=len(self.ids)).astype(np.int64)

    def export(self, path: str | Path, *, with_scores: bool = False, force: bool = False) -> dict[str, Any]:
        """Write the picked rows as JSON lines, and a manifest beside them.

        Args:
            path: the file.
            with_scores: add rank, gain and score to each row.
            force: replace a file that is no earlier export too.

        Returns:
            The manifest.
        """
        return write_export(self.store, self.name, Path(path), with_scores=with_scores, force=force)

    def to_polars(self) -> pl.DataFrame:
        """Return the picks as a frame: rank, id, gain, represents, value (the objective up to this pick)."""
        import polars as pl

        return pl.DataFrame(
            {
                "rank": range(1, len(self.ids) + 1),
                "id": self.ids,
                "gain": self.gains,
                "represents": self.weights,
                "value": self.selection.cumulative,
            }
        )

    def represented(self) -> pl.DataFrame:
        """Return every instance of the dataset with the pick that represents it: id, pick (or null), similarity."""
        import polars as pl

        picks = [self.ids[p] if p >= 0 else None for p in self.coreset.representative.tolist()]
        return pl.DataFrame(
            {"id": self.coreset.all_ids, "pick": picks, "similarity": self.coreset.similarity},
            schema={"id": pl.String, "pick": pl.String, "similarity": pl.Float32},
        )


def select(
    store: Store,
    dataset: str,
    options: SelectOptions,
    scores_of: ScoresOf,
    embed: Embed,
    progress: Progress | None = None,
    cluster: ClusterOptions | None = None,
) -> Selected:
    """Choose a coreset from a dataset and keep it.

    KeyboardInterrupt once there are picks ends the selection early: what is there is kept, marked incomplete.

    Args:
        store: the store.
        dataset: the dataset's name, or a part of one: DATASET[SQL], a subset, a coreset.
        options: size, strategy, rules.
        scores_of: gives id -> score of a dataset against its own adapter, for strategies that need it.
        embed: gives (n, d) unit rows for a dataset and n ids of it, for kernels that need them.
        progress: called with (stage, done, total).
        cluster: where the first of two rounds is done; None: one machine, one round.

    Returns:
        The stored coreset.

    Raises:
        UsageError: the size is no size, or the name is taken.
        UnknownNameError: no such dataset, strategy or column.
        SelectionError: the selection cannot be made.
        KeyboardInterrupt: it came before the first pick.
    """
    name = options.name or options.default_name(dataset)
    may_replace = options.replace or options.name is None
    if store.is_coreset(name) and not may_replace:
        raise UsageError(f"there is a coreset {name!r} already; choose another --name, or give --replace.")
    posed = pose(store, dataset, options, scores_of, embed)
    problem = posed.problem
    if progress is not None:
        tell = progress
        problem = replace(problem, progress=lambda done, total: tell(f"selecting from {dataset}", done, total))
        for kernel in (problem.kernel, posed.own):
            if isinstance(kernel, FactorKernel):
                kernel.progress = lambda what, done, total: tell(f"{what} {dataset}", done, total)
    with store.run("select", {"dataset": dataset, "name": name, **options.changed()}) as run:
        if cluster is None:
            selection = solve(options.strategy, problem)
        else:
            from repmatch.curator.cluster.selecting import select_on_cluster

            selection = select_on_cluster(options.strategy, problem, cluster)
        if not selection.complete and not len(selection):
            raise KeyboardInterrupt
        representative, similarity, cut = _own(posed, selection)
        selection = replace(
            selection, notes=(*posed.notes, *selection.notes, *cut), complete=selection.complete and not cut
        )
        coreset = _coreset(name, dataset, options, posed, selection, (representative, similarity))
        store.save_coreset(coreset, replace=may_replace)
        run.detail.update(picks=len(selection), algorithm=selection.algorithm, complete=selection.complete)
    return Selected(coreset, selection, store)


def _own(posed: Posed, selection: Selection) -> tuple[NDArray[np.int64], NDArray[np.float32], tuple[str, ...]]:
    """Return who represents the dataset's own instances, for the store keeps that; see `represent_or_stop`."""
    if posed.elsewhere:
        return represent_or_stop(posed.own, selection.indices, len(posed.ids))
    return selection.representative, selection.similarity, ()


def _coreset(
    name: str, dataset: str, options: SelectOptions, posed: Posed, selection: Selection, known: Represented
) -> Coreset:
    representative, similarity = known
    rows = np.argsort(posed.places)  # kept in the dataset's order
    return Coreset(
        name=name,
        dataset=posed.dataset,
        strategy=options.strategy,
        arguments={
            **options.changed(),
            "source": dataset,
            "k": len(selection) if options.k is None else str(options.k),
            "seed": options.seed,
            "options": options.words(),
            "algorithm": selection.algorithm,
            "reason": selection.reason,
            "value": selection.value,
            "bound": selection.bound,
            "certainty": selection.certainty,
            "cost": selection.cost,
            "complete": selection.complete,
            "notes": list(selection.notes),
            "version": __version__,
        },
        ids=tuple(posed.ids[i] for i in selection.indices),
        gains=selection.gains,
        all_ids=tuple(posed.ids[i] for i in rows),
        representative=representative[rows],
        similarity=similarity[rows],
    )


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
