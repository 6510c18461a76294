"""Does a selection train a better model? Retrain on it from the base model and test on held-out rows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from repmatch.curator.classification import Example, SequenceClassification
from repmatch.curator.engine import batches_by_tokens
from repmatch.curator.training import Recipe, adapted, batches, train_step
from repmatch.curator.workbench import Workbench
from repmatch.datamodels import Row

if TYPE_CHECKING:
    from repmatch.store import Store


@dataclass(frozen=True)
class Retraining:
    """How a model that was trained on a selection does on held-out rows.

    Attributes:
        accuracies: one per seed, share of the test rows classified right.
        steps: optimiser steps of each training.
        curve: (steps done, mean accuracy over the seeds) where it was tested on the way, the end included.
    """

    accuracies: tuple[float, ...]
    steps: int
    curve: tuple[tuple[int, float], ...] = ()

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return float(np.mean(self.accuracies))


def retrain(
    bench: Workbench,
    labels: Sequence[str],
    train_rows: Sequence[Row],
    test_rows: Sequence[Row],
    *,
    seeds: Sequence[int] = (0,),
    steps: int = 60,
    rank: int = 8,
    every: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Retraining:
    """Train head and fresh adapters on a selection and test them, once a seed.

    Every selection gets the same number of optimiser steps, whatever its size.

    Args:
        bench: the base model.
        labels: every label.
        train_rows: the selection.
        test_rows: held-out rows.
        seeds: of the start and of the order.
        steps: optimiser steps of 16 instances.
        rank: LoRA rank of the retraining.
        every: test after every so many steps too, for a curve; None: at the end only.
        progress: called with (steps done, steps in all).

    Returns:
        The accuracies.
    """
    task = bench.task(labels)
    train_examples, test_examples = task.encode(train_rows), task.encode(test_rows)
    accuracies = []
    on_the_way: dict[int, list[float]] = defaultdict(list)
    for number, seed in enumerate(seeds):
        module = bench.module(len(labels))
        space = replace(bench.space, seed=seed)
        recipe = Recipe(1e-3, 0.01, math.ceil(steps * 16 / len(train_examples)), 16, steps, seed)
        head = _head(module)
        kept = [parameter.detach().clone() for parameter in head]
        try:
            with adapted(module, space, rank) as wrapped:
                for parameter in head:
                    parameter.requires_grad_(True)
                trained = [p for p in wrapped.parameters() if p.requires_grad]
                optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
                for step, at in enumerate(batches(train_examples, recipe)):
                    train_step(wrapped, optimizer, task.collate([train_examples[i] for i in at]))
                    if progress is not None:
                        progress(number * steps + step + 1, len(seeds) * steps)
                    if every is not None and (step + 1) % every == 0 and step + 1 < steps:
                        found = accuracy(wrapped, task, test_examples, bench.batch_tokens)
                        on_the_way[step + 1].append(found)
                accuracies.append(accuracy(wrapped, task, test_examples, bench.batch_tokens))
        finally:
            with torch.no_grad():
                for parameter, value in zip(head, kept, strict=True):
                    parameter.copy_(value)
    curve = [(step, float(np.mean(values))) for step, values in sorted(on_the_way.items())]
    if curve:
        curve.append((steps, float(np.mean(accuracies))))
    return Retraining(tuple(accuracies), steps, tuple(curve))


def keep_retraining(store: Store, dataset: str, selection: str, result: Retraining, **arguments: Any) -> None:
    """Record a retraining as a run of the store, so that a report shows it.

    Args:
        store: the store.
        dataset: the dataset that the selection is from.
        selection: name of the selection.
        result: how it went.
        arguments: what else repeats it, plain JSON values.
    """
    with store.run("retrain", {"dataset": dataset, "selection": selection, "steps": result.steps, **arguments}) as run:
        run.detail["accuracies"] = [round(value, 6) for value in result.accuracies]
        run.detail["curve"] = [[step, round(value, 6)] for step, value in result.curve]


def _head(module: nn.Module) -> list[nn.Parameter]:
    prefix = f"{module.base_model_prefix}."
    return [parameter for name, parameter in module.named_parameters() if not name.startswith(prefix)]


def accuracy(module: nn.Module, task: SequenceClassification, examples: Sequence[Example], batch_tokens: int) -> float:
    """Return the share of examples that a classifier gets right.

    Args:
        module: a sequence classifier.
        task: collates examples.
        examples: at least one.
        batch_tokens: padded tokens a batch may hold.

    Returns:
        A number in [0, 1].
    """
    device = next(module.parameters()).device
    right = 0
    with torch.inference_mode():
        for at in batches_by_tokens([example.tokens for example in examples], batch_tokens):
            batch = {name: value.to(device) for name, value in task.collate([examples[i] for i in at]).items()}
            wanted = batch.pop("labels")
            right += int((module(**batch).logits.argmax(dim=1) == wanted).sum())
    return right / len(examples)
