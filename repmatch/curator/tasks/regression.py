"""Text regression: a number to predict, squared error as the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from repmatch.curator.classification import SequenceClassification
from repmatch.curator.tasks.task import Example
from repmatch.datamodels import Row
from repmatch.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "text-regression"
TEMPLATE = "tokenizer:text[,text_pair]"


class TextRegression(SequenceClassification):
    """Turns rows into batches and one output into squared errors.

    Args:
        tokenizer: a fast tokenizer.
        max_length: tokens kept of an instance; of a pair the longer text is cut first.
    """

    name = NAME
    template = TEMPLATE

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        super().__init__(tokenizer, (), max_length)

    def target(self, row: Row) -> float:
        """Return the number a row is to be given."""
        try:
            return float(row.label)
        except ValueError:
            raise InputError(f"the label {row.label!r} is no number; expected one for text regression.") from None

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Pad examples to one batch; "labels" is (n,) float32."""
        batch = super().collate(examples)
        batch["labels"] = torch.tensor([float(example.label) for example in examples], dtype=torch.float32)
        return batch

    def losses(self, module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Compute the squared error of each instance.

        Args:
            module: a sequence classifier of transformers with one output.
            inputs: from `collate`.

        Returns:
            (n,) float32 losses.
        """
        features = {name: value for name, value in inputs.items() if name != "labels"}
        predicted: Tensor = module(**features).logits.float()[:, 0]
        return (predicted - inputs["labels"]) ** 2
