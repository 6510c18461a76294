"""Scores of many queries and instances by torch, for searches on a GPU; the same numbers as on the processor."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from repmatch.blocks import dense_block
from repmatch.curator.precision import computing
from repmatch.datamodels import Factors
from repmatch.similarity import mean_scores

ROWS = 8192  # instances on the device at a time


class DeviceScores:
    """A stand-in for `repmatch.similarity.mean_scores` that computes on a device, at rank 1.

    Args:
        device: a torch device that has float64: "cuda", "cuda:N" or "cpu".
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def __call__(self, queries: Factors, factors: Factors, *, signed: bool = False) -> NDArray[np.float32]:
        """Return the scores of all pairs; see `repmatch.similarity.mean_scores`.

        Args:
            queries: q instances.
            factors: n instances of the same space.
            signed: the cosine of the two ΔW in place of the RepMatch score.

        Returns:
            (q, n) float32. Sign codes: the very numbers of the processor. Floats: right to about 1e-6.
        """
        if factors.layout.rank > 1:
            return mean_scores(queries, factors, signed=signed)
        out = np.empty((len(queries), len(factors)), np.float32)
        with computing("float32", self.device):
            for lo in range(0, len(factors), ROWS):
                hi = min(len(factors), lo + ROWS)
                out[:, lo:hi] = self._block(queries, factors, lo, hi, signed).to(torch.float32).cpu().numpy()
        return out

    def _block(self, queries: Factors, factors: Factors, lo: int, hi: int, signed: bool) -> torch.Tensor:
        layout = factors.layout
        total = torch.zeros((len(queries), hi - lo), dtype=torch.float64, device=self.device)
        alive, asked = self._alive(factors, lo, hi), self._alive(queries, 0, len(queries))
        for m, d in enumerate(layout.dims):
            left, right = self._columns(queries, m, 0, len(queries)), self._columns(factors, m, lo, hi)
            if factors.bits is None:
                if signed:
                    left = left / left.norm(dim=1, keepdim=True).clamp_min(1e-30)
                overlap = (left @ right.T).double()
                term = overlap.clamp(-1.0, 1.0) if signed else overlap.square().clamp(max=1.0)
                total += term / len(layout.dims)
            else:  # whole numbers: exact in float32 for any d_out below 2^24
                difference = (left @ right.T).double()
                weight = 1.0 / (len(layout.dims) * float(d) ** (1 if signed else 2))
                term = (difference if signed else difference * difference) * weight
                total += term * alive[:, m] * asked[:, m, None]
        return total

    def _alive(self, factors: Factors, lo: int, hi: int) -> torch.Tensor:
        return torch.from_numpy((factors.norms[lo:hi] != 0).astype(np.float64)).to(self.device)

    def _columns(self, factors: Factors, m: int, lo: int, hi: int) -> torch.Tensor:
        """Return one matrix's factors on the device, float32: unit vectors, or ±1 for sign codes."""
        layout = factors.layout
        if factors.bits is None:
            block = np.ascontiguousarray(dense_block(factors, m, lo, hi)[:, :, 0])
            return torch.from_numpy(block).to(self.device)
        start = sum(layout.words[:m])
        codes = np.ascontiguousarray(factors.bits[lo:hi, start : start + layout.words[m]]).view(np.uint8)
        held = torch.from_numpy(codes).to(self.device)
        ones = (held[:, :, None] >> torch.arange(8, device=self.device, dtype=torch.uint8)) & 1
        signs: torch.Tensor = 1.0 - 2.0 * ones.reshape(len(codes), -1)[:, : layout.dims[m]].to(torch.float32)
        return signs
