"""Which matrices tell instances apart?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repmatch.blocks import choose_matrices, take
from repmatch.curator.study.nearest import expected, precision
from repmatch.datamodels import Factors
from repmatch.similarity import kernel_block

if TYPE_CHECKING:
    from repmatch.store import Store


@dataclass(frozen=True)
class LayerStudy:
    """How well each matrix alone finds instances of the same value.

    Attributes:
        dataset: its name.
        field: the column.
        matrices: names.
        alone: (m,) float64, share of the ten nearest by this matrix alone that have the query's value.
        without: (m,) float64, the same by all others together; NaN where there is no other.
        zero: (m,) float64, share of instances whose gradient is zero in this matrix.
        together: by all matrices.
        chance: for neighbours drawn by chance.
    """

    dataset: str
    field: str
    matrices: tuple[str, ...]
    alone: NDArray[np.float64]
    without: NDArray[np.float64]
    zero: NDArray[np.float64]
    together: float
    chance: float

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        without = [None if np.isnan(x) else float(x) for x in self.without]
        return {
            "dataset": self.dataset,
            "field": self.field,
            "together": self.together,
            "chance": self.chance,
            "matrices": [
                {"matrix": name, "alone": float(a), "without": w, "zero": float(z)}
                for name, a, w, z in zip(self.matrices, self.alone, without, self.zero, strict=True)
            ],
        }

    def verdict(self) -> list[str]:
        """Say in words which matrices carry the signal."""
        best, worst = int(self.alone.argmax()), int(self.alone.argmin())
        said = [
            f"all {len(self.matrices)} matrices together: {self.together:.0%} of the ten nearest share {self.field}, "
            f"by chance {self.chance:.0%}; best alone {self.matrices[best]} with {self.alone[best]:.0%}, worst "
            f"{self.matrices[worst]} with {self.alone[worst]:.0%}"
        ]
        if self.alone.max() > self.together + 0.02:
            said.append(f"{self.matrices[best]} alone does better than all: consider --targets {self.matrices[best]}")
        if self.together < self.chance + 0.02:
            said.append("no better than chance: too few layers, too low a rank, or a start that is too cold")
        dead = [name for name, share in zip(self.matrices, self.zero, strict=True) if share > 0.5]
        if dead:
            said.append(f"most gradients are zero in {', '.join(dead)}: leave them out")
        return said


def study_layers(store: Store, dataset: str, field: str | None = None) -> LayerStudy:
    """Study every matrix.

    Args:
        store: the store.
        dataset: the dataset's name.
        field: the column that neighbours should share; None: the label.

    Returns:
        The study.

    Raises:
        UnknownNameError: no such column.
        SelectionError: ten instances or fewer.
    """
    factors = store.factors(dataset)
    field = field or store.dataset(dataset).fields.label_field
    held = dict(zip(store.ids(dataset), store.column(dataset, field), strict=True))
    values = [str(held[name]) for name in factors.ids]
    count = len(factors.matrices)

    def by(positions: list[int]) -> float:
        chosen: Factors = choose_matrices(factors, positions)
        return precision(lambda at: kernel_block(take(chosen, at), chosen), values)

    everything = list(range(count))
    alone = np.array([by([m]) for m in everything])
    without = np.array([by([o for o in everything if o != m]) if count > 1 else np.nan for m in everything])
    zero = (factors.norms == 0).mean(axis=0).astype(np.float64)
    together = by(everything)
    return LayerStudy(dataset, field, factors.matrices, alone, without, zero, together, expected(values))
