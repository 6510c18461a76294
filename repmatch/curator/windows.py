"""Windows: the unit of commit. Rows are cut into windows, and these into batches that fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from repmatch.curator.batches import default_workers
from repmatch.datamodels import Row

if TYPE_CHECKING:
    from repmatch.curator.engine import FactorEngine
    from repmatch.curator.tasks import Example, Task
    from repmatch.curator.workbench import Workbench

# Rows are sorted by length within a window and committed together. It is sized in work, not in seconds or cores, so
# that a run that was killed goes on with the very batches an uninterrupted run would have computed, and so that
# machines with more or fewer cores cut the same input alike: a factor depends on its batch, if only by rounding.
_WINDOW_FLOP = 2e12
_WINDOW_FLOP_GPU = 5e13
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
