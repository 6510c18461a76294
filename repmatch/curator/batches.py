"""Batches: rows of similar length, cut with the least padding, and computed."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from repmatch.compiled import in_chunks, thread_count
from repmatch.datamodels import BadRow, FactorBatch, Row
from repmatch.errors import ModelError

if TYPE_CHECKING:
    from repmatch.curator.engine import BatchFactors, FactorEngine
    from repmatch.curator.shortcuts import Shortcut
    from repmatch.curator.tasks import Example, Task

logger = logging.getLogger(__name__)

# Numbers that are worth a thread to copy them; batches on the CPU make fewer.
_PIECE = 1 << 21
# Threads that make batches ready for an accelerator: images take more of them than text does.
_READERS = 8
# What a batch costs beside its tokens, as a share of the tokens it may hold.
_BATCH_COST = 1 / 32

Window: TypeAlias = "tuple[Sequence[Row], Sequence[Example], Sequence[int]]"
Parts: TypeAlias = "list[tuple[list[int], BatchFactors]]"


def batches_by_tokens(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Group instances of similar length into batches of at most `limit` padded tokens, with the least work.

    Of all ways to cut the instances, sorted by length, the one whose padded tokens and batches cost least, where a
    batch costs as much as `limit` / 32 tokens do.

    Args:
        lengths: tokens of each instance.
        limit: padded tokens a batch may hold; a longer instance is a batch of its own.

    Returns:
        Positions in `lengths`, batch after batch, shortest first; ties by position.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    overhead = _BATCH_COST * limit
    # What the first j instances cost, and where their last batch begins; of equal cuts the one with the largest batch.
    least = np.zeros(len(order) + 1)
    begins = [0] * (len(order) + 1)
    sizes = np.arange(len(order), 0, -1)
    for j in range(1, len(order) + 1):
        longest = max(1, lengths[order[j - 1]])
        lo = max(0, j - max(1, limit // longest))
        costs = least[lo:j] + longest * sizes[len(order) - j + lo :]
        best = int(costs.argmin())
        least[j], begins[j] = costs[best] + overhead, lo + best
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.append(order[begins[end] : end])
        end = begins[end]
    return batches[::-1]


class Batches:
    """Cuts windows into batches that fit, and computes them: on the CPU as many at once as there are threads.

    Args:
        engine: the factor engine.
        task: collates examples.
        limit: padded tokens a batch may hold; it falls when memory runs out.
        workers: batches at once; None: torch's threads on the CPU, 1 elsewhere. On CUDA so many are made ready at once,
            and computed one after the other.
    """

    def __init__(self, engine: FactorEngine, task: Task, limit: int, workers: int | None = None) -> None:
        self.engine = engine
        self.task = task
        self.limit = limit
        self._workers = default_workers(engine) if workers is None else workers
        self._twins: list[FactorEngine] = []
        # On CUDA threads make batches ready and take turns on the device, so that it seldom waits for them, nor for
        # windows to be put together.
        self._turn = threading.Lock() if engine.device.type == "cuda" else None
        if self._turn is not None and workers is None:
            self._workers = min(_READERS, thread_count())

    def factors(
        self,
        rows: Sequence[Row],
        examples: Sequence[Example],
        *,
        tick: Callable[[int], None] | None = None,
    ) -> tuple[FactorBatch, list[BadRow]]:
        """Compute the factors of a window; see `stream`.

        Args:
            rows: the window's rows.
            examples: the same rows, made ready.
            tick: called with the rows of each batch that is done.

        Returns:
            The factors of the rows whose loss and gradient are finite, in the rows' order, and the others as bad rows.
        """
        (found,) = self.stream([(rows, examples, [len(rows)])], tick)
        return found

    def stream(
        self, windows: Iterable[Window], tick: Callable[[int], None] | None = None
    ) -> Generator[tuple[FactorBatch, list[BadRow]], None, None]:
        """Compute the factors of windows, each in batches of similar length.

        On the CPU each core computes a batch of its own, and when it finds none left in a window it begins with the
        next window's: no core waits for another, nor for what the caller does with a window. Nor does a CUDA device.

        Args:
            windows: rows, the same rows made ready, and the rows of each window where several are joined; no batch
                holds rows of two.
            tick: called with the rows of each batch that is done.

        Yields:
            The factors of a window's rows whose loss and gradient are finite, in the rows' order, and the others as bad
            rows; window by window, in order.
        """
        tell = tick or (lambda _: None)
        if self._workers == 1 and self._turn is None:
            for rows, examples, sizes in windows:
                alone = self._one_by_one(examples, self._planned(examples, sizes))
                yield self._gathered(rows, examples, alone, tell)
            return
        waiting: deque[tuple[Sequence[Row], Sequence[Example], Iterator[Parts]]] = deque()
        with self._pool() as submit:
            coming, error = iter(windows), None
            while True:
                try:
                    rows, examples, sizes = next(coming)
                except StopIteration:
                    break
                except Exception as found:  # what was read before is finished first
                    error = found
                    break
                waiting.append((rows, examples, submit(examples, self._planned(examples, sizes))))
                if len(waiting) > 1:
                    yield self._gathered(*waiting.popleft(), tell)
            while waiting:
                yield self._gathered(*waiting.popleft(), tell)
            if error is not None:
                raise error

    def _one_by_one(self, examples: Sequence[Example], groups: Sequence[list[int]]) -> Iterator[Parts]:
        for group in groups:
            yield self._fitting(self.engine, examples, group)

    def _gathered(
        self, rows: Sequence[Row], examples: Sequence[Example], parts: Iterable[Parts], tell: Callable[[int], None]
    ) -> tuple[FactorBatch, list[BadRow]]:
        """Put the batches of a window together, in the rows' order."""
        layout, rank, n = self.engine.layout, self.engine.layout.rank, len(rows)
        values = np.empty((n, layout.width), dtype=np.float32)
        cores = np.empty((n, len(layout.dims), rank, rank), dtype=np.float32) if rank > 1 else None
        norms = np.empty((n, len(layout.dims)), dtype=np.float32)
        losses = np.empty(n, dtype=np.float32)
        for some in parts:
            for at, part in some:
                _put(values, at, part.values)
                norms[at], losses[at] = part.norms, part.losses
                if cores is not None and part.cores is not None:
                    cores[at] = part.cores
                tell(len(at))
        with np.errstate(invalid="ignore"):
            whole = np.isfinite(values.sum(axis=1))  # of numbers up to 1, so that the sum of finite ones is finite
        finite = np.isfinite(losses) & np.isfinite(norms).all(axis=1) & whole
        # All, nearly always: then nothing is copied.
        taken = slice(None) if finite.all() else finite
        keep = np.flatnonzero(finite).tolist()
        lost = np.flatnonzero(~finite).tolist()
        bad = [_not_finite(rows[i], losses[i], norms[i].max(), self.engine.space.optimizer) for i in lost]
        batch = FactorBatch(
            rows=tuple(rows[i] for i in keep),
            values=values[taken],
            cores=None if cores is None else cores[taken],
            norms=norms[taken],
            losses=losses[taken],
            tokens=np.asarray([examples[i].tokens for i in keep], dtype=np.int32),
            truncated=np.asarray([examples[i].truncated for i in keep], dtype=np.bool_),
        )
        return batch, bad

    def _planned(self, examples: Sequence[Example], sizes: Sequence[int]) -> list[list[int]]:
        lengths = [example.tokens for example in examples]
        planned: list[list[int]] = []
        lo = 0
        for size in sizes:
            planned += [[lo + i for i in group] for group in batches_by_tokens(lengths[lo : lo + size], self.limit)]
            lo += size
        return planned

    @contextmanager
    def _pool(self) -> Iterator[Callable[[Sequence[Example], Sequence[list[int]]], Iterator[Parts]]]:
        """Keep a thread a core, each with an engine of its own: none waits for another, as it would within a product.

        Yields:
            What begins to compute batches, and returns an iterator over them as they are done.
        """
        import torch

        before = torch.get_num_threads()
        idle: queue.SimpleQueue[FactorEngine] = queue.SimpleQueue()
        lent = iter(range(self._workers))

        def work(examples: Sequence[Example], shortcut: Shortcut, group: list[int]) -> Parts:
            # Of this thread. One alone computes a batch even where others have nothing to do, because a product shared
            # by several is rounded differently, and factors should not depend on how many cores a machine has.
            torch.set_num_threads(1)
            engine = idle.get()
            engine.take_shortcut(shortcut)
            try:
                return self._fitting(engine, examples, group)
            finally:
                idle.put(engine)

        def submit(examples: Sequence[Example], groups: Sequence[list[int]]) -> Iterator[Parts]:
            if not groups:
                return iter(())
            few = self.task.collate([examples[i] for i in dict.fromkeys((groups[0][0], groups[-1][-1]))])
            with self._turn or nullcontext():
                shortcut = self.engine.try_shortcut(few)
                self.engine.find_way(few)
            for _, at in zip(groups, lent, strict=False):
                if at == len(self._twins):
                    self._twins.append(self.engine.twin() if self._turn is None else self.engine)
                self._twins[at].precision = self.engine.precision
                self._twins[at].take_way(self.engine)
                idle.put(self._twins[at])
            # The longest first: what is left for the end is short.
            futures = [pool.submit(work, examples, shortcut, group) for group in reversed(groups)]
            return (future.result() for future in as_completed(futures))

        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="repmatch-batch")
        try:
            yield submit
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)

    def _fitting(self, engine: FactorEngine, examples: Sequence[Example], planned: Sequence[int]) -> Parts:
        """Compute a batch in parts that fit into memory."""
        from repmatch.curator.precision import halving, is_out_of_memory

        lengths = [example.tokens for example in examples]
        out: Parts = []
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
            out += found
        return out

    def _compute(self, engine: FactorEngine, examples: Sequence[Example], at: Sequence[int]) -> BatchFactors:
        batch = self.task.collate([examples[i] for i in at])
        with self._turn or nullcontext():
            return engine.compute(batch)

    def _free(self) -> None:
        import gc

        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.engine.device.type == "mps":
            torch.mps.empty_cache()


def _put(values: NDArray[np.float32], at: Sequence[int], part: NDArray[np.float32]) -> None:
    """Copy rows to their places, by several threads where an accelerator has made many at once."""

    def copy(lo: int, hi: int) -> None:
        values[at[lo:hi]] = part[lo:hi]

    in_chunks(copy, len(at), least=1 + _PIECE // values.shape[1])


def default_workers(engine: FactorEngine) -> int:
    """Return how many batches are computed at once.

    Args:
        engine: the factor engine.

    Returns:
        Torch's threads on the CPU, 1 elsewhere.
    """
    import torch

    return torch.get_num_threads() if engine.device.type == "cpu" else 1


def _not_finite(row: Row, loss: float, norm: float, step: Mapping[str, Any]) -> BadRow:
    if np.isfinite(loss) and np.isfinite(norm):  # at the start all is well
        count = int(step.get("steps", 1))
        reason = (
            f"after {count} step{'s' * (count > 1)} of {step['name']} at the learning rate {step['lr']:g} the adapter "
            "holds values that are not finite; expected finite numbers. The steps diverge: take a smaller "
            f"--learning-rate{' or fewer --steps' * (count > 1)}"
        )
    else:
        reason = (
            f"the loss is {loss} and the gradient's norm {norm}; expected finite numbers. The model cannot learn from "
            "this row: look at it, or use another model"
        )
    return BadRow(row.source, row.line, row.id, reason)


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
