"""Inner loops on a kernel kept whole, compiled. Import where they are needed: numba takes half a second to load."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmatch.compiled import compiled, compiled_exactly

BLOCK = 512  # entries summed in the kernel's own precision before float64 takes over
LANES = 256  # sums that run side by side
PIECE = 4096  # entries read again and again while they are in the processor's first cache
FLAGS = 8  # comparisons that are looked at together, a byte each of one word
PLACES = np.uint64(0x0001020304050607)  # times a word with one byte of 1: the top byte is that byte's place
ONE, TOP = np.uint64(1), np.uint64(56)


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

    Sets `sums` to the sum of every row, finite only where every entry is, and `positive` to those of positive entries,
    one a PIECE of the row.

    Returns:
        Σ_ij (right_i left_j − left_i right_j) bits_ij mod 2⁶⁴, over the rows; 0 over all rows where the kernel is
        symmetric (as Freivalds 1977 checks products).
    """
    total = np.uint64(0)
    for i in range(lo, hi):
        a, b = np.uint64(0), np.uint64(0)
        sums[i] = 0.0
        for first in range(0, kernel.shape[1], PIECE):
            last = min(kernel.shape[1], first + PIECE)
            line, bits, u, v = kernel[i, first:last], words[i, first:last], left[first:last], right[first:last]
            every, some = 0.0, 0.0
            for j in range(last - first):
                entry = np.float64(line[j])
                every += entry
                some += max(entry, 0.0)
            sums[i] += every
            positive[i, first // PIECE] = some
            for j in range(last - first):
                a += np.uint64(bits[j]) * np.uint64(u[j])
                b += np.uint64(bits[j]) * np.uint64(v[j])
        total += a * np.uint64(right[i]) - b * np.uint64(left[i])
    return total


@compiled
def line_sums(lines: NDArray[Any], lo: int, hi: int, out: NDArray[np.float64]) -> None:
    """Set out[lo:hi] to the sums of the positive entries of lines lo..hi, one a PIECE of the line."""
    for i in range(lo, hi):
        for first in range(0, lines.shape[1], PIECE):
            line = lines[i, first : first + PIECE]
            some = 0.0
            for j in range(line.shape[0]):
                some += max(np.float64(line[j]), 0.0)
            out[i, first // PIECE] = some


@compiled
def rough_gains(
    lines: NDArray[Any],
    which: NDArray[np.int64],
    cover: NDArray[Any],
    floor: NDArray[np.float64],
    parts: NDArray[np.float64],
    turn: NDArray[np.int64],
    lo: int,
    hi: int,
    out: NDArray[np.float64],
) -> int:
    """Set out[lo:hi] to Σ_i max(lines[which, i] − cover_i, 0), or to more than that where more is below the floor too.

    Pieces of a line are summed anew, the longest ago first, until all are, or until what is known of them bounds the
    whole below the floor. Sums are rounded by less than (BLOCK + 2) ulp of the kernel's.

    Args:
        lines: the kernel.
        which: the candidates.
        cover: of every row, in the kernel's precision.
        floor: of every candidate: smaller gains need not be known.
        parts: (n, pieces) what every piece adds at the most; brought up to date.
        turn: (n,) the piece of every candidate that was summed the longest ago; brought up to date.
        lo: first of `which`.
        hi: end of them.
        out: of the length of `which`.

    Returns:
        How many pieces were summed.
    """
    zero = lines.dtype.type(0)
    pieces, read = parts.shape[1], 0
    for c in range(lo, hi):
        j = which[c]
        total = 0.0
        for p in range(pieces):
            total += parts[j, p]
        at = turn[j]
        for _ in range(pieces):
            start = at * PIECE
            new = 0.0
            for first in range(start, min(start + PIECE, lines.shape[1]), BLOCK):
                last = min(first + BLOCK, lines.shape[1])
                line, covered = lines[j, first:last], cover[first:last]
                some = zero
                for i in range(last - first):
                    some += max(line[i] - covered[i], zero)
                new += np.float64(some)
            total += new - parts[j, at]
            parts[j, at] = new
            at = at + 1 if at + 1 < pieces else 0
            read += 1
            if total < floor[c]:
                break
        turn[j] = at
        total = 0.0
        for p in range(pieces):
            total += parts[j, p]
        out[c] = total
    return read


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
    flags = np.zeros(PIECE, np.uint8)
    words = flags.view(np.uint64)
    for i in range(lo, hi):
        if place + n > end:
            return i
        least = floor[i]
        starts[i] = place
        for first in range(0, n, PIECE):
            width = min(PIECE, n - first)
            line = lines[i, first : first + width]
            if width < PIECE:
                flags[:] = 0
            for j in range(width):
                flags[j] = line[j] > least
            for b in range((width + FLAGS - 1) // FLAGS):
                word = words[b]
                while word:
                    at = FLAGS * b + np.int64(((word & (~word + ONE)) * PLACES) >> TOP)
                    neighbours[place], values[place] = first + at, line[at]
                    place += 1
                    word &= word - ONE
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
    found, n = 0, line.shape[0]
    flags = np.zeros((n + FLAGS - 1) // FLAGS * FLAGS, np.uint8)
    words = flags.view(np.uint64)
    for i in range(n):
        flags[i] = np.float64(line[i]) > cover[i]
    for b in range(words.shape[0]):
        word = words[b]
        while word:
            at = FLAGS * b + np.int64(((word & (~word + ONE)) * PLACES) >> TOP)
            value = np.float64(line[at])
            raised[found], old[found], new[found] = at, cover[at], value
            cover[at], representative[at] = value, position
            found += 1
            word &= word - ONE
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
