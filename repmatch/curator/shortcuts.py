"""Work that a classifier's loss cannot see, left out: the last layer of an encoder whose head reads one token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def last_block(module: nn.Module) -> nn.Module | None:
    """Find the part of an encoder's last layer that follows the attention, where the layers are BERT's.

    Args:
        module: a model.

    Returns:
        The module that takes (attention's output, its input), or None where the architecture is another.
    """
    base: Any = getattr(module, "base_model", None)
    if base is None or not type(module).__name__.endswith("ForSequenceClassification"):
        return None
    layers = getattr(getattr(base, "encoder", None), "layer", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return None
    found = getattr(getattr(layers[-1], "attention", None), "output", None)
    fits = isinstance(found, nn.Module) and hasattr(found, "dense") and hasattr(found, "LayerNorm")
    return found if fits else None


@contextmanager
def first_token_only(block: nn.Module | None) -> Iterator[None]:
    """Let everything behind the last layer's attention see the first token alone.

    The rest of that layer works token by token, so the first token's output is what it was; where the head reads no
    other token the loss is the same, and the gradient at all others, which is zero, is not computed.

    Args:
        block: from `last_block`; None: nothing is left out.

    Yields:
        Nothing; the model is as before afterwards.
    """
    if block is None:
        yield
        return
    handle = block.register_forward_pre_hook(_cut)
    try:
        yield
    finally:
        handle.remove()


def needs_first_token_only(
    module: nn.Module,
    block: nn.Module,
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor],
    inputs: Mapping[str, Tensor],
) -> bool | None:
    """Try whether the loss is the same without the last layer's other tokens.

    Args:
        module: the model.
        block: from `last_block`.
        loss: maps (module, inputs) to the loss of each instance.
        inputs: a few instances.

    Returns:
        Whether it is; None where no loss is finite, which says nothing.
    """
    with torch.no_grad():
        whole = loss(module, inputs)
        with first_token_only(block):
            short = loss(module, inputs)
    finite = torch.isfinite(whole)
    if not finite.any():
        return None
    same = torch.allclose(whole[finite], short[finite], rtol=1e-4, atol=1e-5)
    return same and bool((torch.isfinite(short) == finite).all())


def _cut(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value[:, :1] for value in args)
