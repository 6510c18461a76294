"""Causal language models: a prompt and its completion, or a conversation; the loss is on the completion only."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from repmatch.curator.forms import conversation
from repmatch.curator.records import RowProblem
from repmatch.curator.tasks.head_loss import linear_cross_entropy
from repmatch.curator.tasks.short_head import ShortHead
from repmatch.curator.tasks.task import Example, pad
from repmatch.datamodels import Row
from repmatch.errors import ModelError, RefusedRowsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "causal-lm"
PLAIN = "prompt+completion+eos"
CHAT = "chat"
IGNORED = -100
# Answers of one character that no text has, to find where a template puts an answer.
_MARKS = ("\ue000", "\ue001")


class CausalLanguage:
    """Prompt and completion as one sequence; the loss is the mean cross entropy of the completion's tokens.

    Plainly, a prompt and its completion are tokenized apart and joined, and the end-of-text token closes the
    completion. By the chat template, the conversation is rendered as the tokenizer says; its completion is what the
    last message adds to the prompt for it.

    Args:
        tokenizer: a fast tokenizer.
        template: `PLAIN` or `CHAT`.
        max_length: tokens kept: the start of the prompt goes first, then the end of the completion.
        messages_field: column with the conversation, None where rows have prompt and completion.
    """

    name = NAME

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, max_length: int, messages_field: str | None = None
    ) -> None:
        if template == CHAT and not tokenizer.chat_template:
            raise ModelError(
                "the tokenizer of this model has no chat template; expected one for chat messages. Give rows a prompt "
                "and a completion, or use a model that was made for chat."
            )
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self._field = messages_field
        self._short = ShortHead(_short_logits)

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Tokenize rows.

        Args:
            rows: rows with a prompt as text and a completion as second text.

        Returns:
            One example a row, in order; "input_ids", and under "prompt" the number of tokens before the completion.

        Raises:
            RefusedRowsError: the chat template refuses rows, or their prompt or completion has no tokens.
        """
        reasons: dict[int, str] = {}
        pairs = [self._texts(i, row, reasons) for i, row in enumerate(rows)]
        prompts = self._ids([prompt for prompt, _ in pairs], special=self.template != CHAT)
        completions = self._ids([completion for _, completion in pairs], special=False)
        eos = self.tokenizer.eos_token_id
        examples = []
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            if self.template != CHAT and eos is not None:
                prompt = prompt[:-1] if len(prompt) > 1 and prompt[-1] == eos else prompt
                completion = [*completion, eos]
            if not completion or not prompt:
                which = "completion" if prompt else "prompt"
                reasons.setdefault(i, f"the {which} has no tokens; expected one or more. Fix it, or use another model")
                continue
            before = len(prompt) + len(completion)
            completion = completion[: self.max_length - 1]
            prompt = prompt[-max(1, self.max_length - len(completion)) :]
            ids = prompt + completion
            examples.append(Example({"input_ids": ids, "prompt": len(prompt)}, None, len(ids) < before))
        if reasons:
            at = min(reasons)
            where = f"{rows[at].source}, line {rows[at].line}: " if rows[at].source else ""
            raise RefusedRowsError(f"{where}{reasons[at]}.", reasons)
        return examples

    def _ids(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = self.tokenizer(list(texts), add_special_tokens=special, truncation=False, verbose=False)
        ids: list[list[int]] = found["input_ids"]
        return ids

    def _texts(self, position: int, row: Row, reasons: dict[int, str]) -> tuple[str, str]:
        """Prompt and completion; empty ones of a row that the template refuses, with the reason under its position."""
        if self.template != CHAT:
            return row.text, row.text_pair or ""
        try:
            messages = self._messages(row)
        except RowProblem as problem:  # a row that was ingested before such rows were set aside
            reasons[position] = str(problem)
            return "", ""
        try:
            whole = self._render(messages)
            prompt = self._render(messages[:-1], add_generation_prompt=True)
            at = len(prompt) if whole.startswith(prompt) else self._answer_at(messages, whole)
        except Exception as error:  # a template is a program of the model's makers and raises what it likes
            reasons[position] = (
                f"the model's chat template refuses the conversation ({type(error).__name__}: {error}); fix it, or use "
                "another model"
            )
            return "", ""
        if at is None:
            reasons[position] = (
                "the model's chat template renders the conversation differently once its answer is there, so the "
                "answer cannot be told from the prompt; give rows a prompt and a completion instead"
            )
            return "", ""
        return whole[:at], whole[at:]

    def _render(self, messages: Sequence[Mapping[str, str]], **how: Any) -> str:
        tokenizer: Any = self.tokenizer
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **how))

    def _answer_at(self, messages: Sequence[Mapping[str, str]], whole: str) -> int | None:
        """Where the answer begins in a conversation that does not begin with the prompt for it.

        Some templates end a prompt for an answer with more than stands before an answer that is there, such as an
        opened `<think>`. So another answer is rendered in its place: what comes before the first difference is the
        prompt, if there the other answer begins.
        """
        mark = next(mark for mark in _MARKS if not messages[-1]["content"].strip().startswith(mark))
        other = self._render([*messages[:-1], {**messages[-1], "content": mark}])
        at = next((i for i, (one, two) in enumerate(zip(whole, other, strict=False)) if one != two), None)
        return at if at and other[at] == mark else None

    def _messages(self, row: Row) -> list[dict[str, str]]:
        value = json.loads(row.json).get(self._field) if self._field is not None else None
        if value is not None:
            return conversation(value, self._field or "")
        return [{"role": "user", "content": row.text}, {"role": "assistant", "content": row.text_pair or ""}]

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Pad examples to one batch, on the right.

        Args:
            examples: at least one.

        Returns:
            "input_ids", "attention_mask" and "labels" (n, longest) int64; a label is `IGNORED` outside completions.
        """
        ids = [list(example.features["input_ids"]) for example in examples]
        cut = [int(example.features["prompt"]) for example in examples]
        return {
            "input_ids": pad(ids, int(self.tokenizer.pad_token_id or 0)),
            "attention_mask": pad([[1] * len(row) for row in ids], 0),
            "labels": pad([[IGNORED] * p + row[p:] for row, p in zip(ids, cut, strict=True)], IGNORED),
        }

    def losses(self, module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Compute the mean cross entropy of each instance's completion.

        The vocabulary's logits are made at the completion's positions only, where the model allows it: that is tried
        on the first batch of a model and given up where it does not equal the model's own logits.

        Args:
            module: a causal language model of transformers.
            inputs: from `collate`.

        Returns:
            (n,) float32 losses.
        """
        unwrap: Any = getattr(module, "get_base_model", None)
        if unwrap is not None:  # peft's wrapper; its layers sit in the model itself
            module = unwrap()
        targets = inputs["labels"][:, 1:]
        keep = targets != IGNORED
        given = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        if not self._short.is_right(module, given):
            logits = module(**given, use_cache=False).logits[:, :-1][keep].float()
            return mean_over_instances(functional.cross_entropy(logits, targets[keep], reduction="none"), keep)
        hidden, head = _before_head(module, given, keep)
        if type(head) is nn.Linear and not head.weight.requires_grad:
            return mean_over_instances(linear_cross_entropy(hidden, head, targets[keep]), keep)
        logits = head(hidden).float()
        return mean_over_instances(functional.cross_entropy(logits, targets[keep], reduction="none"), keep)


def mean_over_instances(values: Tensor, keep: Tensor) -> Tensor:
    """Average the values of each instance's positions.

    Args:
        values: one number a position that is kept, in row order.
        keep: (n, t) bool.

    Returns:
        (n,) means; 0 for an instance without a position.
    """
    if values.device.type == "cpu":
        rows = keep.nonzero()[:, 0]
        total = torch.zeros(len(keep), dtype=values.dtype).index_add(0, rows, values)
    else:  # there `index_add` adds in any order, so that the last bits would change from run to run
        total = (
            torch.zeros(keep.shape, dtype=values.dtype, device=values.device).masked_scatter(keep, values).sum(dim=1)
        )
    return total / keep.sum(dim=1).clamp_min(1)


def _before_head(module: Any, given: Mapping[str, Tensor], keep: Tensor) -> tuple[Tensor, Any]:
    """What the head reads at the positions that count, and the head."""
    hidden = module.base_model(**given, use_cache=False)[0][:, :-1]
    return hidden[keep], module.get_output_embeddings()


def _short_logits(module: Any, given: Mapping[str, Tensor], keep: Tensor) -> Tensor:
    """The logits at the positions that count, (k, vocabulary)."""
    hidden = module.base_model(**given, use_cache=False)[0][keep]
    logits: Tensor = module.get_output_embeddings()(hidden)
    return logits
