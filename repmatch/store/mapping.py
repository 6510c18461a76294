"""Segment files mapped into memory: rows without a copy, and pages given back when a scan has passed them."""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from repmatch.store.segment import HEADER_BYTES, SegmentFile


class MappedSegment:
    """The committed rows of one segment file; they stay readable when the file is removed.

    Args:
        file: the segment.
        rows: how many of its rows are needed, from the first.

    Raises:
        StoreCorruptError: the file is gone or shorter than that.
    """

    def __init__(self, file: SegmentFile, rows: int) -> None:
        file.check_size(rows)
        self._row_bytes = file.row_bytes
        with file.path.open("rb") as opened:
            self._map = mmap.mmap(opened.fileno(), file.offset(rows), access=mmap.ACCESS_READ)
        self.rows: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8, rows * file.row_bytes, HEADER_BYTES).reshape(
            rows, file.row_bytes
        )

    def release(self, first: int, count: int) -> None:
        """Give back the memory of rows that a scan has passed; reading them again reads the file again.

        Args:
            first: number of the first row.
            count: how many.
        """
        page = mmap.PAGESIZE
        lo = -(-(HEADER_BYTES + first * self._row_bytes) // page) * page
        hi = (HEADER_BYTES + (first + count) * self._row_bytes) // page * page
        if hi > lo and hasattr(mmap, "MADV_DONTNEED"):
            with suppress(OSError):  # advice only
                self._map.madvise(mmap.MADV_DONTNEED, lo, hi - lo)
