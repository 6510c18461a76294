"""Conversations: messages as users keep them, made into what a chat template reads, and which of them are learned.

Nothing here needs torch: rows are read and checked before a model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from repmatch.curator.records import RowProblem, not_finite, shown
from repmatch.curator.toolcalls import TOOL, call_text, calls_of, listed, tools_of, without_nulls
from repmatch.errors import quote_list

CONVERSATIONS = ("messages", "conversations")
"""Columns that hold a conversation, where no other is named and there is no prompt."""

OPTIONS = "chat_template_kwargs"
"""Column with what a row's chat template is told besides messages and tools."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names under which an assistant's thoughts are kept; the first is ours."""

# Roles as ShareGPT's files name them, whose messages have "from" and "value".
_SPEAKERS = {"human": "user", "gpt": "assistant", "observation": TOOL}

# Arguments of `apply_chat_template` that are not the template's.
_RESERVED = frozenset(
    [
        *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"),
    ]
)
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False, check_circular=False)
_IN_ORDER = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False)

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """A conversation, checked.

    Attributes:
        messages: role and content; of the assistant also "tool_calls" (arguments as objects) and `REASONING[0]`, of a
            tool its "name" and "tool_call_id", each where there is one.
        learned: positions of the assistant's messages that are learned, ascending, at least one.
        tools: what the assistant may call, each {"type": "function", "function": {"name": ...}}.
        options: further arguments of the chat template.
    """

    messages: tuple[Message, ...]
    learned: tuple[int, ...]
    tools: tuple[dict[str, Any], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def uses_tools(self) -> bool:
        """Whether there are tools or calls of tools."""
        return bool(self.tools) or any("tool_calls" in message for message in self.messages)

    @property
    def prompt(self) -> str:
        """The messages before the last one as readable text."""
        return dialogue(self.messages[:-1])

    @property
    def answer(self) -> str:
        """The last message as readable text, its calls of tools with it."""
        return spoken(self.messages[-1])

    def identity(self) -> str:
        """Return JSON text of all that the factors depend on.

        Where the last message alone is learned and no tools are about, it is that of the messages. Else the order of
        keys counts too: templates write arguments in theirs.
        """
        if not self.uses_tools and not self.options and self.learned == (len(self.messages) - 1,):
            return _CANONICAL.encode(self.messages)
        parts = {"messages": self.messages, "learned": self.learned, "tools": self.tools, "options": self.options}
        return _IN_ORDER.encode(parts)


def messages_in(value: Any) -> Any:
    """Return the messages that a value holds as JSON text, as in CSV.

    Args:
        value: what a column holds.

    Returns:
        The list of objects with a role (or "from"); the value itself where it is no such text.
    """
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    talks = (
        isinstance(found, list) and found and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in found)
    )
    return found if talks else value


def conversation(row: Mapping[str, Any], column: str, answer_column: str | None = None) -> Conversation:
    """Read and check the conversation of a row.

    Args:
        row: the row.
        column: the column with the messages, or with those of the prompt: a list, or the same as JSON text.
        answer_column: the column with the messages of the completion; None: `column` holds the whole conversation.

    Returns:
        The conversation. Without a second column its last turn is learned: the assistant's last message, and the calls
        of tools that led to it; with weights all of the assistant's messages but those of weight 0. With a second
        column all of the assistant's messages in it are learned, but those of weight 0.

    Raises:
        RowProblem: it is no list of messages that ends with the assistant's, no message of it is learned, or a message,
            a call or a tool is not what it should be.
    """
    if answer_column is None:
        given = messages_in(row.get(column))
        if not isinstance(given, list) or len(given) < 2:
            raise RowProblem(
                f"column {column!r} holds {shown(given)}; expected a list of two or more messages, each an object with "
                "role and content. Fix the row, or name another column with --text-field."
            )
        first, where = 0, column
    else:
        asked = _side(row, column, "user", "--text-field")
        told = _side(row, answer_column, "assistant", "--text-pair-field")
        given, first, where = [*asked, *told], len(asked), answer_column
    messages = [_message(message, column if i < first else where) for i, message in enumerate(given)]
    last = messages[-1]
    if last["role"] != "assistant" or _says_nothing(last):
        raise RowProblem(
            f"the last message in column {where!r} is {shown(last['content'])} by {last['role']!r}; expected an "
            "answer of the assistant, which is what is learned. Fix the row."
        )
    _name_answers(messages)
    learned = _learned(messages, given, first, where, one_turn=answer_column is None)
    found = Conversation(tuple(messages), learned, tuple(tools_of(row, messages)), _options(row))
    try:
        found.identity()
    except ValueError:
        raise not_finite({where: given, **{c: row[c] for c in ("tools", OPTIONS) if c in row}}) from None
    return found


def _side(row: Mapping[str, Any], column: str, role: str, option: str) -> list[Any]:
    """The messages of a prompt or a completion, which may be text too."""
    value = messages_in(row.get(column))
    if isinstance(value, str) and value.strip():
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise RowProblem(
            f"column {column!r} holds {shown(value)}; expected a list of one or more messages, each an object with "
            f"role and content. Fix the row, or name another column with {option}."
        )
    return value


def _spoken_by(message: Any) -> Any:
    """A message of ShareGPT's files with role and content, its call as one of tools; any other as it is."""
    if not isinstance(message, dict) or message.get("role") is not None or not isinstance(message.get("from"), str):
        return message
    speaker, value = message["from"], message.get("value")
    rest = {key: inner for key, inner in message.items() if key not in ("from", "value")}
    if speaker != "function_call":
        return {**rest, "role": _SPEAKERS.get(speaker, speaker), "content": value}
    calls = listed(listed(value, "{"))
    return {**rest, "role": "assistant", "content": None, "tool_calls": calls if isinstance(calls, list) else [calls]}


def _message(message: Any, column: str) -> Message:
    given = _spoken_by(message)
    role, content = (given.get(key) for key in ("role", "content")) if isinstance(given, dict) else (None, None)
    calls = calls_of(given, column) if isinstance(given, dict) else []
    if role == "function":  # what OpenAI called a tool's answer before there were tools
        role = TOOL
    if isinstance(content, list):
        content = _joined(content, column)
    if content is None and (calls or role == TOOL):
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise RowProblem(
            f"column {column!r} holds the message {shown(message)}; expected an object whose role and content are "
            "text. Fix the row."
        )
    found: Message = {"role": role, "content": content}
    if calls and role != "assistant":
        raise RowProblem(
            f"column {column!r} holds a message with tool_calls by {role!r}; expected them in messages of the "
            "assistant. Fix the row."
        )
    if calls:
        found["tool_calls"] = calls
    if role == "assistant":
        thought = next((given[name] for name in REASONING if given.get(name) is not None), None)
        if thought is not None and not isinstance(thought, str):
            raise RowProblem(
                f"column {column!r} holds a message with the reasoning {shown(thought)}; expected text. Fix the row."
            )
        if thought:
            found[REASONING[0]] = thought
    if role == TOOL:
        found |= {key: str(given[key]) for key in ("name", "tool_call_id") if given.get(key) is not None}
    return found


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


def _says_nothing(message: Message) -> bool:
    return not message["content"].strip() and "tool_calls" not in message


def _name_answers(messages: Sequence[Message]) -> None:
    """Give a tool's answer that has the id of a call alone the name of what was called."""
    names: dict[str, str] = {}
    for message in messages:
        names |= {call["id"]: call["function"]["name"] for call in message.get("tool_calls", ()) if "id" in call}
        if message["role"] == TOOL and "name" not in message and message.get("tool_call_id") in names:
            message["name"] = names[message["tool_call_id"]]


def _learned(
    messages: Sequence[Message], given: Sequence[Any], first: int, column: str, *, one_turn: bool
) -> tuple[int, ...]:
    # A message that opens the conversation answers no prompt.
    said = [i for i in range(max(first, 1), len(messages)) if messages[i]["role"] == "assistant"]
    weights = {i: weight for i in said if (weight := given[i].get("weight")) is not None}
    wrong = next((weight for weight in weights.values() if weight not in (0, 1)), None)
    if wrong is not None:
        raise RowProblem(
            f"column {column!r} holds a message with the weight {shown(wrong)}; expected 1 (learned) or 0 (not). "
            "Fix the row."
        )
    if one_turn and not weights:
        start = len(messages) - 1
        while start and (messages[start - 1]["role"] == TOOL or "tool_calls" in messages[start - 1]):
            start -= 1
        said = [i for i in said if i >= start]
    learned = tuple(i for i in said if weights.get(i) != 0 and not _says_nothing(messages[i]))
    if not learned:
        raise RowProblem(
            f"every message of the assistant in column {column!r} that says something has weight 0, so nothing is "
            "learned; expected one of weight 1. Fix the row, or leave it out."
        )
    return learned


def _options(row: Mapping[str, Any]) -> dict[str, Any]:
    value = row.get(OPTIONS)
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):
            value = json.loads(value) if value.strip() else None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RowProblem(
            f"column {OPTIONS!r} holds {shown(value)}; expected an object with arguments of the chat template, such as "
            '{"enable_thinking": false}. Fix the row, or rename the column.'
        )
    taken = sorted(_RESERVED & set(value))
    if taken:
        raise RowProblem(
            f"column {OPTIONS!r} names {quote_list(taken)}, which is not for a row to say; expected arguments of the "
            "chat template alone. Leave it out."
        )
    found: dict[str, Any] = without_nulls(value)
    return found


def spoken(message: Mapping[str, Any]) -> str:
    """Return what a message says as readable text.

    Args:
        message: with content, maybe calls of tools.

    Returns:
        The content, then a line for each call.
    """
    calls = [call_text(call) for call in message.get("tool_calls", ())]
    return "\n".join([message["content"], *calls] if message["content"] else calls)


def dialogue(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return messages as readable text.

    Args:
        messages: with role and content.

    Returns:
        The content of a single user message, else "role: content" a line.
    """
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"] or "(empty)"
    return "\n".join(f"{message['role']}: {spoken(message)}" for message in messages)
