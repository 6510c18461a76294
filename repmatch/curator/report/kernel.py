"""What the report draws from the RepMatch kernel: nearest instances, group similarities, a layout in the plane."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from repmatch.blocks import dense_block, take
from repmatch.datamodels import Factors
from repmatch.errors import MissingExtraError
from repmatch.similarity import kernel_block

Floats = NDArray[np.float32]
Layout = Literal["auto", "tsne", "pca"]
Tell = Callable[[str, int, int | None], None]

TILE = 1024
# Multiply-adds that the all-pairs pass may take above rank 1; more points than that allows are sampled.
WORK = 8e12
_PERPLEXITY = 5.0  # neighbours that pull; a third of those searched, as t-SNE wants
SEARCHED = 15
_NEARLY = 0.99  # one AdamW step's factors: 0.9997; Gaussian ones: 0.8
_LANDMARKS = 1000


def affordable(factors: Factors, points: int) -> int:
    """Return how many points the all-pairs pass can take.

    Args:
        factors: of the space.
        points: asked for.

    Returns:
        `points`, or fewer above rank 1, where every pair costs rank² times as much.
    """
    if factors.layout.rank == 1:
        return points
    return min(points, int((WORK / (factors.layout.width * factors.layout.rank)) ** 0.5))


def joined(parts: Sequence[Factors]) -> Factors:
    """Join factors of one space, whatever their encodings.

    Args:
        parts: one or more.

    Returns:
        One object; where encodings differ, floats of all. Ids are not unique over datasets.
    """
    if len(parts) == 1:
        return parts[0]
    ids = tuple(name for part in parts for name in part.ids)
    norms = np.concatenate([part.norms for part in parts])
    if all(part.bits is not None for part in parts):
        return replace(
            parts[0], ids=ids, norms=norms, bits=np.concatenate([p.bits for p in parts if p.bits is not None])
        )
    flats = [_flat(part) for part in parts]
    kept = [part.cores for part in parts]
    cores = None if any(c is None for c in kept) else np.concatenate([c for c in kept if c is not None])
    flat = np.concatenate(flats)
    return replace(parts[0], ids=ids, norms=norms, flat=flat, bits=None, cores=cores, encoding="float32")


def _flat(part: Factors) -> NDArray[Any]:
    if part.flat is not None:
        return part.flat
    n = len(part)
    blocks = [dense_block(part, m, 0, n).reshape(n, -1) for m in range(len(part.layout.dims))]
    return np.concatenate(blocks, axis=1)


def nearest(factors: Factors, k: int, tell: Tell | None = None) -> tuple[NDArray[np.int64], Floats]:
    """Find every instance's nearest others, exact scores.

    Where factors are nearly their signs, as those of one AdamW step are, candidates are found by sign codes (measured
    11 times faster than floats) and scored exactly: twice as many as wanted and ten more held all of the 16 true
    nearest in every one of 512 rows of a 5,452-row dataset.

    Args:
        factors: n instances.
        k: how many; fewer where n is small.
        tell: progress.

    Returns:
        (n, k) int64 positions and (n, k) float32 scores, best first.
    """
    n = len(factors)
    k = min(k, n - 1)
    places, scores = np.zeros((n, max(k, 0)), np.int64), np.zeros((n, max(k, 0)), np.float32)
    if k < 1:
        return places, scores
    codes = sign_codes(factors) if factors.layout.rank == 1 and _nearly_signs(factors) else None
    wide = min(n - 1, 2 * k + 10)
    for lo in range(0, n, TILE):
        rows = np.arange(lo, min(n, lo + TILE))
        if codes is None or codes.bits is None:
            block = kernel_block(take(factors, slice(lo, lo + len(rows))), factors)
        else:
            block = kernel_block(take(codes, slice(lo, lo + len(rows))), codes)
        block[np.arange(len(rows)), rows] = -1.0
        near = np.argpartition(-block, min(wide, n - 1) - 1, axis=1)[:, :wide]
        exact = codes is None or factors.bits is not None
        values = np.take_along_axis(block, near, 1) if exact else _pairs(factors, rows, near)
        order = np.argsort(-values, axis=1, kind="stable")[:, :k]
        places[rows] = np.take_along_axis(near, order, 1)
        scores[rows] = np.take_along_axis(values, order, 1)
        if tell is not None:
            tell("finding neighbours", int(rows[-1]) + 1, n)
    return places, scores


def sign_codes(factors: Factors) -> Factors:
    """Return the sign codes of rank-1 factors.

    Args:
        factors: n instances of rank 1.

    Returns:
        The same instances with `bits`; themselves where they are kept so.
    """
    if factors.bits is not None:
        return factors
    parts = []
    for m, words in enumerate(factors.layout.words):
        packed = np.zeros((len(factors), 8 * words), np.uint8)
        negative = np.packbits(factors.matrix(m)[:, :, 0] < 0, axis=1, bitorder="little")
        packed[:, : negative.shape[1]] = negative
        parts.append(packed.view(np.uint64))
    return replace(factors, flat=None, bits=np.concatenate(parts, axis=1), encoding="sign")


def _nearly_signs(factors: Factors) -> bool:
    """Whether factors and their signs are nearly parallel: |x|₁ / √d, the cosine of the two, is 1 for pure signs."""
    if factors.flat is None:
        return True
    some = take(factors, np.linspace(0, len(factors) - 1, min(len(factors), 256)).astype(np.int64))
    means = [np.abs(some.matrix(m).astype(np.float32)).sum(axis=1) / d**0.5 for m, d in enumerate(some.layout.dims)]
    alive = some.norms.T > 0
    return bool(np.concatenate(means, axis=1).T[alive].mean() > _NEARLY) if alive.any() else True


def _pairs(factors: Factors, rows: NDArray[np.int64], others: NDArray[np.int64]) -> Floats:
    """Return the exact RepMatch scores of (rows[i], others[i, j]) at rank 1."""
    total = np.zeros(others.shape, np.float32)
    for m in range(len(factors.layout.dims)):
        values = factors.matrix(m)[:, :, 0]
        for lo in range(0, len(rows), 256):
            cut = slice(lo, lo + 256)
            mine = values[rows[cut]].astype(np.float32)
            theirs = values[others[cut]].astype(np.float32)
            total[cut] += np.square(np.einsum("nd,nkd->nk", mine, theirs))
    total /= len(factors.layout.dims)
    return np.minimum(total, np.float32(1.0), out=total)


def group_similarities(factors: Factors, groups: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Return the mean score between the instances of groups, per matrix, pairs of one with itself left out.

    Args:
        factors: n instances, a few thousand.
        groups: (n,) int64 group of each.
        count: number of groups.

    Returns:
        (m, count, count) float64; NaN where a group has no pair.
    """
    n, dims = len(factors), factors.layout.dims
    member = np.zeros((n, count))
    member[np.arange(n), groups] = 1.0
    sizes = member.sum(axis=0)
    pairs = np.outer(sizes, sizes) - np.diag(sizes)
    out = np.empty((len(dims), count, count))
    for m in range(len(dims)):
        one = replace(
            factors,
            layout=replace(factors.layout, matrices=(factors.layout.matrices[m],)),
            flat=dense_block(factors, m, 0, n).reshape(n, -1),
            bits=None,
            norms=factors.norms[:, m : m + 1],
            cores=None,
            encoding="float32",
        )
        kernel = kernel_block(one, one)
        np.fill_diagonal(kernel, 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            out[m] = np.where(pairs > 0, member.T @ (kernel @ member) / pairs, np.nan)
    return out


def plane(
    factors: Factors, places: NDArray[np.int64], scores: Floats, *, layout: Layout, seed: int, tell: Tell | None = None
) -> tuple[NDArray[np.float64], str]:
    """Lay instances out in the plane so that near ones lie near.

    Args:
        factors: n instances.
        places: (n, k) their nearest, from `nearest`.
        scores: (n, k) scores of those.
        layout: "tsne" (openTSNE), "pca" (the kernel's two main directions over landmarks), or "auto": the first where
            it is installed.
        seed: of the start.
        tell: progress.

    Returns:
        (n, 2) float64, and the name of the layout.

    Raises:
        MissingExtraError: "tsne" is asked for and openTSNE is not installed.
    """
    there = importlib.util.find_spec("openTSNE") is not None
    if layout == "tsne" and not there:
        raise MissingExtraError("the t-SNE layout", "report")
    if len(factors) > 3 * SEARCHED and layout != "pca" and there:
        return _tsne(places, scores, seed, tell), "tsne"
    return _landmark_pca(factors, seed), "pca"


def _tsne(places: NDArray[np.int64], scores: Floats, seed: int, tell: Tell | None) -> NDArray[np.float64]:
    from openTSNE import TSNEEmbedding
    from openTSNE.affinity import PerplexityBasedNN
    from openTSNE.nearest_neighbors import PrecomputedNeighbors

    # The kernel's distance in its feature space: ‖x − y‖² = 2 − 2·k(x, y) for unit factors.
    distances = np.sqrt(np.maximum(2.0 - 2.0 * scores.astype(np.float64), 0.0))
    perplexity = min(_PERPLEXITY, (places.shape[1] - 1) / 3)
    affinities = PerplexityBasedNN(knn_index=PrecomputedNeighbors(places, distances), perplexity=perplexity)
    start = np.random.default_rng(seed).standard_normal((len(places), 2)) * 1e-2
    method = "fft" if len(places) > 2000 else "bh"
    embedding = TSNEEmbedding(start, affinities, negative_gradient_method=method, random_state=seed, n_jobs=-1)
    steps = [(125, {"exaggeration": 12, "momentum": 0.5})] + [(75, {"momentum": 0.8})] * 5
    done = 0
    for count, options in steps:
        embedding.optimize(count, inplace=True, **options)
        done += count
        if tell is not None:
            tell("laying out the map", done, 500)
    return np.asarray(embedding, np.float64)


def _landmark_pca(factors: Factors, seed: int) -> NDArray[np.float64]:
    """Kernel PCA with the Nyström approximation from at most `_LANDMARKS` instances."""
    n = len(factors)
    chosen = np.sort(np.random.default_rng(seed).permutation(n)[: min(n, _LANDMARKS)])
    some = take(factors, chosen)
    small = kernel_block(some, some).astype(np.float64)
    means, whole = small.mean(axis=0), small.mean()
    centred = small - means[None] - means[:, None] + whole
    values, vectors = np.linalg.eigh(centred)
    values, vectors = values[::-1][:2], vectors[:, ::-1][:, :2]
    axes = np.zeros((len(chosen), 2))
    axes[:, : vectors.shape[1]] = vectors / np.sqrt(np.maximum(values, 1e-12))
    out = np.zeros((n, 2))
    for lo in range(0, n, TILE):
        block = kernel_block(take(factors, slice(lo, min(n, lo + TILE))), some).astype(np.float64)
        out[lo : lo + len(block)] = (block - block.mean(axis=1, keepdims=True) - means[None] + whole) @ axes
    return out
