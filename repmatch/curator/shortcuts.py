"""Work that a classifier's loss cannot see, left out: the last layer of an encoder whose head reads one token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


def _cut(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value[:, :1] for value in args)
