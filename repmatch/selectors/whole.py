"""Facility location on a kernel that is kept whole: exact greedy that reads few of its rows more than twice."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmatch.compiled import in_chunks, thread_count
from repmatch.selectors.cover import Cover, Handing, Incremental
from repmatch.selectors.kernels import DenseKernel, Kernel
from repmatch.selectors.pruning import expected_entries
from repmatch.similarity.pairs import Floats

MOST_KEPT = 0.05  # share of the entries that are kept: with 8 bytes each, a tenth of the kernel's memory
FIRST_LOOK = 8  # picks between two looks at how many entries could be kept
ROOM = 3.0  # times as many entries as expected have room: pages that stay unused take no memory
PATIENCE = 2.0  # times the number of candidates that are computed before entries are kept, whatever is to come
KEEPING = 1.5  # times the number of candidates: computing as many costs about as much as keeping entries
NO_FLOOR = np.full(1, -np.inf)
FIRST_LINES, LAST_LINES = 16, 1024  # candidates computed at a time, few at first


class Whole(Handing):
    """Lazy at first; then only the entries that still exceed their row's cover are kept, and gains are kept up to date.

    Looking a candidate up costs up to a row, keeping entries one pass over the kernel: so it is changed over once as
    many rows are likely to be read as that costs. Where too many entries still exceed the cover by then, gains are kept
    up to date from the rows themselves for a while: a pick raises the cover of fewer and fewer.
    """

    name = "incremental"

    def __init__(self, kernel: Kernel, array: Floats, k: int) -> None:
        self.array, self.k = array, k
        start = Lines(kernel, array) if kernel.symmetric else Incremental(kernel, array)
        super().__init__(kernel, start)
        self.next_look, self.read_before = FIRST_LOOK, 0.0

    def settle(self) -> None:
        """Change the way of working where that pays."""
        now = self.inner
        if isinstance(now, Kept) or self.picks < self.next_look:
            return
        self.next_look, recent = self.picks + FIRST_LOOK, now.rows_read - self.read_before
        self.read_before = now.rows_read
        # Rows a pick fall about as 1/t, so that these are still to come until k; and then all, for the certificate.
        ahead = self.n + recent / FIRST_LOOK * self.picks * np.log(max(1.0, self.k / self.picks))
        waited = now.rows_read >= PATIENCE * self.n
        if not waited and ahead < KEEPING * self.n:
            return
        expected = expected_entries(self.kernel, now.cover)
        if expected <= MOST_KEPT * self.array.size:
            self.inner = Kept(self.kernel, self.array, now, int(expected))
        elif waited and isinstance(now, Lines):
            self.inner = Incremental(self.kernel, self.array, now)


class Lines(Cover):
    """Gains only fall, so old ones bound new ones: only candidates whose bound leads are computed (Minoux 1978)."""

    name = "incremental"

    def __init__(self, kernel: Kernel, array: Floats) -> None:
        super().__init__(kernel)
        from repmatch.selectors import _whole

        self.lines, self.array = _whole, array
        known = kernel.positive_sums if isinstance(kernel, DenseKernel) else None
        pieces = -(-array.shape[1] // _whole.PIECE)
        self.parts = np.zeros((self.n, pieces)) if known is None else known.copy()
        if known is None:
            in_chunks(lambda lo, hi: _whole.line_sums(array, lo, hi, self.parts), self.n, least=64)
        self.turn = np.zeros(self.n, np.int64)
        rounding = (_whole.BLOCK + 2) * np.finfo(array.dtype).eps + array.shape[1] * np.finfo(np.float64).eps
        self.slack = float(rounding)  # of sums, relative
        self.gains = self.parts.sum(axis=1) * (1.0 + self.slack)
        self.low = self.cover.astype(array.dtype)  # exact: entries, or 0
        self.stale = False

    def best(self, allowed: NDArray[np.bool_], costs: NDArray[np.float64] | None = None) -> tuple[int, float]:
        """Return the allowed candidate of the largest gain (with costs: gain per cost), and its gain."""
        candidates = np.flatnonzero(allowed)
        price = np.ones(len(candidates)) if costs is None else costs[candidates]
        rates = self.gains[candidates] / price  # bounds until they are computed
        near = (1.0 - self.kernel.resolution) * (1.0 - self.slack) ** 2
        first = np.array([rates.argmax()])
        rates[first] = self._compute(candidates[first], NO_FLOOR) / price[first]
        done, top = [first], float(rates[first[0]])
        waiting = np.flatnonzero((rates >= near * top) & (rates > 0.0))
        waiting = waiting[waiting != first[0]]
        waiting = waiting[np.argsort(-rates[waiting])]
        width = FIRST_LINES
        while len(waiting) and rates[waiting[0]] >= near * top:
            now, waiting = waiting[:width], waiting[width:]
            now = now[rates[now] >= near * top]
            rates[now] = self._compute(candidates[now], near * top * price[now]) / price[now]
            done.append(now)
            top, width = max(top, float(rates[now].max())), min(2 * width, LAST_LINES)
        leaders = np.concatenate(done)
        leaders = leaders[rates[leaders] >= near * top]
        exact = np.array([self.gain(int(j)) for j in candidates[leaders]])
        ties = exact / price[leaders]
        ties = leaders[ties >= ties.max() * (1.0 - self.kernel.resolution)]
        if top <= 0.0:  # nobody gains anything any more
            ties = np.flatnonzero(rates <= 0.0)
        winner = int(candidates[ties.min()])
        return winner, self.gain(winner)

    def _compute(self, which: NDArray[np.int64], floor: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return upper bounds on some gains that are too large by their rounding only, or below the floor."""
        out, least = np.empty(len(which)), max(8, (1 << 20) // max(1, self.array.shape[1]))
        low = np.broadcast_to(floor / (1.0 + self.slack) ** 2, which.shape)
        read: list[int] = []

        def part(lo: int, hi: int) -> None:
            read.append(self.lines.rough_gains(self.array, which, self.low, low, self.parts, self.turn, lo, hi, out))

        in_chunks(part, len(which), least=least)
        out *= 1.0 + self.slack
        self.gains[which] = out
        self.rows_read += sum(read) / max(1, self.parts.shape[1])
        return out

    def gain(self, index: int) -> float:
        """Return the gain of one candidate."""
        return float(self.lines.exact_line(self.array[index], self.cover))

    def add(self, index: int, position: int) -> None:
        """Note a pick."""
        self.raise_cover(self.array[index], position)
        self.low = self.cover.astype(self.array.dtype)
        self.stale = True

    def upper(self) -> NDArray[np.float64]:
        """Return upper bounds on the gains left."""
        if self.stale:
            self._compute(np.arange(self.n), NO_FLOOR)
            self.stale = False
        return self.gains


class Kept(Incremental):
    """Incremental on the entries that exceed their row's cover; a pick lets go of those that no longer do."""

    def __init__(self, kernel: Kernel, array: Floats, start: Cover, expected: int) -> None:
        super().__init__(kernel, array, start, fresh=False)
        from repmatch.selectors import _whole

        self.lines = _whole
        self.entries = _keep(array, self.cover, expected)
        self.gains = np.zeros(self.n)
        _whole.add_kept(*self.entries, self.cover, self.gains)
        self.scale = float(self.gains.max(initial=0.0))

    def lower(self, raised: NDArray[np.int64], old: NDArray[np.float64], new: NDArray[np.float64]) -> None:
        """Take from the gains what the raised rows no longer give."""
        self.lines.lower_kept(*self.entries, raised, old, new, self.gains, self.exact)


def _keep(
    array: Floats, cover: NDArray[np.float64], expected: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32], NDArray[Any]]:
    """Return where each row's entries above its cover start and stop, their candidates and values."""
    from repmatch.selectors import _whole

    rows, n = array.shape
    floor = cover.astype(array.dtype)
    starts, stops = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    threads = max(1, min(thread_count(), rows // 64))
    room = ROOM * expected / threads
    while True:
        each = int(room) + 2 * n + 64  # pages that stay unused take no memory
        neighbours, values = np.empty(threads * each, np.int32), np.empty(threads * each, array.dtype)
        done: list[bool] = []

        def part(lo: int, hi: int, each: int, neighbours: NDArray[np.int32], values: Floats, done: list[bool]) -> None:
            place = -(-lo * threads // rows) * each
            end = place + each
            done.append(hi == _whole.keep_above(array, floor, lo, hi, place, end, starts, stops, neighbours, values))

        in_chunks(partial(part, each=each, neighbours=neighbours, values=values, done=done), rows, least=64)
        if all(done):
            return starts, stops, neighbours, values
        room = 2.0 * room + n
