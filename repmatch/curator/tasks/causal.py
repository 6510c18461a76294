"""Causal language models: a prompt and its completion, or a conversation; the loss is on the completion only."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from repmatch.curator.conversations import Conversation, conversation
from repmatch.curator.records import RowProblem
from repmatch.curator.tasks.head_loss import linear_cross_entropy
from repmatch.curator.tasks.rendering import rendered
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

# Characters of a piece that the next one is tokenized behind: more than any one token has.
_CONTEXT = 128


class CausalLanguage:
    """Prompt and completion as one sequence; the loss is the mean cross entropy of the completion's tokens.

    Plainly, a prompt and its completion are tokenized apart and joined, and the end-of-text token closes the
    completion. By the chat template, the conversation is rendered as the tokenizer says; what its messages that are
    learned add is the completion, what stands between them is read and not learned.

    Args:
        tokenizer: a fast tokenizer.
        template: `PLAIN` or `CHAT`.
        max_length: tokens kept: the start of the prompt goes first, then the end of the completion.
        messages_field: column with the conversation or its prompt, None where rows have prompt and completion as texts.
        answer_field: column with the messages of the completion, None where the conversation is in one column.
    """

    name = NAME

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        max_length: int,
        messages_field: str | None = None,
        answer_field: str | None = None,
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
        self._answer_field = answer_field
        self._short = ShortHead(_short_logits)

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        """Tokenize rows.

        Args:
            rows: rows with a prompt as text and a completion as second text.

        Returns:
            One example a row, in order; "input_ids", under "prompt" the number of tokens before the completion, and
            under "gaps", where there are any, the ranges of tokens behind them that are not learned.

        Raises:
            RefusedRowsError: the chat template refuses rows, or their prompt or completion has no tokens.
        """
        reasons: dict[int, str] = {}
        chat = self.template == CHAT
        texts = [self._pieces(i, row, reasons) for i, row in enumerate(rows)]
        found = self._behind(texts) if chat else self._apart(texts)
        eos = None if chat else self.tokenizer.eos_token_id
        examples = []
        for i, (prompt, *rest) in enumerate(found):
            if eos is not None:
                prompt = prompt[:-1] if len(prompt) > 1 and prompt[-1] == eos else prompt
                rest[-1] = [*rest[-1], eos]
            if not any(rest[::2]) or not prompt:
                which = "completion" if prompt else "prompt"
                reasons.setdefault(i, f"the {which} has no tokens; expected one or more. Fix it, or use another model")
                continue
            examples.append(self._example(prompt, rest))
        if reasons:
            at = min(reasons)
            where = f"{rows[at].source}, line {rows[at].line}: " if rows[at].source else ""
            raise RefusedRowsError(f"{where}{reasons[at]}.", reasons)
        return examples

    def _example(self, prompt: list[int], rest: list[list[int]]) -> Example:
        """Cut the tokens of a prompt, and of what follows, to the maximum length; every second part is a gap."""
        follows = [token for part in rest for token in part]
        kept = follows[: self.max_length - 1]
        asked = prompt[-max(1, self.max_length - len(kept)) :]
        ids = asked + kept
        gaps, at = [], len(asked)
        for j, part in enumerate(rest):
            if j % 2 and part and at < len(ids):
                gaps.append((at, min(at + len(part), len(ids))))
            at += len(part)
        features = {"input_ids": ids, "prompt": len(asked)} | ({"gaps": tuple(gaps)} if gaps else {})
        return Example(features, None, len(ids) < len(prompt) + len(follows))

    def _apart(self, texts: Sequence[list[str]]) -> list[list[list[int]]]:
        """Tokenize prompts and completions, each as a text of its own."""
        prompts = self._ids([prompt for prompt, _ in texts], special=True)
        completions = self._ids([completion for _, completion in texts], special=False)
        return [[prompt, completion] for prompt, completion in zip(prompts, completions, strict=True)]

    def _behind(self, texts: Sequence[list[str]]) -> list[list[list[int]]]:
        """Tokenize the pieces of texts, each behind the end of the one before, as it stands in the whole text.

        Many tokenizers (of LLaMA 2 and Mistral, among others) put a space before a text, which within it there is not.
        Where a token would be partly of one piece and partly of the next, the next is tokenized as a text of its own.
        """
        first = iter(self._ids([pieces[0] for pieces in texts], special=False))
        joints = [(one[-_CONTEXT:], other) for pieces in texts for one, other in pairwise(pieces)]
        ends = iter(self._ids([end for end, _ in joints], special=False))
        both = iter(self._ids([end + piece for end, piece in joints], special=False))
        found = []
        for pieces in texts:
            ids = [next(first)]
            for piece in pieces[1:]:
                end, joined = next(ends), next(both)
                is_whole = joined[: len(end)] == end
                ids.append(joined[len(end) :] if is_whole else self._ids([piece], special=False)[0])
            found.append(ids)
        return found

    def _ids(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = self.tokenizer(list(texts), add_special_tokens=special, truncation=False, verbose=False)
        ids: list[list[int]] = found["input_ids"]
        return ids

    def _pieces(self, position: int, row: Row, reasons: dict[int, str]) -> list[str]:
        """The text of a row, cut where what is learned begins and ends; the first piece is the prompt.

        Empty ones of a row that cannot be rendered, with the reason under its position.
        """
        if self.template != CHAT:
            return [row.text, row.text_pair or ""]
        try:
            return rendered(self.tokenizer, self._talk(row))
        except RowProblem as problem:
            reasons[position] = str(problem)
            return ["", ""]

    def _talk(self, row: Row) -> Conversation:
        value = json.loads(row.json) if self._field is not None else {}
        if self._field is not None and value.get(self._field) is not None:
            return conversation(value, self._field, self._answer_field)
        asked, told = ("user", row.text), ("assistant", row.text_pair or "")
        return Conversation(tuple({"role": role, "content": text} for role, text in (asked, told)), (1,))

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Pad examples to one batch, on the right.

        Args:
            examples: at least one.

        Returns:
            "input_ids", "attention_mask" and "labels" (n, longest) int64; a label is `IGNORED` outside completions.
        """
        ids = [list(example.features["input_ids"]) for example in examples]
        labels = []
        for example, row in zip(examples, ids, strict=True):
            label = row.copy()
            for lo, hi in ((0, int(example.features["prompt"])), *example.features.get("gaps", ())):
                label[lo:hi] = [IGNORED] * (hi - lo)
            labels.append(label)
        return {
            "input_ids": pad(ids, int(self.tokenizer.pad_token_id or 0)),
            "attention_mask": pad([[1] * len(row) for row in ids], 0),
            "labels": pad(labels, IGNORED),
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
