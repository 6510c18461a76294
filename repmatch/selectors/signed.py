"""The signed kernel of stored factors: cosines of ΔW, in which opposite instances differ."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from repmatch.blocks import dense_block, same_space
from repmatch.datamodels import Factors
from repmatch.errors import SelectionError
from repmatch.selectors.kernels import FactorKernel
from repmatch.similarity.pairs import Floats


class SignedKernel(FactorKernel):
    """The mean over matrices of the cosines of two ΔW, from −1 to 1: positive semi-definite, computed where it is read.

    A cosine is the product of two unit vectors, so a whole set enters a mean through the sum of its vectors alone.
    """

    nonnegative = False

    def __init__(
        self, factors: Factors, *, represented: Factors | None = None, memory_limit: int | None = None
    ) -> None:
        """Take factors.

        Args:
            factors: the n candidates.
            represented: the instances that the selection should stand for; the candidates themselves by default.
            memory_limit: bytes that a whole kernel may take; by default a quarter of the machine's, 4 GiB at most.

        Raises:
            SelectionError: factors of a rank above 1 without cores, whose ΔW is not known.
            SpaceMismatchError: candidates and represented are of different spaces.
        """
        for some in (factors, represented):
            if some is not None and some.layout.rank > 1 and some.cores is None:
                raise SelectionError(
                    f"signed similarity at rank {some.layout.rank} needs cores: these factors have none"
                )
        super().__init__(factors, represented=represented, memory_limit=memory_limit)
        self.resolution = 1e-6

    def block(self, rows: Factors, columns: Factors) -> NDArray[np.float32]:
        """Return (rows, columns): the mean cosines of all pairs."""
        same_space(rows, columns)
        out = np.zeros((len(rows), len(columns)), np.float32)
        for m in range(len(rows.layout.dims)):
            out += _vectors(rows, m) @ _vectors(columns, m).T
        out /= np.float32(len(rows.layout.dims))
        return np.clip(out, -1.0, 1.0, out=out)

    def sums(self) -> NDArray[np.float64] | None:
        """Return None: the mean bounds no sum of positive entries where some are negative."""
        return None

    def diagonal(self) -> NDArray[np.float64]:
        """Return (n,): the share of matrices whose factor is not zero, for every cosine with itself is 1."""
        return np.asarray((self.factors.norms != 0).mean(axis=1), np.float64)

    def means(self) -> NDArray[np.float64]:
        """Return (n,): each candidate's mean similarity with the represented instances, through mean vectors."""
        out = np.zeros(len(self.factors))
        for m in range(len(self.factors.layout.dims)):
            mean = _vectors(self.represented, m).mean(axis=0, dtype=np.float64)
            out += _vectors(self.factors, m) @ mean
        return np.asarray(out / len(self.factors.layout.dims), np.float64)


def _vectors(factors: Factors, m: int) -> Floats:
    """Return (n, d·r) float32: one matrix's ΔW in the basis of A's rows, of unit length; zero factors are zeros."""
    block = dense_block(factors, m, 0, len(factors))
    if factors.cores is None:
        return block[:, :, 0]
    cores = np.asarray(factors.cores[:, m], np.float32)
    length = np.linalg.norm(cores, axis=(1, 2), keepdims=True)
    out: Floats = np.matmul(block, cores / np.where(length > 0, length, 1.0)).reshape(len(factors), -1)
    return out
