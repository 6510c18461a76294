"""Inner loops of the selectors, compiled. Import where they are needed: numba takes half a second to load."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmatch.compiled import compiled, compiled_exactly

STRIDE = 64  # entries of which few are wanted that are looked at together
TILE = 2048  # columns whose running sums stay in the processor's first cache


@compiled
def add_columns(kernel: NDArray[Any], lo: int, hi: int, out: NDArray[np.float64]) -> None:
    """Add the positive entries of columns lo..hi to out."""
    for first in range(lo, hi, TILE):
        width = min(TILE, hi - first)
        total = np.zeros(width, np.float64)
        for i in range(kernel.shape[0]):
            line = kernel[i, first : first + width]
            for j in range(width):
                total[j] += max(np.float64(line[j]), 0.0)
        for j in range(width):
            out[first + j] += total[j]


@compiled
def lower_gains(
    kernel: NDArray[Any],
    raised: NDArray[np.int64],
    old: NDArray[np.float64],
    new: NDArray[np.float64],
    lo: int,
    hi: int,
    gains: NDArray[np.float64],
) -> None:
    """Take from the gains of columns lo..hi what the raised rows no longer give: min(max(K, old), new) − old."""
    for first in range(lo, hi, TILE):
        width = min(TILE, hi - first)
        reached = np.zeros(width, np.float64)
        covered = 0.0
        for r in range(raised.shape[0]):
            line = kernel[raised[r], first : first + width]
            a, b = kernel.dtype.type(old[r]), kernel.dtype.type(new[r])  # exact: both are entries, or 0
            covered += old[r]
            for j in range(width):
                reached[j] += np.float64(min(max(line[j], a), b))
        for j in range(width):
            gains[first + j] -= reached[j] - covered


@compiled
def column_gains(columns: NDArray[Any], cover: NDArray[np.float64], lo: int, hi: int, out: NDArray[np.float64]) -> None:
    """Set out[lo:hi] to Σ_i max(columns[i, :] − cover_i, 0)."""
    total = np.zeros(hi - lo, np.float64)
    for i in range(columns.shape[0]):
        line = columns[i, lo:hi]
        covered = cover[i]
        for j in range(hi - lo):
            total[j] += max(np.float64(line[j]) - covered, 0.0)
    out[lo:hi] = total


@compiled_exactly
def exact_gain(kernel: NDArray[Any], index: int, by_row: bool, cover: NDArray[np.float64]) -> float:
    """Return Σ max(K[:, index] − cover, 0), rounded once (Neumaier's compensated sum)."""
    total = 0.0
    lost = 0.0
    for i in range(cover.shape[0]):
        entry = np.float64(kernel[index, i]) if by_row else np.float64(kernel[i, index])
        term = entry - cover[i]
        if term > 0.0:
            new = total + term
            lost += (total - new) + term if total >= term else (term - new) + total
            total = new
    return total + lost


@compiled
def lower_sparse(
    starts: NDArray[np.int64],
    neighbours: NDArray[np.int32],
    values: NDArray[Any],
    raised: NDArray[np.int64],
    old: NDArray[np.float64],
    new: NDArray[np.float64],
    gains: NDArray[np.float64],
) -> None:
    """Do what lower_gains does where each row keeps a few candidates."""
    for r in range(raised.shape[0]):
        a, b = old[r], new[r]
        for p in range(starts[raised[r]], starts[raised[r] + 1]):
            lost = min(max(np.float64(values[p]), a), b) - a
            if lost > 0.0:
                gains[neighbours[p]] -= lost


@compiled
def add_sparse(
    starts: NDArray[np.int64],
    neighbours: NDArray[np.int32],
    values: NDArray[Any],
    cover: NDArray[np.float64],
    gains: NDArray[np.float64],
) -> None:
    """Add what every kept entry exceeds its row's cover by to its candidate's gain."""
    for i in range(starts.shape[0] - 1):
        for p in range(starts[i], starts[i + 1]):
            gains[neighbours[p]] += max(np.float64(values[p]) - cover[i], 0.0)


@compiled
def turn_sparse(
    starts: NDArray[np.int64],
    neighbours: NDArray[np.int32],
    values: NDArray[Any],
    ends: NDArray[np.int64],
    rows: NDArray[np.int32],
    turned: NDArray[Any],
) -> None:
    """List by candidate what is listed by row; `ends` holds each candidate's start and is moved to its end."""
    for i in range(starts.shape[0] - 1):
        for p in range(starts[i], starts[i + 1]):
            j = neighbours[p]
            rows[ends[j]] = i
            turned[ends[j]] = values[p]
            ends[j] += 1


@compiled
def count_above(block: NDArray[Any], floor: NDArray[np.float64], lo: int, hi: int, out: NDArray[np.int64]) -> None:
    """Count, for rows lo..hi of a block, the entries above the row's floor."""
    for i in range(lo, hi):
        line, least = block[i], floor[i]
        found = 0
        for j in range(line.shape[0]):
            found += np.float64(line[j]) > least
        out[i] = found


@compiled
def take_above(
    block: NDArray[Any],
    floor: NDArray[np.float64],
    first: int,
    lo: int,
    hi: int,
    starts: NDArray[np.int64],
    neighbours: NDArray[np.int32],
    values: NDArray[Any],
) -> None:
    """List, for rows lo..hi of a block whose columns start at `first`, the entries above the row's floor."""
    for i in range(lo, hi):
        line, least, p = block[i], floor[i], starts[i]
        for start in range(0, line.shape[0], STRIDE):
            piece = line[start : start + STRIDE]
            found = 0
            for j in range(piece.shape[0]):
                found += np.float64(piece[j]) > least
            if found == 0:
                continue
            for j in range(piece.shape[0]):
                if np.float64(piece[j]) > least:
                    neighbours[p] = first + start + j
                    values[p] = piece[j]
                    p += 1


@compiled
def count_above_by_column(
    block: NDArray[Any], floor: NDArray[np.float64], lo: int, hi: int, out: NDArray[np.int64]
) -> None:
    """Count, for columns lo..hi of a block, the entries above the column's floor."""
    for i in range(block.shape[0]):
        line, least, found = block[i, lo:hi], floor[lo:hi], out[lo:hi]
        for j in range(hi - lo):
            found[j] += np.float64(line[j]) > least[j]


@compiled
def take_above_by_column(
    block: NDArray[Any],
    floor: NDArray[np.float64],
    first: int,
    lo: int,
    hi: int,
    ends: NDArray[np.int64],
    neighbours: NDArray[np.int32],
    values: NDArray[Any],
) -> None:
    """List, for columns lo..hi of a block whose rows start at `first`, the entries above the column's floor."""
    for i in range(block.shape[0]):
        line = block[i]
        for j in range(lo, hi):
            if np.float64(line[j]) > floor[j]:
                neighbours[ends[j]] = first + i
                values[ends[j]] = line[j]
                ends[j] += 1


@compiled
def swap_gains(
    column: NDArray[Any],
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    nearest: NDArray[np.int64],
    out: NDArray[np.float64],
) -> None:
    """Turn out from minus each pick's removal loss into what replacing that pick by a candidate changes.

    A row with best pick p (similarity a), second best b and candidate c: where another pick goes, it gains
    max(c − a, 0); where p goes, it ends at max(b, c), of which b is in the removal loss.
    """
    shared = 0.0
    for i in range(column.shape[0]):
        c = np.float64(column[i])
        if c > first[i]:
            shared += c - first[i]
            out[nearest[i]] += first[i] - second[i]
        elif c > second[i]:
            out[nearest[i]] += c - second[i]
    for p in range(out.shape[0]):
        out[p] += shared


@compiled
def cover_gains(
    lines: NDArray[Any],
    which: NDArray[np.int64],
    cover: NDArray[np.float64],
    lo: int,
    hi: int,
    out: NDArray[np.float64],
) -> None:
    """Set out[lo:hi] to Σ_i max(lines[which, i] − cover_i, 0)."""
    for c in range(lo, hi):
        line = lines[which[c]]
        total = 0.0
        for i in range(line.shape[0]):
            total += max(np.float64(line[i]) - cover[i], 0.0)
        out[c] = total


@compiled
def room_gains(
    lines: NDArray[Any], which: NDArray[np.int64], room: NDArray[np.float64], lo: int, hi: int, out: NDArray[np.float64]
) -> None:
    """Set out[lo:hi] to Σ_i min(max(lines[which, i], 0), room_i)."""
    for c in range(lo, hi):
        line = lines[which[c]]
        total = 0.0
        for i in range(line.shape[0]):
            total += min(max(np.float64(line[i]), 0.0), room[i])
        out[c] = total


@compiled
def root_gains(
    features: NDArray[np.float64],
    which: NDArray[np.int64],
    total: NDArray[np.float64],
    weights: NDArray[np.float64],
    lo: int,
    hi: int,
    out: NDArray[np.float64],
) -> None:
    """Set out[lo:hi] to Σ_f w_f (√(total_f + x_f) − √total_f), term by term: large sums would lose its digits."""
    before = np.sqrt(total)
    for c in range(lo, hi):
        line = features[which[c]]
        gain = 0.0
        for f in range(total.shape[0]):
            gain += weights[f] * (np.sqrt(total[f] + line[f]) - before[f])
        out[c] = gain


@compiled
def sparse_gains(
    starts: NDArray[np.int64],
    columns: NDArray[np.int32],
    values: NDArray[np.float64],
    which: NDArray[np.int64],
    total: NDArray[np.float64],
    weights: NDArray[np.float64],
    lo: int,
    hi: int,
    out: NDArray[np.float64],
) -> None:
    """Do what root_gains does where a row has few features."""
    for c in range(lo, hi):
        gain = 0.0
        for p in range(starts[which[c]], starts[which[c] + 1]):
            before, after = total[columns[p]], total[columns[p]] + values[p]
            gain += weights[columns[p]] * (np.sqrt(after) - np.sqrt(before))
        out[c] = gain


@compiled_exactly
def largest(gains: NDArray[np.float64], prices: NDArray[np.float64], allowed: NDArray[np.bool_]) -> float:
    """Return the largest gain per price of what is allowed; without prices (length 0) the largest gain."""
    tops = np.full(STRIDE, -np.inf)  # side by side
    for first in range(0, gains.shape[0], STRIDE):
        width = min(STRIDE, gains.shape[0] - first)
        some, there = gains[first : first + width], allowed[first : first + width]
        for j in range(width):
            rate = some[j] if prices.shape[0] == 0 else some[j] / prices[first + j]
            rate = rate if there[j] else -np.inf
            tops[j] = rate if rate > tops[j] else tops[j]
    return float(tops.max())


@compiled_exactly
def leading(
    gains: NDArray[np.float64], prices: NDArray[np.float64], allowed: NDArray[np.bool_], drift: float, top: float
) -> NDArray[np.int64]:
    """Return the positions of what is allowed and may, within a drift of the gains, reach the top gain per price."""
    priced = prices.shape[0] > 0
    found = np.empty(gains.shape[0], np.int64)
    count = 0
    for j in range(gains.shape[0]):
        if allowed[j]:
            rate = (gains[j] + drift) / prices[j] if priced else gains[j] + drift
            if rate >= top:
                found[count] = j
                count += 1
    return found[:count].copy()
