"""Models quantised by bitsandbytes: what its layers need so that gradients flow through them."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

_CAST = "MatMul8bitLt: inputs will be cast"


def make_ready(module: nn.Module) -> nn.Module:
    """Let a model's quantised layers be differentiated, and be quiet; a model without any is left alone.

    In evaluation mode bitsandbytes packs a 4-bit weight for a kernel of processors with AVX512-BF16 as soon as an input
    needs no gradient, and that kernel has no backward pass: the layer then cuts the gradient of every layer below. So
    packing is switched off, and what is packed is unpacked. The 8-bit product says at every call that inputs become
    float16, which is how it works.

    Args:
        module: the model; changed in place.

    Returns:
        The same model.
    """
    layer: Any
    for layer in module.modules():
        if not type(layer).__module__.startswith("bitsandbytes."):
            continue
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            _unpack(layer)
            layer.support_avx512bf16_for_cpu = False
        if hasattr(layer, "state"):
            talker = logging.getLogger("bitsandbytes.autograd._functions")
            if _needless not in talker.filters:
                talker.addFilter(_needless)
    return module


def _unpack(layer: Any) -> None:
    if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
        layer.state_dict()  # unpacks the weight in place, so that a checkpoint holds the usual format


def _needless(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_CAST)
