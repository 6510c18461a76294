"""Which start a dataset gets: cold, warmed on some of its rows, or another dataset's."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from repmatch.curator import warm
from repmatch.curator.windows import Progress
from repmatch.datamodels import Adapter, Dataset
from repmatch.errors import SpaceMismatchError, UsageError

if TYPE_CHECKING:
    from repmatch.curator.workbench import Workbench
    from repmatch.store import Stage, Store

logger = logging.getLogger(__name__)


def started(
    store: Store, stage: Stage, total: int, tell: Progress, bench: Workbench, asked: str | None, record: Dataset
) -> Workbench:
    """Give a new dataset's workbench the start that was asked for.

    Args:
        store: keeps the warm start.
        stage: the dataset's rows.
        total: how many they are.
        tell: called with (stage, done, total or None).
        bench: the cold workbench.
        asked: see `Settings.warm_start`.
        record: the new dataset.

    Returns:
        The workbench, its space final.

    Raises:
        UsageError: `asked` names a dataset without a warm start.
    """
    if asked in (None, "none"):
        return bench
    asked = str(asked)
    count = warm.size_of(bench, asked, total)
    if count is None and asked == "auto":
        logger.warning("%s starts cold: too few rows for a warm start, or no head drawn at random", record.name)
        return bench
    if count is None:
        adapter = _warm_of(store, asked)
    else:
        rows = warm.sample(stage.todo(), count, bench.space.seed)
        tick = partial(tell, "warm start")
        task = bench.task(record.labels, record.fields)
        adapter = warm.train(bench, record.labels, rows, asked=asked, task=task, progress=tick)
        store.save_space(bench.space)
        store.save_adapter(replace(adapter, subset=f"warm start of {record.name}"))
    return bench.from_warm(adapter)


def _warm_of(store: Store, name: str) -> Adapter:
    space_id = store.dataset(name).space_id
    start = None if space_id is None else store.space(space_id).warm_start
    if start is None:
        raise UsageError(
            f"--warm-start {name!r} names a dataset that has no warm start; expected one that has, a number of "
            "instances, a share such as 5%, or none."
        )
    return warm.warm_adapter(store, start)


def check_same(store: Store, asked: str | None, known: Dataset, start: Adapter | None) -> None:
    """Refuse another start than a dataset has.

    Args:
        store: the store.
        asked: see `Settings.warm_start`.
        known: the dataset.
        start: its warm start, None for a cold one.

    Raises:
        SpaceMismatchError: another one is asked for.
    """
    if asked in (None, "auto") or asked == (start.recipe["asked"] if start else "none") or asked == known.name:
        return
    if start is not None and store.has_dataset(asked) and _warm_of(store, asked).id == start.id:
        return
    stored = f"one that was asked for as {start.recipe['asked']!r}" if start else "a cold one"
    raise SpaceMismatchError(
        f"--warm-start {asked!r} is another start than that of the dataset {known.name!r}, {stored}. Leave "
        "--warm-start out, or ingest into a new dataset.",
        {"warm_start": (start.id if start else None, asked)},
    )
