"""What a task is, and what a user writes to bring their own."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from repmatch.curator.forms import FORMS
from repmatch.datamodels import digest
from repmatch.errors import UnknownChoiceError

if TYPE_CHECKING:
    from torch import nn

    from repmatch.datamodels import Row


@dataclass(frozen=True)
class Example:
    """One instance made ready for batching.

    Attributes:
        features: what the task's `collate` needs; token ids under "input_ids" where there are any.
        label: index of the label, the number to predict, or whatever the task keeps there.
        truncated: whether the instance was longer than the maximum length.
        size: how much of a batch it takes, in tokens; None: the number of its "input_ids".
    """

    features: Mapping[str, Any]
    label: Any
    truncated: bool
    size: int | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.features["input_ids"]) if self.size is None else self.size


class Task(Protocol):
    """Rows to examples, examples to a padded batch, a batch to one loss per instance."""

    name: str
    template: str

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Make rows ready: one example a row, in order."""
        ...

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Pad examples to one batch, name -> first dimension n."""
        ...

    def losses(self, module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Compute the loss of each instance, (n,), each from its own row of the batch only."""
        ...


class RowTask(ABC):
    """Base of a user's own task: write `batch` and `losses`, and `size` where instances differ in length.

    Attributes:
        name: part of the space's identity: change it when the task changes what it computes.
        template: likewise, for variants of one task.
        form: what the rows hold, one of `repmatch.curator.forms.FORMS`: "classes" for labels of a fixed list. Columns
            are text, text_pair and label, whatever the form, unless `fields=` of an ingest names others.
        labels: the dataset's labels, set before the task is used; a label's index is its position.
    """

    name: str = "own"
    template: str = "own"
    form: str = "classes"
    labels: tuple[str, ...] = ()

    @abstractmethod
    def batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Turn rows into one padded batch.

        Args:
            rows: n rows with id, text, text_pair, label, and the row itself in `json`.

        Returns:
            Name -> tensor whose first dimension is n.
        """

    @abstractmethod
    def losses(self, module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Compute the loss of each instance.

        Args:
            module: the user's module.
            inputs: from `batch`, on the module's device.

        Returns:
            (n,) losses. That of an instance must not depend on the others of the batch.
        """

    def size(self, row: Row) -> int:
        """Return how much of a batch a row takes, in tokens; by default its words."""
        return max(1, len(row.text.split()) + len((row.text_pair or "").split()))

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Make rows ready: one example a row, in order."""
        return [Example({"row": row}, None, False, self.size(row)) for row in rows]

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Pad examples to one batch."""
        return self.batch([example.features["row"] for example in examples])

    def label_index(self, label: str) -> int:
        """Return the position of a label in the dataset's list.

        Args:
            label: the label as text.

        Returns:
            Its index.

        Raises:
            UnknownNameError: the dataset has no such label.
        """
        from repmatch.errors import UnknownNameError

        if label not in self.labels:
            raise UnknownNameError.of("label", label, self.labels)
        return self.labels.index(label)


@dataclass(frozen=True)
class OwnModel:
    """A user's own module and task, in place of a base model's name.

    Attributes:
        module: any `torch.nn.Module`; its weights are part of the space's identity, so they must be the same each time.
            It is left frozen, in evaluation mode and on the device; give a copy where it is to be trained afterwards.
        task: how rows reach it.
        name: what reports call it.
    """

    module: nn.Module
    task: RowTask
    name: str = "own"

    def __post_init__(self) -> None:
        """Check the task's form.

        Raises:
            UnknownChoiceError: there is none of that name.
        """
        if self.task.form not in FORMS:
            raise UnknownChoiceError.of("form", self.task.form, FORMS)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the module's kind, and the names, shapes and bytes of its parameters and buffers."""
        total = hashlib.sha256(type(self.module).__name__.encode())
        for name, value in sorted(self.module.state_dict().items()):
            held = value.detach().cpu().contiguous()
            total.update(f"{name}:{held.dtype}:{tuple(held.shape)}".encode())
            total.update(held.flatten().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()

    @property
    def task_fingerprint(self) -> str:
        """Digest of the task's name, template and form."""
        return digest([self.task.name, self.task.template, self.task.form])


def pad(rows: Sequence[Sequence[int]], filler: int, *, left: bool = False) -> Tensor:
    """Pad lists of numbers to one length.

    Args:
        rows: n lists.
        filler: the padding.
        left: pad before in place of after.

    Returns:
        (n, longest) int64.
    """
    longest = max(len(row) for row in rows)
    fill = [[filler] * (longest - len(row)) for row in rows]
    padded = [f + list(r) if left else list(r) + f for r, f in zip(rows, fill, strict=True)]
    return torch.from_numpy(np.array(padded, dtype=np.int64))  # numpy reads lists five times as fast as torch
