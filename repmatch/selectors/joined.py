"""Kernels of embeddings, alone or together with that of factors: what an instance teaches, and what it is about."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from repmatch.blocks import take
from repmatch.datamodels import Factors
from repmatch.errors import SelectionError
from repmatch.selectors.kernels import FactorKernel
from repmatch.similarity import kernel_block, mean_similarity

_WEIGHED = 2048  # instances of either side from which means are taken, evenly spaced where there are more
_STEP = 4096  # embeddings that are multiplied at a time


class JoinedKernel(FactorKernel):
    """A weighted sum of the RepMatch kernel and the cosines of embeddings, negative cosines as 0; computed where read.

    The weights add up to 1 and give both kernels the same mean, so that neither drowns the other: entries lie between
    0 and 1, and an instance's similarity with itself is 1.

    Attributes:
        weights: of the RepMatch kernel and of the embeddings' cosines.
    """

    def __init__(
        self,
        factors: Factors,
        *,
        represented: Factors | None = None,
        memory_limit: int | None = None,
        weights: tuple[float, float] | None = None,
    ) -> None:
        """Take factors with embeddings.

        Args:
            factors: the n candidates.
            represented: the instances that the selection should stand for; the candidates themselves by default.
            memory_limit: bytes that a whole kernel may take; by default a quarter of the machine's, 4 GiB at most.
            weights: of the two kernels; (0, 1) for embeddings alone. By default each by the other's mean entry, taken
                from at most 2,048 evenly spaced instances of either side.

        Raises:
            SelectionError: factors without embeddings.
            SpaceMismatchError: candidates and represented are of different spaces.
        """
        for some in (factors, represented):
            if some is not None:
                _of(some)
        super().__init__(factors, represented=represented, memory_limit=memory_limit)
        self.weights = _balanced(self.represented, self.factors) if weights is None else weights
        self.resolution = 1e-6

    def block(self, rows: Factors, columns: Factors) -> NDArray[np.float32]:
        """Return (rows, columns): the similarities of all pairs."""
        own, other = np.float32(self.weights[0]), np.float32(self.weights[1])
        out = _cosines(rows, columns)
        out *= other
        if own:
            out += own * kernel_block(rows, columns)
        return out

    def like(self, factors: Factors, represented: Factors | None) -> JoinedKernel:
        """Return the same kernel of other instances, with the same weights."""
        return JoinedKernel(factors, represented=represented, memory_limit=self.memory_limit, weights=self.weights)

    def sums(self) -> NDArray[np.float64] | None:
        """Return (n,) upper bounds on each column's sum.

        Of cosines x, Σ max(x, 0) = (Σ x + Σ |x|) / 2 ≤ (Σ x + √(n Σ x²)) / 2, and both sums are found from the mean
        and the second moment of the embeddings, without any pass over pairs.
        """
        rows, n = self.shape
        embedded = _of(self.represented)
        total, moment = np.zeros(embedded.shape[1]), np.zeros((embedded.shape[1],) * 2)
        for lo in range(0, rows, _STEP):
            some = embedded[lo : lo + _STEP].astype(np.float32)
            total += some.sum(axis=0, dtype=np.float64)
            moment += some.T @ some
        out = np.empty(n)
        for lo in range(0, n, _STEP):
            some = _of(self.factors)[lo : lo + _STEP].astype(np.float64)
            squares = np.maximum(((some @ moment) * some).sum(axis=1), 0.0)
            out[lo : lo + _STEP] = (some @ total + np.sqrt(rows * squares)) / 2.0
        bound = self.weights[1] * (out * (1.0 + 1e-4) + 1e-4)
        if self.weights[0]:
            own = super().sums()
            bound += 0.0 if own is None else self.weights[0] * own
        return np.asarray(bound, np.float64)

    def diagonal(self) -> NDArray[np.float64]:
        """Return (n,): the similarity of each instance with itself; below 1 where a factor or an embedding is zero."""
        lengths = np.concatenate(
            [(_of(self.factors)[lo : lo + _STEP] != 0).any(axis=1) for lo in range(0, len(self.factors), _STEP)]
            or [np.zeros(0, np.bool_)]
        ).astype(np.float64)
        return np.asarray(self.weights[0] * super().diagonal() + self.weights[1] * lengths, np.float64)

    def means(self) -> NDArray[np.float64]:
        """Return (n,): each candidate's mean similarity with the represented instances.

        Cosines below 0 count as 0, which no mean vector can tell; where more than 2,048 instances are represented, as
        many of them, evenly spaced, stand for all.
        """
        some = take(self.represented, _spread(len(self.represented)))
        out = np.empty(len(self.factors))
        for lo in range(0, len(out), _STEP):
            columns = take(self.factors, slice(lo, min(len(out), lo + _STEP)))
            out[lo : lo + _STEP] = self.weights[1] * _cosines(some, columns).mean(axis=0, dtype=np.float64)
        if self.weights[0]:
            out += self.weights[0] * mean_similarity(self.factors, self.represented)
        return out


def _balanced(rows: Factors, columns: Factors) -> tuple[float, float]:
    """Return weights that add up to 1 and give both kernels the same mean."""
    some, others = take(rows, _spread(len(rows))), take(columns, _spread(len(columns)))
    if not len(some) or not len(others):
        return 0.5, 0.5
    own, other = (float(block.mean(dtype=np.float64)) for block in (kernel_block(some, others), _cosines(some, others)))
    if own <= 0.0 or other <= 0.0:  # one of them says nothing
        return (1.0, 0.0) if own > 0.0 else (0.0, 1.0)
    return other / (own + other), own / (own + other)


def _spread(n: int) -> NDArray[np.int64]:
    return np.arange(n) if n <= _WEIGHED else np.linspace(0, n - 1, _WEIGHED).astype(np.int64)


def _of(factors: Factors) -> NDArray[np.floating]:
    if factors.embeddings is None:
        raise SelectionError("a joined kernel needs embeddings: these factors have none")
    return factors.embeddings


def _cosines(rows: Factors, columns: Factors) -> NDArray[np.float32]:
    left, right = (_of(some).astype(np.float32, copy=False) for some in (rows, columns))
    out: NDArray[np.float32] = left @ right.T
    return np.clip(out, 0.0, 1.0, out=out)
