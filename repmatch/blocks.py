"""Factors in blocks: float32 pieces of one matrix at a time, whatever the encoding, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmatch.datamodels import Factors, Layout
from repmatch.errors import SpaceMismatchError, UsageError

BLOCK_BYTES = 64 << 20  # working memory of one block of rows


def same_space(a: Factors, b: Factors) -> None:
    """Refuse factors of different spaces.

    Args:
        a: factors.
        b: other factors.

    Raises:
        SpaceMismatchError: space, matrices or rank differ.
    """
    pairs = {
        "space_id": (a.space_id, b.space_id),
        "d_out": (a.layout.dims, b.layout.dims),
        "rank": (a.layout.rank, b.layout.rank),
    }
    different = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if different:
        raise SpaceMismatchError("these factors live in different spaces and can't be compared.", different)


def take(factors: Factors, rows: Sequence[int] | NDArray[np.integer[Any]] | slice) -> Factors:
    """Return the factors of some instances.

    Args:
        factors: n instances.
        rows: positions, or a slice (then nothing is copied).

    Returns:
        Their factors, in the order of `rows`.
    """
    index = rows if isinstance(rows, slice) else np.asarray(rows, np.int64)
    ids = factors.ids[index] if isinstance(index, slice) else tuple(factors.ids[i] for i in index)
    return replace(
        factors,
        ids=ids,
        flat=None if factors.flat is None else factors.flat[index],
        bits=None if factors.bits is None else factors.bits[index],
        norms=factors.norms[index],
        cores=None if factors.cores is None else factors.cores[index],
        embeddings=None if factors.embeddings is None else factors.embeddings[index],
    )


def choose_matrices(factors: Factors, positions: Sequence[int]) -> Factors:
    """Return the factors of some matrices only, so that everything averages over those.

    Args:
        factors: n instances.
        positions: positions in `factors.matrices`, at least one.

    Returns:
        Factors with those matrices in that order; values are copied.

    Raises:
        UsageError: no position, or one out of range.
    """
    layout = factors.layout
    wrong = [p for p in positions if not 0 <= p < len(layout.dims)]
    if not positions or wrong:
        raise UsageError(f"got matrices {list(positions)}: expected one or more of 0 to {len(layout.dims) - 1}")
    words = np.concatenate(([0], np.cumsum(layout.words)))

    def columns(edges: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        return np.concatenate([np.arange(edges[p], edges[p + 1]) for p in positions])

    return replace(
        factors,
        layout=Layout(tuple(layout.matrices[p] for p in positions), layout.rank),
        flat=None if factors.flat is None else factors.flat[:, columns(layout.offsets)],
        bits=None if factors.bits is None else factors.bits[:, columns(words)],
        norms=factors.norms[:, list(positions)],
        cores=None if factors.cores is None else factors.cores[:, list(positions)],
    )


def row_blocks(factors: Factors, m: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows whose float32 block of one matrix stays within `BLOCK_BYTES`.

    Args:
        factors: n instances.
        m: position of the matrix.

    Yields:
        (start, stop), in order.
    """
    step = max(1, BLOCK_BYTES // (4 * factors.layout.dims[m] * factors.layout.rank))
    for lo in range(0, len(factors), step):
        yield lo, min(len(factors), lo + step)


def dense_block(factors: Factors, m: int, lo: int, hi: int) -> NDArray[np.float32]:
    """Return one matrix's factors of a range of rows as float32, whatever the encoding.

    Args:
        factors: n instances.
        m: position of the matrix.
        lo: first row.
        hi: row after the last.

    Returns:
        (hi − lo, d_out, r) float32; zero factors are zeros. Maybe a read-only view.
    """
    layout = factors.layout
    if factors.flat is not None:
        start, stop = layout.offsets[m : m + 2]
        block = factors.flat[lo:hi, start:stop].astype(np.float32, copy=False)
        return block.reshape(hi - lo, layout.dims[m], layout.rank)
    if factors.bits is None:
        raise UsageError("factors hold neither values nor sign codes: expected one of the two")
    from repmatch import signcodes

    bits = factors.bits[lo:hi]
    out = signcodes.decode(bits, sum(layout.words[:m]), layout.dims[m])
    out[factors.norms[lo:hi, m] == 0] = 0.0
    return out[:, :, None]


def second_moment(factors: Factors, m: int, weights: NDArray[np.floating[Any]] | None = None) -> NDArray[np.float64]:
    """Return the mean projector of a set for one matrix, P̄ = Σ w_j U_j U_jᵀ.

    Args:
        factors: the set, n instances.
        m: position of the matrix.
        weights: (n,) weights; 1/n each by default.

    Returns:
        (d_out, d_out) float64, symmetric.
    """
    d = factors.layout.dims[m]
    out = np.zeros((d, d))
    for lo, hi in row_blocks(factors, m):
        block = dense_block(factors, m, lo, hi)
        columns = block.transpose(1, 0, 2).reshape(d, -1)
        if weights is None:
            out += columns @ columns.T
        else:
            out += (columns * np.repeat(weights[lo:hi], block.shape[2]).astype(np.float32)) @ columns.T
    return out / max(1, len(factors)) if weights is None else out
