"""How many tokens fit: batches on CUDA are sized from the memory that is free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Share of the free memory that batches may take; the rest is for fragments and for lengths that the trial did not have.
_SHARE = 0.7
_LEAST, _MOST = 256, 262_144


@dataclass(frozen=True)
class Meter:
    """Reads a device's memory.

    Attributes:
        reset: forgets the peak.
        used: bytes in use now.
        peak: most bytes in use since `reset`.
        free: bytes that could be had still.
    """

    reset: Callable[[], None]
    used: Callable[[], int]
    peak: Callable[[], int]
    free: Callable[[], int]

    @classmethod
    def of_cuda(cls, device: torch.device) -> Meter:
        """Return the meter of a CUDA device."""

        def free() -> int:
            kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return int(torch.cuda.mem_get_info(device)[0]) + kept

        return cls(
            lambda: torch.cuda.reset_peak_memory_stats(device),
            lambda: int(torch.cuda.memory_allocated(device)),
            lambda: int(torch.cuda.max_memory_allocated(device)),
            free,
        )


def fitting_tokens(compute: Callable[[Mapping[str, Any]], Any], inputs: Mapping[str, Any], meter: Meter) -> int:
    """Measure what a trial batch takes, and return how many padded tokens a batch may hold.

    Args:
        compute: computes a batch.
        inputs: the trial batch; its first two dimensions count its tokens.
        meter: reads the memory.

    Returns:
        Tokens, a multiple of 256 between 256 and 262,144.
    """
    meter.reset()
    before = meter.used()
    compute(inputs)
    first = next(iter(inputs.values()))
    tokens = max(1, first.shape[0] * (first.shape[1] if first.ndim == 2 else 1))
    each = max(1.0, (meter.peak() - before) / tokens)
    limit = int(_SHARE * meter.free() / each)
    return max(_LEAST, min(_MOST, limit // 256 * 256))
