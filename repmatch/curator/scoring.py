"""Scores of instances against a subset adapter, and of subset adapters against each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repmatch.curator.adapter_comparison import AdapterComparison, chance_of, compare_adapters
from repmatch.curator.adapter_files import fitting, foreign_adapter, is_foreign, lora_of
from repmatch.curator.subsets import Trainer
from repmatch.curator.tabular import Tabular
from repmatch.datamodels import Adapter, Space
from repmatch.errors import SpaceMismatchError, UsageError
from repmatch.similarity import chance, matrix_scores, orthonormal, score_against

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True, repr=False)
class Scores(Tabular):
    """RepMatch scores of a dataset's instances against one subset adapter, best first, ties by id.

    Attributes:
        dataset: the dataset's name.
        against: the subset's name.
        adapter: the subset adapter.
        ids: the user's ids.
        scores: (n,) float32 in [0, 1], mean over the matrices.
        per_matrix: (n, m) float32.
        matrices: names of the matrices.
        chance: expectation for unrelated random directions.
    """

    dataset: str
    against: str
    adapter: Adapter
    ids: tuple[str, ...]
    scores: NDArray[np.float32]
    per_matrix: NDArray[np.float32]
    matrices: tuple[str, ...]
    chance: float

    @property
    def headline(self) -> str:
        """What a notebook shows above the table."""
        return f"Scores of {self.dataset} against {self.against}; unrelated directions would score {self.chance:.4f}"

    def to_polars(self) -> pl.DataFrame:
        """Return the scores as a frame: id, score, per_matrix."""
        import polars as pl

        return pl.DataFrame({"id": self.ids, "score": self.scores, "per_matrix": self.per_matrix.tolist()})


@dataclass(frozen=True, repr=False)
class Comparison(Tabular):
    """RepMatch scores between subsets.

    Attributes:
        names: the subsets.
        scores: (s, s) float64, mean over the matrices.
        layers: matrix name -> (s, s) float64.
        chance: expectation for unrelated random directions.
        adapters: the subset adapters.
        own_start: whether they start where the factors of their datasets do; else they start cold, because that is what
            datasets with warm starts of their own have in common.
    """

    names: tuple[str, ...]
    scores: NDArray[np.float64]
    layers: dict[str, NDArray[np.float64]]
    chance: float
    adapters: tuple[Adapter, ...]
    own_start: bool = True

    @property
    def headline(self) -> str:
        """What a notebook shows above the table."""
        return f"RepMatch scores; unrelated directions would score {self.chance:.4f}"

    def to_polars(self) -> pl.DataFrame:
        """Return the scores as a frame: name, then a column for each of the names."""
        import polars as pl

        columns = {name: self.scores[:, i] for i, name in enumerate(self.names)}
        return pl.DataFrame({"name": self.names}).hstack(pl.DataFrame(columns))

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "names": list(self.names),
            "scores": self.scores.round(6).tolist(),
            "chance": self.chance,
            "layers": {name: values.round(6).tolist() for name, values in self.layers.items()},
        }


def directions(adapter: Adapter, space: Space) -> list[NDArray[np.float64]]:
    """Return the left singular vectors of an adapter's ΔW.

    Args:
        adapter: the adapter.
        space: its space.

    Returns:
        A (d_out, r) block a matrix, orthonormal columns in order of falling singular value; zeros where the adapter,
        imported, does not adapt it.
    """
    return [
        orthonormal(adapter.b[m.name], adapter.a[m.name]) if m.name in adapter.b else np.zeros((m.d_out, 1))
        for m in space.matrices
    ]


def score(trainer: Trainer, dataset: str, *, against: str | None = None, where: str | None = None) -> Scores:
    """Score every instance of a dataset against a subset adapter, and keep the scores.

    Args:
        trainer: gives the subset adapter.
        dataset: the dataset's name.
        against: the subset; None: the dataset itself.
        where: an SQL condition that narrows the subset.

    Returns:
        The scores, best first.

    Raises:
        SpaceMismatchError: the subset's factors are of another space.
    """
    store, target = trainer.store, dataset if against is None else against
    space = trainer.space_of(dataset)
    adapter = foreign_adapter(store, target, space)
    if adapter is None:
        other = trainer.space_of(store.resolve(target).dataset)
        require_same_space(dataset, space, target, other)
        adapter = trainer.adapter(target, where=where)
    elif where is not None:
        raise UsageError(f"{target!r} is an adapter from outside and has no rows; --where cannot narrow it.")
    u = directions(adapter, space)
    common = fitting(adapter, space)
    ids: list[str] = []
    parts = []
    for factors in store.iter_factors(dataset):
        ids += factors.ids
        parts.append(score_against(factors, u))
    per_matrix = np.concatenate(parts) if parts else np.zeros((0, len(space.matrices)), np.float32)
    scores = per_matrix[:, common].mean(axis=1, dtype=np.float64).astype(np.float32)
    store.save_scores(dataset, adapter.id, ids, scores, per_matrix)
    order = sorted(range(len(ids)), key=lambda i: (-scores[i], ids[i]))
    return Scores(
        dataset=dataset,
        against=adapter.subset,
        adapter=adapter,
        ids=tuple(ids[i] for i in order),
        scores=scores[order],
        per_matrix=per_matrix[order][:, common],
        matrices=tuple(space.layout.names[i] for i in common),
        chance=_chance(adapter, space),
    )


def _chance(adapter: Adapter, space: Space) -> float:
    ranks = {len(a) for a in adapter.a.values()}
    if ranks == {space.rank}:
        return chance(space.layout)
    found = [m for m in space.matrices if m.name in adapter.a]
    return float(np.mean([chance_of(m.d_out, space.rank, len(adapter.a[m.name])) for m in found]))


def compare(trainer: Trainer, names: Sequence[str]) -> Comparison | AdapterComparison:
    """Compare subsets by the RepMatch scores of their adapters.

    Args:
        trainer: gives the subset adapters.
        names: two or more datasets, subsets, coresets or DATASET[SQL]; also paths of LoRA checkpoints and imported
            adapters.

    Returns:
        The scores, per matrix too; an `AdapterComparison` where an adapter from outside takes part.

    Raises:
        UsageError: fewer than two names.
        SpaceMismatchError: they are of different spaces.
    """
    if len(names) < 2:
        raise UsageError(f"compare takes two or more names, not {len(names)}.")
    if any(is_foreign(trainer.store, name) for name in names):
        return compare_adapters([lora_of(trainer, name) for name in names])
    space, own = shared_space(trainer, names)
    adapters = [trainer.adapter(name, space=space) for name in names]
    blocks = [directions(adapter, space) for adapter in adapters]
    per_matrix = np.empty((len(space.matrices), len(names), len(names)))
    for i, one in enumerate(blocks):
        for j, two in enumerate(blocks):
            per_matrix[:, i, j] = matrix_scores(one, two)
    return Comparison(
        names=tuple(names),
        scores=per_matrix.mean(axis=0),
        layers={m.name: per_matrix[k] for k, m in enumerate(space.matrices)},
        chance=chance(space.layout),
        adapters=tuple(adapters),
        own_start=own,
    )


def shared_space(trainer: Trainer, names: Sequence[str]) -> tuple[Space, bool]:
    """Return a space in which several subsets can be compared.

    Datasets that were each given a warm start of their own have the cold start in common; their adapters are then
    trained from that.

    Args:
        trainer: knows the spaces.
        names: datasets, subsets, coresets or DATASET[SQL]s.

    Returns:
        The space, and whether it is that of their factors.

    Raises:
        SpaceMismatchError: the spaces differ in more than the warm start.
    """
    spaces = [trainer.space_of(trainer.store.resolve(name).dataset) for name in names]
    if len({space.id for space in spaces}) == 1:
        return spaces[0], True
    cold = [replace(space, warm_start=None) for space in spaces]
    for name, space in zip(names, cold, strict=True):
        require_same_space(names[0], cold[0], name, space)
    trainer.store.save_space(cold[0])
    return cold[0], False


def require_same_space(name: str, space: Space, other_name: str, other: Space) -> None:
    """Refuse to compare what lives in different spaces.

    Args:
        name: of one.
        space: its space.
        other_name: of the other.
        other: its space.

    Raises:
        SpaceMismatchError: the spaces differ, with the fields.
    """
    if space.id != other.id:
        raise SpaceMismatchError(
            f"{name!r} and {other_name!r} are of different spaces and cannot be compared; ingest one of them again, "
            "into a new dataset, with the other's options.",
            space.differences(other),
        )
