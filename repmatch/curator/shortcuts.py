"""Work that a classifier's loss cannot see, left out: the last layer of an encoder whose head reads one token.

The head of such a classifier reads the first token. Behind the last layer's attention every token is on its own, so the
other tokens' part of it changes neither the loss nor a gradient. Of the attention itself the first token needs its own
query, and the others' keys and values in sums only (see `attend`). Nothing is left out before a trial has shown that
the loss stays what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_LISTS = ("encoder.layer", "transformer.layer", "layers")
# Where an attention lies in its layer, and what its query, key, value and output are called: BERT and its kin,
# DistilBERT, ViT and its kin.
_NAMES = (
    ("attention.self", "query", "key", "value", None),
    ("attention", "q_lin", "k_lin", "v_lin", "out_lin"),
    ("attention", "q_proj", "k_proj", "v_proj", "o_proj"),
)


class Shortcut(Enum):
    """What of a last layer is computed for the first token alone."""

    NONE = "nothing"
    OUTPUT = "what follows the attention"
    LAYER = "the whole layer"


@dataclass(frozen=True)
class Attention:
    """A self-attention of a known form.

    Attributes:
        module: the attention; its parts are called as modules, so that what is adapted or watched stays so.
        query: maps (..., d) to (..., heads · size), as do `key` and `value`.
        key: see `query`.
        value: see `query`.
        out: maps (..., heads · size) to (..., d); None where another module does.
        before: what the layer does to its input first; None: nothing.
        heads: how many.
        size: numbers a head.
    """

    module: Any
    query: Any
    key: Any
    value: Any
    out: Any
    before: Any
    heads: int
    size: int

    @classmethod
    def of(cls, layer: nn.Module) -> Attention | None:
        """Find a layer's attention.

        Args:
            layer: a layer of an encoder.

        Returns:
            The attention, None where its form is not known.
        """
        for path, *parts in _NAMES:
            module: Any = _at(layer, path)
            query, key, value, out = (None if part is None else getattr(module, part, None) for part in parts)
            heads = getattr(module, "num_attention_heads", getattr(module, "n_heads", None))
            size = getattr(module, "attention_head_size", getattr(module, "head_dim", None))
            known = None not in (query, key, value, heads, size) and hasattr(module, "scaling")
            if known and (parts[3] is None or out is not None) and not getattr(module, "is_decoder", False):
                before = getattr(layer, "layernorm_before", None)
                return cls(module, query, key, value, out, before, int(heads or 0), int(size or 0))
        return None

    @property
    def drops(self) -> bool:
        """Whether shares of tokens are dropped at random, as in training."""
        rate = getattr(self.module, "dropout", getattr(self.module, "attention_dropout", 0.0))
        return bool(self.module.training and getattr(rate, "p", rate) > 0)


@dataclass(frozen=True)
class LastLayer:
    """The last layer of an encoder.

    Attributes:
        layer: maps (n, t, d) to (n, t, d).
        attention: its attention; None where its form is not known.
        output: what follows the attention in layers like BERT's, taking (attention's output, the layer's input).
    """

    layer: Any
    attention: Attention | None
    output: nn.Module | None

    @classmethod
    def of(cls, module: nn.Module) -> LastLayer | None:
        """Find the last layer of a classifier.

        Args:
            module: a model.

        Returns:
            The layer, or None where nothing is known of the architecture.
        """
        base: Any = getattr(module, "base_model", None)
        if not type(module).__name__.endswith(("ForSequenceClassification", "ForImageClassification")):
            return None
        for layers in (_at(base, path) for path in _LISTS):
            if isinstance(layers, nn.ModuleList) and len(layers):
                output = _at(layers[-1], "attention.output")
                like_bert = hasattr(output, "dense") and hasattr(output, "LayerNorm")
                found = cls(layers[-1], Attention.of(layers[-1]), output if like_bert else None)
                return None if found.attention is None and found.output is None else found
        return None

    def try_out(
        self,
        module: nn.Module,
        loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor],
        inputs: Mapping[str, Tensor],
    ) -> Shortcut | None:
        """Try what of this layer can be left out without another loss.

        Args:
            module: the model.
            loss: maps (module, inputs) to the loss of each instance.
            inputs: a few instances.

        Returns:
            The shortest that leaves the loss as it is; None where no loss is finite, which says nothing.
        """
        there = {Shortcut.LAYER: self.attention is not None, Shortcut.OUTPUT: self.output is not None}
        with torch.no_grad():
            whole = loss(module, inputs)
            finite = torch.isfinite(whole)
            if not finite.any():
                return None
            for shortcut in (shortcut for shortcut, known in there.items() if known):
                with self.cut(shortcut):
                    try:
                        short = loss(module, inputs)
                    except (RuntimeError, IndexError):  # the head asks for a token that is not there
                        continue
                same = torch.allclose(whole[finite], short[finite], rtol=1e-4, atol=1e-5)
                if same and bool((torch.isfinite(short) == finite).all()):
                    return shortcut
        return Shortcut.NONE

    @contextmanager
    def cut(self, shortcut: Shortcut | None) -> Iterator[None]:
        """Take a shortcut.

        Args:
            shortcut: from `try_out`; None: none.

        Yields:
            Nothing; the model is as before afterwards.
        """
        with ExitStack() as held:
            if shortcut is Shortcut.OUTPUT and self.output is not None:
                held.callback(self.output.register_forward_pre_hook(_first_tokens).remove)
            if shortcut is Shortcut.LAYER:
                held.enter_context(_forward(self.layer, self._first_token))
            yield

    def _first_token(
        self,
        whole: Callable[..., Any],
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        **options: Any,
    ) -> Any:
        """Run the layer on the first token, with an attention that still sees the others."""
        attention = self.attention
        odd = attention_mask is not None and attention_mask.ndim != 4
        if attention is None or odd or attention.drops:
            return whole(hidden_states, attention_mask, *args, **options)
        hidden = hidden_states if attention.before is None else attention.before(hidden_states)

        def attended(*_: Any, **__: Any) -> tuple[Tensor, None]:
            return attend(attention, hidden, attention_mask), None

        with _forward(attention.module, attended):
            return whole(hidden_states[:, :1], attention_mask, *args, **options)


@contextmanager
def _forward(module: Any, replacement: Callable[..., Any]) -> Iterator[None]:
    """Let a module run something else, which is given the module's own forward as first argument."""
    # An attribute of the module goes before that of its class.
    module.forward = partial(replacement, partial(type(module).forward, module))
    try:
        yield
    finally:
        del module.forward


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def _first_tokens(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value[:, :1] for value in args)


def attend(attention: Attention, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Compute what the first token attends to, without the keys and with few of the values of the others.

    With q the first token's query, x_t the attention's input and p the softmax, per head: q · (K x_t + b) = (Kᵀq) · x_t
    plus a number that is the same for every t, which the softmax does not see; and Σ p_t (V x_t + b) =
    V (Σ p_t x_t) + b, as Σ p_t = 1. So one vector a head stands for all tokens. What is adapted is still called as a
    module, and what it adds to the gradients of A and B, summed over positions, is what it was.

    Args:
        attention: the attention.
        hidden: (n, t, d) its input.
        mask: (n or 1, heads or 1, t or 1, t), bool or added to the scores; None: every token sees all.

    Returns:
        (n, 1, d).
    """
    count, length, _ = hidden.shape
    heads, size = attention.heads, attention.size
    query = attention.query(hidden[:, :1]).reshape(count, heads, size)
    if _is_plain(attention.key):
        looked_for = torch.einsum("nhe,hed->nhd", query, attention.key.weight.reshape(heads, size, -1))
        scores = looked_for @ hidden.transpose(1, 2)
    else:
        scores = torch.einsum("nhe,nthe->nht", query, attention.key(hidden).reshape(count, length, heads, size))
    scores = scores * attention.module.scaling
    if mask is not None:
        seen = mask[:, :, 0]
        scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype is torch.bool else scores + seen
    shares = scores.float().softmax(dim=2).to(scores.dtype)
    if length > heads:
        # Row h of the mixed inputs belongs to head h, which reads its own part of the values.
        values = attention.value(shares @ hidden).reshape(count, heads, heads, size)
        found = values.diagonal(dim1=1, dim2=2).transpose(1, 2)
    else:
        found = torch.einsum("nht,nthe->nhe", shares, attention.value(hidden).reshape(count, length, heads, size))
    attended: Tensor = found.reshape(count, 1, heads * size)
    return attended if attention.out is None else attention.out(attended)


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling a layer does nothing but multiply by its weight and add its bias."""
    return type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks
