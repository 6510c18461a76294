"""The optimisers of the instance step: AdamW, Adam and SGD, their first step in closed form and all steps by torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from repmatch.errors import ModelError

NAMES = ("adamw", "adam", "sgd")
# The learning rate of the reference procedure; torch's eps. SGD's steps are as long as its gradients, which are small.
DEFAULT_RATES = {"adamw": 1e-3, "adam": 1e-3, "sgd": 1e-1}


def instance_step(name: str | None, learning_rate: float | None, steps: int | None) -> dict[str, Any]:
    """Describe the instance step as the space's identity holds it.

    Args:
        name: "adamw", "adam" or "sgd"; None: "adamw".
        learning_rate: None: the optimiser's default.
        steps: None: 1.

    Returns:
        Plain JSON values; "steps" only where there is more than one.

    Raises:
        ModelError: there is no such optimiser.
    """
    name = name or "adamw"
    _check(name)
    step: dict[str, Any] = {"name": name, "lr": learning_rate or DEFAULT_RATES[name]}
    if name != "sgd":
        step["eps"] = 1e-8
    if steps is not None and steps > 1:
        step["steps"] = steps
    return step


def _check(name: str) -> None:
    if name not in NAMES:
        raise ModelError(f"the instance step {name!r} is unknown; expected 'adamw', 'adam' or 'sgd'.")


def first_step(gradient: Tensor, optimizer: Mapping[str, Any]) -> Tensor:
    """Return B after the optimiser's first step from B = 0.

    Adam and AdamW (Kingma and Ba 2015; Loshchilov and Hutter 2019): after the bias correction of the first step m̂ = g
    and v̂ = g², and weight decay does nothing to B = 0. SGD: B₁ = −lr · g.

    Args:
        gradient: ∂L/∂B, any shape.
        optimizer: "name", "lr" and, but for SGD, "eps".

    Returns:
        B₁, same shape.

    Raises:
        ModelError: the optimiser is none that is known.
    """
    _check(optimizer["name"])
    rate = float(optimizer["lr"])
    if optimizer["name"] == "sgd":
        return -rate * gradient
    return -rate * gradient / (gradient.abs() + float(optimizer["eps"]))


def build(parameters: Iterable[Tensor], optimizer: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Make torch's optimiser.

    Args:
        parameters: what it trains.
        optimizer: "name", "lr", maybe "eps" and "weight_decay"; the rest are torch's defaults.

    Returns:
        The optimiser.

    Raises:
        ModelError: the optimiser is none that is known.
    """
    _check(optimizer["name"])
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    options = {name: optimizer[name] for name in ("lr", "eps", "weight_decay") if name in optimizer}
    made: torch.optim.Optimizer = kinds[optimizer["name"]](list(parameters), **options)
    return made
