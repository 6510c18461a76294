"""Two adapters, or two subspaces: Grassmann similarity, the RepMatch score, and what chance would give."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repmatch.datamodels import Layout
from repmatch.errors import UsageError

Floats: TypeAlias = NDArray[np.floating[Any]]
Blocks: TypeAlias = Sequence[Floats]  # one (d, r) array a matrix


def grassmann(u1: ArrayLike, u2: ArrayLike, i: int | None = None, j: int | None = None) -> float:
    """Return φ(i, j) = ‖U₁[:, :i]ᵀ U₂[:, :j]‖²_F / min(i, j) (Hu et al. 2021, section 7.2).

    Args:
        u1: (d, r₁) orthonormal columns in order of falling singular value, or (d,) for one; zeros mark missing rank.
        u2: (d, r₂) or (d,), likewise.
        i: leading columns of u1 that count, all by default.
        j: leading columns of u2 that count, all by default.

    Returns:
        A number in [0, 1]; 0 where either side is zero.

    Raises:
        UsageError: columns are not orthonormal, the lengths differ, or i or j is out of range.
    """
    left, right = as_frame(u1, "u1"), as_frame(u2, "u2")
    _same_length(left, right)
    i, j = left.shape[1] if i is None else i, right.shape[1] if j is None else j
    for name, value, limit in (("i", i, left.shape[1]), ("j", j, right.shape[1])):
        if not 1 <= value <= limit:
            raise UsageError(f"{name} = {value} is out of range: expected 1 to {limit}, the number of columns")
    overlap = float(np.square(left[:, :i].T @ right[:, :j]).sum()) / min(i, j)
    return min(1.0, overlap)


def matrix_scores(u1: Floats | Blocks, u2: Floats | Blocks) -> NDArray[np.float64]:
    """Return the RepMatch score of each matrix: the maximum of φ(i, j) over all i, j.

    Args:
        u1: (m, d, r) array, or m arrays (dᵢ, rᵢ); orthonormal columns in order of falling singular value.
        u2: likewise; ranks may differ from u1's.

    Returns:
        (m,) float64 in [0, 1].

    Raises:
        UsageError: another number of matrices, other lengths, or columns that are not orthonormal.
    """
    if len(u1) != len(u2):
        raise UsageError(f"adapters of {len(u1)} and {len(u2)} matrices can't be compared: both need the same matrices")
    out = np.empty(len(u1))
    for m, (a, b) in enumerate(zip(u1, u2, strict=True)):
        left, right = as_frame(a, f"u1[{m}]"), as_frame(b, f"u2[{m}]")
        _same_length(left, right)
        out[m] = best(np.square(left.T @ right)[None])[0]
    return out


def repmatch_score(u1: Floats | Blocks, u2: Floats | Blocks) -> float:
    """Return the RepMatch score of two adapters: the mean of `matrix_scores` (Modarres et al. 2024, section 3).

    Args:
        u1: (m, d, r) array, or m arrays (dᵢ, rᵢ); orthonormal columns in order of falling singular value.
        u2: likewise; ranks may differ from u1's.

    Returns:
        A number in [0, 1]. For unrelated adapters expect `chance(layout)`.

    Raises:
        UsageError: another number of matrices, other lengths, or columns that are not orthonormal.
    """
    if len(u1) == 0:
        raise UsageError("an adapter without matrices has no score: expected at least one matrix")
    return float(matrix_scores(u1, u2).mean())


def orthonormal(b: ArrayLike, a: ArrayLike) -> NDArray[np.float64]:
    """Return the left singular vectors of B·A without a d × d decomposition: QR of Aᵀ, then an SVD of (d_out, r).

    Args:
        b: (d_out, r) floats, LoRA's B.
        a: (r, d_in) floats, LoRA's A.

    Returns:
        (d_out, r) float64 in order of falling singular value; columns whose singular value is 0 are 0.
    """
    left, right = np.asarray(b, np.float64), np.asarray(a, np.float64)
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise UsageError(f"B {left.shape} and A {right.shape} don't multiply: expected (d_out, r) and (r, d_in)")
    triangle: NDArray[np.float64] = np.asarray(np.linalg.qr(right.T, mode="r"))
    vectors, values, _ = np.linalg.svd(left @ triangle.T, full_matrices=False)
    out = np.zeros(left.shape)
    kept = values > values.max(initial=0.0) * max(left.shape) * np.finfo(np.float64).eps
    out[:, : len(values)] = vectors * kept
    return out


def chance(layout: Layout) -> float:
    """Return the score to expect of unrelated random directions.

    Args:
        layout: the adapted matrices and the rank.

    Returns:
        Rank 1: the mean of 1/d_out, exact. Higher ranks: the mean of E[max φ(i, j)], estimated from 20,000 random pairs
        of subspaces drawn with a fixed seed, so always the same number (standard error below 0.5 %).
    """
    return float(np.mean([_chance(d, layout.rank) for d in layout.dims]))


@lru_cache(maxsize=256)
def _chance(d: int, r: int) -> float:
    if r == 1:
        return 1.0 / d
    if d < r:
        raise UsageError(f"rank {r} exceeds d_out {d}: columns can't be orthonormal")
    # By symmetry U₁ may be the first r axes, so only the top r rows of a random U₂ matter. With G Gaussian,
    # U₂ = G·chol(GᵀG)⁻ᵀ; GᵀG is the top block's plus a Wishart matrix, drawn by Bartlett's decomposition.
    generator, trials = np.random.default_rng([d, r]), 20_000
    top = generator.standard_normal((trials, r, r))
    rest = d - r
    lower = np.tril(generator.standard_normal((trials, r, r)), -1)
    for c in range(r):
        lower[:, c, c] = np.sqrt(generator.chisquare(rest - c, trials)) if rest > c else 0.0
    if rest < r:
        tail = generator.standard_normal((trials, rest, r))
        wishart = tail.transpose(0, 2, 1) @ tail
    else:
        wishart = lower @ lower.transpose(0, 2, 1)
    triangle = np.linalg.cholesky(top.transpose(0, 2, 1) @ top + wishart)
    overlap = np.linalg.solve(triangle, top.transpose(0, 2, 1))
    return float(best(np.square(overlap)).mean())


def best(squares: Floats) -> Floats:
    """Return max over i, j of φ(i, j): running sums over both axes give every φ.

    Args:
        squares: (n, r₁, r₂) squared products of columns.

    Returns:
        (n,) in [0, 1].
    """
    sums = squares.cumsum(axis=1).cumsum(axis=2)
    smaller = np.minimum(np.arange(1, sums.shape[1] + 1)[:, None], np.arange(1, sums.shape[2] + 1))
    out: Floats = np.minimum((sums / smaller.astype(sums.dtype)).max(axis=(1, 2)), 1.0)
    return out


def _same_length(a: Floats, b: Floats) -> None:
    if len(a) != len(b):
        raise UsageError(f"columns of length {len(a)} and {len(b)} can't be compared: d_out must be the same")


def as_frame(u: ArrayLike, name: str) -> NDArray[np.float64]:
    """Check that columns are orthonormal, or zero from some column on.

    Args:
        u: (d, r), or (d,) for one column.
        name: what to call it in an error.

    Returns:
        (d, r) float64.

    Raises:
        UsageError: they are not.
    """
    out = np.asarray(u, np.float64)
    out = out[:, None] if out.ndim == 1 else out
    if out.ndim != 2 or out.shape[1] == 0:
        raise UsageError(f"{name} has shape {out.shape}: expected (d, r), one column a singular vector")
    gram = out.T @ out
    kept = np.diag(gram) != 0
    worst = float(np.abs(gram - np.diag(kept.astype(np.float64))).max())
    if not worst < 1e-2:
        raise UsageError(
            f"the columns of {name} are not orthonormal: UᵀU differs from the identity by {worst:.3g}; "
            "pass left singular vectors, repmatch.similarity.orthonormal(B, A) gives them"
        )
    return out
