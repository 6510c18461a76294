"""Directions of factors: unit rows, and the left singular vectors of many tall matrices at once."""

from __future__ import annotations

import torch
from torch import Tensor

# A singular value below this share of the largest one counts as zero: its direction is rounding noise. It happens:
# the loss reaches the last layer's query through the first token alone, so that gradient has rank one, and what the
# step's eps adds to it is of this size.
_RANK_TOLERANCE = 1e-4


def unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split rows into directions and norms; squares of very small or large numbers leave the range of float32.

    Args:
        x: (n, d).

    Returns:
        (n, d) unit rows (zeros where the row is zero), and (n,) norms.
    """
    tiny = torch.finfo(x.dtype).tiny
    peak = x.abs().amax(dim=1, keepdim=True)
    scaled = x / peak.clamp_min(tiny)
    norm = scaled.norm(dim=1, keepdim=True)
    return scaled / norm.clamp_min(tiny), (norm * peak.clamp_min(tiny))[:, 0]


def left_singular(m: Tensor) -> tuple[Tensor, Tensor]:
    """Split matrices into left singular vectors and the rest, through the small Gram matrix.

    Args:
        m: (n, d, r) float64.

    Returns:
        (n, d, r) orthonormal columns in order of falling singular value (zero columns where the singular value is
        zero), and (n, r, r) with columns @ core = m / |m|. A matrix that is not finite gives NaN.
    """
    # One NaN would make the decomposition of the whole batch fail.
    broken = ~m.flatten(1).isfinite().all(dim=1)[:, None, None]
    m = m.masked_fill(broken, 0.0)
    m = m / m.flatten(1).norm(dim=1).clamp_min(torch.finfo(m.dtype).tiny)[:, None, None]
    values, vectors = torch.linalg.eigh(m.transpose(1, 2) @ m)
    singular = values.flip(1).clamp_min(0).sqrt()
    vectors = vectors.flip(2)
    keep = singular > _RANK_TOLERANCE * singular[:, :1].clamp_min(torch.finfo(m.dtype).tiny)
    columns = (m @ vectors) * torch.where(keep, 1 / singular.clamp_min(1e-30), torch.zeros_like(singular))[:, None, :]
    # One more QR keeps nearly parallel columns orthonormal; its R is the identity up to signs and rounding.
    q, r = thin_qr(columns)
    columns = q * torch.sign(torch.diagonal(r, dim1=1, dim2=2))[:, None, :]
    columns = columns * keep[:, None, :]
    core = columns.transpose(1, 2) @ m
    return columns.masked_fill(broken, torch.nan), core.masked_fill(broken, torch.nan)


def thin_qr(m: Tensor) -> tuple[Tensor, Tensor]:
    """Split tall matrices into orthonormal columns and the upper triangle that makes the matrices of them.

    On CUDA the library's own would take the matrices of a batch one after the other, some launches each.

    Args:
        m: (..., d, r) with d ≥ r.

    Returns:
        (..., d, r) and (..., r, r).
    """
    if m.device.type != "cuda":
        q, r = torch.linalg.qr(m)
        return q, r
    return gram_schmidt(m)


def gram_schmidt(m: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `thin_qr` does column by column, for all matrices at once; the triangle's diagonal is not negative.

    Each column is projected twice, which leaves no more than rounding of the others in it (Giraud, Langou and
    Rozložník, The loss of orthogonality in the Gram-Schmidt orthogonalization process, 2005).

    Args:
        m: (..., d, r); a column of zeros stays one.

    Returns:
        (..., d, r) and (..., r, r).
    """
    q = torch.zeros_like(m)
    for k in range(m.shape[-1]):
        column = m[..., k : k + 1]
        for _ in range(2 if k else 0):
            before = q[..., :k]
            column = column - before @ (before.transpose(-2, -1) @ column)
        length = column.norm(dim=-2, keepdim=True)
        q[..., k : k + 1] = column / length.clamp_min(torch.finfo(m.dtype).tiny)
    return q, q.transpose(-2, -1) @ m
