"""A plan: what an ingest will take on this machine, from a few seconds' trial."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from repmatch.curator import start
from repmatch.curator.batches import Batches, batches_by_tokens, default_workers
from repmatch.curator.forms import CLASSED
from repmatch.curator.ingest import IngestOptions
from repmatch.curator.rows import open_rows
from repmatch.curator.settings import Settings
from repmatch.curator.trial_store import trial_store
from repmatch.curator.warm_choice import built, settled
from repmatch.curator.windows import Progress, encoded, window_tokens, windows
from repmatch.datamodels import BadRow, Dataset, FactorBatch, Row
from repmatch.errors import InputError
from repmatch.store.encoding import RowFormat

if TYPE_CHECKING:
    from repmatch.curator.sources import Source
    from repmatch.curator.workbench import Workbench
    from repmatch.store import Store

# Rows that are tokenised for the lengths, the most that a window may have, and seconds that the trial may take.
_SAMPLE_ROWS = 1024
_WINDOW = 4096
_SECONDS = 6.0
# What a trial of some seconds does not see of a whole ingest's peak; benchmarks/bench_plan.py holds it against ingests.
_MISSED = 1.15
# What the catalog keeps of an instance beside its row: identity, location, loss.
_CATALOG_BYTES = 120


@dataclass(frozen=True)
class Plan:
    """What an ingest is predicted to take.

    Attributes:
        rows: rows that can be used.
        bad: rows that cannot.
        tokens: tokens of a row, on average.
        truncated: share of the rows longer than the maximum length.
        matrices: adapted weight matrices.
        per_second: instances a second while factors are computed.
        seconds: of the whole ingest, loading included.
        store_bytes: of a new store.
        factor_bytes: of one instance's factors.
        memory_bytes: peak of the process.
        tried: instances of the trial.
        device: where it would be computed.
        precision: what it would be computed in.
        start_rows: instances that the start is trained on first; 0: none.
        start_seconds: that takes.
    """

    rows: int
    bad: int
    tokens: float
    truncated: float
    matrices: int
    per_second: float
    seconds: float
    store_bytes: int
    factor_bytes: int
    memory_bytes: int
    tried: int
    device: str
    precision: str
    start_rows: int
    start_seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return the fields that `--json` prints."""
        return {
            "rows": self.rows,
            "bad": self.bad,
            "tokens_per_row": round(self.tokens, 2),
            "truncated": round(self.truncated, 4),
            "matrices": self.matrices,
            "instances_per_second": round(self.per_second, 2),
            "seconds": round(self.seconds, 1),
            "store_bytes": self.store_bytes,
            "factor_bytes": self.factor_bytes,
            "memory_bytes": self.memory_bytes,
            "tried": self.tried,
            "device": self.device,
            "precision": self.precision,
            "start_rows": self.start_rows,
            "start_seconds": round(self.start_seconds, 3),
        }


def plan(
    sources: Sequence[str | Source],
    settings: Settings,
    options: IngestOptions,
    progress: Progress | None = None,
    store: Store | None = None,
) -> Plan:
    """Predict what an ingest of some rows into a new dataset takes; nothing is kept.

    All rows are read; a random thousand of them is made ready, and batches of these are computed for a few seconds just
    as an ingest would compute them.

    Args:
        sources: as for `ingest`.
        settings: the space.
        options: columns and encoding.
        progress: called with (stage, done, total or None).
        store: holds the dataset whose start is asked for.

    Returns:
        The prediction.

    Raises:
        InputError: no row can be used.
        UnknownNameError: the dataset whose start is asked for is not there.
    """
    began = time.monotonic()
    tell = progress or (lambda *_: None)
    settings = settled(store, settings)
    reader = open_rows(sources, options.fields, kind=settings.kind)
    rows, good, bad, size, labels = _sampled(reader, settings.seed or 0, tell)
    if not rows:
        raise InputError(
            f"{', '.join(map(str, sources))}: no row can be used ({bad} are bad); expected some to plan with."
        )
    from repmatch.curator.warm import size_of

    with trial_store() as scratch:
        rows = scratch.stage(rows)
        bench = built(store, settings, reader.fields.form)
        found = labels if reader.fields.form in CLASSED else ()
        record = Dataset("plan", reader.fields, found, reader.columns, None, options.encoding or "float16")
        row_bytes = RowFormat(bench.space.layout, record.encoding).row_bytes
        task = bench.task(found, reader.fields)
        ready, share = _ready(task, rows)
        rows = [row for row, _ in ready]
        refused = round(good * share)
        good, bad, size = good - refused, bad + refused, round(size * (1 - share))
        start_rows = size_of(bench, settings.warm_start, good)
        training = time.monotonic()
        bench, starting = _start(bench, found, task, rows, start_rows)
        began += time.monotonic() - training
        trial = _try(bench, task, found, ready, good, tell)
        kept = scratch.fill(bench, record, rows, trial.batch, several=trial.window < good)
        memory = round(_MISSED * (peak_memory() + trial.growth))
        stored = scratch.close()
    return Plan(
        rows=good,
        bad=bad,
        tokens=trial.tokens,
        truncated=trial.truncated,
        matrices=len(bench.space.matrices),
        per_second=trial.per_second,
        # Everything but the trial (reading, loading) has been done once here, so its time is known.
        seconds=good / trial.per_second + starting + trial.began - began,
        store_bytes=stored + (good - kept) * (row_bytes + _CATALOG_BYTES) + round(size * (1 - kept / good)),
        factor_bytes=row_bytes,
        memory_bytes=memory,
        tried=trial.tried,
        device=bench.device,
        precision=trial.precision,
        start_rows=start_rows or 0,
        start_seconds=starting,
    )


def _ready(task: Any, rows: Sequence[Row]) -> tuple[list[tuple[Row, Any]], float]:
    """Rows with their examples, and the share of the rows that the task refuses."""
    made = encoded(task, rows)
    ready = [(row, one) for row, one in zip(rows, made, strict=True) if not isinstance(one, BadRow)]
    if not ready:
        reason = next(one.reason for one in made if isinstance(one, BadRow))
        raise InputError(f"none of {len(rows)} rows can be used: {reason}.")
    return ready, 1 - len(ready) / len(rows)


def _start(
    bench: Workbench, labels: tuple[str, ...], task: Any, rows: list[Row], count: int | None
) -> tuple[Workbench, float]:
    """Take a few steps of a warm start; return the workbench with that start, and what all steps will take."""
    if count is None:
        return bench, 0.0
    from repmatch.curator import warm

    ticks: list[float] = []
    few = rows[: 2 * warm.BATCH]
    adapter = warm.train(bench, labels, few, task=task, progress=lambda *_: ticks.append(time.monotonic()))
    return bench.from_warm(adapter), warm.steps_for(count) * (ticks[-1] - ticks[1]) / (len(ticks) - 2)


def _sampled(reader: Any, seed: int, tell: Progress) -> tuple[list[Row], int, int, int, tuple[str, ...]]:
    """A random sample of the good rows (reservoir), their number, that of bad ones, bytes of all rows, labels."""
    draw = start.generator(seed, "plan")
    rows: list[Row] = []
    labels: set[str] = set()
    good = bad = size = 0
    for chunk in reader:
        for row in chunk:
            if isinstance(row, BadRow):
                bad += 1
                continue
            good += 1
            size += len(row.json) + len(row.text) + len(row.text_pair or "")
            labels.add(row.label)
            if len(rows) < _SAMPLE_ROWS:
                rows.append(row)
            elif (at := int(draw.integers(good))) < _SAMPLE_ROWS:
                rows[at] = row
        tell("reading", good + bad, None)
    return rows, good, bad, size, tuple(sorted(labels))


@dataclass(frozen=True)
class _Trial:
    per_second: float
    tokens: float
    truncated: float
    tried: int
    precision: str
    began: float
    growth: int  # bytes by which an ingest's process becomes larger than this one
    window: int
    batch: FactorBatch


def _try(
    bench: Workbench, task: Any, labels: tuple[str, ...], ready: Sequence[tuple[Row, Any]], total: int, tell: Progress
) -> _Trial:
    """Compute batches as they would be cut of all rows, for a few seconds."""
    from repmatch.curator.work import LOOK, tune

    engine = bench.engine(labels, task)
    batches = Batches(engine, task, bench.batch_tokens)
    sample = [example for _, example in ready]
    chosen = tune(batches, bench, sample[:LOOK])["precision"]
    # A whole window, as an ingest of all rows would cut it; the sample stands for all, so its rows may come again.
    many = [ready[i % len(ready)][0] for i in range(min(total, _WINDOW))]
    rows, examples = next(windows(iter([many]), task, window_tokens(bench, engine)))
    groups = _groups(examples, batches.limit)
    at_once = default_workers(engine)
    # The first batches pay for what is done once: memory, kernels, threads.
    batch = _computed(batches, rows, examples, groups[:at_once])
    began, first = time.monotonic(), peak_memory()
    steps = 0
    while steps < len(groups) and (steps == 0 or not batch.rows or time.monotonic() - began < _SECONDS):
        found = _computed(batches, rows, examples, groups[steps : steps + at_once])
        batch = found if found.rows else batch
        steps = min(len(groups), steps + at_once)
        tell("trial", sum(map(len, groups[:steps])), None)
    spent = time.monotonic() - began
    tried = [examples[i] for group in groups[:steps] for i in group]
    if not batch.rows:
        raise InputError(f"none of {len(tried)} rows has a finite loss and gradient; look at them, or at the model.")
    shapes = [(len(group), max(examples[i].tokens for i in group)) for group in groups]
    growth = _growth(peak_memory() - first, at_once, len(set(shapes[:steps])), len(set(shapes)))
    mean = float(np.mean([example.tokens for example in sample]))
    # Work grows with tokens, so the sample's mean length counts, not that of the rows that were tried.
    return _Trial(
        per_second=sum(example.tokens for example in tried) / spent / mean,
        tokens=mean,
        truncated=float(np.mean([example.truncated for example in sample])),
        tried=len(tried),
        precision=chosen,
        began=began,
        # A window's factors are put together once, and once more without the rows whose factors are not finite.
        growth=growth + 2 * 4 * len(rows) * bench.space.layout.width,
        window=len(rows),
        batch=batch,
    )


def _growth(seen: int, first: int, tried: int, all_: int) -> int:
    """Bytes that the process still grows by, when batches of other shapes come.

    Memory that batches of one shape gave back fits those of another only in part, so each new shape takes some more,
    and less each time: with the embedded model as the square root of their number, measured.
    """
    if tried <= first:
        return 0
    return round(seen * (math.sqrt((all_ - first) / (tried - first)) - 1))


def _groups(examples: Sequence[Any], limit: int) -> list[list[int]]:
    """Cut a window into batches, so ordered that any few of the first ones are of very different lengths."""
    cut = batches_by_tokens([example.tokens for example in examples], limit)
    # By the fractional parts of multiples of the golden ratio, which fill the range evenly.
    ranks = [(0.5 + i * 0.6180339887498949) % 1 for i in range(len(cut))]
    return [cut[at] for at in np.argsort(np.argsort(ranks)).tolist()]


def _computed(
    batches: Batches, rows: Sequence[Row], examples: Sequence[Any], groups: Sequence[Sequence[int]]
) -> FactorBatch:
    at = [i for group in groups for i in group]
    window = [rows[i] for i in at], [examples[i] for i in at], [len(group) for group in groups]
    ((batch, _),) = batches.stream([window])
    return batch


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def human_time(seconds: float) -> str:
    """Return a time as people say it.

    Args:
        seconds: the time.

    Returns:
        "42 s", "12 min" or "3.5 h".
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
