"""Instance factors, as they are made and as they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmatch.datamodels.rows import Row
from repmatch.datamodels.spaces import Encoding, Layout


@dataclass(frozen=True)
class FactorBatch:
    """Instance factors of a few rows, as the engine makes them.

    Attributes:
        rows: the rows, n of them.
        values: (n, layout.width) float32; per matrix the left singular vectors of ΔW as unit columns in order of
            falling singular value, signs as in ΔW (rank 1: B / |B|). A zero gradient gives zeros.
        cores: (n, m, r, r) float32 with ΔW = (values · core) · Qᵀ up to one scale, where Q is the space's orthonormal
            basis of the rows of A; None for rank 1.
        norms: (n, m) float32, norm of ∂L/∂B per matrix; 0 marks a zero factor.
        losses: (n,) float32, loss of each instance at the shared start.
        tokens: (n,) int32, tokens read.
        truncated: (n,) bool, whether the text was longer than max_length.
    """

    rows: tuple[Row, ...]
    values: NDArray[np.float32]
    cores: NDArray[np.float32] | None
    norms: NDArray[np.float32]
    losses: NDArray[np.float32]
    tokens: NDArray[np.int32]
    truncated: NDArray[np.bool_]


@dataclass(frozen=True)
class Factors:
    """Stored instance factors of a dataset, in the dataset's order.

    Attributes:
        ids: the user's ids, n of them.
        layout: matrices and rank.
        encoding: how they are kept.
        flat: (n, layout.width) float32 or float16, maybe a read-only view of the store's file; None for sign codes.
        bits: (n, sum(layout.words)) uint64 sign codes, bit j of word w is 1 where number 64·w + j is negative, padding
            bits 0; None for floats.
        norms: (n, m) float32, norm of the gradient per matrix; 0 marks a zero factor (its sign code means nothing).
        cores: (n, m, r, r) float32 or None (rank 1).
        space_id: the space they belong to.
        embeddings: (n, d) floats, unit rows that a kernel may join with the factors; None where nobody asked for them.
    """

    ids: tuple[str, ...]
    layout: Layout
    encoding: Encoding
    flat: NDArray[np.floating[Any]] | None
    bits: NDArray[np.uint64] | None
    norms: NDArray[np.float32]
    cores: NDArray[np.float32] | None
    space_id: str
    embeddings: NDArray[np.floating[Any]] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the adapted matrices."""
        return self.layout.names

    @property
    def values(self) -> NDArray[np.floating[Any]]:
        """(n, m, d) or (n, m, d, r) unit columns; only where every matrix has the same d_out and floats are kept.

        Raises:
            ValueError: sign codes are kept, or the matrices' d_out differ (use `matrix(i)` then).
        """
        if self.flat is None:
            raise ValueError("this dataset keeps sign codes; use .codes, or ingest with --encoding float16 for values")
        dims = set(self.layout.dims)
        if len(dims) != 1:
            raise ValueError(f"matrices have different d_out {sorted(dims)}; use .matrix(i) for each")
        shape = (len(self.ids), len(self.layout.dims), dims.pop())
        return self.flat.reshape(shape if self.layout.rank == 1 else (*shape, self.layout.rank))

    @property
    def codes(self) -> NDArray[np.uint64]:
        """(n, m, words) uint64 sign codes, where every matrix takes the same number of words.

        Raises:
            ValueError: floats are kept, or the matrices' words differ (use `.bits` and `.layout.words` then).
        """
        if self.bits is None:
            raise ValueError(f"this dataset keeps {self.encoding} values; use .values")
        words = set(self.layout.words)
        if len(words) != 1:
            raise ValueError(f"matrices take different words {sorted(words)}; use .bits and .layout.words")
        return self.bits.reshape(len(self.ids), len(self.layout.dims), words.pop())

    def matrix(self, index: int) -> NDArray[np.floating[Any]]:
        """Return the factors of one matrix.

        Args:
            index: position in `matrices`.

        Returns:
            (n, d_out, r) floats.
        """
        if self.flat is None:
            raise ValueError("this dataset keeps sign codes; use .codes")
        lo, hi = self.layout.offsets[index : index + 2]
        return self.flat[:, lo:hi].reshape(len(self.ids), self.layout.dims[index], self.layout.rank)
