"""Sequence classification as a task: rows to model input, model output to a loss per instance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from repmatch.curator.tasks.task import Example, pad
from repmatch.datamodels import Row
from repmatch.errors import UnknownNameError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["NAME", "TEMPLATE", "Example", "SequenceClassification", "losses"]

NAME = "sequence-classification"
TEMPLATE = "tokenizer:text[,text_pair]"


class SequenceClassification:
    """Turns rows into batches and logits into losses.

    Args:
        tokenizer: a fast tokenizer.
        labels: every label; its position is its index.
        max_length: tokens kept of an instance; of a pair the longer text is cut first.
    """

    name = NAME
    template = TEMPLATE

    def __init__(self, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._index = {label: i for i, label in enumerate(labels)}

    def label_index(self, label: str) -> int:
        """Return the index of a label.

        Args:
            label: the label as text.

        Returns:
            Its row of the head.

        Raises:
            UnknownNameError: the dataset has no such label.
        """
        if label not in self._index:
            raise UnknownNameError.of("label", label, self._index)
        return self._index[label]

    def target(self, row: Row) -> Any:
        """Return what a row's label is to the loss."""
        return self.label_index(row.label)

    @property
    def left(self) -> bool:
        """Whether padding goes before the text."""
        return bool(self.tokenizer.padding_side == "left")

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Tokenise rows.

        Args:
            rows: rows with text, maybe a second text, and a label.

        Returns:
            One example a row, in order.
        """
        examples: list[Example | None] = [None] * len(rows)
        for paired in (False, True):
            at = [i for i, row in enumerate(rows) if (row.text_pair is not None) == paired]
            if not at:
                continue
            texts = [rows[i].text for i in at]
            pairs = [str(rows[i].text_pair) for i in at] if paired else None
            coded = self.tokenizer(
                texts, pairs, truncation="longest_first", max_length=self.max_length, return_overflowing_tokens=False
            )
            for position, i in enumerate(at):
                features = {name: coded[name][position] for name in coded}
                cut = bool(coded.encodings[position].overflowing)
                examples[i] = Example(features, self.target(rows[i]), cut)
        return [example for example in examples if example is not None]

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Pad examples to one batch.

        Args:
            examples: at least one.

        Returns:
            Name -> (n, longest) int64, and "labels" (n,) int64.
        """
        batch = self.padded(examples)
        batch["labels"] = torch.tensor([example.label for example in examples])
        return batch

    def padded(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Pad what the tokenizer gave of each example, name -> (n, longest) int64."""
        fillers = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        return {
            name: pad([e.features[name] for e in examples], fillers.get(name, 0), left=self.left)
            for name in examples[0].features
        }

    def losses(self, module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Compute the cross entropy of each instance; see `losses` below."""
        return losses(module, inputs)


def losses(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Compute the cross entropy of each instance.

    Args:
        module: a sequence classifier of transformers.
        inputs: a batch from `SequenceClassification.collate`.

    Returns:
        (n,) float32 losses.
    """
    features = {name: value for name, value in inputs.items() if name != "labels"}
    logits = module(**features).logits
    return functional.cross_entropy(logits.float(), inputs["labels"], reduction="none")
