"""Work that a classifier's loss cannot see, left out: the last layer of an encoder whose head reads one token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_PARTS = ("query", "key", "value", "num_attention_heads", "attention_head_size", "scaling", "dropout")


@dataclass(frozen=True)
class Shortcut:
    """What of a last layer is computed for the first token alone.

    What follows the attention works token by token, so the first token's output is what it was; where the head reads no
    other token the loss is the same, and the gradient at all others, which is zero, is not computed. Of the attention
    the first token alone needs its query, and keys and values of the others are needed in sums only (see `attend`).

    Attributes:
        attention: whether the attention is.
        output: whether what follows it is.
    """

    attention: bool
    output: bool


@dataclass(frozen=True)
class LastLayer:
    """The last layer of an encoder like BERT's.

    Attributes:
        attention: maps the layer's input to what the tokens attend to; None where it is not computed as BERT's.
        output: what follows; it takes (attention's output, the layer's input).
    """

    attention: Any
    output: nn.Module

    @classmethod
    def of(cls, module: nn.Module) -> LastLayer | None:
        """Find the last layer of a classifier.

        Args:
            module: a model.

        Returns:
            The layer, or None where the architecture is another.
        """
        base: Any = getattr(module, "base_model", None)
        if base is None or not type(module).__name__.endswith("ForSequenceClassification"):
            return None
        layers = getattr(getattr(base, "encoder", None), "layer", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            return None
        around = getattr(layers[-1], "attention", None)
        output, attention = getattr(around, "output", None), getattr(around, "self", None)
        if not isinstance(output, nn.Module) or not hasattr(output, "dense") or not hasattr(output, "LayerNorm"):
            return None
        plain = isinstance(attention, nn.Module) and all(hasattr(attention, part) for part in _PARTS)
        return cls(attention if plain and not getattr(attention, "is_decoder", False) else None, output)

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
            The shortest that leaves the loss as it is, maybe one that leaves out nothing; None where no loss is finite,
            which says nothing.
        """
        with torch.no_grad():
            whole = loss(module, inputs)
            finite = torch.isfinite(whole)
            if not finite.any():
                return None
            for shortcut in (Shortcut(True, True), Shortcut(False, True)):
                if shortcut.attention and self.attention is None:
                    continue
                with self.cut(shortcut):
                    short = loss(module, inputs)
                same = torch.allclose(whole[finite], short[finite], rtol=1e-4, atol=1e-5)
                if same and bool((torch.isfinite(short) == finite).all()):
                    return shortcut
        return Shortcut(False, False)

    @contextmanager
    def cut(self, shortcut: Shortcut) -> Iterator[None]:
        """Take a shortcut.

        Args:
            shortcut: from `try_out`.

        Yields:
            Nothing; the model is as before afterwards.
        """
        with ExitStack() as held:
            if shortcut.output:
                held.callback(self.output.register_forward_pre_hook(_cut).remove)
            if shortcut.attention:
                # An attribute of the module goes before that of its class.
                self.attention.forward = partial(_attended, self.attention, type(self.attention).forward)
                held.callback(delattr, self.attention, "forward")
            yield


def _cut(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value[:, :1] for value in args)


def _attended(
    attention: Any,
    whole: Callable[..., Any],
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    *args: Any,
    **options: Any,
) -> Any:
    odd = attention_mask is not None and attention_mask.ndim != 4
    if odd or (attention.training and attention.dropout.p > 0):
        return whole(attention, hidden_states, attention_mask, *args, **options)
    return attend(attention, hidden_states, attention_mask), None


def attend(attention: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Compute what the first token attends to, without the keys and with few of the values of the others.

    With q the first token's query, x_t the layer's input and p the softmax, per head: q · (K x_t + b) = (Kᵀq) · x_t
    plus a number that is the same for every t, which the softmax does not see; and Σ p_t (V x_t + b) =
    V (Σ p_t x_t) + b, as Σ p_t = 1. So one vector a head stands for all tokens. What is adapted is still called as a
    module, and what it adds to the gradients of A and B, summed over positions, is what it was.

    Args:
        attention: a self-attention with the parts of BERT's.
        hidden: (n, t, d) the layer's input.
        mask: (n or 1, heads or 1, t or 1, t), bool or added to the scores; None: every token sees all.

    Returns:
        (n, 1, d).
    """
    count, length, _ = hidden.shape
    heads, size = attention.num_attention_heads, attention.attention_head_size
    query = attention.query(hidden[:, :1]).reshape(count, heads, size)
    key = attention.key
    if _is_plain(key):
        looked_for = torch.einsum("nhe,hed->nhd", query, key.weight.reshape(heads, size, -1))
        scores = looked_for @ hidden.transpose(1, 2)
    else:
        scores = torch.einsum("nhe,nthe->nht", query, key(hidden).reshape(count, length, heads, size))
    scores = scores * attention.scaling
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
    return attended


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling a layer does nothing but multiply by its weight and add its bias."""
    return type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks
