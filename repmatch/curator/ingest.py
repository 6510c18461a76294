"""Ingest: rows and their instance factors into the store, resumable at every window."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from repmatch.curator.destination import working_folder
from repmatch.curator.forms import CLASSED
from repmatch.curator.rows import FieldChoice, RowReader, open_rows
from repmatch.curator.settings import Settings
from repmatch.curator.shards import Shard, divide
from repmatch.curator.warm_choice import built, check_same, keep, settled, started
from repmatch.curator.windows import Progress, usable
from repmatch.curator.work import LOOK, Work
from repmatch.datamodels import BadRow, Dataset, Encoding, Row
from repmatch.errors import InputError, SpaceMismatchError, UsageError
from repmatch.store.encoding import RowFormat
from repmatch.store.records import united_columns

if TYPE_CHECKING:
    from repmatch.curator.cluster.connection import ClusterOptions
    from repmatch.curator.sources import Source
    from repmatch.curator.workbench import Workbench
    from repmatch.store import Stage, StageSummary, Store

__all__ = [
    "IngestOptions",
    "IngestReport",
    "Progress",
    "check_name",
    "ingest",
]

logger = logging.getLogger(__name__)

MAX_LABELS = 1000


@dataclass(frozen=True)
class IngestOptions:
    """What `ingest` is asked to do beside the space's settings.

    Attributes:
        fields: columns the user named.
        encoding: how factors are kept; None: the dataset's, or float16 for a new one.
        strict: refuse everything when one row is bad.
        shard: compute this part of the input only; None: all of it.
        cluster: compute on this cluster; None: in this process.
    """

    fields: FieldChoice = field(default_factory=FieldChoice)
    encoding: Encoding | None = None
    strict: bool = False
    shard: Shard | None = None
    cluster: ClusterOptions | None = None


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
        detail: what was measured on the way: the device and precision used, how far the factors of each precision that
            was tried agree with float32, what the encoding costs.
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
    detail: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """Return the fields that `--json` prints; what was not measured, because nothing was computed, is None."""
        names = ("dataset", "rows", "new", "unchanged", "changed", "quarantined")
        return {
            **{name: getattr(self, name) for name in names},
            "seconds": round(self.seconds, 3),
            "device": self.detail.get("device"),
            "precision": self.detail.get("precision"),
            "agreement": self.detail.get("agreement_with_float32"),
            "sign_error": self.detail.get("sign_error"),
        }


def ingest(
    store: Store,
    sources: Sequence[str | Source],
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
        sources: files, "-" for JSON lines on standard input, or "hf:NAME"; of images also folders. Or what
            `repmatch.curator.sources.find` returned.
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
        if known is None or known.space_id is None:
            settings = settled(store, settings)
        reader = open_rows(sources, options.fields, resolved=known.fields if known else None, kind=settings.kind)
        _read(stage, reader, known, tell)
        first = stage.resolve(known.space_id if known else None)
        rejected = _listed(stage.rejected(limit=10), first.rejected)
        names = [str(source) for source in sources]
        _refuse(dataset, names, options, rejected, first)
        record = _record(dataset, reader, known, first.labels, options, rejected)
        done, truncated, lost, detail = 0, 0, list[BadRow](), dict[str, Any]()
        shard = {} if options.shard is None else {"shard": str(options.shard)}
        arguments = {"dataset": dataset, "sources": names, "input": reader.input_hash, **working_folder(), **shard}
        with store.run("ingest", arguments) as run:
            if known is None or first.todo or not settings.asks_nothing or options.shard is not None:
                bench = _bench(store, known, _here(settings, options), record)
                _refuse_rows(stage, bench, known, record, options)
                if known is None or known.space_id is None:
                    bench = started(stage, first.todo, tell, bench, settings.warm_start, record)
                RowFormat(bench.space.layout, record.encoding)  # refuses sign codes above rank 1, while nothing is kept
                work = _work(store, stage, bench, record, tell, settings, options)
                if first.todo:
                    work.prepare()  # a start that does not fit the model is found before anything is kept
                keep(store, bench)
                store.save_dataset(replace(record, space_id=bench.space.id))
                if options.shard is not None:
                    first = _restrict(stage, work, options.shard, tell)
                stage.touch()
                done, truncated, lost = work.compute(first.todo)
                detail = work.detail
                run.detail.update(detail)
                if lost:
                    store.quarantine(dataset, lost)
            else:  # nothing to compute: the model is not even loaded
                store.save_dataset(record)
                stage.touch()
        bad = stage.rejected(limit=20)
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
        detail=detail,
    )


def _here(settings: Settings, options: IngestOptions) -> Settings:
    """Return the settings of this process: the device that is asked for may be on the cluster's nodes only."""
    return settings if options.cluster is None or settings.device == "cpu" else replace(settings, device="auto")


def _work(
    store: Store,
    stage: Stage,
    bench: Workbench,
    record: Dataset,
    tell: Progress,
    settings: Settings,
    options: IngestOptions,
) -> Work:
    if options.cluster is None:
        return Work(store, stage, bench, record, tell)
    from repmatch.curator.cluster.factors import ClusterWork

    return ClusterWork(store, stage, bench, record, tell, settings=settings, options=options.cluster)


def _restrict(stage: Stage, work: Work, shard: Shard, tell: Progress) -> StageSummary:
    stretch = divide(stage.accepted(), work.task, work.tokens, shard, tell)
    work.detail["shard"] = {"number": shard.number, "of": shard.of, "window_tokens": work.tokens, **asdict(stretch)}
    return stage.restrict(stretch.lo, stretch.hi)


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
    labels = set(known.labels) if known and known.fields.form in CLASSED else None
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


def _listed(bad: Sequence[BadRow], count: int) -> str:
    """Return the first bad rows, a line each after a line break; nothing where there are none."""
    lines = [f"\n  {row.source}:{row.line}: {row.reason}" for row in bad]
    return "".join(lines) + (f"\n  and {count - len(bad)} more" if count > len(bad) else "")


def _refuse(dataset: str, sources: Sequence[str], options: IngestOptions, rejected: str, summary: StageSummary) -> None:
    if options.strict and summary.rejected:
        raise InputError(
            f"{summary.rejected} of {summary.rows} rows are bad, and --strict refuses them all; nothing of {dataset!r} "
            f"was changed:{rejected}"
        )
    if summary.rejected == summary.rows:
        where = ", ".join(sources)
        raise InputError(
            f"none of the {summary.rejected} rows of {where} can be used:{rejected}"
            if summary.rejected
            else f"{where}: no rows; expected at least two, with different labels."
        )


def _record(
    name: str,
    reader: RowReader,
    known: Dataset | None,
    labels: tuple[str, ...],
    options: IngestOptions,
    rejected: str,
) -> Dataset:
    if known is not None:
        if options.encoding not in (None, known.encoding):
            raise UsageError(
                f"the dataset {name!r} keeps its factors as {known.encoding}, not {options.encoding}; leave --encoding "
                "out, or ingest into a new dataset."
            )
        return replace(known, columns=united_columns(known.columns, reader.columns))
    if reader.fields.form not in CLASSED:
        return Dataset(name, reader.fields, (), reader.columns, None, options.encoding or "float16")
    if len(labels) < 2:
        raise InputError(
            f"every row has the label {labels[0]!r}; expected two or more labels, because with one there is nothing to "
            "learn. Name the column with --label-field."
            + (f" These rows could not be used:{rejected}" if rejected else "")
        )
    if len(labels) > MAX_LABELS:
        raise InputError(
            f"the column {reader.fields.label_field!r} has {len(labels)} different values; expected at most "
            f"{MAX_LABELS} labels. Name the label's column with --label-field."
        )
    return Dataset(name, reader.fields, labels, reader.columns, None, options.encoding or "float16")


def _refuse_rows(
    stage: Stage, bench: Workbench, known: Dataset | None, record: Dataset, options: IngestOptions
) -> None:
    """Refuse rows of which the task takes none, and with `strict` rows of which it does not take all."""
    if not options.strict and known is not None and known.space_id is not None:
        return
    rows = stage.todo() if options.strict else stage.todo(LOOK)  # a few say whether the task takes any
    taken, count, bad = usable(bench.task(record.labels, record.fields), rows, every=options.strict)
    if bad and (options.strict or not taken):
        listed = _listed(bad[:10], len(bad))
        raise InputError(
            f"{len(bad)} of {count} rows are bad, and --strict refuses them all; nothing of {record.name!r} was "
            f"changed:{listed}"
            if options.strict
            else f"none of the first {count} rows can be used:{listed}"
        )


def _bench(store: Store, known: Dataset | None, settings: Settings, record: Dataset) -> Workbench:
    # torch loads here: only once the input is known to be good
    from repmatch.curator.warm import warm_adapter
    from repmatch.curator.workbench import Workbench

    if known is None or known.space_id is None:
        return built(store, settings, record.fields.form)
    space = store.space(known.space_id)
    bench = Workbench.build(settings.like(space), record.fields.form)
    if space.warm_start is not None:
        bench = bench.from_warm(warm_adapter(store, space.warm_start))
    if bench.space.id != space.id:
        raise SpaceMismatchError(
            f"the factors of the dataset {known.name!r} are of another space than these options make (stored against "
            "asked). Leave the options out, or ingest into a new dataset.",
            space.differences(bench.space),
        )
    check_same(store, settings.warm_start, known, bench.warm)
    return bench
