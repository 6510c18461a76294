"""How the factors of one instance are laid out as the bytes of a segment row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from repmatch.compiled import in_chunks
from repmatch.datamodels import ENCODINGS, Encoding, FactorBatch, Layout
from repmatch.errors import UsageError

# Values that are worth a thread to look at or to round: more than a window has that was computed on a few cores. An
# accelerator computes larger windows in less time than one core rounds them.
_PIECE = 1 << 23


def _aligned(size: int, unit: int) -> int:
    return -(-size // unit) * unit


@dataclass(frozen=True)
class Decoded:
    """The parts of segment rows, as views of the bytes where they could be.

    Attributes:
        flat: (n, layout.width) float32 or float16; None for sign codes.
        bits: (n, sum(layout.words)) uint64; None for floats.
        norms: (n, m) float32.
        cores: (n, m, r, r) float32; None for rank 1.
    """

    flat: NDArray[np.floating[Any]] | None
    bits: NDArray[np.uint64] | None
    norms: NDArray[np.float32]
    cores: NDArray[np.float32] | None


@dataclass(frozen=True)
class RowFormat:
    """The bytes of one segment row: values, norms, cores, padded to 8 bytes, all little-endian.

    Attributes:
        layout: matrices and rank.
        encoding: how the values are kept.
    """

    layout: Layout
    encoding: Encoding

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise UsageError(f"unknown encoding {self.encoding!r}; expected one of {', '.join(ENCODINGS)}.")
        if self.encoding == "sign" and self.layout.rank != 1:
            raise UsageError(
                f"sign codes keep one direction a matrix, so they need rank 1; this space has rank {self.layout.rank}. "
                "Use --encoding float16."
            )

    @cached_property
    def value_bytes(self) -> int:
        """Bytes that the values take."""
        if self.encoding == "sign":
            return 8 * sum(self.layout.words)
        return self.layout.width * (4 if self.encoding == "float32" else 2)

    @property
    def _least(self) -> int:
        """Rows that are worth a thread."""
        return 1 + _PIECE // max(1, self.layout.width)

    @cached_property
    def norms_at(self) -> int:
        """Where the norms start."""
        return _aligned(self.value_bytes, 4)

    @cached_property
    def cores_at(self) -> int:
        """Where the cores start."""
        return self.norms_at + 4 * len(self.layout.matrices)

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of a whole row."""
        r = self.layout.rank
        cores = 4 * len(self.layout.matrices) * r * r if r > 1 else 0
        return _aligned(self.cores_at + cores, 8)

    def encode(self, batch: FactorBatch) -> NDArray[np.uint8]:
        """Turn factors into segment rows.

        Args:
            batch: n factors of this layout.

        Returns:
            (n, row_bytes) uint8, C order.

        Raises:
            UsageError: the arrays have other shapes than the layout says, or hold NaN or infinity.
        """
        self._check(batch)
        n, m, r = len(batch.rows), len(self.layout.matrices), self.layout.rank
        out = np.zeros((n, self.row_bytes), np.uint8)
        values = np.ascontiguousarray(batch.values, np.float32)
        if self.encoding == "sign":
            from repmatch import signcodes

            self._finite(batch, "values", signcodes.pack(values, self.layout.dims, out.view("<u8")))
        elif self.encoding == "float16":
            halves = out[:, : self.value_bytes].view("<f2")

            def round_rows(lo: int, hi: int) -> None:
                halves[lo:hi] = values[lo:hi]

            in_chunks(round_rows, n, least=self._least)
        else:
            out[:, : self.value_bytes] = values.astype("<f4", copy=False).view(np.uint8)
        norms = np.ascontiguousarray(batch.norms, "<f4")
        out[:, self.norms_at : self.cores_at] = norms.view(np.uint8)
        if r > 1 and batch.cores is not None:
            cores = np.ascontiguousarray(batch.cores, "<f4").reshape(n, m * r * r)
            out[:, self.cores_at : self.cores_at + cores.shape[1] * 4] = cores.view(np.uint8)
        return out

    def _check(self, batch: FactorBatch) -> None:
        n, m, r = len(batch.rows), len(self.layout.matrices), self.layout.rank
        shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
            "values": (batch.values.shape, (n, self.layout.width)),
            "norms": (batch.norms.shape, (n, m)),
            "losses": (batch.losses.shape, (n,)),
            "tokens": (batch.tokens.shape, (n,)),
            "truncated": (batch.truncated.shape, (n,)),
        }
        if r > 1:
            if batch.cores is None:
                raise UsageError(f"factors of rank {r} need their cores, (n, {m}, {r}, {r}) float32; received None.")
            shapes["cores"] = (batch.cores.shape, (n, m, r, r))
        for name, (got, expected) in shapes.items():
            if got != expected:
                raise UsageError(f"the factors' {name} have shape {got}; this space needs {expected}.")
        self._finite(batch, "norms", np.asarray(np.isfinite(batch.norms).all(axis=1)))
        if self.encoding != "sign":  # sign codes: found while they are packed
            good = np.empty(n, np.bool_)

            def look(lo: int, hi: int) -> None:
                good[lo:hi] = np.isfinite(batch.values[lo:hi]).all(axis=1)

            in_chunks(look, n, least=self._least)
            self._finite(batch, "values", good)

    @staticmethod
    def _finite(batch: FactorBatch, name: str, good: NDArray[np.bool_]) -> None:
        if not good.all():
            bad = batch.rows[int(np.argmin(good))].id
            raise UsageError(f"the factor of instance {bad!r} holds NaN or infinity in its {name}; it is not stored.")

    def decode(self, rows: NDArray[np.uint8]) -> Decoded:
        """Split segment rows into their parts without copying.

        Args:
            rows: (n, row_bytes) uint8 whose last axis is contiguous.

        Returns:
            Views of the rows.
        """
        n, m, r = len(rows), len(self.layout.matrices), self.layout.rank
        raw = rows[:, : self.value_bytes]
        flat: NDArray[np.floating[Any]] | None = None
        bits: NDArray[np.uint64] | None = None
        if self.encoding == "sign":
            bits = raw.view(np.dtype("<u8"))
        else:
            flat = raw.view(np.dtype("<f4" if self.encoding == "float32" else "<f2"))
        norms = rows[:, self.norms_at : self.cores_at].view(np.dtype("<f4"))
        cores = None
        if r > 1:
            block = rows[:, self.cores_at : self.cores_at + 4 * m * r * r]
            cores = block.view(np.dtype("<f4")).reshape(n, m, r, r)
        return Decoded(flat, bits, norms, cores)
