"""The entries of a kernel that can still matter: those above what their row is covered by already."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from repmatch.compiled import in_chunks
from repmatch.selectors.kernels import Kernel, report
from repmatch.selectors.sparse import SparseKernel
from repmatch.similarity.pairs import Floats

ROWS, COLUMNS = 2048, 32768  # of a block: 256 MiB of float32
ENTRY = 16  # bytes of a kept entry: position and value, listed by row and by candidate
SAMPLE = 128  # rows that an estimate looks at

Listed = tuple[NDArray[np.int64], NDArray[np.int32], Floats]


def expected_entries(kernel: Kernel, floor: NDArray[np.float64], seed: int = 0) -> float:
    """Estimate how many entries exceed their row's floor, from a sample of rows.

    Args:
        kernel: any kernel.
        floor: (rows,) float64.
        seed: of the sample.

    Returns:
        The estimate.
    """
    rows, n = kernel.shape
    some = np.sort(np.random.default_rng(seed).choice(rows, min(rows, SAMPLE), replace=False))
    block = kernel.columns(some).T if kernel.symmetric else kernel.rows(some).columns(np.arange(n))
    return float((block > floor[some, None]).sum()) * rows / max(1, len(some))


def above(kernel: Kernel, floor: NDArray[np.float64]) -> SparseKernel:
    """Keep the entries that exceed their row's floor; of a symmetric kernel only one half is computed.

    Args:
        kernel: any kernel; it is read a block at a time.
        floor: (rows,) float64.

    Returns:
        The sparse kernel, each row's entries in rising order of the candidates.
    """
    rows, n = kernel.shape
    edges = [*range(0, max(1, rows), ROWS), rows]
    waiting: list[list[Listed]] = [[] for _ in edges[1:]]
    done: list[Listed] = []
    for b, (lo, hi) in enumerate(pairwise(edges)):
        part = kernel.rows(np.arange(lo, hi))
        first = lo if kernel.symmetric else 0
        for start in range(first, n, COLUMNS):
            stop = min(n, start + COLUMNS)
            block = np.ascontiguousarray(part.columns(np.arange(start, stop)))
            waiting[b].append(_by_row(block, floor[lo:hi], start))
            if kernel.symmetric:
                for other in range(max(start, hi), stop, ROWS):
                    end = min(stop, other + ROWS)
                    waiting[other // ROWS].append(
                        _by_column(block[:, other - start : end - start], floor[other:end], lo)
                    )
        done.append(_merge(waiting[b]))
        waiting[b] = []
        report(kernel, "comparing", hi, rows)
    return _concatenate(done, n, kernel.resolution)


def _by_row(block: Floats, floor: NDArray[np.float64], first: int) -> Listed:
    from repmatch.selectors import _loops

    counts = np.zeros(len(block), np.int64)
    in_chunks(lambda lo, hi: _loops.count_above(block, floor, lo, hi, counts), len(block), least=64)
    starts = np.concatenate(([0], np.cumsum(counts)))
    neighbours, values = np.empty(starts[-1], np.int32), np.empty(starts[-1], block.dtype)
    in_chunks(
        lambda lo, hi: _loops.take_above(block, floor, first, lo, hi, starts, neighbours, values), len(block), least=64
    )
    return starts, neighbours, values


def _by_column(block: Floats, floor: NDArray[np.float64], first: int) -> Listed:
    from repmatch.selectors import _loops

    width = block.shape[1]
    counts = np.zeros(width, np.int64)
    in_chunks(lambda lo, hi: _loops.count_above_by_column(block, floor, lo, hi, counts), width, least=64)
    starts = np.concatenate(([0], np.cumsum(counts)))
    neighbours, values, ends = np.empty(starts[-1], np.int32), np.empty(starts[-1], block.dtype), starts[:-1].copy()
    in_chunks(
        lambda lo, hi: _loops.take_above_by_column(block, floor, first, lo, hi, ends, neighbours, values),
        width,
        least=64,
    )
    return starts, neighbours, values


def _merge(parts: list[Listed]) -> Listed:
    """Put the entries of the same rows, listed by ranges of candidates in rising order, behind each other."""
    if len(parts) == 1:
        return parts[0]
    lengths = [np.diff(starts) for starts, _, _ in parts]
    starts = np.concatenate(([0], np.cumsum(np.sum(lengths, axis=0)))).astype(np.int64)
    neighbours, values = np.empty(starts[-1], np.int32), np.empty(starts[-1], parts[0][2].dtype)
    place = starts[:-1].copy()
    for length, (_, some, numbers) in zip(lengths, parts, strict=True):
        target = np.repeat(place - (np.cumsum(length) - length), length) + np.arange(len(some))
        neighbours[target], values[target] = some, numbers
        place += length
    return starts, neighbours, values


def _concatenate(done: list[Listed], n: int, resolution: float) -> SparseKernel:
    sizes = [len(values) for _, _, values in done]
    counts = [np.diff(starts) for starts, _, _ in done]
    starts = (
        np.concatenate(([0], np.cumsum(np.concatenate(counts)))).astype(np.int64) if done else np.zeros(1, np.int64)
    )
    neighbours, values = np.empty(sum(sizes), np.int32), np.empty(sum(sizes), done[0][2].dtype if done else np.float32)
    lo = 0
    for b, size in enumerate(sizes):
        neighbours[lo : lo + size], values[lo : lo + size] = done[b][1:]
        done[b] = (starts, neighbours[:0], values[:0])  # let go of it as the whole grows
        lo += size
    return SparseKernel(starts, neighbours, values, n, resolution=resolution)
