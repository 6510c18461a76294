"""Conversations rendered by a model's chat template, and which stretches of the text the assistant's messages are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from repmatch.curator.conversations import REASONING, Conversation, Message
from repmatch.curator.records import RowProblem
from repmatch.curator.toolcalls import TOOL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Answers of one character that no text has, to find where a template puts an answer.
_MARKS = ("\ue000", "\ue001")
# How calls are given: the content of a message that has nothing else, and whether arguments are JSON text. Templates
# differ in what they take, and most take the first.
_WAYS: tuple[tuple[str | None, bool], ...] = (("", False), (None, False), ("", True), (None, True))
_ANOTHER_MODEL = "use a model whose chat template knows tools"


def rendered(tokenizer: PreTrainedTokenizerBase, talk: Conversation) -> list[str]:
    """Render a conversation and cut it where what is learned begins and ends.

    Args:
        tokenizer: with a chat template.
        talk: the conversation.

    Returns:
        Pieces of the text, in order: the prompt, what is learned, and so on in turn, ending with what is learned. What
        follows on the last message that is learned is left out.

    Raises:
        RowProblem: the template refuses the conversation, leaves out tools, calls or a tool's answer, or renders it so
            that the assistant's messages cannot be told from the rest.
    """
    reason: RowProblem | None = None
    for silent, as_text in _WAYS if any("tool_calls" in message for message in talk.messages) else _WAYS[:1]:
        try:
            return _Rendering(tokenizer, talk, silent, as_text).pieces()
        except RowProblem as problem:  # one of what is left out says more than one of a way that the template refuses
            if reason is None or (reason.__cause__ is not None and problem.__cause__ is None):
                reason = problem
    assert reason is not None
    raise reason


class _Rendering:
    """One conversation under a template.

    Args:
        tokenizer: with a chat template.
        talk: the conversation.
        silent: the content of a message that calls tools and says nothing; None: it has none.
        as_text: whether arguments of calls are JSON text, in place of objects.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, talk: Conversation, silent: str | None, as_text: bool
    ) -> None:
        self._tokenizer: Any = tokenizer
        self._talk = talk
        self._silent = silent
        self._as_text = as_text
        self._messages = talk.messages

    def pieces(self) -> list[str]:
        """Return the pieces, as `rendered` does."""
        try:
            whole = self._text(self._messages)
            lost = self._lost(whole) if self._talk.uses_tools else ""
            spans = [] if lost else self._spans(whole)
        except Exception as error:  # a template is a program of the model's makers and raises what it likes
            raise RowProblem(
                f"the model's chat template refuses the conversation ({type(error).__name__}: {error}); fix it, or use "
                "another model"
            ) from error
        if lost:
            raise RowProblem(lost)
        if spans is None:
            raise RowProblem(
                "the model's chat template renders the conversation differently once its answer is there, so the "
                "answer cannot be told from the prompt; give rows a prompt and a completion instead"
            )
        cuts = [0, *(at for span in spans for at in span)]
        return [whole[lo:hi] for lo, hi in pairwise(cuts)]

    def _text(
        self, messages: Sequence[Message], *, prompt: bool = False, tools: Sequence[Mapping[str, Any]] | None = None
    ) -> str:
        how = {"tools": list(tools or self._talk.tools) or None, "add_generation_prompt": prompt}
        given = [self._given(message) for message in messages]
        return str(self._tokenizer.apply_chat_template(given, tokenize=False, **how, **self._talk.options))

    def _given(self, message: Message) -> Message:
        """A message as templates want it: its reasoning under every name that they know."""
        found = dict(message)
        if REASONING[0] in message:
            found |= dict.fromkeys(REASONING, message[REASONING[0]])
        if "tool_calls" in message and not message["content"]:
            found["content"] = self._silent
        if "tool_calls" in message and self._as_text:
            found["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": _json(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
        return {key: value for key, value in found.items() if value is not None}

    # ------------------------------------------------------------------------------------------ what is shown

    def _lost(self, whole: str) -> str:
        """Say which tool, call or answer of a tool the template leaves out; "" where it shows all of them.

        Names could stand in the text by chance, so they are looked for under names that nothing else has.
        """
        shown: dict[str, tuple[str, str]] = {}  # mark -> the name as it is, and what to say of it

        def mark(kind: str, name: str, what: str) -> str:
            found = f"{name}__{kind}{len(shown)}__"
            shown[found] = (name, what)
            return found

        tools = [
            {**tool, "function": {**tool["function"], "name": mark("tool", name, f"the tool {name!r}")}}
            for tool in self._talk.tools
            for name in (tool["function"]["name"],)
        ]
        messages = []
        for at, message in enumerate(self._messages, start=1):
            found = dict(message)
            if "tool_calls" in message:
                found["tool_calls"] = [
                    {**call, "function": {**call["function"], "name": mark("call", name, f"the call of {name!r}")}}
                    for call in message["tool_calls"]
                    for name in (call["function"]["name"],)
                ]
            if message["role"] == TOOL and message["content"].strip():
                found["content"] = mark("answer", "", f"a tool's answer (message {at})")
            messages.append(found)
        try:
            text, by_mark = self._text(messages, tools=tools), True
        except Exception:  # a template that looks names up elsewhere
            text, by_mark = whole, False
        lost = next((what for key, (name, what) in shown.items() if (key if by_mark else name) not in text), "")
        lost = lost or self._not_json(whole)
        if not lost:
            return ""
        column = ", or leave the column of the tools out" if lost.startswith("the tool ") else ""
        return f"the model's chat template leaves out {lost}; {_ANOTHER_MODEL}{column}"

    def _not_json(self, whole: str) -> str:
        """Say which arguments stand there as Python writes objects, or as text within a text of JSON."""
        said = "".join(message["content"] for message in self._messages)
        for message in self._messages:
            for call in message.get("tool_calls", ()):
                arguments = call["function"]["arguments"]
                written, wanted = str(arguments), _json(arguments)
                objects = written != wanted and whole.count(written) > said.count(written)
                if wanted not in whole if self._as_text else objects:
                    return f"the JSON of the arguments of {call['function']['name']!r}"
        return ""

    # ------------------------------------------------------------------------------------------ what is learned

    def _spans(self, whole: str) -> list[tuple[int, int]] | None:
        """Where each message that is learned begins and ends; None where that cannot be told."""
        found: list[tuple[int, int]] = []
        for at in self._talk.learned:
            start = self._start(at, whole)
            end = len(whole) if at == len(self._messages) - 1 else self._end(at, whole)
            if start is None or end is None or not (found[-1][1] if found else 0) <= start < end:
                return None
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], end)
            else:
                found.append((start, end))
        return found

    def _start(self, at: int, whole: str) -> int | None:
        """Where a message begins: behind the prompt for it.

        Some templates end a prompt for an answer with more than stands before an answer that is there, such as an
        opened `<think>`, or put the tools before the last question. So another answer is rendered in its place: what
        comes before the first difference is the prompt, if there the other answer begins. Where it begins later, as
        behind a thought that the other one has not, the last opening of a message before the difference counts.
        """
        before = self._text(self._messages[:at], prompt=True)
        if whole.startswith(before):
            return len(before)
        message, said = self._messages[at], self._messages[at]["content"].strip()
        mark = next(mark for mark in _MARKS if not said.startswith(mark))
        to_here, rest = self._messages[:at], self._messages[at + 1 :]
        others: list[list[Message]] = [[*to_here, {"role": "assistant", "content": mark}]]
        if rest:
            others.append([*to_here, {**message, "content": mark}, *rest])
        found = 0
        for other in others:
            text = self._text(other)
            found = _alike(whole, text)
            if found and text[found : found + 1] == mark:
                return found
        closed = self._text(to_here)
        opening = before[len(closed) :] if before.startswith(closed) else ""
        place = whole.rfind(opening, 0, found) if opening else -1
        earlier = self._text([*to_here[:-1], {**to_here[-1], "content": mark}, message, *rest])
        return place + len(opening) if place >= _alike(whole, earlier) else None

    def _end(self, at: int, whole: str) -> int | None:
        """Where a message ends that others follow: with what closes it when it is the last.

        Where a template renders a last message in another way, what closes it is taken to be what stays when it says
        something else.
        """
        to_here = self._messages[: at + 1]
        alone = self._text(to_here)
        if whole.startswith(alone):
            return len(alone)
        other, rest = _otherwise(self._messages[at]), self._messages[at + 1 :]
        varied = self._text([*to_here[:-1], other])
        closing = alone[len(alone) - _alike(alone[::-1], varied[::-1]) :]
        varied = self._text([*to_here[:-1], other, *rest])
        place = len(whole) - _alike(whole[::-1], varied[::-1])
        end = self._between_tokens(whole, place + _alike(whole[place:], closing))
        answered = self._text([*to_here, {**rest[0], "content": _MARKS[0]}, *rest[1:]])
        return end if end <= _alike(whole, answered) else None

    def _between_tokens(self, whole: str, end: int) -> int:
        """Move a place within a token of the vocabulary's own, such as `<|end|>`, before it."""
        for token in self._tokenizer.added_tokens_encoder:
            at = whole.find(token, max(0, end - len(token) + 1), end + len(token) - 1)
            if 0 <= at < end < at + len(token):
                return at
        return end


def _otherwise(message: Message) -> Message:
    """The message with another end."""
    found = {**message, "content": _MARKS[0]} if message["content"] else dict(message)
    if "tool_calls" in message:
        *calls, last = message["tool_calls"]
        arguments = {_MARKS[0]: _MARKS[0]}
        found["tool_calls"] = [*calls, {**last, "function": {**last["function"], "arguments": arguments}}]
    return found


def _json(arguments: dict[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def _alike(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # by halves: comparing slices costs far less than a look at each character
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
