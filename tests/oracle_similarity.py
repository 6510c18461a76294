"""Slow, literal versions of what repmatch.similarity computes, straight from the definitions."""

from __future__ import annotations

import numpy as np

from repmatch.blocks import dense_block
from repmatch.datamodels import Factors, Layout, Matrix
from repmatch.signcodes import encode


def phi_from_updates(delta1: np.ndarray, delta2: np.ndarray, i: int, j: int) -> float:
    """φ(i, j) from two ΔW by full SVDs."""
    u1 = np.linalg.svd(delta1)[0][:, :i]
    u2 = np.linalg.svd(delta2)[0][:, :j]
    return float((np.abs(u1.T @ u2) ** 2).sum() / min(i, j))


def best_phi(u1: np.ndarray, u2: np.ndarray) -> float:
    """Maximum of φ(i, j) over all i, j by two loops."""
    best = 0.0
    for i in range(1, u1.shape[1] + 1):
        for j in range(1, u2.shape[1] + 1):
            best = max(best, float((np.abs(u1[:, :i].T @ u2[:, :j]) ** 2).sum()) / min(i, j))
    return best


def blocks_of(factors: Factors, row: int) -> list[np.ndarray]:
    """One instance's factors per matrix, float64."""
    return [dense_block(factors, m, row, row + 1)[0].astype(np.float64) for m in range(len(factors.layout.dims))]


def kernel(a: Factors, b: Factors) -> np.ndarray:
    """Mean over matrices of φ(r, r), pair by pair."""
    out = np.zeros((len(a), len(b)))
    r = a.layout.rank
    for x in range(len(a)):
        for y in range(len(b)):
            pairs = zip(blocks_of(a, x), blocks_of(b, y), strict=True)
            out[x, y] = np.mean([(np.abs(u.T @ v) ** 2).sum() / r for u, v in pairs])
    return out


def make_factors(
    n: int, dims: tuple[int, ...], rank: int = 1, encoding: str = "float32", *, seed: int = 0, zeros: int = 0
) -> Factors:
    """Random instances in a few clusters; the first `zeros` have a zero factor in the first matrix."""
    rng = np.random.default_rng(seed)
    layout = Layout(tuple(Matrix(f"layer.{m}", d, 8) for m, d in enumerate(dims)), rank)
    which = rng.integers(0, 3, n)
    parts = []
    for d in dims:
        centres = rng.standard_normal((3, d, rank))
        raw = centres[which] + 0.8 * rng.standard_normal((n, d, rank))
        parts.append(np.linalg.qr(raw)[0].reshape(n, -1))
    flat = np.concatenate(parts, axis=1).astype(np.float32) if n else np.zeros((0, layout.width), np.float32)
    norms = rng.uniform(0.5, 2.0, (n, len(dims))).astype(np.float32)
    norms[:zeros, 0] = 0.0
    flat[:zeros, : layout.offsets[1]] = 0.0
    cores = None if rank == 1 else rng.standard_normal((n, len(dims), rank, rank)).astype(np.float32)
    ids = tuple(f"id-{i:04d}" for i in range(n))
    if encoding == "sign":
        return Factors(ids, layout, "sign", None, encode(flat, dims), norms, None, "space")
    return Factors(ids, layout, encoding, flat.astype(encoding), None, norms, cores, "space")  # type: ignore[arg-type]
