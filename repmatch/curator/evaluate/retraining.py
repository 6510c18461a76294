"""Train classifiers on selections and test them on held-out rows, several at once on one frozen base model.

Every training has the same number of optimiser steps and of instances a step, whatever the size of its selection, so
that what differs is the data alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from repmatch.curator import start, trial
from repmatch.curator.apart import Way
from repmatch.curator.batches import batches_by_tokens
from repmatch.curator.evaluate.lower import LowerLayers
from repmatch.curator.linear import by_onednn
from repmatch.curator.shortcuts import LastLayer, Shortcut
from repmatch.curator.stack import AdapterStack
from repmatch.errors import ModelError, UsageError

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from repmatch.curator.classification import Example
    from repmatch.curator.workbench import Workbench
    from repmatch.datamodels import Space

_STRETCH = 16  # batches that are sorted by length together: little padding, still random order


@dataclass(frozen=True)
class RetrainRecipe:
    """How every selection is trained on: head and fresh LoRA adapters, AdamW.

    Attributes:
        steps: optimiser steps.
        batch_size: instances a step.
        rank: LoRA rank.
        alpha: LoRA alpha.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        layers: how many of the last layers get adapters; those below run once an instance for all trainings. None: all.
    """

    steps: int = 60
    batch_size: int = 16
    rank: int = 8
    alpha: float = 16.0
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    layers: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: a value is out of range.
        """
        if self.layers is not None and self.layers < 1:
            raise UsageError(f"--layers {self.layers} is out of range; expected 1 or more.")

    def as_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        examples: the selection, tokenised; one or more.
        seed: of head, A and order.
    """

    examples: Sequence[Example]
    seed: int


@dataclass(frozen=True)
class Outcome:
    """How one training ended.

    Attributes:
        accuracy: share of the test rows that are classified right.
        right: (t,) which of the test rows are.
        steps: optimiser steps taken.
        instances_read: instances that went through the model in training.
        tokens_read: tokens that did, without padding.
        last_loss: mean training loss of the last tenth of the steps.
        seconds: this training's share of the wall time of those trained beside it.
    """

    accuracy: float
    right: tuple[bool, ...]
    steps: int
    instances_read: int
    tokens_read: int
    last_loss: float
    seconds: float


@dataclass
class Retrainer:
    """Trains selections of one dataset, several at once; what they share is computed once.

    Attributes:
        bench: the base model.
        labels: every label.
        recipe: how selections are trained on.
    """

    bench: Workbench
    labels: Sequence[str]
    recipe: RetrainRecipe

    def __post_init__(self) -> None:
        """Make the model ready."""
        bench, recipe = self.bench, self.recipe
        self.module, self.task = bench.module(len(self.labels)), bench.task(self.labels)
        self.device = torch.device(bench.device)
        self.space = replace(bench.space, rank=recipe.rank, alpha=recipe.alpha)
        self.lower: LowerLayers | None = None
        self._last_layer = LastLayer.of(self.module)
        self._shortcut: Shortcut | None = None
        self._lower_tried = False
        self._apart: bool | None = None  # whether trainings can go side by side
        if recipe.layers is not None:
            lower = LowerLayers.of(self.module, self.space.matrices, recipe.layers, left=self.task.left)
            self.space = replace(self.space, matrices=lower.above(self.space.matrices))
            self.lower = lower if lower.depth else None

    def retrain(
        self, jobs: Sequence[Job], test: Sequence[Example], progress: Callable[[int, int], None] | None = None
    ) -> list[Outcome]:
        """Train on several selections at once, each with a head and adapters of its own, and test each.

        Args:
            jobs: the trainings.
            test: held-out examples, tokenised; one or more.
            progress: called with (steps done, steps in all).

        Returns:
            One outcome a job, in order.

        Raises:
            ModelError: a loss is not finite.
        """
        steps, tell = self.recipe.steps, progress or (lambda *_: None)
        self._prepare([*(e for job in jobs for e in job.examples), *test])
        if len(jobs) == 1 or self._apart:
            return self._retrained(jobs, test, lambda done: tell(done, steps))
        found: list[Outcome] = []
        for at, job in enumerate(jobs):

            def part(done: int, at: int = at) -> None:
                tell((at * steps + done) // len(jobs), steps)

            found += self._retrained([job], test, part)
        return found

    def _retrained(self, jobs: Sequence[Job], test: Sequence[Example], tell: Callable[[int], None]) -> list[Outcome]:
        began, recipe = time.monotonic(), self.recipe
        seeds = [job.seed for job in jobs]
        stack = AdapterStack(self.module, self.space, seeds, self.device)
        heads = HeadStack(self.module, self.space, seeds, self.device)
        optimizer = torch.optim.AdamW(
            [*stack.parameters, *heads.parameters], lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        orders = [list(order(job.examples, job.seed, recipe)) for job in jobs]
        losses: list[NDArray[np.float32]] = []
        with self._shortened(), stack.attached(), heads.attached():
            for step in range(recipe.steps):
                chosen = [job.examples[i] for job, found in zip(jobs, orders, strict=True) for i in found[step]]
                loss = self._step(optimizer, chosen, len(jobs))
                if not np.isfinite(loss).all():
                    raise ModelError(
                        f"training {int(np.argmin(np.isfinite(loss))) + 1} of {len(jobs)} diverged at step {step + 1}; "
                        f"try a smaller learning rate than {recipe.learning_rate}."
                    )
                losses.append(loss)
                tell(step + 1)
            right = self._test(test, len(jobs))
        tail = np.mean(losses[-max(1, recipe.steps // 10) :], axis=0)
        seconds = (time.monotonic() - began) / len(jobs)
        return [
            Outcome(
                accuracy=float(right[at].mean()),
                right=tuple(right[at].tolist()),
                steps=recipe.steps,
                instances_read=recipe.steps * recipe.batch_size,
                tokens_read=sum(job.examples[i].tokens for found in orders[at] for i in found),
                last_loss=float(tail[at]),
                seconds=round(seconds, 3),
            )
            for at, job in enumerate(jobs)
        ]

    def _prepare(self, examples: Sequence[Example]) -> None:
        if self._apart is None:
            engine = trial.tried(self.module, self.space, self.task, examples)
            self._apart = engine.way is Way.TOGETHER
            if not engine.batch_first:  # states are kept by instance
                self.lower = None
        if self.lower is not None:
            self.lower.remember(self.task, examples, self.bench.batch_tokens)
            if not self._lower_tried and not self.lower.is_right(self.task, trial.unlike(examples)):
                logger.info("the layers below the adapted ones run every time: what they do cannot be put back")
                self.lower = None
            self._lower_tried = True
        if self._last_layer is not None and self._shortcut is None:
            few = self._on(self.task.collate(examples[:2]))
            self._shortcut = self._last_layer.try_out(self.module, self.task.losses, few)

    @contextmanager
    def _shortened(self) -> Iterator[None]:
        """Leave out the layers below the adapters, and what the head does not read."""
        with ExitStack() as held:
            held.enter_context(by_onednn(self.module))
            if self._last_layer is not None:
                held.enter_context(self._last_layer.cut(self._shortcut))
            if self.lower is not None:
                held.enter_context(self.lower.skipped())
            yield

    def _on(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in batch.items()}

    def _step(self, optimizer: torch.optim.Optimizer, chosen: Sequence[Example], jobs: int) -> NDArray[np.float32]:
        batch = self._on(self.task.collate(chosen))
        if self.lower is not None:
            self.lower.give(chosen)
        with torch.enable_grad():
            wanted = batch.pop("labels")
            logits = self.module(**batch).logits.float()
            # The sum over trainings of their mean losses: each one's gradient is its own.
            loss = functional.cross_entropy(logits, wanted, reduction="none").reshape(jobs, -1).mean(dim=1)
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss.sum())
        optimizer.step()
        found: NDArray[np.float32] = loss.detach().cpu().numpy()
        return found

    def _test(self, test: Sequence[Example], jobs: int) -> NDArray[np.bool_]:
        right = np.zeros((jobs, len(test)), np.bool_)
        with torch.inference_mode():
            for at in batches_by_tokens([e.tokens for e in test], max(1, self.bench.batch_tokens // jobs)):
                rows = [test[i] for i in at]
                batch = self._on(self.task.collate(rows))
                wanted = batch.pop("labels")
                repeated = {name: value.repeat(jobs, 1) for name, value in batch.items()}
                if self.lower is not None:
                    self.lower.give(rows, jobs)
                found = self.module(**repeated).logits.argmax(dim=1).reshape(jobs, -1)
                right[:, at] = (found == wanted).cpu().numpy()
        return right


def order(examples: Sequence[Example], seed: int, recipe: RetrainRecipe) -> Iterator[list[int]]:
    """Yield the batches of a training: every instance once before any comes again, similar lengths together.

    Batches are always full, and where those of long instances stand depends on the seed alone, so that trainings side
    by side read instances of similar length at the same time.

    Args:
        examples: the selection.
        seed: of the order.
        recipe: steps and batch size.

    Yields:
        `recipe.batch_size` positions in `examples`, `recipe.steps` times.
    """
    draw, size = start.generator(seed, "evaluate:order"), recipe.batch_size
    queue: list[int] = []
    done = passes = 0
    while done < recipe.steps:
        batches = min(_STRETCH, recipe.steps - done)
        while len(queue) < batches * size:
            queue += start.generator(seed, f"evaluate:pass:{passes}").permutation(len(examples)).tolist()
            passes += 1
        stretch, queue = queue[: batches * size], queue[batches * size :]
        stretch.sort(key=lambda i: (examples[i].tokens, i))
        for place in draw.permutation(batches):
            yield stretch[place * size : (place + 1) * size]
        done += batches


class HeadStack:
    """Heads of several trainings: own copies of the linear layers outside of the base model.

    Attributes:
        weight: layer name -> (s, out, in).
        bias: layer name -> (s, 1, out), where the layer has one.

    Args:
        module: the classifier.
        space: names the base model.
        seeds: of the start, one a training.
        device: where the model is.

    Raises:
        ModelError: the model has no linear layer outside of the base.
    """

    def __init__(self, module: nn.Module, space: Space, seeds: Sequence[int], device: torch.device) -> None:
        prefix = f"{module.base_model_prefix}."
        self.layers = {
            name: layer
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear) and not name.startswith(prefix)
        }
        if not self.layers:
            raise ModelError(f"{space.model} has no linear head that could be trained; use an encoder with one.")
        std = float(getattr(module.config, "initializer_range", 0.02))
        self.size = len(seeds)
        self.weight: dict[str, Tensor] = {}
        self.bias: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            shape = (layer.out_features, layer.in_features)
            drawn = np.stack([start.draw_head_rows(seed, f"{name}.weight", shape, std) for seed in seeds])
            self.weight[name] = torch.from_numpy(drawn).to(device).requires_grad_(True)
            if layer.bias is not None:
                zeros = torch.zeros(self.size, 1, layer.out_features, device=device)
                self.bias[name] = zeros.requires_grad_(True)

    @property
    def parameters(self) -> list[Tensor]:
        """Every weight, then every bias."""
        return [*self.weight.values(), *self.bias.values()]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Let the heads answer in place of the model's own, and take them off again."""
        handles = [layer.register_forward_hook(partial(self._answer, name)) for name, layer in self.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _answer(self, name: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0].reshape(self.size, -1, args[0].shape[-1])
        answer = torch.bmm(x, self.weight[name].transpose(1, 2))
        if name in self.bias:
            answer = answer + self.bias[name]
        return answer.reshape(output.shape)
