"""Which weight matrices of a base model are adapted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from repmatch.datamodels import Matrix
from repmatch.errors import ModelError, UsageError, quote_list

if TYPE_CHECKING:
    from torch import nn

# Architectures that peft's own mapping leaves out: query and value of every layer, as in the paper; of convolutional
# networks every convolution of a block.
_MORE_DEFAULTS = {
    "albert": ["query", "value"],
    "camembert": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "ernie": ["query", "value"],
    "modernbert": ["Wqkv"],
    "mpnet": ["attn.q", "attn.v"],
    "resnet": [r".*\.layer\.\d+\.convolution"],
    "xlm-roberta-xl": ["query", "value"],
}
# What query and value are called where nothing is known of the architecture.
_COMMON = (
    ["q_proj", "v_proj"],
    ["query", "value"],
    ["c_attn"],
    ["query_key_value"],
    ["qkv_proj"],
    ["Wqkv"],
    ["q_lin", "v_lin"],
)


def default_targets(model_type: str, names: Sequence[str] = ()) -> list[str] | None:
    """Return the name patterns adapted by default for an architecture.

    Args:
        model_type: `model_type` of the config.
        names: the adaptable layers; a default that matches none of them is passed over.

    Returns:
        Name suffixes (peft's mapping first, then names that are common for query and value), or None where nothing is
        known.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    known = KNOWN.get(model_type)
    mine = [known] if isinstance(known, str) else known
    found = [list(patterns) for patterns in (mine, _MORE_DEFAULTS.get(model_type), *_COMMON) if patterns is not None]
    if not names:
        return found[0] if mine or model_type in _MORE_DEFAULTS else None
    fitting = [patterns for patterns in found if all(any(_matches(n, p) for n in names) for p in patterns)]
    return fitting[0] if fitting else None


def _matches(name: str, pattern: str) -> bool:
    if name == pattern or name.endswith("." + pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ModelError(
            f"--targets {pattern!r} is neither a name's ending nor a regular expression: {error}."
        ) from error


def find_matrices(module: nn.Module, patterns: Sequence[str] | None, layers: str | None = None) -> tuple[Matrix, ...]:
    """List the weight matrices to adapt.

    Args:
        module: a transformers model, or any other module.
        patterns: endings of module names ("query", "attention.self.value") or regular expressions on the whole name;
            None: the architecture's default.
        layers: numbers of the layers to keep, such as "0,8-11"; None: all.

    Returns:
        The matrices in the model's order, named as in the module.

    Raises:
        ModelError: a pattern matches no adaptable layer, or nothing is known of the architecture.
        UsageError: `layers` cannot be read, or names layers that the model does not have.
    """
    from repmatch.curator.layers import is_adaptable, matrix_of

    found = {name: layer for name, layer in module.named_modules() if is_adaptable(layer)}
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    body = [name for name in found if name.startswith(prefix)] if prefix != "." else list(found)
    kinds = sorted({name.rsplit(".", 1)[-1] for name in body})
    if not body:
        raise ModelError(
            f"{type(module).__name__} has no layer that can be adapted: expected linear layers of torch, transformers' "
            "Conv1D, or Conv2d with one group, no dilation and zero padding. Name another with --model."
        )
    if patterns is None:
        model_type = str(getattr(getattr(module, "config", None), "model_type", type(module).__name__))
        patterns = default_targets(model_type, body)
        if patterns is None:
            raise ModelError(
                f"there are no default targets for the architecture {model_type!r}; name some of its linear layers "
                f"with --targets: {quote_list(kinds, 20)}."
            )
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in body):
            example = f", and a regular expression must match a whole name such as {body[0]!r}"
            raise ModelError(
                f"--targets {pattern!r} matches no linear layer of the base model; its linear layers end in "
                f"{quote_list(kinds, 20)}{example}."
            )
    chosen = [name for name in body if any(_matches(name, pattern) for pattern in patterns)]
    if layers is not None:
        chosen = _of_layers(chosen, layers)
    return tuple(matrix_of(name, found[name]) for name in chosen)


def layer_number(name: str) -> int | None:
    """Return the number of the layer that a module belongs to: the first number in its name.

    Args:
        name: a dotted name.

    Returns:
        The number, or None.
    """
    numbers = [part for part in name.split(".") if part.isdigit()]
    return int(numbers[0]) if numbers else None


def _of_layers(names: Sequence[str], layers: str) -> list[str]:
    wanted: set[int] = set()
    for part in layers.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None:
            raise UsageError(f"--layers {layers!r} cannot be read; expected numbers and ranges, such as 0,8-11.")
        wanted |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    there = {number for name in names if (number := layer_number(name)) is not None}
    if not wanted <= there:
        raise UsageError(
            f"--layers {layers!r} names layer {min(wanted - there)}, which the targets do not have; theirs are "
            f"{min(there, default=0)} to {max(there, default=0)}."
        )
    return [name for name in names if layer_number(name) in wanted]
