"""Windows: the unit of commit. Rows are cut into windows, and these into batches that fit."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from repmatch.datamodels import BadRow, FactorBatch, Row
from repmatch.errors import ModelError

if TYPE_CHECKING:
    from repmatch.curator.engine import BatchFactors, FactorEngine
    from repmatch.curator.tasks import Example, Task
    from repmatch.curator.workbench import Workbench

logger = logging.getLogger(__name__)

# Rows are sorted by length within a window and committed together. It is sized in work, not in seconds or cores, so
# that a run that was killed goes on with the very batches an uninterrupted run would have computed, and so that
# machines with more or fewer cores cut the same input alike: a factor depends on its batch, if only by rounding.
_WINDOW_FLOP = 2e12
_WINDOW_FLOP_GPU = 5e13
_WINDOW_ROWS = (64, 4096)

Progress = Callable[[str, int, int | None], None]


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
