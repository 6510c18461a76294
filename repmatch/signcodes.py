"""Similarity of sign codes: XOR and popcount, compiled.

A code holds one bit per number of a rank-1 factor, 1 where it is negative. Two sign vectors of length d that differ in
h places have cosine 1 − 2h/d. Codes of all matrices lie side by side, each padded to whole 64-bit words with zeros.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import intrinsic
from numpy.typing import NDArray

from repmatch.compiled import compiled, in_chunks

TILE = 256  # columns kept in cache while rows stream by


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


@compiled
def _kernel(
    a: NDArray[np.uint64],
    b: NDArray[np.uint64],
    live_a: NDArray[np.bool_],
    live_b: NDArray[np.float64],
    starts: NDArray[np.int64],
    dims: NDArray[np.int64],
    out: NDArray[np.float32],
) -> None:
    count = dims.shape[0]
    different = np.empty(TILE, np.int64)
    total = np.empty(TILE, np.float64)
    for first in range(0, b.shape[1], TILE):
        width = min(TILE, b.shape[1] - first)
        for i in range(a.shape[0]):
            total[:] = 0.0
            for m in range(count):
                if not live_a[i, m]:
                    continue
                different[:] = 0
                w, last = starts[m], starts[m + 1]
                while w < last:  # three words at a time; slices of their own let the loops use vector instructions
                    x0, b0 = a[i, w], b[w, first : first + width]
                    if w + 2 < last:
                        x1, b1 = a[i, w + 1], b[w + 1, first : first + width]
                        x2, b2 = a[i, w + 2], b[w + 2, first : first + width]
                        for j in range(width):
                            ones = _popcount(x0 ^ b0[j]) + _popcount(x1 ^ b1[j]) + _popcount(x2 ^ b2[j])
                            different[j] += np.int64(ones)
                        w += 3
                    else:
                        for j in range(width):
                            different[j] += np.int64(_popcount(x0 ^ b0[j]))
                        w += 1
                scale = 2.0 / dims[m]
                alive = live_b[m, first : first + width]
                for j in range(width):
                    cosine = 1.0 - scale * different[j]
                    total[j] += cosine * cosine * alive[j]
            line = out[i, first : first + width]
            for j in range(width):
                line[j] = total[j] / count


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
    a: tuple[NDArray[np.uint64], NDArray[np.bool_]],
    b: tuple[NDArray[np.uint64], NDArray[np.bool_]],
    words: tuple[int, ...],
    dims: tuple[int, ...],
) -> NDArray[np.float32]:
    """Return the mean over matrices of the squared cosines of all pairs, (1 − 2h/d)².

    Args:
        a: (na, W) uint64 codes and (na, m) bool, False where a factor is zero.
        b: (nb, W) uint64 codes and (nb, m) bool.
        words: words that each matrix takes; their sum is W.
        dims: d_out of each matrix.

    Returns:
        (na, nb) float32; the same bits of a pair always give the same number.
    """
    starts, lengths = word_starts(words), np.asarray(dims, np.int64)
    left, right = np.ascontiguousarray(a[0]), np.ascontiguousarray(b[0].T)
    live_left, live_right = np.ascontiguousarray(a[1]), np.ascontiguousarray(b[1].T, dtype=np.float64)
    out = np.empty((len(left), right.shape[1]), np.float32)
    if len(left) >= right.shape[1]:

        def rows(lo: int, hi: int) -> None:
            _kernel(left[lo:hi], right, live_left[lo:hi], live_right, starts, lengths, out[lo:hi])

        in_chunks(rows, len(left), least=64)
        return out

    def columns(lo: int, hi: int) -> None:
        part = np.empty((len(left), hi - lo), np.float32)
        mine, alive = np.ascontiguousarray(right[:, lo:hi]), np.ascontiguousarray(live_right[:, lo:hi])
        _kernel(left, mine, live_left, alive, starts, lengths, part)
        out[:, lo:hi] = part

    in_chunks(columns, right.shape[1], least=TILE)
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
