"""What has to be known of an array before strategies read it: that it is finite, and whether it is symmetric."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmatch.compiled import in_chunks
from repmatch.errors import SelectionError
from repmatch.similarity.pairs import Floats


def refuse_not_finite(array: Floats) -> None:
    """Refuse an array that holds a number that is not finite.

    Args:
        array: (rows, n).

    Raises:
        SelectionError: an entry is infinite or not a number; it names the first.
    """
    step = max(1, (16 << 20) // max(1, array.itemsize * array.shape[1]))
    view = array.T if array.flags.f_contiguous and not array.flags.c_contiguous else array
    step = max(1, (16 << 20) // max(1, view.itemsize * view.shape[1]))
    for lo in range(0, len(view), step):
        block = view[lo : lo + step]
        with np.errstate(over="ignore", invalid="ignore"):
            good = np.isfinite(block.sum())  # a sum is finite only where every entry is; it may overflow, so look again
        if not good and not np.isfinite(block).all():
            bad = np.argwhere(~np.isfinite(block))[0] + (lo, 0)
            place = tuple(int(p) for p in (bad if view is array else bad[::-1]))
            raise SelectionError(f"the kernel is {array[place]} at {place}: every entry must be finite")


def surveyed(array: NDArray[np.floating[Any]]) -> NDArray[np.float64] | None:
    """Read a square float32 array once.

    An array that is not symmetric passes for one with a probability below 10⁻⁸: its bits are compared with its
    transpose's through one product with random numbers on both sides.

    Args:
        array: (n, n) float32 in C order.

    Returns:
        (n, pieces) float64 sums of each row's positive entries, one a piece of the row; None where the array is not
        symmetric to the bit, or not finite.
    """
    from repmatch.selectors import _whole

    n = len(array)
    left, right = np.random.default_rng(0).integers(1, 2**32, (2, n), dtype=np.uint32)
    words, difference, sums, positive = (
        array.view(np.uint32),
        np.zeros(n, np.uint64),
        np.empty(n),
        np.empty((n, -(-n // _whole.PIECE))),
    )

    def part(lo: int, hi: int) -> None:
        difference[lo] = _whole.survey(array, words, left, right, lo, hi, sums, positive)

    in_chunks(part, n, least=256)
    return None if difference.sum() or not np.isfinite(sums).all() else positive


def is_symmetric(array: Floats, step: int = 256) -> bool:
    """Return whether a square array is its own transpose, to the last digit.

    Args:
        array: (n, n).
        step: rows and columns looked at together.
    """
    n = len(array)
    for lo in range(0, n, step):
        for start in range(lo, n, step):
            block = array[lo : lo + step, start : start + step]
            if not np.array_equal(block, array[start : start + step, lo : lo + step].T):
                return False
    return True
