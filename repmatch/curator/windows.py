"""Windows: the unit of commit. Rows are cut into windows, and these into batches that fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from repmatch.curator.batches import default_workers
from repmatch.datamodels import BadRow, Row
from repmatch.errors import RefusedRowsError

if TYPE_CHECKING:
    from repmatch.curator.engine import FactorEngine
    from repmatch.curator.tasks import Example, Task
    from repmatch.curator.workbench import Workbench

# Rows are sorted by length within a window and committed together. It is sized in work, not in seconds or cores, so
# that a run that was killed goes on with the very batches an uninterrupted run would have computed, and so that
# machines with more or fewer cores cut the same input alike: a factor depends on its batch, if only by rounding.
_WINDOW_FLOP = 2e12
# About half a second of a large accelerator at 40 % of its peak in bfloat16: long beside a commit, and enough rows of a
# model of a billion parameters that batches of similar length keep it busy.
_WINDOW_FLOP_GPU = 2e14
_WINDOW_ROWS = (64, 4096)

Progress = Callable[[str, int, int | None], None]


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


def encoded(task: Task, rows: Sequence[Row]) -> list[Example | BadRow]:
    """Make rows ready, and say what is wrong with those that the task refuses.

    Args:
        task: makes them ready.
        rows: the rows.

    Returns:
        For each row, in order, its example, or the bad row with its reason.
    """
    try:
        return list(task.encode(rows))
    except RefusedRowsError as error:
        reasons = error.reasons
    rest = [row for i, row in enumerate(rows) if i not in reasons]
    made = iter(task.encode(rest) if rest else [])
    return [
        BadRow(row.source, row.line, row.id, reasons[i]) if i in reasons else next(made) for i, row in enumerate(rows)
    ]


def usable(task: Task, chunks: Iterable[Sequence[Row]], *, every: bool = False) -> tuple[bool, int, list[BadRow]]:
    """Look whether a task takes rows, as far as that has to be known.

    Args:
        task: makes them ready.
        chunks: the rows.
        every: look at all; else until one is taken, or until thousands were refused, all for one reason.

    Returns:
        Whether one is taken, how many rows were looked at, and those of them that are refused.
    """
    taken, count = False, 0
    refused: list[BadRow] = []
    for chunk in chunks:
        bad = [found for found in encoded(task, chunk) if isinstance(found, BadRow)]
        count += len(chunk)
        refused += bad
        taken = taken or len(bad) < len(chunk)
        hopeless = not taken and count >= _WINDOW_ROWS[1] and len({row.reason for row in refused}) == 1
        if not every and (taken or hopeless):
            break
    return taken, count, refused


def windows(
    chunks: Iterator[Sequence[Row]], task: Task, tokens: int, refused: list[BadRow] | None = None
) -> Iterator[tuple[list[Row], list[Example]]]:
    """Cut a stream of rows into windows of about so many tokens.

    Args:
        chunks: rows in input order.
        task: tokenises them.
        tokens: a window ends with the row that reaches them.
        refused: takes the rows that the task refuses, each before the window is yielded that ends behind it; None: such
            a row is an error.

    Yields:
        Rows and their examples, in input order.
    """
    rows: list[Row] = []
    examples: list[Example] = []
    count = 0
    for chunk in chunks:
        made = task.encode(chunk) if refused is None else encoded(task, chunk)
        for row, example in zip(chunk, made, strict=True):
            if isinstance(example, BadRow):
                refused.append(example)  # type: ignore[union-attr]
                continue
            rows.append(row)
            examples.append(example)
            count += example.tokens
            full = count >= tokens and len(rows) >= _WINDOW_ROWS[0]
            if full or len(rows) >= _WINDOW_ROWS[1]:
                yield rows, examples
                rows, examples, count = [], [], 0
    if rows:
        yield rows, examples
