"""Similarity of sign codes: XOR and popcount, compiled.

A code holds one bit per number of a rank-1 factor, 1 where it is negative. Two sign vectors of length d that differ in
h places have cosine 1 − 2h/d. Codes of all matrices lie side by side, each padded to whole 64-bit words with zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import intrinsic
from numpy.typing import NDArray

from repmatch.compiled import compiled, compiled_exactly, in_chunks

TILE = 512  # columns kept in cache while queries stream by


def _ctpop(typing_context: Any, word: Any) -> Any:
    """Count the ones of a word with the processor's instruction."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return word(word), generate


_popcount: Any = intrinsic(_ctpop)


@compiled
def _cosines(
    query: NDArray[np.uint64],
    bits: NDArray[np.uint64],
    starts: NDArray[np.int64],
    dims: NDArray[np.int64],
    out: NDArray[np.float32],
) -> None:
    for i in range(bits.shape[0]):
        for m in range(dims.shape[0]):
            h = np.uint64(0)
            for w in range(starts[m], starts[m + 1]):
                h += _popcount(query[w] ^ bits[i, w])
            out[i, m] = 1.0 - 2.0 * float(h) / dims[m]


@compiled_exactly
def _row_scores(
    query: NDArray[np.uint64],
    bits: NDArray[np.uint64],
    live_query: NDArray[np.bool_],
    live: NDArray[Any],
    starts: NDArray[np.int64],
    dims: NDArray[np.int64],
    weights: NDArray[np.float64],
    signed: bool,
    out: NDArray[np.float32],
) -> None:
    """Score one query, row by row; the same sums in the same order as `_tile_scores`."""
    words = query.shape[0]
    ones = np.empty(words, np.int64)
    for i in range(bits.shape[0]):
        row, total = bits[i, :words], 0.0
        for w in range(words):
            ones[w] = np.int64(_popcount(query[w] ^ row[w]))
        for m in range(dims.shape[0]):
            if live_query[m] and live[i, m] != 0:
                h = np.int64(0)
                for w in range(starts[m], starts[m + 1]):
                    h += ones[w]
                difference = np.float64(dims[m]) - 2.0 * np.float64(h)
                total += (difference if signed else difference * difference) * weights[m]
        out[i] = total


@compiled_exactly
def _six(
    a: NDArray[np.uint64],
    i: int,
    k: int,
    w: int,
    tile: NDArray[np.uint64],
    width: int,
    ones: NDArray[np.int64],
    fresh: bool,
) -> None:
    """Count where six words of two queries differ from those of a tile's columns; `fresh` begins the count."""
    a0, a1, a2, a3, a4, a5 = a[i, w], a[i, w + 1], a[i, w + 2], a[i, w + 3], a[i, w + 4], a[i, w + 5]
    c0, c1, c2, c3, c4, c5 = a[k, w], a[k, w + 1], a[k, w + 2], a[k, w + 3], a[k, w + 4], a[k, w + 5]
    t0, t1, t2 = tile[w, :width], tile[w + 1, :width], tile[w + 2, :width]
    t3, t4, t5 = tile[w + 3, :width], tile[w + 4, :width], tile[w + 5, :width]
    h0, h1 = ones[0, :width], ones[1, :width]
    if fresh:
        h0[:] = 0
        h1[:] = 0
    for j in range(width):
        b0, b1, b2, b3, b4, b5 = t0[j], t1[j], t2[j], t3[j], t4[j], t5[j]
        low = _popcount(a0 ^ b0) + _popcount(a1 ^ b1) + _popcount(a2 ^ b2)
        h0[j] += np.int64(low + _popcount(a3 ^ b3) + _popcount(a4 ^ b4) + _popcount(a5 ^ b5))
        low = _popcount(c0 ^ b0) + _popcount(c1 ^ b1) + _popcount(c2 ^ b2)
        h1[j] += np.int64(low + _popcount(c3 ^ b3) + _popcount(c4 ^ b4) + _popcount(c5 ^ b5))


@compiled_exactly
def _one_word(
    a: NDArray[np.uint64], i: int, k: int, w: int, tile: NDArray[np.uint64], width: int, ones: NDArray[np.int64]
) -> None:
    x, y, column = a[i, w], a[k, w], tile[w, :width]
    h0, h1 = ones[0, :width], ones[1, :width]
    for j in range(width):
        h0[j] += np.int64(_popcount(x ^ column[j]))
        h1[j] += np.int64(_popcount(y ^ column[j]))


@compiled_exactly
def _count(
    a: NDArray[np.uint64],
    pair: tuple[int, int],
    words: tuple[int, int],
    tile: NDArray[np.uint64],
    width: int,
    ones: NDArray[np.int64],
) -> None:
    """Count where the words of one matrix of two queries differ from those of a tile's columns."""
    w, last = words
    if w + 5 < last:
        _six(a, pair[0], pair[1], w, tile, width, ones, True)
        w += 6
    else:
        ones[:] = 0
    while w + 5 < last:
        _six(a, pair[0], pair[1], w, tile, width, ones, False)
        w += 6
    while w < last:
        _one_word(a, pair[0], pair[1], w, tile, width, ones)
        w += 1


@compiled_exactly
def _add_up(
    ones: NDArray[np.int64], d: float, weight: NDArray[np.float64], signed: bool, sums: NDArray[np.float64]
) -> None:
    if signed:
        for j in range(weight.shape[0]):
            sums[j] += (d - 2.0 * np.float64(ones[j])) * weight[j]
    else:
        for j in range(weight.shape[0]):
            difference = d - 2.0 * np.float64(ones[j])
            sums[j] += difference * difference * weight[j]


@compiled_exactly
def _tile_scores(
    a: NDArray[np.uint64],
    live_a: NDArray[np.bool_],
    bits: NDArray[np.uint64],
    live: NDArray[Any],
    starts: NDArray[np.int64],
    dims: NDArray[np.int64],
    weights: NDArray[np.float64],
    signed: bool,
    out: NDArray[np.float32],
) -> None:
    """Score all pairs: rows of `bits` are turned into columns tile by tile, two queries share every load."""
    count, words, n = dims.shape[0], bits.shape[1], a.shape[0]
    tile, alive = np.empty((words, TILE), np.uint64), np.empty((count, TILE), np.float64)
    ones, total = np.empty((2, TILE), np.int64), np.empty((2, TILE), np.float64)
    for first in range(0, bits.shape[0], TILE):
        width = min(TILE, bits.shape[0] - first)
        for j in range(width):
            for w in range(words):
                tile[w, j] = bits[first + j, w]
            for m in range(count):
                alive[m, j] = weights[m] if live[first + j, m] != 0 else 0.0
        for i in range(0, n, 2):
            k = min(i + 1, n - 1)
            total[:] = 0.0
            for m in range(count):
                _count(a, (i, k), (starts[m], starts[m + 1]), tile, width, ones)
                d, weight = np.float64(dims[m]), alive[m, :width]
                if live_a[i, m]:
                    _add_up(ones[0], d, weight, signed, total[0])
                if live_a[k, m]:
                    _add_up(ones[1], d, weight, signed, total[1])
            for q in range(k - i + 1):
                line, sums = out[i + q, first : first + width], total[q, :width]
                for j in range(width):
                    line[j] = sums[j]


@compiled
def _dots(codes: NDArray[np.uint8], table: NDArray[np.float32], start: int, out: NDArray[np.float32]) -> None:
    for i in range(codes.shape[0]):
        total = np.float32(0.0)
        for p in range(table.shape[0]):
            total += table[p, codes[i, start + p]]
        out[i] = total


@compiled
def _pack(
    values: NDArray[np.float32],
    edges: NDArray[np.int64],
    starts: NDArray[np.int64],
    out: NDArray[np.uint64],
    finite: NDArray[np.bool_],
) -> None:
    for i in range(values.shape[0]):
        bad = np.float32(0.0)
        for m in range(edges.shape[0] - 1):
            w, lo, last = starts[m], edges[m], edges[m + 1]
            while lo < last:
                part = values[i, lo : min(lo + 64, last)]
                word = np.uint64(0)
                for j in range(part.shape[0]):
                    bad += part[j] * np.float32(0.0)  # NaN from here on where the number is NaN or infinite
                    word |= np.uint64(part[j] < 0) << np.uint64(j)
                out[i, w] = word
                w += 1
                lo += 64
        finite[i] = bad == 0.0


def word_starts(words: tuple[int, ...]) -> NDArray[np.int64]:
    """Return where each matrix's words start.

    Args:
        words: words that each matrix takes.

    Returns:
        (m + 1,) int64.
    """
    return np.concatenate(([0], np.cumsum(words, dtype=np.int64))).astype(np.int64)


def cosines(
    query: NDArray[np.uint64], bits: NDArray[np.uint64], words: tuple[int, ...], dims: tuple[int, ...]
) -> NDArray[np.float32]:
    """Return the cosine of one code with many, per matrix.

    Args:
        query: (W,) uint64.
        bits: (n, W) uint64.
        words: words that each matrix takes; their sum is W.
        dims: d_out of each matrix.

    Returns:
        (n, m) float32 in [−1, 1].
    """
    starts, lengths = word_starts(words), np.asarray(dims, np.int64)
    out = np.empty((len(bits), len(dims)), np.float32)
    query = np.ascontiguousarray(query)
    in_chunks(lambda lo, hi: _cosines(query, bits[lo:hi], starts, lengths, out[lo:hi]), len(bits), least=4096)
    return out


def kernel(
    a: tuple[NDArray[np.uint64], NDArray[Any]],
    b: tuple[NDArray[np.uint64], NDArray[Any]],
    words: tuple[int, ...],
    dims: tuple[int, ...],
    *,
    signed: bool = False,
) -> NDArray[np.float32]:
    """Return the mean over matrices of the squared cosines of all pairs, (1 − 2h/d)².

    Args:
        a: (na, W) uint64 codes and (na, m) norms or bools, 0 where a factor is zero.
        b: (nb, W) uint64 codes and (nb, m) norms or bools.
        words: words that each matrix takes; their sum is W.
        dims: d_out of each matrix.
        signed: the mean of the cosines themselves.

    Returns:
        (na, nb) float32; the same bits of a pair always give the same number, whatever else is asked for.
    """
    starts, lengths = word_starts(words), np.asarray(dims, np.int64)
    weights = 1.0 / (len(dims) * lengths.astype(np.float64) ** (1 if signed else 2))
    left, right = np.ascontiguousarray(a[0]), b[0]
    live_left, live_right = np.ascontiguousarray(a[1] != 0), b[1]
    out = np.empty((len(left), len(right)), np.float32)

    def one(lo: int, hi: int) -> None:
        rows = right[lo:hi], live_left[0], live_right[lo:hi]
        _row_scores(left[0], *rows, starts, lengths, weights, signed, out[0, lo:hi])

    def columns(lo: int, hi: int) -> None:
        part = np.empty((len(left), hi - lo), np.float32)
        _tile_scores(left, live_left, right[lo:hi], live_right[lo:hi], starts, lengths, weights, signed, part)
        out[:, lo:hi] = part

    def rows(lo: int, hi: int) -> None:
        _tile_scores(left[lo:hi], live_left[lo:hi], right, live_right, starts, lengths, weights, signed, out[lo:hi])

    if len(left) == 1:
        in_chunks(one, len(right), least=4096)
    elif len(right) >= len(left):
        in_chunks(columns, len(right), least=TILE)
    else:
        in_chunks(rows, len(left), least=64)
    return out


def dots(bits: NDArray[np.uint64], first_word: int, vector: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Return the products of sign vectors with a vector of floats, by a table of 256 partial sums for each byte.

    Args:
        bits: (n, W) uint64 codes.
        first_word: where the matrix's words start.
        vector: (d,) floats.

    Returns:
        (n,) float32: Σ ±vector / √d, the product with the unit sign vector.
    """
    d = len(vector)
    padded = np.zeros((-(-d // 8), 8))
    padded.reshape(-1)[:d] = np.asarray(vector, np.float64) / np.sqrt(d)
    patterns = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    table = np.ascontiguousarray((padded @ (1.0 - 2.0 * patterns.T)).astype(np.float32))
    codes = np.ascontiguousarray(bits).astype("<u8", copy=False).view(np.uint8)
    out = np.empty(len(bits), np.float32)
    in_chunks(lambda lo, hi: _dots(codes[lo:hi], table, first_word * 8, out[lo:hi]), len(bits), least=4096)
    return out


def encode(values: NDArray[np.floating[Any]], dims: tuple[int, ...]) -> NDArray[np.uint64]:
    """Pack the signs of rank-1 factors.

    Args:
        values: (n, Σ d) floats, matrix after matrix.
        dims: d_out of each matrix.

    Returns:
        (n, W) uint64: bit j of a matrix's word w is 1 where number 64·w + j is negative; padding bits 0.
    """
    out = np.zeros((len(values), sum(-(-d // 64) for d in dims)), np.uint64)
    pack(np.ascontiguousarray(values, np.float32), dims, out)
    return out


def pack(values: NDArray[np.float32], dims: tuple[int, ...], out: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Pack the signs of rank-1 factors into rows that are there, and look for NaN and infinity on the way.

    Args:
        values: (n, Σ d) float32, C order.
        dims: d_out of each matrix.
        out: (n, at least W) uint64, filled from the first word on; the rest is left alone.

    Returns:
        (n,) bool, False where a number is NaN or infinite.
    """
    starts = word_starts(tuple(-(-d // 64) for d in dims))
    edges, finite = word_starts(dims), np.empty(len(values), np.bool_)
    in_chunks(lambda lo, hi: _pack(values[lo:hi], edges, starts, out[lo:hi], finite[lo:hi]), len(values), least=1024)
    return finite


def decode(bits: NDArray[np.uint64], first_word: int, d: int) -> NDArray[np.float32]:
    """Unpack the sign codes of one matrix into unit vectors.

    Args:
        bits: (n, W) uint64 codes.
        first_word: where the matrix's words start.
        d: its d_out.

    Returns:
        (n, d) float32, every number ±1/√d.
    """
    words = np.ascontiguousarray(bits[:, first_word : first_word + -(-d // 64)]).astype("<u8", copy=False)
    ones = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little", count=d)
    scale = np.float32(1.0 / np.sqrt(d))
    return scale - (2.0 * scale) * ones.astype(np.float32)
