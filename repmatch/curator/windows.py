"""Windows: the unit of commit. Rows are tokenised, computed and stored window by window, overlapping where it pays."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repmatch.datamodels import BadRow, Dataset, FactorBatch, Layout, Row
from repmatch.errors import ModelError

if TYPE_CHECKING:
    from repmatch.curator.engine import BatchFactors, FactorEngine
    from repmatch.curator.tasks import Example, Task
    from repmatch.curator.workbench import Workbench
    from repmatch.store import Stage, Store

logger = logging.getLogger(__name__)

# Rows are sorted by length within a window and committed together. It is sized in work, not in seconds or cores, so
# that a run that was killed goes on with the very batches an uninterrupted run would have computed, and so that
# machines with more or fewer cores cut the same input alike: a factor depends on its batch, if only by rounding.
_WINDOW_FLOP = 2e12
_WINDOW_FLOP_GPU = 5e13
_WINDOW_ROWS = (64, 4096)
# Instances on which the cost of sign codes is measured, from the first window.
SIGN_SAMPLE = 256
# Instances on which precision and batch size are chosen.
LOOK = 32

Progress = Callable[[str, int, int | None], None]


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
        self._total = 0
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

    def compute(self, total: int) -> tuple[int, int, list[BadRow]]:
        """Compute and store every factor that is missing.

        Args:
            total: how many they are.

        Returns:
            Factors stored, instances among them that were cut, and the rows without a finite factor.
        """
        self._total = total
        if total == 0:
            return 0, 0, []
        from repmatch.curator.overlap import ahead, behind

        dataset, engine = self._dataset, self.engine
        self._tell("factors", 0, total)
        batches = Batches(engine, self.task, self._bench.batch_tokens)
        overlapping = engine.device.type == "cuda"
        stream = grouped(windows(self._stage.todo(), self.task, self.tokens), windows_at_once(engine))
        done = truncated = 0
        lost: list[BadRow] = []
        with behind(self._keep, overlapping) as keep:
            for rows, examples, sizes in ahead(stream, overlapping):
                if "precision" not in self.detail:
                    self._look(batches, examples)
                batch, bad = batches.factors(rows, examples, sizes=sizes, tick=partial(self._within, done))
                if "sign_error" not in self.detail and dataset.encoding == "sign":
                    self.detail["sign_error"] = sign_error(batch.values[:SIGN_SAMPLE], engine.layout)
                if batch.rows:
                    keep(batch)
                lost += bad
                truncated += int(batch.truncated.sum())
                done += len(rows)
                self._tick(done)
        return done - len(lost), truncated, lost

    def _keep(self, batch: FactorBatch) -> None:
        self._store.append(self._dataset.name, self._bench.space.id, self._dataset.encoding, batch)

    def _within(self, before: int, done: int) -> None:
        self._tick(before + done)

    def _tick(self, done: int) -> None:
        self._tell("factors", done, self._total)

    def _look(self, batches: Batches, examples: Sequence[Example]) -> None:
        from repmatch.curator.tasks import OwnModel

        if isinstance(self._bench.model, OwnModel) and len(examples) > 1:
            batches.engine.check_apart(batches.task.collate(list(examples[:LOOK])))
        self.detail |= look(batches, self._bench, examples[:LOOK])


def look(batches: Batches, bench: Workbench, examples: Sequence[Example]) -> dict[str, Any]:
    """Choose the precision, and on CUDA the batch size, on the first rows of an ingest.

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


class Batches:
    """Cuts windows into batches that fit, and computes them: on the CPU as many at once as there are threads.

    Args:
        engine: the factor engine.
        task: collates examples.
        limit: padded tokens a batch may hold; it falls when memory runs out.
        workers: batches at once; None: torch's threads on the CPU, 1 elsewhere.
    """

    def __init__(self, engine: FactorEngine, task: Task, limit: int, workers: int | None = None) -> None:
        self.engine = engine
        self.task = task
        self.limit = limit
        self._workers = default_workers(engine) if workers is None else workers
        self._twins: list[FactorEngine] = []

    def factors(
        self,
        rows: Sequence[Row],
        examples: Sequence[Example],
        *,
        sizes: Sequence[int] | None = None,
        tick: Callable[[int], None] | None = None,
    ) -> tuple[FactorBatch, list[BadRow]]:
        """Compute the factors of a window, batch by batch of similar length.

        Args:
            rows: the window's rows.
            examples: the same rows, made ready.
            sizes: rows of each window where they are several; no batch holds rows of two.
            tick: called with the rows done so far, batch by batch.

        Returns:
            The factors of the rows whose loss and gradient are finite, in the rows' order, and the others as bad rows.
        """
        layout, rank, n = self.engine.layout, self.engine.layout.rank, len(rows)
        values = np.empty((n, layout.width), dtype=np.float32)
        cores = np.empty((n, len(layout.dims), rank, rank), dtype=np.float32) if rank > 1 else None
        norms = np.empty((n, len(layout.dims)), dtype=np.float32)
        losses, done = np.empty(n, dtype=np.float32), 0
        for at, part in self._parts(examples, sizes or [n]):
            values[at], norms[at], losses[at] = part.values, part.norms, part.losses
            if cores is not None and part.cores is not None:
                cores[at] = part.cores
            done += len(at)
            if tick is not None:
                tick(done)
        finite = np.isfinite(losses) & np.isfinite(norms).all(axis=1) & np.isfinite(values).all(axis=1)
        keep = np.flatnonzero(finite).tolist()
        bad = [_not_finite(rows[i], losses[i], norms[i].max()) for i in np.flatnonzero(~finite).tolist()]
        batch = FactorBatch(
            rows=tuple(rows[i] for i in keep),
            values=values[keep],
            cores=None if cores is None else cores[keep],
            norms=norms[keep],
            losses=losses[keep],
            tokens=np.asarray([examples[i].tokens for i in keep], dtype=np.int32),
            truncated=np.asarray([examples[i].truncated for i in keep], dtype=np.bool_),
        )
        return batch, bad

    def _parts(self, examples: Sequence[Example], sizes: Sequence[int]) -> Iterator[tuple[list[int], BatchFactors]]:
        from repmatch.curator.engine import batches_by_tokens

        lengths = [example.tokens for example in examples]
        planned: list[list[int]] = []
        lo = 0
        for size in sizes:
            planned += [[lo + i for i in group] for group in batches_by_tokens(lengths[lo : lo + size], self.limit)]
            lo += size
        if self._workers > 1 and len(planned) > 1:
            yield from self._side_by_side(examples, planned)
            return
        for group in planned:
            yield from self._fitting(self.engine, examples, group)

    def _side_by_side(
        self, examples: Sequence[Example], planned: Sequence[list[int]]
    ) -> Iterator[tuple[list[int], BatchFactors]]:
        """One batch a core: no core waits for another within a batch, as it would if they shared each product."""
        import torch

        before = torch.get_num_threads()
        if not self._twins:
            self.engine.try_shortcut(self.task.collate([examples[i] for i in planned[0][:2]]))
            self._twins = [self.engine.twin() for _ in range(self._workers)]
        idle: queue.SimpleQueue[FactorEngine] = queue.SimpleQueue()
        for twin in self._twins:
            twin.precision = self.engine.precision
            idle.put(twin)

        def work(group: list[int]) -> list[tuple[list[int], BatchFactors]]:
            torch.set_num_threads(1)  # of this thread
            engine = idle.get()
            try:
                return list(self._fitting(engine, examples, group))
            finally:
                idle.put(engine)

        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="repmatch-batch")
        try:
            # The longest first: what is left for the end is short.
            for future in as_completed([pool.submit(work, group) for group in reversed(planned)]):
                yield from future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)

    def _fitting(
        self, engine: FactorEngine, examples: Sequence[Example], planned: Sequence[int]
    ) -> Iterator[tuple[list[int], BatchFactors]]:
        """Compute a batch in parts that fit into memory."""
        from repmatch.curator.engine import batches_by_tokens
        from repmatch.curator.precision import halving, is_out_of_memory

        lengths = [example.tokens for example in examples]
        # Cut once more: the limit may have fallen since the window was planned.
        for part in batches_by_tokens([lengths[i] for i in planned], self.limit):
            at = [planned[i] for i in part]
            try:
                found = halving(partial(self._compute, engine, examples), at, self._free)
            except (RuntimeError, MemoryError) as error:
                if is_out_of_memory(error):
                    raise _too_long(max(lengths[i] for i in at), error) from error
                raise
            if len(found) > 1:
                self.limit = max(max(lengths[i] for i in some) * len(some) for some, _ in found)
                logger.warning("out of memory: from here on batches hold %d tokens", self.limit)
            yield from found

    def _compute(self, engine: FactorEngine, examples: Sequence[Example], at: Sequence[int]) -> BatchFactors:
        return engine.compute(self.task.collate([examples[i] for i in at]))

    def _free(self) -> None:
        import gc

        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def default_workers(engine: FactorEngine) -> int:
    """Return how many batches are computed at once.

    Args:
        engine: the factor engine.

    Returns:
        Torch's threads on the CPU, 1 elsewhere.
    """
    import torch

    return torch.get_num_threads() if engine.device.type == "cpu" else 1


def _not_finite(row: Row, loss: float, norm: float) -> BadRow:
    return BadRow(
        row.source,
        row.line,
        row.id,
        f"the loss is {loss} and the gradient's norm {norm}; expected finite numbers. The model cannot learn from this "
        "text: look at it, or use another model",
    )


def _too_long(tokens: int, error: BaseException) -> ModelError:
    return ModelError(
        f"one instance of {tokens} tokens alone does not fit into memory ({str(error).splitlines()[0][:200]}). Cut "
        "instances with --max-length, adapt fewer matrices with --targets, or use a device with more memory."
    )


def factors_of(
    engine: FactorEngine,
    task: Task,
    rows: Sequence[Row],
    examples: Sequence[Example],
    batch_tokens: int,
    *,
    tick: Callable[[int], None] | None = None,
) -> tuple[FactorBatch, list[BadRow]]:
    """Compute the factors of a window; see `Batches.factors`."""
    return Batches(engine, task, batch_tokens).factors(rows, examples, tick=tick)


def window_tokens(bench: Workbench, engine: FactorEngine) -> int:
    """Return how many tokens a window holds: a fixed amount of work for the kind of device, by the model's size.

    Args:
        bench: names the device.
        engine: holds the model.

    Returns:
        Tokens, at least 1.
    """
    parameters = sum(p.numel() for n, p in engine.module.named_parameters() if "embed" not in n)
    flop = _WINDOW_FLOP if bench.device == "cpu" else _WINDOW_FLOP_GPU
    return max(1, int(flop / (4 * parameters)))


def windows_at_once(engine: FactorEngine) -> int:
    """Return how many windows are computed and committed together: more where there are more cores to keep busy.

    Args:
        engine: the factor engine.

    Returns:
        One for every two cores, at least one.
    """
    return max(1, default_workers(engine) // 2)


def grouped(
    stream: Iterator[tuple[list[Row], list[Example]]], count: int
) -> Iterator[tuple[list[Row], list[Example], list[int]]]:
    """Join windows that are computed together.

    Args:
        stream: windows.
        count: how many to join; fewer where they have many rows, because all are held in memory.

    Yields:
        Rows, their examples, and the rows of each window.
    """
    rows: list[Row] = []
    examples: list[Example] = []
    sizes: list[int] = []
    for some, made in stream:
        if sizes and (len(sizes) == count or len(rows) + len(some) > _WINDOW_ROWS[1]):
            yield rows, examples, sizes
            rows, examples, sizes = [], [], []
        rows, examples, sizes = [*rows, *some], [*examples, *made], [*sizes, len(some)]
    if sizes:
        yield rows, examples, sizes


def windows(chunks: Iterator[Sequence[Row]], task: Task, tokens: int) -> Iterator[tuple[list[Row], list[Example]]]:
    """Cut a stream of rows into windows of about so many tokens.

    Args:
        chunks: rows in input order.
        task: tokenises them.
        tokens: a window ends with the row that reaches them.

    Yields:
        Rows and their examples, in input order.
    """
    rows: list[Row] = []
    examples: list[Example] = []
    count = 0
    for chunk in chunks:
        for row, example in zip(chunk, task.encode(chunk), strict=True):
            rows.append(row)
            examples.append(example)
            count += example.tokens
            full = count >= tokens and len(rows) >= _WINDOW_ROWS[0]
            if full or len(rows) >= _WINDOW_ROWS[1]:
                yield rows, examples
                rows, examples, count = [], [], 0
    if rows:
        yield rows, examples
