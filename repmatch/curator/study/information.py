"""Is information lost by LoRA? The same rows learned by LoRA of several ranks and by full fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from repmatch.curator import layers, start
from repmatch.curator.batches import batches_by_tokens
from repmatch.curator.stack import AdapterStack
from repmatch.curator.training import batches, train_step
from repmatch.curator.warm import shared_copy
from repmatch.errors import ModelError, SelectionError, UsageError

if TYPE_CHECKING:
    from repmatch.curator.subsets import Trainer
    from repmatch.curator.tasks import Example
    from repmatch.datamodels import Space

RANKS = (1, 2, 4, 8)
HELD = 0.2  # share of the instances that is held out
FULL_RATE = 1e-4  # AdamW moves every weight by about its rate; LoRA's product moves less, so it takes a larger one


@dataclass(frozen=True)
class InformationStudy:
    """What LoRA of each rank and full fine-tuning of the same matrices make of the same rows.

    Attributes:
        dataset: its name.
        trained: instances trained on.
        held: instances tested on.
        ranks: of LoRA, s of them.
        accuracy: (s,) of each rank, on the held-out instances.
        loss: (s,) mean loss there.
        full_accuracy: of full fine-tuning.
        full_loss: mean loss there.
        start_accuracy: before any training.
        overlap: (s,) mean over the matrices of φ(r, r) between LoRA's output directions and as many leading ones of
            the full update.
        chance: (s,) the same for random directions, r / d.
        captured: (s,) mean share of the full update's squared norm that lies in LoRA's output directions.
        best: (s,) the largest share that r directions could hold: the full update's own r leading ones.
    """

    dataset: str
    trained: int
    held: int
    ranks: tuple[int, ...]
    accuracy: NDArray[np.float64]
    loss: NDArray[np.float64]
    full_accuracy: float
    full_loss: float
    start_accuracy: float
    overlap: NDArray[np.float64]
    chance: NDArray[np.float64]
    captured: NDArray[np.float64]
    best: NDArray[np.float64]

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        named = ("accuracy", "loss", "overlap", "chance", "captured", "best")
        held = {name: getattr(self, name).round(6).tolist() for name in named}
        about = {"dataset": self.dataset, "trained": self.trained, "held": self.held, "ranks": list(self.ranks)}
        full = {"full_accuracy": self.full_accuracy, "full_loss": self.full_loss, "start_accuracy": self.start_accuracy}
        return {**about, **held, **full}

    @property
    def margin(self) -> float:
        """Twice the standard error of a difference between two accuracies on the held-out instances, at most."""
        return 2 * math.sqrt(0.5 / self.held)

    def verdict(self) -> list[str]:
        """Say in words what is lost."""
        said = []
        near = [r for r, a in zip(self.ranks, self.accuracy, strict=True) if a >= self.full_accuracy - self.margin]
        if max(self.full_accuracy, float(self.accuracy.max())) < self.start_accuracy + self.margin:
            said.append("neither learns more than the start knew: train longer, or on more instances")
        elif near:
            said.append(
                f"LoRA of rank {min(near)} is as accurate as full fine-tuning within the noise of {self.held} held-out "
                f"instances (±{100 * self.margin:.1f} points): no information that matters here is lost"
            )
        else:
            said.append(
                f"full fine-tuning is {100 * (self.full_accuracy - float(self.accuracy.max())):.1f} points more "
                "accurate than LoRA of any rank: information is lost; raise the rank or adapt more matrices"
            )
        r, o, c = self.ranks[-1], float(self.overlap[-1]), float(self.chance[-1])
        captured, best = float(self.captured[-1]), float(self.best[-1])
        said.append(
            f"LoRA of rank {r} and the full update share {o:.2f} of their leading directions (chance {c:.3f}); "
            f"{captured:.0%} of the full update lies in LoRA's directions, where {r} directions could hold {best:.0%}"
        )
        return said


def study_information(
    trainer: Trainer, dataset: str, *, ranks: Sequence[int] = RANKS, rate: float = FULL_RATE, seed: int = 0
) -> InformationStudy:
    """Train on the same rows by LoRA and by full fine-tuning of the same matrices, and compare.

    Head, order and steps are the same for all; the head stays frozen, as the method has it.

    Args:
        trainer: says how LoRA is trained and where to compute.
        dataset: its name, or a subset, coreset or DATASET[SQL].
        ranks: of LoRA.
        rate: AdamW's learning rate of full fine-tuning.
        seed: of the split.

    Returns:
        The study.

    Raises:
        UsageError: the task has no labels, or a rank is out of range.
        SelectionError: fewer than 20 instances.
        ModelError: a loss is not finite.
    """
    subset = trainer.store.resolve(dataset)
    space, known = trainer.space_of(subset.dataset), trainer.store.dataset(subset.dataset)
    if space.task != "sequence-classification":
        raise UsageError(f"{dataset!r} is of the task {space.task!r}; expected sequence-classification.")
    largest = min(min(m.d_out, m.d_in) for m in space.matrices)
    if not ranks or not 1 <= min(ranks) <= max(ranks) <= largest:
        raise UsageError(f"--ranks are out of range; expected numbers from 1 to {largest}, such as 1,4.")
    ids = trainer.store.members(subset).ids
    if len(ids) < 20:
        raise SelectionError(f"{dataset!r} has {len(ids)} instances; expected 20 or more to learn and to test.")
    from repmatch.curator.workbench import Workbench

    bench = Workbench.of_space(space, trainer.settings, trainer.store)
    task = bench.task(known.labels, known.fields)
    examples = task.encode(list(trainer.store.tasks(subset.dataset, ids=list(ids))))
    order = start.generator(seed, "study:information").permutation(len(examples))
    cut = max(1, round(HELD * len(examples)))
    held, rows = [examples[i] for i in sorted(order[:cut])], [examples[i] for i in sorted(order[cut:])]
    module = bench.start(known.labels)
    run = _Run(trainer, module, task, rows, torch.device(bench.device))

    def tested(one: nn.Module) -> tuple[float, float]:
        return _test(one, task, held, bench.batch_tokens)

    before, _ = tested(module)
    full_module, full = run.full(space, rate)
    full_accuracy, full_loss = tested(full_module)
    left = {name: np.linalg.svd(delta, full_matrices=False)[:2] for name, delta in full.items()}
    columns: dict[str, list[float]] = {n: [] for n in ("accuracy", "loss", "overlap", "chance", "captured", "best")}
    for rank in ranks:
        spaced = replace(space, rank=rank)
        stack = run.lora(spaced)
        with stack.attached():
            accuracy, loss = tested(module)
        _, b = stack.arrays(0)
        found = [_compared(b[m.name], full[m.name], *left[m.name]) for m in space.matrices]
        dims = [rank / m.d_out for m in space.matrices]
        values = (accuracy, loss, *np.mean([[f[0], c, *f[1:]] for f, c in zip(found, dims, strict=True)], axis=0))
        for name, value in zip(columns, values, strict=True):
            columns[name].append(float(value))
    arrays = {name: np.array(held_) for name, held_ in columns.items()}
    return InformationStudy(
        dataset, len(rows), len(held), tuple(ranks), full_accuracy=full_accuracy, full_loss=full_loss,
        start_accuracy=before, **arrays,
    )  # fmt: skip


def _compared(
    b: NDArray[np.float32], delta: NDArray[np.float64], vectors: NDArray[np.float64], values: NDArray[np.float64]
) -> tuple[float, float, float]:
    """Return φ(r, r), the share of the full update in B's columns, and the largest share r directions could hold."""
    frame, _ = np.linalg.qr(b.astype(np.float64))
    rank, total = b.shape[1], float((values**2).sum())
    if total == 0.0:
        return 0.0, 0.0, 0.0
    overlap = float(((frame.T @ vectors[:, :rank]) ** 2).sum()) / rank
    return overlap, float(((frame.T @ delta) ** 2).sum()) / total, float((values[:rank] ** 2).sum()) / total


@dataclass
class _Run:
    """Trains on the same rows in the same order, by LoRA or in full."""

    trainer: Trainer
    module: nn.Module
    task: Any
    rows: Sequence[Example]
    device: torch.device

    def lora(self, space: Space) -> AdapterStack:
        stack = AdapterStack(self.module, space, [space.seed], self.device)
        with stack.attached():
            self._train(self.module, stack.parameters, self.trainer.recipe.learning_rate, f"LoRA of rank {space.rank}")
        return stack

    def full(self, space: Space, rate: float) -> tuple[nn.Module, dict[str, NDArray[np.float64]]]:
        module = shared_copy(self.module)
        before: dict[str, Tensor] = {}
        trained: dict[str, Tensor] = {}
        for matrix in space.matrices:
            layer: Any = module.get_submodule(matrix.name)
            if not isinstance(getattr(layer, "weight", None), nn.Parameter):
                raise ModelError(f"{matrix.name!r} has no weight of its own that could be trained in full.")
            before[matrix.name] = layer.weight.detach()
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=True)
            trained[matrix.name] = layer.weight
        self._train(module, list(trained.values()), rate, "full fine-tuning")
        module.requires_grad_(False)
        deltas = {
            name: layers.as_matrix(module.get_submodule(name), weight.detach() - before[name]).cpu().double().numpy()
            for name, weight in trained.items()
        }
        return module, deltas

    def _train(self, module: nn.Module, parameters: list[Tensor], rate: float, name: str) -> None:
        recipe, tick = self.trainer.recipe, self.trainer.progress
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=recipe.weight_decay)
        total = recipe.steps(len(self.rows))
        for step, at in enumerate(batches(self.rows, recipe)):
            loss, _ = train_step(module, optimizer, self.task.collate([self.rows[i] for i in at]), self.task)
            if not math.isfinite(loss):
                raise ModelError(f"{name} diverged at step {step + 1}; try a smaller learning rate than {rate:g}.")
            if tick is not None:
                tick(f"training by {name}", step + 1, total)


def _test(module: nn.Module, task: Any, held: Sequence[Example], tokens: int) -> tuple[float, float]:
    """Return accuracy and mean loss."""
    device = next(module.parameters()).device
    right, total = 0, 0.0
    with torch.inference_mode():
        for at in batches_by_tokens([e.tokens for e in held], tokens):
            inputs = {k: v.to(device) for k, v in task.collate([held[i] for i in at]).items()}
            wanted = inputs.pop("labels")
            logits = module(**inputs).logits.float()
            total += float(functional.cross_entropy(logits, wanted, reduction="sum"))
            right += int((logits.argmax(dim=1) == wanted).sum())
    return right / len(held), total / len(held)
