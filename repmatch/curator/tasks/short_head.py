"""Logits at the positions that count only: whether a language model allows it is tried once and remembered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from repmatch.curator.precision import rounds_products

# A trial needs this many tokens of every row. It takes every row, because adapters side by side have a row each.
_TOKENS = 8

Short = Callable[[Any, Mapping[str, Tensor], Tensor], Tensor]


class ShortHead:
    """Knows of each model that it meets whether its head can be run on a few positions alone.

    Args:
        short: maps (model, its inputs, (n, t) bool of the positions that count) to the logits of these positions.
    """

    def __init__(self, short: Short) -> None:
        self._short = short
        self._right: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

    def is_right(self, module: nn.Module, given: Mapping[str, Tensor]) -> bool:
        """Try it on the first tokens of a batch, the first time that a model is met.

        Args:
            module: a language model of transformers.
            given: its inputs, each (n, t), "input_ids" among them.

        Returns:
            Whether the logits are those of the whole model. Logits that are not finite decide nothing: False for now.
        """
        known = self._right.get(module)
        if known is None:
            known = self._tried(module, {name: value[:, :_TOKENS] for name, value in given.items()})
            if known is not None:
                self._right[module] = known
        return bool(known)

    def _tried(self, module: Any, few: Mapping[str, Tensor]) -> bool | None:
        ids = few["input_ids"]
        seen = few.get("attention_mask", torch.ones_like(ids)) != 0
        # What is asked is how the model is built, so its own precision answers, whatever is computed in.
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            full = module(**few).logits[seen].float()
            try:
                short = self._short(module, few, seen)
            except torch.OutOfMemoryError:
                raise
            except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError):
                return False
        if not isinstance(short, Tensor) or short.shape != full.shape:
            return False
        finite = torch.isfinite(full)
        if not finite.any():
            return None
        # Of the largest logit: a cap on logits, or a scale, moves more than rounding does.
        size = float(full[finite].abs().max())
        apart = float((short[finite].float() - full[finite]).abs().max())
        return bool((torch.isfinite(short) == finite).all()) and apart <= (2e-2 if _is_rough(short) else 1e-5) * size


def _is_rough(logits: Tensor) -> bool:
    """Whether products were rounded to fewer digits than float32 has."""
    return logits.dtype is not torch.float32 or rounds_products(logits.device)
