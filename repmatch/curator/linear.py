"""Frozen linear layers by oneDNN's products, where those are faster than MKL's."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from repmatch.curator import layers
from repmatch.curator.packed import PACKED


@lru_cache(maxsize=1)
def onednn_pays() -> bool:
    """Whether this machine's processor multiplies float32 matrices faster by oneDNN than by MKL, torch's default.

    MKL keeps its widest kernels for Intel's processors. On an AMD EPYC with AVX-512, one thread, (1000, 384) times
    (384, 1536): 108 GFLOP/s by oneDNN, 100 by MKL. It is told by the maker's name, not by a trial, so that a machine
    computes the same bytes at every run.

    Returns:
        True on AMD's x86 processors under Linux, where torch has oneDNN.
    """
    there = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not there or platform.machine() != "x86_64":
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x · weightᵀ + bias, by oneDNN where that pays; autograd sees nothing of it.

    Args:
        x: (..., d_in).
        weight: (d_out, d_in).
        bias: (d_out,).

    Returns:
        (..., d_out).
    """
    if _fits(x, weight) and onednn_pays():
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)
        return found
    return nn.functional.linear(x, weight, bias)


def _frozen_product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
    """Compute a product with a weight, or its transpose, that many batches share."""
    if _fits(x, weight) and onednn_pays():
        weight = PACKED.of(weight, transposed=transposed)
    else:
        weight = weight.t() if transposed else weight
    return product(x, weight, bias)


def _fits(x: Tensor, weight: Tensor) -> bool:
    single = x.dtype is torch.float32 and weight.dtype is torch.float32 and not torch.is_autocast_enabled("cpu")
    return single and x.device.type == "cpu" and x.numel() > 0


class _Frozen(torch.autograd.Function):
    """x · weightᵀ + bias with a gradient for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # frozen: nothing that autograd has to watch
        found = _frozen_product(x, weight, bias)
        # Not a view in autograd's eyes, which would keep the model from changing it in place; nothing else holds it.
        whole: Tensor = torch.ops.aten._unsafe_view(found, found.shape)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _frozen_product(gradients[0], ctx.weight, transposed=True), None, None


def _forward(layer: nn.Linear, *args: Tensor, **options: Tensor) -> Tensor:
    x = layers.given(args, options)
    if not _fits(x, layer.weight):
        return nn.functional.linear(x, layer.weight, layer.bias)
    found: Tensor = _Frozen.apply(x, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return found


def _frozen(module: nn.Module) -> Iterator[nn.Linear]:
    for layer in module.modules():
        if type(layer) is nn.Linear and "forward" not in vars(layer):
            learns = [part for part in (layer.weight, layer.bias) if part is not None and part.requires_grad]
            if not learns and layer.weight.device.type == "cpu" and layer.weight.dtype is torch.float32:
                yield layer


@contextmanager
def by_onednn(module: nn.Module) -> Iterator[None]:
    """Let the frozen float32 linear layers of a model on the CPU multiply by oneDNN, where that pays.

    Args:
        module: the model.

    Yields:
        Nothing; the model is as before afterwards.
    """
    with ExitStack() as held:
        for layer in _frozen(module) if onednn_pays() else ():
            layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
            held.callback(delattr, layer, "forward")
        yield
