"""Masked language models: text without labels, some tokens hidden and to be guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional

from repmatch.curator import start
from repmatch.curator.classification import SequenceClassification
from repmatch.curator.tasks.causal import IGNORED, mean_over_instances
from repmatch.curator.tasks.short_head import ShortHead
from repmatch.curator.tasks.task import Example, pad
from repmatch.datamodels import Row
from repmatch.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "masked-lm"
RATE = 0.15
TEMPLATE = f"mask:{RATE}"


class MaskedLanguage(SequenceClassification):
    """Hides a fixed random share of each text's tokens; the loss is the mean cross entropy of the hidden ones.

    Which tokens are hidden depends on the space's seed and on the text's own tokens only, so an instance has the same
    factor in every run and in every batch. Every hidden token becomes the mask token.

    Args:
        tokenizer: a fast tokenizer with a mask token.
        max_length: tokens kept of an instance.
        seed: the space's seed.
    """

    name = NAME
    template = TEMPLATE

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int) -> None:
        super().__init__(tokenizer, (), max_length)
        if tokenizer.mask_token_id is None:
            raise ModelError("the tokenizer of this model has no mask token; expected one for --task masked-lm.")
        self._seed = seed
        self._short = ShortHead(_short_logits)

    def target(self, row: Row) -> None:
        """Return nothing: the text is its own target."""

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Tokenize rows and hide some of the tokens.

        Args:
            rows: rows with text, maybe a second text.

        Returns:
            One example a row, in order; `label` is the list of wanted tokens, `IGNORED` where nothing is hidden.
        """
        special = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        out = []
        for example in super().encode(rows):
            ids = list(example.features["input_ids"])
            open_to = [i for i, token in enumerate(ids) if token not in special]
            count = min(len(open_to), max(1, round(RATE * len(open_to))))
            draw = start.generator(self._seed, f"mask:{','.join(map(str, ids))}")
            hidden = draw.choice(np.asarray(open_to, dtype=np.int64), count, replace=False).tolist() if open_to else []
            wanted = [IGNORED] * len(ids)
            for i in hidden:
                wanted[i], ids[i] = ids[i], int(self.tokenizer.mask_token_id)
            out.append(Example({**example.features, "input_ids": ids}, wanted, example.truncated))
        return out

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Pad examples to one batch; "labels" is (n, longest) int64."""
        batch = self.padded(examples)
        batch["labels"] = pad([example.label for example in examples], IGNORED, left=self.left)
        return batch

    def losses(self, module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Compute the mean cross entropy of each instance's hidden tokens.

        Args:
            module: a masked language model of transformers.
            inputs: from `collate`.

        Returns:
            (n,) float32 losses; 0 for a text in which nothing could be hidden.
        """
        unwrap: Any = getattr(module, "get_base_model", None)
        if unwrap is not None:  # peft's wrapper; its layers sit in the model itself
            module = unwrap()
        features = {name: value for name, value in inputs.items() if name != "labels"}
        keep = inputs["labels"] != IGNORED
        short = self._short.is_right(module, features)
        logits = (_short_logits(module, features, keep) if short else module(**features).logits[keep]).float()
        return mean_over_instances(functional.cross_entropy(logits, inputs["labels"][keep], reduction="none"), keep)


def _short_logits(module: Any, features: Mapping[str, Tensor], keep: Tensor) -> Tensor:
    """The logits of the hidden tokens alone, where the head is the one module behind the base."""
    (head,) = [child for child in module.children() if child is not module.base_model]
    logits: Tensor = head(module.base_model(**features)[0][keep])
    return logits
