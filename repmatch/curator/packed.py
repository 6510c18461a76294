"""Copies of frozen weights in the order in which oneDNN reads them: it would make one in every product otherwise."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from repmatch.hardware import physical_memory

# Copies take at most this share of the machine's memory: both directions of a model of BERT-base's size on a laptop.
_SHARE = 1 / 16
# Rows of x that the order is chosen for; any number can be multiplied by it.
_ROWS = 1024


@dataclass(eq=False)
class Packed:
    """Keeps a copy of each weight as long as the weight itself, for all threads.

    Attributes:
        limit: bytes that all copies may take; a weight beyond it is used as it is.
    """

    limit: int
    _copies: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, weight: Tensor, *, transposed: bool = False) -> Tensor:
        """Return a weight as oneDNN's product takes it.

        Args:
            weight: (d_out, d_in) float32 on the CPU, frozen; changed in place, it's copied anew.
            transposed: for products with its transpose.

        Returns:
            The copy, or a view of the weight where there is no room for one.
        """
        plain = weight.t() if transposed else weight
        if weight.is_inference():  # whether it was changed is not known
            return plain
        with self._lock:
            kept: dict[bool, tuple[int, Tensor | None]] = self._copies.setdefault(weight, {})  # type: ignore[no-untyped-call]
            if kept.get(transposed, (-1, None))[0] != weight._version:
                kept.pop(transposed, None)
                room = self.used + weight.nbytes <= self.limit
                copy = torch.ops.mkldnn._reorder_linear_weight(plain.detach().contiguous(), _ROWS) if room else None
                kept[transposed] = weight._version, copy
            found = kept[transposed][1]
        return plain if found is None else found

    @property
    def used(self) -> int:
        """Bytes that the copies take."""
        each: list[dict[bool, tuple[int, Tensor | None]]] = list(self._copies.values())  # type: ignore[no-untyped-call]
        copies = (copy for kept in each for _, copy in kept.values())
        return sum(4 * copy.numel() for copy in copies if copy is not None)


PACKED = Packed(int(_SHARE * (physical_memory() or 8 << 30)))
