"""Frozen linear layers in the precision of float32 by bfloat16's products: each number as the sum of two.

With x = x₁ + x₂ and W = W₁ + W₂, all four of bfloat16, x₁W₁ + x₂W₁ + x₁W₂ summed in float32 is x·W but for a share of
about 2⁻¹⁶; tf32 leaves one of 2⁻¹¹ (Henry, Tang and Heinecke, Leveraging the bfloat16 artificial intelligence datatype
for higher-precision computations, 2019). The three are one product of three times the length. On tensor cores that is
faster than float32's own product, which has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from repmatch.curator import layers

Weights = tuple[Tensor, Tensor]


class Split:
    """Computes the frozen float32 linear layers of a model in parts of bfloat16, and keeps their weights' parts.

    These take 12 bytes a weight: three parts for each way.
    """

    def __init__(self) -> None:
        self._weights: dict[int, Weights] = {}
        self._last: tuple[Tensor, int, Tensor] | None = None

    @contextmanager
    def attached(self, module: nn.Module) -> Iterator[None]:
        """Let a model's layers compute so.

        Args:
            module: the model; each time the same.

        Yields:
            Nothing; the model is as before afterwards.
        """
        with ExitStack() as held:
            held.callback(self._forget)
            for layer in module.modules():
                if type(layer) is nn.Linear and "forward" not in vars(layer) and _is_frozen(layer):
                    layer.forward = partial(self._forward, layer)  # type: ignore[method-assign]
                    held.callback(delattr, layer, "forward")
            yield

    def _forget(self) -> None:
        self._last = None

    def _forward(self, layer: nn.Linear, *args: Tensor, **options: Tensor) -> Tensor:
        x = layers.given(args, options)
        if x.dtype is not torch.float32 or not x.numel():
            return nn.functional.linear(x, layer.weight, layer.bias)
        weights = self._weights.get(id(layer.weight))
        if weights is None:
            whole = layer.weight.detach()
            weights = self._weights[id(layer.weight)] = _parts_of_weight(whole), _parts_of_weight(whole.t())
        found: Tensor = _Product.apply(x, self._parts(x), weights, layer.bias)  # type: ignore[no-untyped-call]
        return found

    def _parts(self, x: Tensor) -> Tensor:
        """The parts of an input; query, key and value are given the same one."""
        if self._last is None or self._last[0] is not x or self._last[1] != x._version:
            self._last = x, x._version, parts(x.detach())
        return self._last[2]


def _is_frozen(layer: nn.Linear) -> bool:
    learns = any(part is not None and part.requires_grad for part in (layer.weight, layer.bias))
    return not learns and layer.weight.dtype is torch.float32


def parts(x: Tensor) -> Tensor:
    """Split what a product reads along its rows.

    Args:
        x: (..., d) float32.

    Returns:
        (n, 3 d) bfloat16: x₁, x₂ and x₁ again.
    """
    d = x.shape[-1]
    flat = x.reshape(-1, d)
    out = torch.empty(len(flat), 3 * d, dtype=torch.bfloat16, device=x.device)
    high = out[:, :d].copy_(flat)
    torch.sub(flat, high, out=out[:, d : 2 * d])
    out[:, 2 * d :].copy_(high)
    return out


def _parts_of_weight(weight: Tensor) -> Tensor:
    """Split a weight to go with `parts`: (d_out, d_in) float32 -> (d_out, 3 d_in) bfloat16, W₁, W₁ and W₂."""
    high = weight.to(torch.bfloat16)
    return torch.cat([high, high, (weight - high).to(torch.bfloat16)], dim=1)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x · weightᵀ of bfloat16, summed in float32."""
    if x.device.type != "cuda":
        return x.float() @ weight.float().t()
    product: Any = torch.mm
    found: Tensor = product(x, weight.t(), out_dtype=torch.float32)
    return found


class _Product(torch.autograd.Function):
    """x · weightᵀ + bias with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, split: Tensor, weights: Weights, bias: Tensor | None) -> Tensor:
        ctx.weight = weights[1]
        found = _product(split, weights[0])
        if bias is not None:
            found += bias
        # Not a view in autograd's eyes, which would keep the model from changing it in place; nothing else holds it.
        whole: Tensor = torch.ops.aten._unsafe_view(found, [*x.shape[:-1], found.shape[-1]])
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        found = _product(parts(gradient), ctx.weight)
        return found.view(*gradient.shape[:-1], found.shape[-1]), None, None, None
