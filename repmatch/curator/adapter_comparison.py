"""Two or more LoRA adapters of any rank and partly different targets, layer by layer: no base model, no store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmatch.curator.lora import Lora, LoraLayer, common_names
from repmatch.curator.tabular import Tabular
from repmatch.errors import InputError, UsageError
from repmatch.similarity import matrix_scores, orthonormal

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LayerComparison:
    """One matrix that two or more of the adapters adapt.

    Attributes:
        name: the matrix.
        scores: (s, s) float64, RepMatch max φ(i, j) in [0, 1]; NaN where one of the two lacks the matrix.
        cosines: (s, s) float64 in [-1, 1], cosine of the two ΔW; NaN likewise, and where one is zero.
        chances: (s, s) float64, score to expect of unrelated subspaces of these ranks.
        ranks: (s,) ranks, 0 where it is lacking.
        norms: (s,) float64, Frobenius norm of ΔW.
    """

    name: str
    scores: Floats
    cosines: Floats
    chances: Floats
    ranks: tuple[int, ...]
    norms: Floats


@dataclass(frozen=True, repr=False)
class AdapterComparison(Tabular):
    """RepMatch scores between LoRA adapters.

    Attributes:
        names: the adapters.
        scores: (s, s) float64, mean over the matrices that both have; NaN where there are none.
        cosines: (s, s) float64, cosine of the two ΔW over those matrices taken together.
        chances: (s, s) float64, mean of the layers' chance levels.
        layers: the matrices that two or more have.
        alone: adapter -> its matrices that no other has.
        notes: what the comparison cannot see.
    """

    names: tuple[str, ...]
    scores: Floats
    cosines: Floats
    chances: Floats
    layers: tuple[LayerComparison, ...]
    alone: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]

    @property
    def chance(self) -> float:
        """Mean chance level of the pairs that share matrices."""
        off = self.chances[~np.eye(len(self.names), dtype=bool)]
        return float(np.nanmean(off))

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints; NaN becomes null."""
        return {
            "names": list(self.names),
            "scores": _plain(self.scores),
            "chance": round(self.chance, 8),
            "layers": {layer.name: _plain(layer.scores) for layer in self.layers},
            "cosines": _plain(self.cosines),
            "chances": _plain(self.chances),
            "layer_cosines": {layer.name: _plain(layer.cosines) for layer in self.layers},
            "layer_ranks": {layer.name: list(layer.ranks) for layer in self.layers},
            "layer_norms": {layer.name: _plain(layer.norms) for layer in self.layers},
            "alone": {name: list(layers) for name, layers in self.alone.items()},
            "notes": list(self.notes),
        }

    def to_polars(self) -> Any:
        """Return one row a matrix and pair: layer, one, two, score, cosine, chance, rank_one, rank_two."""
        import polars as pl

        rows = [
            (layer.name, self.names[i], self.names[j], *_pair(layer, i, j))
            for layer in self.layers
            for i in range(len(self.names))
            for j in range(i + 1, len(self.names))
            if not np.isnan(layer.scores[i, j])
        ]
        names = ["layer", "one", "two", "score", "cosine", "chance", "rank_one", "rank_two"]
        return pl.DataFrame(rows, schema=names, orient="row")


def _pair(layer: LayerComparison, i: int, j: int) -> tuple[float, float, float, int, int]:
    values = (float(layer.scores[i, j]), float(layer.cosines[i, j]), float(layer.chances[i, j]))
    return (*values, layer.ranks[i], layer.ranks[j])


def _plain(values: Floats) -> Any:
    if values.ndim > 1:
        return [_plain(row) for row in values]
    return [None if np.isnan(value) else round(float(value), 6) for value in values]


def compare_adapters(adapters: Sequence[Lora]) -> AdapterComparison:
    """Compare LoRA adapters by the RepMatch score of each matrix that they share.

    Args:
        adapters: two or more, of one base model's architecture.

    Returns:
        Scores, cosines and chance levels, per matrix and on average.

    Raises:
        UsageError: fewer than two, or one name twice.
        InputError: no two have a matrix in common, or a shared name has different sizes.
    """
    names = tuple(lora.name for lora in adapters)
    if len(names) < 2:
        raise UsageError(f"compare takes two or more names, not {len(names)}.")
    rows = _aligned(adapters)
    shared = {name: row for name, row in rows.items() if sum(layer is not None for layer in row) > 1}
    if not shared:
        raise InputError(
            "these adapters have no matrix in common: "
            + "; ".join(f"{lora.name} adapts {', '.join(list(lora.layers)[:2])}, ..." for lora in adapters)
            + ". Adapters of one architecture can be compared."
        )
    inner = np.zeros((len(shared), len(names), len(names)))
    layers = tuple(_layer(name, row, names, inner[i]) for i, (name, row) in enumerate(shared.items()))
    known = ~np.isnan(np.stack([layer.scores for layer in layers]))
    count = known.sum(axis=0)
    square = np.where(known, np.square([layer.norms for layer in layers])[:, :, None], 0.0).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        scores = np.where(known, [layer.scores for layer in layers], 0.0).sum(axis=0) / count
        chances = np.where(known, [layer.chances for layer in layers], 0.0).sum(axis=0) / count
        cosines = np.clip(inner.sum(axis=0) / np.sqrt(square * square.T), -1.0, 1.0)
    alone: dict[str, tuple[str, ...]] = {}
    for i, lora in enumerate(adapters):
        alone[lora.name] = tuple(n for n, row in rows.items() if n not in shared and row[i] is not None)
    notes = [note for lora in adapters for note in lora.notes] + _base_note(adapters) + _zero_notes(layers, names)
    return AdapterComparison(names, scores, cosines, chances, layers, alone, tuple(notes))


def _aligned(adapters: Sequence[Lora]) -> dict[str, list[LoraLayer | None]]:
    """Put the layers of all adapters in rows by name; the first adapter that has a matrix names it."""
    rows: dict[str, list[LoraLayer | None]] = {}
    for i, lora in enumerate(adapters):
        renamed = common_names(list(lora.layers), list(rows)) if rows else {}
        for own, layer in lora.layers.items():
            name = renamed.get(own, own)
            rows.setdefault(name, [None] * len(adapters))[i] = layer
    return rows


def _layer(name: str, row: Sequence[LoraLayer | None], names: Sequence[str], inner: Floats) -> LayerComparison:
    """Compare one matrix over all adapters; `inner` (s, s) is filled with the inner products of the ΔW."""
    count = len(row)
    there = [i for i, layer in enumerate(row) if layer is not None]
    sizes = {i: (layer.d_out, layer.d_in) for i, layer in enumerate(row) if layer is not None}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{size} in {names[i]}" for i, size in sizes.items())
        raise InputError(f"{name!r} is (d_out, d_in) = {shown}: these adapters belong to different base models.")
    factors = {i: _finite(layer, names[i]) for i, layer in enumerate(row) if layer is not None}
    frames = {i: orthonormal(b, a) for i, (a, b) in factors.items()}
    scores, chances = np.full((count, count), np.nan), np.full((count, count), np.nan)
    for i in there:
        for j in there:
            scores[i, j] = matrix_scores([frames[i]], [frames[j]])[0]
            chances[i, j] = chance_of(sizes[i][0], frames[i].shape[1], frames[j].shape[1])
            (a, b), (c, d) = factors[i], factors[j]  # ⟨B·A, D·C⟩ = Σ (BᵀD)∘(A·Cᵀ), without a d × d matrix
            inner[i, j] = float(((b.T @ d) * (a @ c.T)).sum())
    norms = np.sqrt(np.maximum(np.diagonal(inner), 0.0))
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = np.clip(inner / np.outer(norms, norms), -1.0, 1.0)
    ranks = tuple(0 if layer is None else layer.rank for layer in row)
    return LayerComparison(name, scores, cosines, chances, ranks, norms)


def _finite(layer: LoraLayer, name: str) -> tuple[Floats, Floats]:
    a, b = layer.load()
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError(f"{name}: the factors of {layer.name!r} hold NaN or infinity; the adapter is not usable.")
    return a.astype(np.float64), b.astype(np.float64) * layer.scale


@lru_cache(maxsize=256)
def chance_of(d: int, r1: int, r2: int) -> float:
    """Return the score to expect of unrelated random subspaces of two ranks: E[max φ(i, j)].

    Args:
        d: d_out.
        r1: rank of one.
        r2: rank of the other.

    Returns:
        1/d for two ranks of 1, exact; above, estimated from random pairs drawn with a fixed seed, so always the same
        number (standard error about 1 %).
    """
    r1, r2 = sorted((min(r1, d), min(r2, d)))
    if r2 == 1:
        return 1.0 / d
    generator = np.random.default_rng([d, r1, r2])
    trials = max(32, min(4000, 400_000 // (r1 * r2)))
    found = []
    for _ in range(trials):
        # Only the first r1 rows of a random orthonormal frame matter: G·chol(GᵀG)⁻ᵀ with G Gaussian, and GᵀG is the
        # top rows' plus a Wishart matrix. Small d is drawn whole.
        top = generator.standard_normal((r1, r2))
        rest = d - r1
        if rest >= r2:
            lower = np.tril(generator.standard_normal((r2, r2)), -1)
            lower[np.arange(r2), np.arange(r2)] = np.sqrt(generator.chisquare(rest - np.arange(r2)))
            wishart = lower @ lower.T
        else:
            tail = generator.standard_normal((rest, r2))
            wishart = tail.T @ tail
        frame = np.linalg.solve(np.linalg.cholesky(top.T @ top + wishart), top.T).T
        found.append(_best_overlap(frame))
    return float(np.mean(found))


def _best_overlap(products: Floats) -> float:
    """Return max φ(i, j) from the products U₁ᵀU₂ of two frames."""
    sums = np.square(products).cumsum(axis=0).cumsum(axis=1)
    i, j = np.indices(sums.shape) + 1
    return float(min(1.0, (sums / np.minimum(i, j)).max()))


def _base_note(adapters: Sequence[Lora]) -> list[str]:
    bases = sorted({lora.base for lora in adapters if lora.base})
    if len(bases) < 2:
        return []
    return [f"they name different base models ({', '.join(bases)}): a score means something on the same weights."]


def _zero_notes(layers: Sequence[LayerComparison], names: Sequence[str]) -> list[str]:
    notes = []
    for i, name in enumerate(names):
        zero = sum(layer.ranks[i] > 0 and layer.norms[i] == 0 for layer in layers)
        if zero:
            notes.append(f"ΔW of {name} is zero in {zero} of {len(layers)} matrices: it was not trained there.")
    return notes
