"""The work of an ingest: from staged rows to stored factors, window by window, overlapping where it pays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repmatch.curator.batches import Batches, Window
from repmatch.curator.windows import Progress, grouped, window_tokens, windows, windows_at_once
from repmatch.datamodels import BadRow, Dataset, FactorBatch, Layout

if TYPE_CHECKING:
    from repmatch.curator.engine import FactorEngine
    from repmatch.curator.tasks import Example, Task
    from repmatch.curator.workbench import Workbench
    from repmatch.store import Stage, Store

# Instances on which the cost of sign codes is measured, from the first window.
SIGN_SAMPLE = 256
# Instances on which precision and batch size are chosen.
LOOK = 32


class Work:
    """One ingest's factors: from staged rows to stored ones.

    Attributes:
        detail: what was measured on the way.

    Args:
        store: the store, writable.
        stage: the rows.
        bench: the workbench.
        dataset: the dataset's record.
        tell: called with (stage, done, total or None).
    """

    def __init__(self, store: Store, stage: Stage, bench: Workbench, dataset: Dataset, tell: Progress) -> None:
        self.detail: dict[str, Any] = {}
        self._store = store
        self._stage = stage
        self._bench = bench
        self._dataset = dataset
        self._total = self._done = 0
        self._tell = tell

    @cached_property
    def task(self) -> Task:
        """The dataset's task."""
        made: Task = self._bench.task(self._dataset.labels, self._dataset.fields)
        return made

    @cached_property
    def engine(self) -> FactorEngine:
        """The factor engine at the space's start."""
        return self._bench.engine(self._dataset.labels, self.task)

    @property
    def tokens(self) -> int:
        """Tokens of a window."""
        return window_tokens(self._bench, self.engine)

    def prepare(self) -> None:
        """Load the model at the space's start."""
        _ = self.engine

    def compute(self, total: int) -> tuple[int, int, list[BadRow]]:
        """Compute and store every factor that is missing.

        Args:
            total: how many they are.

        Returns:
            Factors stored, instances among them that were cut, and the rows without a finite factor, or that the task
            refuses.
        """
        self._total, self._done = total, 0
        if total == 0:
            return 0, 0, []
        from repmatch.curator.overlap import ahead, behind

        dataset, engine = self._dataset, self.engine
        self._tell("factors", 0, total)
        batches = Batches(engine, self.task, self._bench.batch_tokens)
        overlapping = engine.device.type == "cuda"
        refused: list[BadRow] = []
        cut = windows(self._stage.todo(), self.task, self.tokens, refused)
        stream = grouped(cut, windows_at_once(engine))
        truncated = 0
        lost: list[BadRow] = []
        with (
            behind(self._keep, overlapping) as keep,
            closing(ahead(stream, overlapping)) as coming,
            closing(batches.stream(self._looked_at(batches, coming), self._tick)) as made,
        ):
            for batch, bad in made:
                if "sign_error" not in self.detail and dataset.encoding == "sign":
                    self.detail["sign_error"] = sign_error(batch.values[:SIGN_SAMPLE], engine.layout)
                if batch.rows:
                    keep(batch)
                lost += bad
                truncated += int(batch.truncated.sum())
        self._tell("factors", self._done + len(refused), total)
        return self._done - len(lost), truncated, [*lost, *refused]

    def _looked_at(self, batches: Batches, stream: Iterator[Window]) -> Iterator[Window]:
        """Pass windows on; the first one decides how all are computed."""
        for rows, examples, sizes in stream:
            if "precision" not in self.detail:
                self._look(batches, examples)
            yield rows, examples, sizes

    def _keep(self, batch: FactorBatch) -> None:
        self._store.append(self._dataset.name, self._bench.space.id, self._dataset.encoding, batch)

    def _tick(self, rows: int) -> None:
        self._done += rows
        self._tell("factors", self._done, self._total)

    def _look(self, batches: Batches, examples: Sequence[Example]) -> None:
        self.detail |= look(batches, self._bench, examples[:LOOK])


def look(batches: Batches, bench: Workbench, examples: Sequence[Example]) -> dict[str, Any]:
    """Check the engine and choose the precision, and on CUDA the batch size, on the first rows of an ingest.

    Args:
        batches: are set accordingly.
        bench: names the device.
        examples: the first rows, at most `LOOK` of them.

    Returns:
        What was chosen and measured.

    Raises:
        ModelError: the model does not call an adapted layer, or instances of a batch see each other.
    """
    from repmatch.curator import trial

    trial.check(batches.engine, batches.task, examples)
    return tune(batches, bench, examples)


def tune(batches: Batches, bench: Workbench, examples: Sequence[Example]) -> dict[str, Any]:
    """Choose the precision, and on CUDA the batch size.

    Args:
        batches: are set accordingly.
        bench: names the device.
        examples: the first rows, at most `LOOK` of them.

    Returns:
        What was chosen and measured.
    """
    from repmatch.curator import precision
    from repmatch.curator.memory import Meter, fitting_tokens

    few = batches.task.collate(list(examples))
    detail: dict[str, Any] = {}
    chosen, agreement = precision.choose(batches.engine, few)
    if batches.engine.device.type == "cuda" and bench.fits_memory and "input_ids" in few:
        batches.limit = fitting_tokens(batches.engine.compute, few, Meter.of_cuda(batches.engine.device))
        detail["batch_tokens"] = batches.limit
    detail |= {"device": bench.device, "precision": chosen}
    if agreement:
        detail["agreement_with_float32"] = agreement
    return detail


def sign_error(values: NDArray[np.float32], layout: Layout) -> dict[str, float]:
    """Measure what sign codes lose: the squared cosine of each matrix' exact direction with its signs.

    Args:
        values: (n, layout.width) float32, rank 1.
        layout: how they lie.

    Returns:
        Instances measured, and the mean, first percentile and minimum over instances and matrices.
    """
    cosines = []
    for lo, hi in zip(layout.offsets, layout.offsets[1:], strict=False):
        block = values[:, lo:hi].astype(np.float64)
        there = np.linalg.norm(block, axis=1) > 0
        cosines.append(np.abs(block[there]).sum(axis=1) ** 2 / (hi - lo))
    found = np.concatenate(cosines)
    if not len(found):
        return {"instances": len(values), "mean": 1.0, "first_percentile": 1.0, "minimum": 1.0}
    return {
        "instances": len(values),
        "mean": round(float(found.mean()), 6),
        "first_percentile": round(float(np.percentile(found, 1)), 6),
        "minimum": round(float(found.min()), 6),
    }
