"""Which start a dataset gets: cold, warmed on some of its rows, or another dataset's."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from repmatch.curator.windows import Progress
from repmatch.datamodels import Adapter, Dataset, Space
from repmatch.errors import RepMatchError, SpaceMismatchError, UnknownNameError, UsageError

if TYPE_CHECKING:
    from repmatch.curator.settings import Settings
    from repmatch.curator.workbench import Workbench
    from repmatch.store import Stage, Store

logger = logging.getLogger(__name__)


def settled(store: Store | None, settings: Settings) -> Settings:
    """Fill in what was not asked for from the dataset whose start is asked for: both share one space.

    Args:
        store: holds the dataset; None: there is no store.
        settings: of a new dataset.

    Returns:
        Settings that make the other dataset's space, but for what was asked; as they were where no dataset is named.

    Raises:
        UnknownNameError: there is no such dataset.
        UsageError: the dataset has no warm start.
        SpaceMismatchError: another task was asked for.
    """
    name = settings.start_dataset
    if name is None:
        return settings
    if store is None:
        raise UnknownNameError.of("dataset", name, [], "make it with: repmatch ingest FILE --dataset NAME")
    space = _space_of(store, name)
    if settings.task not in (None, space.task):
        raise _other_space(name, {"task": (space.task, settings.task)})
    return settings.like(space)


def started(
    stage: Stage, total: int, tell: Progress, bench: Workbench, asked: str | None, record: Dataset
) -> Workbench:
    """Give a new dataset's workbench the start that was asked for; nothing is kept yet.

    Args:
        stage: the dataset's rows.
        total: how many they are.
        tell: called with (stage, done, total or None).
        bench: the workbench, from `built`.
        asked: see `Settings.warm_start`.
        record: the new dataset.

    Returns:
        The workbench, its space final.
    """
    from repmatch.curator import warm

    if bench.warm is not None or asked in (None, "none"):
        return bench
    asked = str(asked)
    count = warm.size_of(bench, asked, total)
    if count is None:
        logger.warning("%s starts cold: too few rows for a warm start, or no head drawn at random", record.name)
        return bench
    rows = warm.sample(stage.todo(), count, bench.space.seed)
    tick = partial(tell, "warm start")
    task = bench.task(record.labels, record.fields)
    adapter = warm.train(bench, record.labels, rows, asked=asked, task=task, progress=tick)
    return bench.from_warm(replace(adapter, subset=f"warm start of {record.name}"))


def keep(store: Store, bench: Workbench) -> None:
    """Keep a workbench's space, and its warm start with the cold space that it was trained in.

    Args:
        store: the store, writable.
        bench: the workbench.
    """
    cold = replace(bench.space, warm_start=None)
    if bench.warm is not None and bench.warm.space_id == cold.id:
        store.save_space(cold)
        store.save_adapter(bench.warm)
    store.save_space(bench.space)


def built(store: Store | None, settings: Settings, form: str | None) -> Workbench:
    """Make the workbench of a new dataset, with the start of another dataset where that is asked for.

    Args:
        store: holds the other dataset.
        settings: from `settled`.
        form: what the rows hold.

    Returns:
        The workbench, started as the other dataset is, else cold.

    Raises:
        UsageError: the dataset has no warm start.
        SpaceMismatchError: the settings make another space than the dataset's.
    """
    from repmatch.curator.base_models import find_model
    from repmatch.curator.warm import warm_adapter
    from repmatch.curator.workbench import Workbench

    name = settings.start_dataset
    if name is None or store is None:
        return Workbench.build(settings, form)
    space = _space_of(store, name)
    cold = replace(space, warm_start=None)
    try:
        bench = Workbench.build(settings, form)
    except RepMatchError as error:  # another model's matrices have other names
        model = settings.model
        found = find_model(model) if isinstance(model, str) and not model.startswith("own:") else None
        if found is None or found.fingerprint == cold.model_fingerprint:
            raise
        prints = (cold.model_fingerprint, found.fingerprint)
        raise _other_space(name, {"model": (cold.model, found.name), "model_fingerprint": prints}) from error
    if cold.id != bench.space.id:
        names = {"model": (cold.model, bench.space.model)} if cold.model != bench.space.model else {}
        raise _other_space(name, names | cold.differences(bench.space))
    return bench.from_warm(warm_adapter(store, str(space.warm_start)))


def _space_of(store: Store, name: str) -> Space:
    """The space of a dataset that has a warm start."""
    space_id = store.dataset(name).space_id
    space = None if space_id is None else store.space(space_id)
    if space is None or space.warm_start is None:
        raise UsageError(
            f"--warm-start {name!r} names a dataset that has no warm start; expected one that has, a number of "
            "instances, a share such as 5%, or none."
        )
    return space


def _other_space(name: str, differences: Mapping[str, tuple[Any, Any]]) -> SpaceMismatchError:
    return SpaceMismatchError(
        f"--warm-start {name!r} is a start in another space than these options make ({name!r} against asked). Leave "
        "the options out, or train a start of its own on some rows, such as --warm-start 160.",
        differences,
    )


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
    if start is not None and store.has_dataset(asked) and _space_of(store, asked).warm_start == start.id:
        return
    stored = f"one that was asked for as {start.recipe['asked']!r}" if start else "a cold one"
    raise SpaceMismatchError(
        f"--warm-start {asked!r} is another start than that of the dataset {known.name!r}, {stored}. Leave "
        "--warm-start out, or ingest into a new dataset.",
        {"warm_start": (start.id if start else None, asked)},
    )
