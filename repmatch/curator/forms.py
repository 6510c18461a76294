"""What the rows of each task hold: which columns are read, and what of them the factors depend on.

Nothing here needs torch: rows are read and checked before a model is loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
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
            conversation) or "images" (an image, see `repmatch.curator.pictures`, and a label).
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
        TaskKind("causal-lm", "completion", "prompt", "completion", "prompt and completion, or chat messages"),
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


def messages_in(value: Any) -> Any:
    """Return the messages that a value holds as JSON text, as in CSV.

    Args:
        value: what a column holds.

    Returns:
        The list of objects with a role; the value itself where it is no such text.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    talks = isinstance(found, list) and found and all(isinstance(m, dict) and "role" in m for m in found)
    return found if talks else value


def conversation(value: Any, column: str) -> list[dict[str, str]]:
    """Check the messages of a conversation.

    Args:
        value: what the column holds: a list of messages, or the same as JSON text.
        column: its name.

    Returns:
        The messages, role and content alone; a content in parts of text is joined.

    Raises:
        RowProblem: it is no list of at least two messages whose last one is the assistant's, or a message has parts
            other than text, or calls of tools.
    """
    value = messages_in(value)
    if not isinstance(value, list) or len(value) < 2:
        raise RowProblem(
            f"column {column!r} holds {shown(value)}; expected a list of two or more messages, each an object with "
            "role and content. Fix the row, or name another column with --text-field."
        )
    messages = [_message(message, column) for message in value]
    last = messages[-1]
    if last["role"] != "assistant" or not last["content"].strip():
        raise RowProblem(
            f"the last message in column {column!r} is {shown(last['content'])} by {last['role']!r}; expected an "
            "answer of the assistant, which is what is learned. Fix the row."
        )
    return messages


def _message(message: Any, column: str) -> dict[str, str]:
    role, content = (message.get(key) for key in ("role", "content")) if isinstance(message, dict) else (None, None)
    if isinstance(content, list):
        content = _joined(content, column)
    if not isinstance(role, str) or not isinstance(content, str):
        raise RowProblem(
            f"column {column!r} holds the message {shown(message)}; expected an object whose role and content are "
            "text. Fix the row."
        )
    if message.get("tool_calls"):
        raise RowProblem(
            f"column {column!r} holds a message with tool_calls ({shown(message['tool_calls'])}); expected text, "
            "because calls of tools are not learned from. Remove them, or write them into the content."
        )
    return {"role": role, "content": content}


def _joined(parts: list[Any], column: str) -> str:
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise RowProblem(
                f"column {column!r} holds a message with the part {shown(part)}; expected parts of text only, such as "
                '{"type": "text", "text": "..."}. Fix the row.'
            )
        texts.append(text)
    return "".join(texts)


def dialogue(messages: Sequence[Mapping[str, str]]) -> str:
    """Return messages as readable text.

    Args:
        messages: with role and content.

    Returns:
        The content of a single user message, else "role: content" a line.
    """
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"] or "(empty)"
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


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
