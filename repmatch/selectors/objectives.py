"""Objectives that greedy maximises, besides facility location: each a small class with gains and picks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repmatch.compiled import in_chunks
from repmatch.errors import SelectionError
from repmatch.selectors.greedy import Objective
from repmatch.selectors.kernels import DenseKernel, Kernel, never_negative


class Coverage(Objective):
    """Facility location by columns: Σ_i max_{j ∈ S} max(K_ij, 0). For stochastic search and mixtures."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.n = kernel, kernel.shape[1]
        self.cover = np.zeros(kernel.shape[0])

    def gains(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return what each of some candidates would add."""
        from repmatch.selectors import _loops

        return _by_lines(self.kernel, indices, _loops.cover_gains, self.cover)

    def add(self, index: int) -> None:
        """Note a pick."""
        self.cover = np.maximum(self.cover, _column(self.kernel, index))


class GraphCut(Objective):
    """Similar to all, unlike each other: λ Σ_i Σ_{j ∈ S} K_ij − Σ_{i, j ∈ S} K_ij (Iyer and Bilmes 2013).

    Submodular for similarities of at least 0, monotone for λ ≥ 2; of others no certificate is given.
    """

    cheap = True

    def __init__(self, kernel: Kernel, *, trade: float = 2.0) -> None:
        """Take a square kernel.

        Args:
            kernel: similarities of all instances with each other.
            trade: λ; the smaller, the more different the picks.
        """
        if not trade >= 0.0:
            raise SelectionError(f"trade = {trade}: expected a number of at least 0")
        self.kernel, self.n, self.falling = kernel, kernel.shape[1], never_negative(kernel)
        self.monotone = self.falling and trade >= 2.0
        self.now = trade * kernel.shape[0] * kernel.means() - kernel.diagonal()

    def gains(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return what each of some candidates would add."""
        return self.now[indices]

    def add(self, index: int) -> None:
        """Note a pick."""
        self.now -= 2.0 * _need(self.kernel).columns(np.array([index], np.int64))[:, 0]


class SaturatedCoverage(Objective):
    """Every instance is covered by all picks together, up to a share of its total: Σ_i min(Σ_{j ∈ S} K_ij, α Σ_j K_ij).

    Lin and Bilmes 2011. Monotone and submodular; a similarity below 0 counts as 0.
    """

    def __init__(self, kernel: Kernel, *, saturation: float = 0.1) -> None:
        """Take a kernel.

        Args:
            kernel: similarities.
            saturation: α, 0 to 1; an instance is satisfied once its picks reach this share of its total similarity.
        """
        if not 0.0 < saturation <= 1.0:
            raise SelectionError(f"saturation = {saturation}: expected above 0, at most 1")
        self.kernel, self.n = kernel, kernel.shape[1]
        summed = kernel.symmetric and never_negative(kernel)
        totals = kernel.means() * kernel.shape[0] if summed else _row_sums(kernel)
        self.limit, self.cover = saturation * totals, np.zeros(kernel.shape[0])

    def gains(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return what each of some candidates would add."""
        from repmatch.selectors import _loops

        return _by_lines(self.kernel, indices, _loops.room_gains, self.limit - self.cover)

    def add(self, index: int) -> None:
        """Note a pick."""
        self.cover = np.minimum(self.cover + np.maximum(_column(self.kernel, index), 0.0), self.limit)

    def noise(self) -> float:
        """Return how far rounding may put a gain off."""
        return 4.0 * float(np.finfo(np.float64).eps) * self.ceiling()

    def ceiling(self) -> float:
        """Return the value of all instances together."""
        return float(self.limit.sum())


class LogDeterminant(Objective):
    """Picks that span a large volume: log det(K_S + εI), the greedy MAP of a determinantal point process.

    Chen et al. 2018, algorithm 1: a Cholesky factor grows by a row a pick, in O(n) each. Submodular, not monotone.
    """

    cheap = True
    monotone = False
    least = 1e-12

    def __init__(self, kernel: Kernel, *, ridge: float = 1e-6) -> None:
        """Take a positive semi-definite kernel.

        Args:
            kernel: similarities of all instances with each other.
            ridge: ε, added to the diagonal so that duplicates don't end the selection.
        """
        self.kernel, self.n = kernel, kernel.shape[1]
        self.left = kernel.diagonal() + ridge
        self.ridge = ridge
        self.factor = np.empty((0, self.n))
        self.count = 0

    def gains(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return what each of some candidates would add."""
        return np.asarray(np.log(np.maximum(self.left[indices], self.least)))

    def add(self, index: int) -> None:
        """Note a pick."""
        row = _column(self.kernel, index).astype(np.float64)
        row[index] += self.ridge
        known = self.factor[: self.count]
        row -= known[:, index] @ known
        row /= np.sqrt(max(float(self.left[index]), self.least))
        self.left -= np.square(row)
        if self.count == len(self.factor):
            larger = np.empty((max(16, 2 * self.count), self.n))  # pages that stay unused take no memory
            larger[: self.count] = known
            self.factor = larger
        self.factor[self.count] = row
        self.count += 1


class MeanMatch(Objective):
    """Picks whose mean is that of all: V − MMD²(S), with V the mean of all similarities (kernel herding).

    Welling 2009; Chen, Welling and Smola 2010. Greedy on the exact MMD² of the picks with the target; the target enters
    through each candidate's mean similarity with it alone, which factors give without any n × n pass.
    """

    cheap = True
    falling = False
    monotone = False

    def __init__(self, kernel: Kernel, *, means: ArrayLike | None = None) -> None:
        """Take a kernel.

        Args:
            kernel: similarities of all candidates with each other.
            means: (n,) each candidate's mean similarity with the target; the candidates themselves by default.
        """
        self.kernel, self.n = kernel, kernel.shape[1]
        self.target = kernel.means() if means is None else np.asarray(means, np.float64)
        if self.target.shape != (self.n,):
            raise SelectionError(f"means have shape {self.target.shape}: expected ({self.n},)")
        self.self_similarity = kernel.diagonal()
        self.with_picks = np.zeros(self.n)
        self.count, self.cross, self.within, self.value = 0, 0.0, 0.0, 0.0

    def gains(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return what each of some candidates would add."""
        t = self.count + 1
        cross = self.cross + self.target[indices]
        within = self.within + 2.0 * self.with_picks[indices] + self.self_similarity[indices]
        return np.asarray(2.0 * cross / t - within / t**2 - self.value)

    def add(self, index: int) -> None:
        """Note a pick."""
        self.value += float(self.gains(np.array([index], np.int64))[0])
        self.cross += float(self.target[index])
        self.within += float(2.0 * self.with_picks[index] + self.self_similarity[index])
        self.with_picks = self.with_picks + _column(self.kernel, index)
        self.count += 1


class ScoreSum(Objective):
    """The sum of the picks' scores: for mixtures, so that good instances are preferred among representative ones."""

    cheap = True

    def __init__(self, scores: ArrayLike, *, kernel: Kernel | None = None) -> None:
        """Take scores.

        Args:
            scores: (n,) floats of at least 0.
            kernel: for the representatives only.
        """
        self.scores = np.asarray(scores, np.float64)
        if self.scores.ndim != 1 or not np.isfinite(self.scores).all() or (self.scores < 0).any():
            raise SelectionError(
                f"scores {self.scores.shape} can't be summed: expected (n,) finite numbers, at least 0"
            )
        self.n, self.kernel = len(self.scores), kernel

    def gains(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return what each of some candidates would add."""
        return self.scores[indices]

    def add(self, index: int) -> None:
        """Note a pick: nothing changes."""

    def ceiling(self) -> float:
        """Return the value of all instances together."""
        return float(self.scores.sum())


class SetFunction(Objective):
    """Any function of a set, called on the picks and one candidate more: nothing is assumed of it."""

    falling = False
    monotone = False

    def __init__(self, value: Callable[[NDArray[np.int64]], float], n: int, *, kernel: Kernel | None = None) -> None:
        """Take a function.

        Args:
            value: gives the value of (t,) positions, t of at least 1.
            n: candidates.
            kernel: for the representatives only.
        """
        self.function, self.n, self.kernel = value, n, kernel
        self.picks: list[int] = []
        self.value = 0.0

    def gains(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return what each of some candidates would add."""
        values = [float(self.function(np.array([*self.picks, j], np.int64))) for j in indices.tolist()]
        if not np.isfinite(values).all():
            place = int(indices[int(np.argmin(np.isfinite(values)))])
            raise SelectionError(f"the function is {values[list(indices).index(place)]} with instance {place}")
        return np.asarray(values, np.float64) - self.value

    def add(self, index: int) -> None:
        """Note a pick."""
        self.picks.append(index)
        self.value = float(self.function(np.array(self.picks, np.int64)))


class Mixture(Objective):
    """A weighted sum of objectives."""

    def __init__(self, parts: Sequence[tuple[float, Objective]]) -> None:
        """Take objectives.

        Args:
            parts: weights of at least 0 and fresh objectives over the same candidates, at least one.
        """
        sizes = {part.n for _, part in parts}
        if len(sizes) != 1 or any(not w >= 0.0 for w, _ in parts):
            raise SelectionError(f"a mixture of sizes {sorted(sizes)}: expected one size and weights of at least 0")
        self.parts, self.n = list(parts), sizes.pop()
        self.kernel = next((p.kernel for _, p in parts if p.kernel is not None), None)
        self.falling = all(p.falling for _, p in parts)
        self.monotone = all(p.monotone for _, p in parts)
        self.cheap = all(p.cheap for _, p in parts)

    def gains(self, indices: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return what each of some candidates would add."""
        out = np.zeros(len(indices))
        for weight, part in self.parts:
            out += weight * part.gains(indices)
        return out

    def add(self, index: int) -> None:
        """Note a pick."""
        for _, part in self.parts:
            part.add(index)

    def noise(self) -> float:
        """Return how far rounding may put a gain off."""
        return float(sum(weight * part.noise() for weight, part in self.parts))

    def ceiling(self) -> float:
        """Return the value of all instances together."""
        return float(sum(weight * part.ceiling() for weight, part in self.parts))


def _need(kernel: Kernel | None) -> Kernel:
    if kernel is None:
        raise SelectionError("this objective needs a kernel")
    return kernel


def _column(kernel: Kernel | None, index: int) -> NDArray[np.float64]:
    return np.asarray(_need(kernel).columns(np.array([index], np.int64))[:, 0], np.float64)


def _row_sums(kernel: Kernel) -> NDArray[np.float64]:
    out = np.zeros(kernel.shape[0])
    for lo in range(0, kernel.shape[1], 256):
        block = kernel.columns(np.arange(lo, min(kernel.shape[1], lo + 256)))
        out += np.maximum(block, 0.0).sum(axis=1, dtype=np.float64)
    return out


def _by_lines(
    kernel: Kernel | None, indices: NDArray[np.int64], loop: Callable[..., None], state: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Run a loop over some candidates' similarities with all rows, a block at a time, on all threads."""
    whole = _need(kernel)
    out = np.empty(len(indices))
    if isinstance(whole, DenseKernel) and whole.symmetric:
        in_chunks(lambda lo, hi: loop(whole.array, indices, state, lo, hi, out), len(indices), least=16)
        return out
    step = max(1, (64 << 20) // (8 * max(1, whole.shape[0])))
    for start in range(0, len(indices), step):
        some = indices[start : start + step]
        lines, part = np.ascontiguousarray(whole.columns(some).T), out[start : start + step]
        which = np.arange(len(some))
        in_chunks(lambda lo, hi, a=lines, w=which, p=part: loop(a, w, state, lo, hi, p), len(some), least=16)  # type: ignore[misc]
    return out
