"""What would an instance's factor be if the instance were learned in a batch with others?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repmatch.curator import start
from repmatch.curator.batches import batches_by_tokens
from repmatch.curator.engine import first_step
from repmatch.errors import SelectionError, UsageError
from repmatch.similarity import chance, matrix_scores, orthonormal

if TYPE_CHECKING:
    from repmatch.curator.subsets import Trainer
    from repmatch.datamodels import Space

SIZES = (1, 2, 4, 8, 16, 32)
QUERIES = 64  # instances whose batches are looked at
POOL = 512  # instances that batches are drawn from


@dataclass(frozen=True)
class BatchStudy:
    """How much of an instance's own factor is left in the first step of a batch that holds it.

    Attributes:
        dataset: its name.
        instances: how many were looked at.
        sizes: instances in a batch, s of them.
        inside: (s,) mean RepMatch score of an instance's factor with the step of a batch that holds it.
        outside: (s,) the same with batches that do not.
        alike: (s,) as `inside`, the others of the batch having the instance's label; nan where labels say nothing.
        mixed: (s,) as `inside`, the others having other labels.
        chance: score of random directions.
    """

    dataset: str
    instances: int
    sizes: tuple[int, ...]
    inside: NDArray[np.float64]
    outside: NDArray[np.float64]
    alike: NDArray[np.float64]
    mixed: NDArray[np.float64]
    chance: float

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        named = {"inside": self.inside, "outside": self.outside, "alike": self.alike, "mixed": self.mixed}
        held = {k: [None if np.isnan(x) else round(float(x), 6) for x in v] for k, v in named.items()}
        about = {"dataset": self.dataset, "instances": self.instances, "sizes": list(self.sizes)}
        return {**about, **held, "chance": self.chance}

    def verdict(self) -> list[str]:
        """Say in words how far a batch hides its instances."""
        said = []
        lost = [b for b, i, o in zip(self.sizes, self.inside, self.outside, strict=True) if i < 2 * o]
        for b, i, o in zip(self.sizes, self.inside, self.outside, strict=True):
            if b == 16:
                said.append(
                    f"in a batch of 16 the step keeps {i:.0%} of an instance's own factor; batches without it score "
                    f"{o:.3f} (chance {self.chance:.4f})"
                )
        if lost:
            said.append(
                f"from {lost[0]} instances on, the step of a batch is less than twice as similar to an instance in it "
                "as to one outside: such steps speak of the batch"
            )
        else:
            said.append(f"up to {self.sizes[-1]} instances, a batch's step can be told from one without the instance")
        both = ~(np.isnan(self.alike) | np.isnan(self.mixed))
        if both.any():
            alike, mixed = float(self.alike[both].mean()), float(self.mixed[both].mean())
            word = "more" if alike > mixed else "less"
            said.append(
                f"batches of one label keep {word} of an instance than mixed ones ({alike:.3f} against {mixed:.3f} on "
                "average): factors depend on what they are batched with"
            )
        return said


def study_batches(trainer: Trainer, dataset: str, *, sizes: Sequence[int] = SIZES, seed: int = 0) -> BatchStudy:
    """Compare instances' factors with the first step of batches that hold them, and of batches that do not.

    At the shared start B = 0, so a batch's gradient is the mean of its instances' (METHOD: one forward and backward
    pass serves all), and its first optimiser step has the same closed form; no training is needed.

    Args:
        trainer: says where to compute.
        dataset: its name.
        sizes: instances in a batch.
        seed: of the draws.

    Returns:
        The study.

    Raises:
        UsageError: the space trains more than one step, or a size is out of range.
        SelectionError: the dataset has fewer instances than the largest batch needs.
    """
    space = trainer.space_of(dataset)
    if int(space.optimizer.get("steps", 1)) > 1:
        raise UsageError(f"{dataset!r} has factors of several steps; batches are studied with those of one step.")
    if not sizes or min(sizes) < 1:
        raise UsageError("--sizes are out of range; expected numbers from 1 on, such as 1,4,16.")
    ids = trainer.store.ids(dataset)
    if len(ids) <= max(sizes):
        raise SelectionError(f"batches of {max(sizes)} are drawn from more instances than that; got {len(ids)}.")
    draw = start.generator(seed, "study:batches")
    pool = np.sort(draw.permutation(len(ids))[: max(POOL, 2 * max(sizes))])
    gradients, labels = _gradients(trainer, dataset, [ids[i] for i in pool])
    named = np.asarray(labels, dtype=object).astype(str)
    a = {m.name: start.draw_a(space.seed, m.name, space.rank, m.d_in) for m in space.matrices}
    drawn = _Draw(space, gradients, named, a, draw)
    queries = {int(q): drawn.step([int(q)]) for q in draw.permutation(len(named))[:QUERIES]}
    told = 1 < len(set(named)) <= len(named) // 4
    table: dict[str, list[float]] = {"inside": [], "outside": [], "alike": [], "mixed": []}
    for size in sizes:
        table["inside"].append(drawn.mean_score(queries, size))
        table["outside"].append(drawn.mean_score(queries, size, holding=False))
        for name, same in (("alike", True), ("mixed", False)):
            score = drawn.mean_score(queries, size, same=same) if told and size > 1 else float("nan")
            table[name].append(score)
    found = {name: np.array(values) for name, values in table.items()}
    return BatchStudy(dataset, len(queries), tuple(sizes), **found, chance=chance(space.layout))


@dataclass(frozen=True)
class _Draw:
    """Gradients of a pool of instances, and batches drawn from it."""

    space: Space
    gradients: Mapping[str, Tensor]
    labels: NDArray[np.str_]
    a: Mapping[str, NDArray[np.float32]]
    draw: np.random.Generator

    def step(self, members: Sequence[int]) -> list[NDArray[np.float64]]:
        """Return the directions of the first step on a batch's mean loss, (d_out, r) a matrix."""
        out = []
        for matrix in self.space.matrices:
            mean = self.gradients[matrix.name][list(members)].mean(dim=0)
            out.append(orthonormal(first_step(mean, self.space.optimizer).double().numpy(), self.a[matrix.name]))
        return out

    def mean_score(
        self,
        queries: Mapping[int, list[NDArray[np.float64]]],
        size: int,
        *,
        holding: bool = True,
        same: bool | None = None,
    ) -> float:
        """Return the mean score of instances with a batch that holds them or not, drawn anew for each.

        Args:
            queries: position in the pool -> the directions of the instance's own step.
            size: of the batch.
            holding: whether the instance is in it.
            same: whether the others have its label or another; None: any.

        Returns:
            The mean; nan where no instance has enough others.
        """
        scores = []
        for q, own in queries.items():
            allowed = np.arange(len(self.labels)) != q
            if same is not None:
                allowed &= (self.labels == self.labels[q]) == same
            others, count = np.flatnonzero(allowed), size - int(holding)
            if len(others) < count:
                continue
            members = self.draw.permutation(others)[:count].tolist()
            batch = self.step([q, *members] if holding else members)
            scores.append(float(matrix_scores(own, batch).mean()))
        return float(np.mean(scores)) if scores else float("nan")


def _gradients(trainer: Trainer, dataset: str, ids: Sequence[str]) -> tuple[dict[str, Tensor], list[str | None]]:
    """Return ∂L/∂B of some instances, matrix name -> (n, d_out, r), and their labels."""
    from repmatch.curator.workbench import Workbench

    known = trainer.store.dataset(dataset)
    bench = Workbench.of_space(trainer.space_of(dataset), trainer.settings, trainer.store)
    task = bench.task(known.labels, known.fields)
    engine = bench.engine(known.labels, task)
    rows = list(trainer.store.tasks(dataset, ids=list(ids)))
    examples = task.encode(rows)
    parts: dict[str, list[Tensor]] = {}
    order: list[int] = []
    for at in batches_by_tokens([e.tokens for e in examples], bench.batch_tokens):
        found, _ = engine.gradients(task.collate([examples[i] for i in at]))
        for name, gradient in found.items():
            parts.setdefault(name, []).append(gradient.cpu())
        order += at
    back = torch.from_numpy(np.argsort(np.asarray(order)))
    return {name: torch.cat(held)[back] for name, held in parts.items()}, [row.label for row in rows]
