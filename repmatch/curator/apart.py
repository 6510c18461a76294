"""Instances apart: gradients of models that do not keep the instances of a batch in the first dimension.

A layer may see the tokens first, as XLNet's do, or work once for a whole batch, as DeBERTa-v2's query does for its
relative positions. What such a layer adds to one instance's gradient cannot be read from what comes out of it. So the
model is run as if on one instance, and torch.func.vmap makes one pass over the batch of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from repmatch.curator.stack import AdapterStack

Factors = Mapping[str, Tensor]

# Gradients that hold a part of another instance's differ by more than this, relative to the matrix's norm. Rounding
# stays below: in float32 it moves them by 1e-4 at most, the second is for what is computed in less.
_SLACK, _ROUGH_SLACK = 1e-2, 0.3
_NOTHING = 1e-5


class Way(Enum):
    """How a batch is computed."""

    TOGETHER = "together"
    APART = "apart, in one pass"
    ONE_BY_ONE = "one by one"


def gradients(
    stack: AdapterStack, losses: Callable[[Mapping[str, Tensor]], Tensor], inputs: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Compute each instance's gradient at its own adapter.

    Args:
        stack: an adapter for every instance of the batch.
        losses: maps inputs to the loss of each instance; it is called for one instance at a time.
        inputs: what the model takes, first dimension n.

    Returns:
        ∂L/∂A, matrix name -> (n, r, d_in); ∂L/∂B, matrix name -> (n, d_out, r); and the losses, (n,) float32.

    Raises:
        RuntimeError: the model does something that vmap cannot follow, like asking for a tensor's value.
    """
    held = stack.only([0])

    def one(a: Factors, b: Factors, instance: Mapping[str, Tensor]) -> Tensor:
        held.a = {name: value[None] for name, value in a.items()}
        held.b = {name: value[None] for name, value in b.items()}
        return losses({name: value[None] for name, value in instance.items()})[0]

    run: Callable[..., Any] = torch.func.vmap(torch.func.grad_and_value(one, argnums=(0, 1)))
    with held.attached():
        (of_a, of_b), found = run(_values(stack.a), _values(stack.b), dict(inputs))
    stack.reached |= held.reached
    return of_a, of_b, found.detach().float()


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Put back what modules hold, for what they keep for later, such as tables of positions, is dead outside of vmap.

    Args:
        module: a model.

    Yields:
        Nothing.
    """
    held = [each for part in module.modules() for each in (vars(part), part._buffers)]
    before = [dict(each) for each in held]
    try:
        yield
    finally:
        for each, was in zip(held, before, strict=True):
            each.clear()
            each.update(was)


def _values(factors: Factors) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in factors.items()}


def different(alone: Factors, together: Factors, at: int, *, rough: bool) -> tuple[str, float] | None:
    """Compare an instance's gradient alone with that in a batch, matrix by matrix, but for rounding.

    Args:
        alone: matrix name -> (1, d_out, r).
        together: matrix name -> (n, d_out, r).
        at: the instance's place in the batch.
        rough: whether something is computed in less than float32.

    Returns:
        The first matrix that differs and by how much, relative to its norm; None: none. What is not finite differs from
        nothing.
    """
    slack = _ROUGH_SLACK if rough else _SLACK
    doubles = {name: value.detach().flatten().cpu().double() for name, value in alone.items()}
    largest = max(float(value.norm()) for value in doubles.values())
    for name, value in doubles.items():
        difference = float((value - together[name][at].detach().flatten().cpu().double()).norm())
        # What is small beside the instance's largest matrix is rounding alone.
        if torch.isfinite(value).all() and not difference <= slack * float(value.norm()) + _NOTHING * largest:
            return name, difference / max(float(value.norm()), 1e-300)
    return None
