"""Cross entropy behind a linear head, without keeping the logits: the vocabulary is large and the memory small."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from repmatch.curator.linear import product

# Numbers that a piece of the logits holds at once.
_PIECE = 1 << 24


class _LinearCrossEntropy(torch.autograd.Function):
    """Makes the gradient at the head's input along with the loss, piece by piece."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        rows = max(1, _PIECE // len(weight))
        losses, gradients = [], []
        for at in range(0, len(hidden), rows):
            part, wanted = hidden[at : at + rows], targets[at : at + rows, None]
            logits = product(part, weight, bias).float()
            chosen, peak = logits.gather(1, wanted), logits.amax(dim=1, keepdim=True)
            # In place, and each exponential once: the logits are not needed any more.
            powers = logits.sub_(peak).exp_()
            total = powers.sum(dim=1, keepdim=True)
            losses.append((total.log() + peak - chosen)[:, 0])
            if ctx.needs_input_grad[0]:
                # ∂L/∂logits is the softmax less one at the wanted token.
                mean = product(powers.to(weight.dtype), weight.t()).float() / total
                gradients.append((mean - weight[wanted[:, 0]]).to(hidden.dtype))
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
