"""Kernels that strategies read: similarities of represented instances (rows) with candidates (columns)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repmatch.blocks import dense_block, row_blocks, same_space, take
from repmatch.datamodels import Factors
from repmatch.errors import SelectionError
from repmatch.hardware import physical_memory
from repmatch.selectors.arrays import is_symmetric, refuse_not_finite, surveyed
from repmatch.similarity import kernel_block, mean_similarity
from repmatch.similarity.pairs import Floats


def _default_limit() -> int:
    return min(4 << 30, (physical_memory() or 8 << 30) // 4)


_SURVEYED = 512  # instances from which a kernel is read by compiled code
DEFAULT_LIMIT = _default_limit()  # bytes that a whole kernel may take


@runtime_checkable
class Kernel(Protocol):
    """Similarities of represented instances (rows) with candidates (columns), read as a strategy needs them."""

    @property
    def shape(self) -> tuple[int, int]:
        """Represented instances and candidates."""

    @property
    def symmetric(self) -> bool:
        """Whether rows and columns are the same instances and entry (i, j) equals (j, i)."""

    @property
    def resolution(self) -> float:
        """Relative rounding error of an entry: gains closer than this count as equal; 0 where entries are exact."""

    def columns(self, indices: NDArray[np.int64]) -> Floats:
        """Return (rows, c): the similarities of all represented instances with some candidates."""

    def dense(self) -> Floats | None:
        """Return the whole (rows, n) array in C order, or None where it exceeds the memory limit."""

    def sums(self) -> NDArray[np.float64] | None:
        """Return (n,) upper bounds on the sum of each column's positive entries, or None where they cost too much."""

    def rows(self, indices: NDArray[np.int64]) -> Kernel:
        """Return the kernel of some represented instances only."""

    def diagonal(self) -> NDArray[np.float64]:
        """Return (n,): the similarity of each instance with itself."""

    def means(self) -> NDArray[np.float64]:
        """Return (n,): each candidate's mean similarity with the represented instances."""


class DenseKernel:
    """A kernel kept whole as an array.

    Attributes:
        array: (rows, n) float32 or float64 in C order.
        resolution: 0: entries are exact.
        positive_sums: (n, pieces) float64 sums of each column's positive entries, where they are known already.
    """

    def __init__(self, array: ArrayLike, *, rectangular: bool = False, survey: bool = False) -> None:
        """Check and take over an array, without a copy where possible.

        Args:
            array: (n, n) float32 or float64; with rectangular=True (represented, n).
            rectangular: rows are other instances than columns.
            survey: check by compiled code that finds the sums of positive entries in the same reading: for those who
                need them and load the compiler anyway, which takes half a second and 100 MB.

        Raises:
            SelectionError: not square, not floats, or an entry that is not finite.
        """
        given = np.asarray(array)
        if given.ndim != 2 or (not rectangular and given.shape[0] != given.shape[1]):
            raise SelectionError(
                f"the kernel has shape {given.shape}: expected a square array (n, n); wrap it as "
                "DenseKernel(array, rectangular=True) where rows are other instances than columns"
            )
        if given.dtype not in (np.float32, np.float64):
            if given.dtype.kind not in "iubf":
                raise SelectionError(f"the kernel holds {given.dtype}: expected float32 or float64")
            given = given.astype(np.float64 if given.dtype.kind in "iu" else np.float32)
        self._square = not rectangular
        self.positive_sums: NDArray[np.float64] | None = None
        if not (survey and self._square and len(given) >= _SURVEYED and self._survey(given)):
            refuse_not_finite(given)
        if not given.flags.c_contiguous:
            # A symmetric array in Fortran order is its own transpose, so nothing needs to be copied.
            turned = given.T if self._square and given.flags.f_contiguous and is_symmetric(given) else given
            given = np.ascontiguousarray(turned)
        self.array: Floats = given
        self.resolution = 0.0

    def _survey(self, given: Floats) -> bool:
        """Read a large float32 array once for its sums and symmetry; False where a closer look is needed."""
        if given.dtype == np.float32 and given.flags.c_contiguous:
            self.positive_sums = surveyed(given)
        if self.positive_sums is None:
            return False
        self.symmetric = True
        return True

    @property
    def shape(self) -> tuple[int, int]:
        """Represented instances and candidates."""
        return self.array.shape[0], self.array.shape[1]

    @cached_property
    def symmetric(self) -> bool:
        """Whether rows and columns are the same instances and entry (i, j) equals (j, i)."""
        return self._square and is_symmetric(self.array)

    def columns(self, indices: NDArray[np.int64]) -> Floats:
        """Return (rows, c): the similarities of all represented instances with some candidates."""
        return self.array[indices].T if self.symmetric else self.array[:, indices]

    def dense(self) -> Floats | None:
        """Return the array."""
        return self.array

    def sums(self) -> NDArray[np.float64] | None:
        """Return None: the algorithms sum an array themselves."""
        return None

    def rows(self, indices: NDArray[np.int64]) -> Kernel:
        """Return the kernel of some represented instances only."""
        return DenseKernel(self.array[indices], rectangular=True)

    def diagonal(self) -> NDArray[np.float64]:
        """Return (n,): the similarity of each instance with itself."""
        _need_square(self.shape)
        return np.diagonal(self.array).astype(np.float64)

    def means(self) -> NDArray[np.float64]:
        """Return (n,): each candidate's mean similarity with the represented instances."""
        return np.asarray(self.array.sum(axis=0, dtype=np.float64) / max(1, self.shape[0]))


class FactorKernel:
    """The RepMatch kernel of stored factors, computed where it is read: mean over matrices of φ(r, r).

    Whole (n, n) arrays are made only within the memory limit; otherwise blocks of columns are.

    Attributes:
        progress: called with what is done, rows done and rows in all, while all of it is read.
        nonnegative: no similarity is below 0.
    """

    progress: Callable[[str, int, int], None] | None = None
    nonnegative = True

    def __init__(
        self, factors: Factors, *, represented: Factors | None = None, memory_limit: int | None = None
    ) -> None:
        """Take factors.

        Args:
            factors: the n candidates.
            represented: the instances that the selection should stand for; the candidates themselves by default.
            memory_limit: bytes that a whole kernel may take; by default a quarter of the machine's, 4 GiB at most.

        Raises:
            SpaceMismatchError: candidates and represented are of different spaces.
        """
        if represented is not None:
            same_space(factors, represented)
        self.factors = factors
        self.represented = factors if represented is None else represented
        self.symmetric = represented is None
        self.memory_limit = DEFAULT_LIMIT if memory_limit is None else memory_limit
        self.resolution = 0.0 if factors.bits is not None and self.represented.bits is not None else 1e-6
        self._whole: NDArray[np.float32] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Represented instances and candidates."""
        return len(self.represented), len(self.factors)

    def columns(self, indices: NDArray[np.int64]) -> Floats:
        """Return (rows, c): the similarities of all represented instances with some candidates."""
        if self._whole is not None:
            return self._whole[indices].T if self.symmetric else self._whole[:, indices]
        return self.block(self.represented, take(self.factors, indices))

    def block(self, rows: Factors, columns: Factors) -> NDArray[np.float32]:
        """Return (rows, columns): the similarities of all pairs."""
        return kernel_block(rows, columns)

    def dense(self) -> Floats | None:
        """Return the whole (rows, n) float32 array, or None where it exceeds the memory limit."""
        rows, n = self.shape
        if self._whole is None and 4 * rows * n <= self.memory_limit:
            out = np.empty((rows, n), np.float32)
            step = 1024 if self.symmetric else max(256, (64 << 20) // (4 * max(1, n)))
            for lo in range(0, rows, step):
                hi = min(rows, lo + step)
                start = lo if self.symmetric else 0
                out[lo:hi, start:] = self.block(
                    take(self.represented, slice(lo, hi)), take(self.factors, slice(start, n))
                )
                report(self, "comparing", hi, rows)
            if self.symmetric:
                _mirror(out)
            self._whole = out
        return self._whole

    def sums(self) -> NDArray[np.float64] | None:
        """Return (n,) upper bounds on each column's sum, through the represented instances' mean projectors."""
        means = mean_similarity(self.factors, self.represented).astype(np.float64)
        return len(self.represented) * (means * (1.0 + 1e-4) + 1e-6)

    def rows(self, indices: NDArray[np.int64]) -> Kernel:
        """Return the kernel of some represented instances only."""
        return self.like(self.factors, take(self.represented, indices))

    def like(self, factors: Factors, represented: Factors | None) -> FactorKernel:
        """Return the same kernel of other instances.

        Args:
            factors: the candidates.
            represented: what they should stand for; None: each other.
        """
        return type(self)(factors, represented=represented, memory_limit=self.memory_limit)

    def candidates(self) -> FactorKernel:
        """Return the kernel of the candidates with each other."""
        return self.like(self.factors, None)

    def part(self, columns: NDArray[np.int64], rows: NDArray[np.int64] | None) -> FactorKernel:
        """Return the kernel of some candidates, with some represented instances or each other."""
        return self.like(take(self.factors, columns), None if rows is None else take(self.represented, rows))

    def diagonal(self) -> NDArray[np.float64]:
        """Return (n,): the similarity of each instance with itself; below 1 where a matrix's factor is zero."""
        if not self.symmetric:
            _need_square((-1, self.shape[1]))
        layout, out = self.factors.layout, np.zeros(len(self.factors))
        if self.factors.bits is not None:
            return np.asarray((self.factors.norms != 0).mean(axis=1), np.float64)
        for m in range(len(layout.dims)):
            for lo, hi in row_blocks(self.factors, m):
                block = dense_block(self.factors, m, lo, hi)
                out[lo:hi] += np.square(np.einsum("ndr,nds->nrs", block, block)).sum(axis=(1, 2))
        # Rounded, so that unit factors have equal diagonals and ties between them go by position, not by noise.
        return np.asarray(np.round(np.minimum(out / (len(layout.dims) * layout.rank), 1.0), 5), np.float64)

    def means(self) -> NDArray[np.float64]:
        """Return (n,): each candidate's mean similarity with the represented instances, through mean projectors."""
        return mean_similarity(self.factors, self.represented).astype(np.float64)


def as_kernel(
    kernel: Kernel | Factors | ArrayLike, represented: Factors | ArrayLike | None = None, *, survey: bool = False
) -> Kernel:
    """Return a kernel of whatever a strategy was given.

    Args:
        kernel: a kernel, factors, an (n, n) array, or a sparse matrix of scipy's kind.
        represented: what the selection should stand for: factors (where `kernel` is factors), (r,) positions of
            instances, or an (r, n) array of their similarities with the candidates; every instance by default.
        survey: see `DenseKernel`.

    Returns:
        The kernel.

    Raises:
        SelectionError: arguments that don't fit together.
    """
    if isinstance(kernel, Factors):
        kernel = FactorKernel(kernel)
    if hasattr(kernel, "tocsr"):
        from repmatch.selectors.sparse import SparseKernel

        kernel = SparseKernel.of_matrix(kernel)
    whole = kernel if isinstance(kernel, Kernel) else DenseKernel(kernel, survey=survey)
    if represented is None:
        return whole
    if isinstance(represented, Factors):
        if not isinstance(whole, FactorKernel):
            raise SelectionError("represented factors need a kernel of factors: pass Factors or FactorKernel as kernel")
        return whole.like(whole.factors, represented)
    array = np.asarray(represented)
    if array.ndim == 1:
        if array.dtype == np.bool_:
            array = np.flatnonzero(array)
        if array.dtype.kind not in "iu" or (len(array) and not 0 <= array.min() <= array.max() < whole.shape[0]):
            raise SelectionError(f"represented holds positions outside 0 to {whole.shape[0] - 1}, or not positions")
        return whole.rows(array.astype(np.int64))
    if array.ndim != 2 or array.shape[1] != whole.shape[1]:
        raise SelectionError(f"represented has shape {array.shape}: expected (r, {whole.shape[1]}) similarities")
    return DenseKernel(array, rectangular=True)


def among_candidates(kernel: Kernel | None) -> Kernel:
    """Return the similarities of the candidates with each other, whatever the kernel's rows are.

    Args:
        kernel: a kernel whose rows are the candidates, or one of factors.

    Returns:
        A square kernel.

    Raises:
        SelectionError: its rows are other instances, or there is none.
    """
    if isinstance(kernel, FactorKernel) and not kernel.symmetric:
        return kernel.candidates()
    if kernel is None or kernel.shape[0] != kernel.shape[1]:
        raise SelectionError("keeping picks apart needs the candidates' similarities with each other")
    return kernel


def never_negative(kernel: Kernel) -> bool:
    """Return whether no similarity is below 0, as far as the kernel can tell: objectives promise less where one is.

    Args:
        kernel: the kernel.
    """
    known = getattr(kernel, "nonnegative", None)
    if known is None:
        whole = kernel.dense()
        known = whole is not None and bool(whole.min(initial=0.0) >= 0.0)
    return bool(known)


def report(kernel: Kernel, what: str, done: int, total: int) -> None:
    """Tell how far a long reading of a kernel is, where the kernel knows whom to tell.

    Args:
        kernel: the kernel.
        what: what is done, such as "comparing".
        done: rows or picks done.
        total: of how many.
    """
    tell = getattr(kernel, "progress", None)
    if tell is not None:
        tell(what, done, total)


def _need_square(shape: tuple[int, int]) -> None:
    if shape[0] != shape[1]:
        raise SelectionError("this objective compares candidates with each other: it can't use a represented set")


def _mirror(array: NDArray[np.float32], step: int = 1024) -> None:
    """Copy the upper triangle to the lower, block by block."""
    n = len(array)
    for lo in range(0, n, step):
        hi = min(n, lo + step)
        square = array[lo:hi, lo:hi]
        square[:] = np.triu(square) + np.triu(square, 1).T
        for start in range(hi, n, step):
            array[start : start + step, lo:hi] = array[lo:hi, start : start + step].T
