"""Which weight matrices of a base model are adapted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from repmatch.datamodels import Matrix
from repmatch.errors import ModelError, quote_list

if TYPE_CHECKING:
    from torch import nn

# Architectures that peft's own mapping leaves out: query and value of every layer, as in the paper.
_MORE_DEFAULTS = {
    "albert": ["query", "value"],
    "camembert": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "ernie": ["query", "value"],
    "modernbert": ["Wqkv"],
    "mpnet": ["attn.q", "attn.v"],
    "xlm-roberta-xl": ["query", "value"],
}


def default_targets(model_type: str) -> list[str] | None:
    """Return the name patterns adapted by default for an architecture.

    Args:
        model_type: `model_type` of the config.

    Returns:
        Name suffixes (peft's mapping first), or None where nothing is known.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    known = KNOWN.get(model_type, _MORE_DEFAULTS.get(model_type))
    if known is None:
        return None
    return [known] if isinstance(known, str) else list(known)


def _matches(name: str, pattern: str) -> bool:
    if name == pattern or name.endswith("." + pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ModelError(
            f"--targets {pattern!r} is neither a name's ending nor a regular expression: {error}."
        ) from error


def find_matrices(module: nn.Module, patterns: Sequence[str] | None) -> tuple[Matrix, ...]:
    """List the weight matrices to adapt.

    Args:
        module: a transformers model.
        patterns: endings of module names ("query", "attention.self.value") or regular expressions on the whole name;
            None: the architecture's default.

    Returns:
        The matrices in the model's order, named as in the module.

    Raises:
        ModelError: a pattern matches no linear layer, or nothing is known of the architecture.
    """
    from torch import nn

    linear = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    body = [name for name in linear if name.startswith(prefix)] if prefix != "." else list(linear)
    if patterns is None:
        model_type = str(getattr(getattr(module, "config", None), "model_type", type(module).__name__))
        patterns = default_targets(model_type)
        if patterns is None:
            kinds = sorted({name.rsplit(".", 1)[-1] for name in body})
            raise ModelError(
                f"there are no default targets for the architecture {model_type!r}; name some of its linear layers "
                f"with --targets: {quote_list(kinds, 20)}."
            )
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in body):
            kinds = sorted({name.rsplit(".", 1)[-1] for name in body})
            raise ModelError(
                f"--targets {pattern!r} matches no linear layer of the base model; its linear layers end in "
                f"{quote_list(kinds, 20)}, and a regular expression must match a whole name such as {body[0]!r}."
            )
    chosen = [name for name in body if any(_matches(name, pattern) for pattern in patterns)]
    return tuple(Matrix(name, linear[name].out_features, linear[name].in_features) for name in chosen)
