"""A plan: what an ingest will take on this machine, from a few seconds' trial."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from repmatch.curator import start
from repmatch.curator.batches import Batches, default_workers
from repmatch.curator.forms import CLASSED
from repmatch.curator.ingest import IngestOptions
from repmatch.curator.rows import open_rows
from repmatch.curator.settings import Settings
from repmatch.curator.warm_choice import built, settled
from repmatch.curator.windows import Progress, encoded, window_tokens, windows
from repmatch.datamodels import BadRow, Encoding, Row
from repmatch.errors import InputError
from repmatch.store.encoding import RowFormat

if TYPE_CHECKING:
    from repmatch.curator.workbench import Workbench
    from repmatch.store import Store

# Rows that are tokenised for the lengths, and seconds that the trial may take.
_SAMPLE_ROWS = 1024
_SECONDS = 6.0
# What the catalog keeps of an instance beside its row (identity, location, loss), and what an empty store takes.
_CATALOG_BYTES = 120
_EMPTY_BYTES = 2_000_000


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
    sources: Sequence[str],
    settings: Settings,
    options: IngestOptions,
    progress: Progress | None = None,
    store: Store | None = None,
) -> Plan:
    """Predict what an ingest of some rows into a new dataset takes; nothing is kept.

    All rows are read; a random thousand of them is made ready, and batches of these are computed for a few seconds just
    as an ingest would compute them.

    Args:
        sources: files, "-" or "hf:NAME", as for `ingest`.
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
        raise InputError(f"{', '.join(sources)}: no row can be used ({bad} are bad); expected some to plan with.")
    bench = built(store, settings, reader.fields.form)
    found = labels if reader.fields.form in CLASSED else ()
    task = bench.task(found, reader.fields)
    made = [(row, example) for row, example in zip(rows, encoded(task, rows), strict=True)]
    ready = [(row, example) for row, example in made if not isinstance(example, BadRow)]
    if not ready:
        reason = next(example.reason for _, example in made if isinstance(example, BadRow))
        raise InputError(f"none of {len(made)} rows can be used: {reason}.")
    refused = round(good * (1 - len(ready) / len(made)))
    good, bad, rows = good - refused, bad + refused, [row for row, _ in ready]
    trial = _try(bench, task, found, rows, tell)
    from repmatch.curator.warm import size_of

    start_rows = size_of(bench, settings.warm_start, good)
    starting = _start_seconds(bench, found, task, rows, start_rows)
    encoding: Encoding = options.encoding or "float16"
    row_bytes = RowFormat(bench.space.layout, encoding).row_bytes
    work = good / trial.per_second
    return Plan(
        rows=good,
        bad=bad,
        tokens=trial.tokens,
        truncated=trial.truncated,
        matrices=len(bench.space.matrices),
        per_second=trial.per_second,
        # Everything but the trial (reading, loading) has been done once here, so its time is known.
        seconds=work + starting + trial.began - began,
        store_bytes=_EMPTY_BYTES + good * (row_bytes + _CATALOG_BYTES) + size,
        factor_bytes=row_bytes,
        memory_bytes=peak_memory(),
        tried=trial.tried,
        device=bench.device,
        precision=trial.precision,
        start_rows=start_rows or 0,
        start_seconds=starting,
    )


def _start_seconds(bench: Workbench, labels: tuple[str, ...], task: Any, rows: list[Row], count: int | None) -> float:
    """Time a few steps of a warm start, and return what all of them will take."""
    if count is None:
        return 0.0
    from repmatch.curator import warm

    ticks: list[float] = []
    warm.train(bench, labels, rows[: 2 * warm.BATCH], task=task, progress=lambda *_: ticks.append(time.monotonic()))
    return warm.steps_for(count) * (ticks[-1] - ticks[1]) / (len(ticks) - 2)


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


def _try(bench: Workbench, task: Any, labels: tuple[str, ...], rows: list[Row], tell: Progress) -> _Trial:
    from repmatch.curator import precision

    engine = bench.engine(labels, task)
    batches = Batches(engine, task, bench.batch_tokens)
    examples = task.encode(rows)
    chosen, _ = precision.choose(engine, task.collate(examples[:32]))
    cut = list(windows(iter([rows]), task, window_tokens(bench, engine)))
    # The first batches pay for what is done once: memory, kernels, threads.
    warm_up = 2 * default_workers(engine)
    batches.factors(rows[:warm_up], examples[:warm_up])
    began = time.monotonic()
    done = tokens = 0
    for some, made in cut:
        part = _fitting(batches, some, made, began, tell)
        done += part
        tokens += sum(example.tokens for example in made[:part])
        if time.monotonic() - began > _SECONDS:
            break
    spent = time.monotonic() - began
    mean = float(np.mean([example.tokens for example in examples]))
    # Work grows with tokens, so the sample's mean length counts, not that of the rows that were tried.
    return _Trial(
        per_second=tokens / spent / mean,
        tokens=mean,
        truncated=float(np.mean([example.truncated for example in examples])),
        tried=done,
        precision=chosen,
        began=began,
    )


def _fitting(batches: Batches, rows: list[Row], examples: list[Any], began: float, tell: Progress) -> int:
    """Compute a window, or as much of it as the time allows; a window of a large model may take minutes."""
    first = max(1, len(rows) // 8)
    start_of = time.monotonic()
    batches.factors(rows[:first], examples[:first])
    tell("trial", first, None)
    each = (time.monotonic() - start_of) / first
    more = min(len(rows) - first, int(max(0.0, _SECONDS - (time.monotonic() - began)) / max(each, 1e-9)))
    if more > 0:
        batches.factors(rows[first : first + more], examples[first : first + more])
    tell("trial", first + more, None)
    return first + more


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
