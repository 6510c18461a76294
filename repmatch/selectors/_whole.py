"""Inner loops on a kernel kept whole, compiled. Import where they are needed: numba takes half a second to load."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmatch.compiled import compiled, compiled_exactly

BLOCK = 512  # entries summed in the kernel's own precision before float64 takes over
LANES = 256  # sums that run side by side
PIECE = 1024  # entries read again and again while they are in the processor's first cache
FLAGS = 8  # comparisons that are looked at together


@compiled
def survey(
    kernel: NDArray[np.float32],
    words: NDArray[np.uint32],
    left: NDArray[np.uint32],
    right: NDArray[np.uint32],
    lo: int,
    hi: int,
    sums: NDArray[np.float64],
    positive: NDArray[np.float64],
) -> Any:
    """Learn all that must be known of a square kernel from one reading of rows lo..hi.

    Sets `sums` to the sum of every row, finite only where every entry is, and `positive` to that of positive entries.

    Returns:
        Σ_ij (right_i left_j − left_i right_j) bits_ij mod 2⁶⁴, over the rows; 0 over all rows where the kernel is
        symmetric (as Freivalds 1977 checks products).
    """
    total = np.uint64(0)
    for i in range(lo, hi):
        a, b = np.uint64(0), np.uint64(0)
        sums[i], positive[i] = 0.0, 0.0
        for first in range(0, kernel.shape[1], PIECE):
            last = min(kernel.shape[1], first + PIECE)
            line, bits, u, v = kernel[i, first:last], words[i, first:last], left[first:last], right[first:last]
            every, some = 0.0, 0.0
            for j in range(last - first):
                entry = np.float64(line[j])
                every += entry
                some += max(entry, 0.0)
            sums[i] += every
            positive[i] += some
            for j in range(last - first):
                a += np.uint64(bits[j]) * np.uint64(u[j])
                b += np.uint64(bits[j]) * np.uint64(v[j])
        total += a * np.uint64(right[i]) - b * np.uint64(left[i])
    return total


@compiled
def line_sums(lines: NDArray[Any], lo: int, hi: int, out: NDArray[np.float64]) -> None:
    """Set out[lo:hi] to the sums of the positive entries of lines lo..hi."""
    for i in range(lo, hi):
        line = lines[i]
        some = 0.0
        for j in range(line.shape[0]):
            some += max(np.float64(line[j]), 0.0)
        out[i] = some


@compiled
def rough_gains(
    lines: NDArray[Any], which: NDArray[np.int64], cover: NDArray[Any], lo: int, hi: int, out: NDArray[np.float64]
) -> None:
    """Set out[lo:hi] to Σ_i max(lines[which, i] − cover_i, 0), rounded by less than (BLOCK + 2) ulp of the kernel's."""
    zero = lines.dtype.type(0)
    for c in range(lo, hi):
        total = 0.0
        for first in range(0, lines.shape[1], BLOCK):
            line, covered = lines[which[c], first : first + BLOCK], cover[first : first + BLOCK]
            some = zero
            for j in range(line.shape[0]):
                some += max(line[j] - covered[j], zero)
            total += np.float64(some)
        out[c] = total


@compiled_exactly
def exact_line(line: NDArray[Any], cover: NDArray[np.float64]) -> float:
    """Return Σ max(line − cover, 0), rounded about once: sums that run side by side keep what they lose (Knuth)."""
    sums, lost = np.zeros(LANES), np.zeros(LANES)
    for first in range(0, line.shape[0], LANES):
        part, covered = line[first : first + LANES], cover[first : first + LANES]
        for j in range(part.shape[0]):
            term = np.float64(part[j]) - covered[j]
            term = term if term > 0.0 else 0.0
            old = sums[j]
            new = old + term
            back = new - old
            lost[j] += (old - (new - back)) + (term - back)
            sums[j] = new
    total, rest = 0.0, 0.0
    for j in range(LANES):
        new = total + sums[j]
        back = new - total
        rest += (total - (new - back)) + (sums[j] - back) + lost[j]
        total = new
    return total + rest


@compiled
def keep_above(
    lines: NDArray[Any],
    floor: NDArray[Any],
    lo: int,
    hi: int,
    place: int,
    end: int,
    starts: NDArray[np.int64],
    stops: NDArray[np.int64],
    neighbours: NDArray[np.int32],
    values: NDArray[Any],
) -> int:
    """List the entries of lines lo..hi above the line's floor from `place` on, before `end`.

    Returns:
        The first line that has no room; hi where all have.
    """
    n = lines.shape[1]
    flags = np.zeros((n + FLAGS - 1) // FLAGS * FLAGS, np.uint8)
    some = flags.view(np.uint64)
    for i in range(lo, hi):
        if place + n + FLAGS > end:
            return i
        line, least = lines[i], floor[i]
        for j in range(n):
            flags[j] = line[j] > least
        starts[i] = place
        for b in range(some.shape[0]):
            if some[b]:
                for j in range(FLAGS * b, min(n, FLAGS * b + FLAGS)):
                    neighbours[place] = j
                    values[place] = line[j]
                    place += flags[j]
        stops[i] = place
    return hi


@compiled
def rising(
    line: NDArray[Any],
    position: int,
    cover: NDArray[np.float64],
    representative: NDArray[np.int64],
    raised: NDArray[np.int64],
    old: NDArray[np.float64],
    new: NDArray[np.float64],
) -> int:
    """Raise the cover to a pick's similarities; list the rows that rise with their cover before and after.

    Returns:
        How many there are.
    """
    found = 0
    for i in range(line.shape[0]):
        value = np.float64(line[i])
        if value > cover[i]:
            raised[found], old[found], new[found] = i, cover[i], value
            cover[i], representative[i] = value, position
            found += 1
    return found


@compiled
def add_kept(
    starts: NDArray[np.int64],
    stops: NDArray[np.int64],
    neighbours: NDArray[np.int32],
    values: NDArray[Any],
    cover: NDArray[np.float64],
    gains: NDArray[np.float64],
) -> None:
    """Add what every kept entry exceeds its row's cover by to its candidate's gain."""
    for i in range(starts.shape[0]):
        covered = cover[i]
        for p in range(starts[i], stops[i]):
            gains[neighbours[p]] += np.float64(values[p]) - covered


@compiled
def lower_kept(
    starts: NDArray[np.int64],
    stops: NDArray[np.int64],
    neighbours: NDArray[np.int32],
    values: NDArray[Any],
    raised: NDArray[np.int64],
    old: NDArray[np.float64],
    new: NDArray[np.float64],
    gains: NDArray[np.float64],
    exact: NDArray[np.bool_],
) -> None:
    """Take from the gains what the raised rows no longer give, and let go of the entries that no longer gain."""
    for r in range(raised.shape[0]):
        i, a, b = raised[r], old[r], new[r]
        place = starts[i]
        for p in range(starts[i], stops[i]):
            j, value = neighbours[p], np.float64(values[p])
            gains[j] -= min(value, b) - a
            exact[j] = False
            neighbours[place], values[place] = j, values[p]
            place += value > b
        stops[i] = place
