"""Cross entropy behind a linear head, without keeping the logits: the vocabulary is large and the memory small."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from repmatch.curator.linear import product

# Numbers that a piece of the logits holds at once on an accelerator, where few large products are fastest.
_PIECE = 1 << 24
# The same on a CPU, 2 MB, which a core's cache holds from the product that makes them to the one that reads them; and
# the positions that share a piece at most.
_CPU_PIECE, _CPU_ROWS = 1 << 19, 1024


def _sizes(count: int, words: int, device: torch.device) -> tuple[int, int]:
    """Return the positions and the words of a piece."""
    if device.type != "cpu":
        return max(1, _PIECE // words), words
    rows = math.ceil(count / max(1, math.ceil(count / _CPU_ROWS)))  # all pieces alike: none has a few rows only
    return max(1, rows), max(64, _CPU_PIECE // max(1, rows) // 64 * 64)


class _LinearCrossEntropy(torch.autograd.Function):
    """Makes the gradient at the head's input along with the loss, piece by piece.

    The softmax over all words is summed up from one piece of the vocabulary to the next: with the largest logit so far
    subtracted, and what was summed before scaled down when a larger one comes (Milakov and Gimelshein, Online
    normalizer calculation for softmax, 2018).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        words, kind = len(weight), hidden.device.type
        # Once, not for every piece: autocast keeps no copy of a weight that is frozen.
        frozen = weight.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else weight
        rows, step = _sizes(len(hidden), words, hidden.device)
        losses, gradients = [], []
        for at in range(0, len(hidden), rows):
            part, wanted = hidden[at : at + rows], targets[at : at + rows, None]
            peak = torch.full((len(part), 1), torch.finfo(torch.float32).min, device=part.device)
            total, chosen = torch.zeros_like(peak), torch.zeros_like(peak)
            mean = torch.zeros(part.shape, device=part.device) if ctx.needs_input_grad[0] else None
            for lo in range(0, words, step):
                piece = frozen[lo : lo + step]
                logits = product(part, piece, None if bias is None else bias[lo : lo + step]).float()
                here = (wanted >= lo) & (wanted < lo + len(piece))
                chosen += logits.gather(1, (wanted - lo).clamp(0, len(piece) - 1)).where(here, 0.0)
                before, peak = peak, torch.maximum(peak, logits.amax(dim=1, keepdim=True))
                # In place, and each exponential once: the logits are not needed any more.
                powers, shrunk = logits.sub_(peak).exp_(), before.sub_(peak).exp_()
                total.mul_(shrunk).add_(powers.sum(dim=1, keepdim=True))
                if mean is not None:
                    mean.mul_(shrunk).add_(product(powers.to(piece.dtype), piece.t()))
            losses.append((total.log() + peak - chosen)[:, 0])
            if mean is not None:
                # ∂L/∂logits is the softmax less one at the wanted token.
                gradients.append((mean / total - weight[wanted[:, 0]]).to(hidden.dtype))
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(gradients) if gradients else torch.zeros_like(hidden))
        return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0][:, None].to(gradient.dtype), None, None, None


def linear_cross_entropy(hidden: Tensor, head: torch.nn.Linear, targets: Tensor) -> Tensor:
    """Compute the cross entropy of a frozen linear head's logits.

    Args:
        hidden: (k, d), what the head reads.
        head: the frozen head.
        targets: (k,) int64, the wanted tokens.

    Returns:
        (k,) float32 losses.
    """
    apply: Any = _LinearCrossEntropy.apply
    found: Tensor = apply(hidden, head.weight, head.bias, targets)
    return found
