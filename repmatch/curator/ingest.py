"""Ingest: rows and their instance factors into the store, resumable at every window."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from repmatch.curator.rows import FieldChoice, RowReader, open_rows
from repmatch.curator.settings import Settings
from repmatch.datamodels import BadRow, Dataset, Encoding, FactorBatch, Row
from repmatch.errors import InputError, SpaceMismatchError, UsageError
from repmatch.store.encoding import RowFormat

if TYPE_CHECKING:
    from repmatch.curator.classification import Example, SequenceClassification
    from repmatch.curator.engine import FactorEngine
    from repmatch.curator.workbench import Workbench
    from repmatch.store import Stage, StageSummary, Store

logger = logging.getLogger(__name__)

MAX_LABELS = 1000
# A window is the unit of commit: rows are sorted by length within it and committed together. It is sized in work, not
# in seconds, so that a run that was killed goes on with the very batches an uninterrupted run would have computed.
_WINDOW_FLOP = {"cpu": 1e12}
_WINDOW_FLOP_GPU = 5e13
_WINDOW_ROWS = (64, 4096)

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class IngestOptions:
    """What `ingest` is asked to do beside the space's settings.

    Attributes:
        fields: columns the user named.
        encoding: how factors are kept; None: the dataset's, or float16 for a new one.
        strict: refuse everything when one row is bad.
    """

    fields: FieldChoice = field(default_factory=FieldChoice)
    encoding: Encoding | None = None
    strict: bool = False


@dataclass(frozen=True)
class IngestReport:
    """What an ingest did.

    Attributes:
        dataset: its name.
        rows: rows read, bad ones included.
        new: instances added.
        unchanged: rows that were there already, repeated rows included.
        changed: rows whose content replaced what was there.
        quarantined: rows set aside as bad.
        truncated: instances computed now that were longer than the maximum length.
        computed: instance factors computed now.
        seconds: wall time.
        bad: the first bad rows.
    """

    dataset: str
    rows: int
    new: int
    unchanged: int
    changed: int
    quarantined: int
    truncated: int
    computed: int
    seconds: float
    bad: tuple[BadRow, ...]

    def as_json(self) -> dict[str, object]:
        """Return the fields that `--json` prints."""
        names = ("dataset", "rows", "new", "unchanged", "changed", "quarantined")
        return {name: getattr(self, name) for name in names} | {"seconds": round(self.seconds, 3)}


def ingest(
    store: Store,
    sources: Sequence[str],
    dataset: str,
    settings: Settings,
    options: IngestOptions,
    progress: Progress | None = None,
) -> IngestReport:
    """Read rows, register them and compute the instance factors that are missing.

    Rows already there with the same content cost nothing; changed rows are computed again; each window of rows is
    committed with its factors, so that an interrupted ingest goes on where it was.

    Args:
        store: the store, writable.
        sources: files, "-" for JSON lines on standard input, or "hf:NAME".
        dataset: name of the dataset to make or extend.
        settings: the space; for a dataset that exists it must be the dataset's own.
        options: columns, encoding, strictness.
        progress: called with (stage, done, total or None).

    Returns:
        Counts and the first bad rows.

    Raises:
        InputError: nothing usable came in, or a row is bad and `strict` was asked for.
        SpaceMismatchError: the dataset's factors are of another space.
    """
    began = time.monotonic()
    tell = progress or (lambda *_: None)
    check_name(dataset)
    with store.writing(), store.stage(dataset) as stage:
        known = store.dataset(dataset) if store.has_dataset(dataset) else None
        reader = open_rows(sources, options.fields, resolved=known.fields if known else None)
        _read(stage, reader, known, tell)
        first = stage.resolve(known.space_id if known else None)
        bad = stage.rejected(limit=20)
        _refuse(dataset, sources, options, bad, first)
        record = _record(dataset, reader, known, first.labels, options)
        done, truncated = 0, 0
        lost: list[BadRow] = []
        with store.run("ingest", {"dataset": dataset, "sources": list(sources), "input": reader.input_hash}):
            if known is None or first.todo or not settings.asks_nothing:
                bench = _bench(store, known, settings)
                RowFormat(
                    bench.space.layout, record.encoding
                )  # refuses sign codes above rank 1 before anything is kept
                store.save_space(bench.space)
                store.save_dataset(replace(record, space_id=bench.space.id))
                stage.touch()
                done, truncated, lost = _compute(store, stage, bench, record, first.todo, tell)
                if lost:
                    store.quarantine(dataset, lost)
            else:  # nothing to compute: the model is not even loaded
                store.save_dataset(record)
                stage.touch()
    return IngestReport(
        dataset=dataset,
        rows=first.rows,
        new=first.new - len(lost),
        unchanged=first.unchanged,
        changed=first.changed,
        quarantined=first.rejected + len(lost),
        truncated=truncated,
        computed=done,
        seconds=time.monotonic() - began,
        bad=tuple([*bad, *lost][:20]),
    )


def check_name(name: str) -> None:
    """Refuse a name that the command line could not tell from a path, an option or a filter.

    Args:
        name: of a dataset, subset or coreset.

    Raises:
        UsageError: it is empty, too long, or has a character outside letters, digits, dot, dash and underscore.
    """
    usable = name and len(name) <= 100 and name[0] not in "-." and all(c.isalnum() or c in "._-" for c in name)
    if not usable:
        raise UsageError(
            f"{name!r} is no usable name; expected up to 100 letters, digits, '.', '_' or '-', the first a letter, "
            "digit or '_'."
        )


def _read(stage: Stage, reader: RowReader, known: Dataset | None, tell: Progress) -> None:
    labels = set(known.labels) if known else None
    count = 0
    for chunk in reader:
        good = [row for row in chunk if isinstance(row, Row)]
        bad = [row for row in chunk if isinstance(row, BadRow)]
        if labels is not None:
            bad += [_unseen(row, known) for row in good if row.label not in labels]
            good = [row for row in good if row.label in labels]
        if good:
            stage.add(good)
        if bad:
            stage.reject(bad)
        count += len(chunk)
        tell("reading", count, None)


def _unseen(row: Row, known: Dataset | None) -> BadRow:
    labels = known.labels if known else ()
    return BadRow(
        row.source,
        row.line,
        row.id,
        f"the label {row.label!r} was not seen when the dataset was made; expected one of its {len(labels)}: "
        f"{', '.join(map(repr, labels[:10]))}{', ...' if len(labels) > 10 else ''}. A label more changes every factor: "
        "correct the row, or ingest all files into a new dataset",
    )


def _refuse(
    dataset: str, sources: Sequence[str], options: IngestOptions, bad: Sequence[BadRow], summary: StageSummary
) -> None:
    rejected = summary.rejected
    listed = "\n".join(f"  {row.source}:{row.line}: {row.reason}" for row in bad[:10])
    more = f"\n  and {rejected - 10} more" if rejected > 10 else ""
    if options.strict and rejected:
        raise InputError(
            f"{rejected} of {summary.rows} rows are bad, and --strict refuses them all; nothing of {dataset!r} was "
            f"changed:\n{listed}{more}"
        )
    if rejected == summary.rows:
        where = ", ".join(sources)
        raise InputError(
            f"none of the {rejected} rows of {where} can be used:\n{listed}{more}"
            if rejected
            else f"{where}: no rows; expected at least two, with different labels."
        )


def _record(
    name: str, reader: RowReader, known: Dataset | None, labels: tuple[str, ...], options: IngestOptions
) -> Dataset:
    if known is not None:
        if options.encoding not in (None, known.encoding):
            raise UsageError(
                f"the dataset {name!r} keeps its factors as {known.encoding}, not {options.encoding}; leave --encoding "
                "out, or ingest into a new dataset."
            )
        columns = {**known.columns, **reader.columns}
        columns |= {c: "json" for c, kind in known.columns.items() if reader.columns.get(c, kind) != kind}
        return replace(known, columns=columns)
    if len(labels) < 2:
        raise InputError(
            f"every row has the label {labels[0]!r}; expected two or more labels, because with one there is nothing to "
            "learn. Name the column with --label-field."
        )
    if len(labels) > MAX_LABELS:
        raise InputError(
            f"the column {reader.fields.label_field!r} has {len(labels)} different values; expected at most "
            f"{MAX_LABELS} labels. Name the label's column with --label-field."
        )
    return Dataset(name, reader.fields, labels, reader.columns, None, options.encoding or "float16")


def _bench(store: Store, known: Dataset | None, settings: Settings) -> Workbench:
    from repmatch.curator.workbench import Workbench  # torch loads here: only once the input is known to be good

    if known is None or known.space_id is None:
        return Workbench.build(settings)
    space = store.space(known.space_id)
    bench = Workbench.build(settings.like(space))
    if bench.space.id != space.id:
        raise SpaceMismatchError(
            f"the factors of the dataset {known.name!r} are of another space than these options make (stored against "
            "asked). Leave the options out, or ingest into a new dataset.",
            space.differences(bench.space),
        )
    return bench


def _compute(
    store: Store, stage: Stage, bench: Workbench, dataset: Dataset, total: int, tell: Progress
) -> tuple[int, int, list[BadRow]]:
    done = truncated = 0
    lost: list[BadRow] = []
    if total == 0:
        return 0, 0, []
    tell("factors", 0, total)
    engine, task = bench.engine(len(dataset.labels)), bench.task(dataset.labels)
    for rows, examples in windows(stage.todo(), task, window_tokens(bench, engine)):
        tick = partial(_tick, tell, done, total)
        batch, bad = factors_of(engine, task, rows, examples, batch_tokens=bench.batch_tokens, tick=tick)
        if batch.rows:
            store.append(dataset.name, bench.space.id, dataset.encoding, batch)
        lost += bad
        truncated += int(batch.truncated.sum())
        done += len(rows)
        tell("factors", done, total)
    return done - len(lost), truncated, lost


def _tick(tell: Progress, before: int, total: int, within: int) -> None:
    tell("factors", before + within, total)


def window_tokens(bench: Workbench, engine: FactorEngine) -> int:
    """Return how many tokens a window holds: a fixed amount of work for the device, by the model's size.

    Args:
        bench: names the device.
        engine: holds the model.

    Returns:
        Tokens, at least 1.
    """
    parameters = sum(p.numel() for n, p in engine.module.named_parameters() if "embed" not in n)
    return max(1, int(_WINDOW_FLOP.get(bench.device, _WINDOW_FLOP_GPU) / (4 * parameters)))


def windows(
    chunks: Iterator[Sequence[Row]], task: SequenceClassification, tokens: int
) -> Iterator[tuple[list[Row], list[Example]]]:
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


def factors_of(
    engine: FactorEngine,
    task: SequenceClassification,
    rows: Sequence[Row],
    examples: Sequence[Example],
    batch_tokens: int,
    *,
    tick: Callable[[int], None] | None = None,
) -> tuple[FactorBatch, list[BadRow]]:
    """Compute the factors of a window, batch by batch of similar length.

    Args:
        engine: the factor engine.
        task: collates examples.
        rows: the window's rows.
        examples: the same rows, tokenised.
        batch_tokens: padded tokens a batch may hold.
        tick: called with the rows done so far, batch by batch.

    Returns:
        The factors of the rows whose loss and gradient are finite, in the rows' order, and the others as bad rows.
    """
    from repmatch.curator.engine import batches_by_tokens

    layout, rank, n = engine.layout, engine.layout.rank, len(rows)
    values = np.empty((n, layout.width), dtype=np.float32)
    cores = np.empty((n, len(layout.dims), rank, rank), dtype=np.float32) if rank > 1 else None
    norms = np.empty((n, len(layout.dims)), dtype=np.float32)
    losses, done = np.empty(n, dtype=np.float32), 0
    for at in batches_by_tokens([example.tokens for example in examples], batch_tokens):
        part = engine.compute(task.collate([examples[i] for i in at]))
        values[at], norms[at], losses[at] = part.values, part.norms, part.losses
        if cores is not None and part.cores is not None:
            cores[at] = part.cores
        done += len(at)
        if tick is not None:
            tick(done)
    finite = np.isfinite(losses) & np.isfinite(norms).all(axis=1) & np.isfinite(values).all(axis=1)
    keep = np.flatnonzero(finite).tolist()
    bad = [
        BadRow(
            rows[i].source,
            rows[i].line,
            rows[i].id,
            f"the loss is {losses[i]} and the gradient's norm {norms[i].max()}; expected finite numbers. The model "
            "cannot learn from this text: look at it, or use another model",
        )
        for i in np.flatnonzero(~finite).tolist()
    ]
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
