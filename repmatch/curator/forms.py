"""What the rows of each task hold: which columns are read, and what of them the factors depend on.

Nothing here needs torch: rows are read and checked before a model is loaded.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from repmatch.curator.records import RowProblem, shown
from repmatch.errors import UnknownChoiceError

DEFAULT_TASK = "sequence-classification"


@dataclass(frozen=True)
class TaskKind:
    """A built-in task, as far as its rows go.

    Attributes:
        name: the task's name.
        form: what its columns hold: "classes" (text, maybe a second text, one of some labels), "numbers" (a number as
            the label), "texts" (the label is optional), "completion" (prompt and completion), "messages" (a
            conversation, see `repmatch.curator.conversations`) or "images" (an image, see `repmatch.curator.pictures`,
            and a label).
        text_field: default column with the text.
        pair_field: default column with the second text; None: none.
        about: one line for the help.
    """

    name: str
    form: str
    text_field: str
    pair_field: str | None
    about: str


TASKS: dict[str, TaskKind] = {
    kind.name: kind
    for kind in (
        TaskKind(DEFAULT_TASK, "classes", "text", "text_pair", "texts or pairs of texts with one of some labels"),
        TaskKind("text-regression", "numbers", "text", "text_pair", "texts or pairs of texts with a number as label"),
        TaskKind(
            "causal-lm", "completion", "prompt", "completion", "prompt and completion, or chat messages with tools"
        ),
        TaskKind("masked-lm", "texts", "text", "text_pair", "texts without labels"),
        TaskKind("image-classification", "images", "image", None, "image files with one of some labels"),
    )
}
# Every form, with what its columns hold.
FORMS: dict[str, str] = {
    "classes": "text, maybe a second text, one of some labels",
    "numbers": "the same with a number as label",
    "texts": "text, maybe a second text; a label is kept, not needed",
    "completion": "text and second text, both needed",
    "messages": "a conversation",
    "images": "an image, one of some labels",
}
# Forms whose labels are a fixed list, a label a row of the head.
CLASSED = frozenset(["classes", "images"])


def task_kind(name: str | None) -> TaskKind:
    """Return a built-in task.

    Args:
        name: its name; None: sequence classification.

    Returns:
        The task.

    Raises:
        UnknownChoiceError: there is none of that name.
    """
    name = name or DEFAULT_TASK
    if name not in TASKS:
        raise UnknownChoiceError.of("task", name, TASKS)
    return TASKS[name]


def number_text(value: Any, column: str) -> str:
    """Return the text form of a number that is the label.

    Args:
        value: what the column holds.
        column: its name.

    Returns:
        The number as JSON writes it.

    Raises:
        RowProblem: it is no finite number.
    """
    found = value
    if isinstance(value, str):
        try:
            found = float(value)
        except ValueError:
            found = None
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise RowProblem(
            f"the label in column {column!r} is {shown(value)}; expected a finite number. Fix the row, or name another "
            "column with --label-field."
        )
    return json.dumps(found)


def optional_label(value: Any) -> str:
    """Return a label that the task does not read, for display and for balanced selection.

    Args:
        value: what the column holds, or None.

    Returns:
        Its text; "" where it is no text, number or boolean.
    """
    if isinstance(value, str):
        return value[:1000]
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    return ""
