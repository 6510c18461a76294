"""Shards: an input divided among machines that know nothing of each other, and always in the same way.

Every machine reads the whole input, so that all agree on labels, columns, repeated ids and a warm start, and computes
one stretch of its windows. Windows are cut as one process would cut them; that is why the factors are the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from repmatch.curator.windows import Progress, windows
from repmatch.errors import UsageError

if TYPE_CHECKING:
    from repmatch.curator.tasks import Task
    from repmatch.datamodels import BadRow, Row


@dataclass(frozen=True)
class Shard:
    """Which part of an input.

    Attributes:
        number: from 1; 0: no row, only what all shards have in common (labels, columns, the start).
        of: how many there are.
    """

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read a shard as users write it.

        Args:
            text: "I/N".

        Returns:
            The shard.

        Raises:
            UsageError: it is none.
        """
        match = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", text)
        if match is None or not 0 <= int(match[1]) <= int(match[2]) or match[2].strip("0") == "":
            raise UsageError(
                f"--shard {text!r} is no shard; expected I/N with I from 1 to N, such as 3/8, or 0/N for what all "
                "shards share."
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@dataclass(frozen=True)
class Stretch:
    """Where a shard lies.

    Attributes:
        lo: place of its first row among the accepted ones.
        hi: place after its last row.
        total: accepted rows of the input.
    """

    lo: int
    hi: int
    total: int


def divide(
    chunks: Iterator[Sequence[Row]], task: Task, tokens: int, shard: Shard, tell: Progress | None = None
) -> Stretch:
    """Find a shard's rows: a stretch of whole windows, so that all stretches are about the same work.

    Args:
        chunks: every accepted row in input order.
        task: counts their tokens.
        tokens: of a window.
        shard: which part.
        tell: called with (stage, done, None).

    Returns:
        The stretch. The stretches of all shards cover every row once, in order.
    """
    rows: list[int] = [0]
    work: list[int] = [0]
    count = 0
    refused: list[BadRow] = []
    for some, made in windows(chunks, task, tokens, refused):
        count += len(some)
        rows.append(count + len(refused))  # a row that the task refuses has a place too
        work.append(work[-1] + sum(example.tokens for example in made))
        if tell is not None:
            tell("dividing", rows[-1], None)
    rows[-1] = count + len(refused)
    if shard.number == 0:
        return Stretch(0, 0, rows[-1])
    wanted = np.arange(1, shard.of) * (work[-1] / shard.of)
    after = np.searchsorted(work, wanted)  # the window's end nearest to each share
    nearest = np.where(wanted - np.take(work, after - 1) < np.take(work, after) - wanted, after - 1, after)
    ends = [0, *(rows[at] for at in nearest.tolist()), rows[-1]]
    return Stretch(ends[shard.number - 1], ends[shard.number], rows[-1])
