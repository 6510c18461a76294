"""Conversations with calls of tools: what is read of them, how templates render them, and what is learned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import chat_templates
import polars as pl
import pytest
import torch
from chat_templates import HERMES, LLAMA, MISTRAL, NO_CALLS, NO_TOOLS, QWEN
from conftest import Run, write_rows
from tiny_models import tokenizer
from tiny_more import causal_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

import repmatch
from repmatch.curator.conversations import Conversation, conversation
from repmatch.curator.forms import TASKS
from repmatch.curator.records import RowProblem
from repmatch.curator.rows import FieldChoice, open_rows
from repmatch.curator.settings import Settings
from repmatch.curator.tasks import causal
from repmatch.curator.tasks.rendering import rendered
from repmatch.curator.workbench import Workbench
from repmatch.datamodels import Fields, Row

PLOT = {
    "type": "function",
    "function": {
        "name": "plot",
        "description": "the plot",
        "parameters": {"type": "object", "properties": {"film": {"type": "string"}}},
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "plot", "arguments": '{"film": "dull"}'}}
ASKED: list[dict[str, Any]] = [
    {"role": "user", "content": "a funny film"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "slow"},
    {"role": "assistant", "content": "not funny"},
]
GREETED: list[dict[str, Any]] = [{"role": "user", "content": "quiet"}, {"role": "assistant", "content": "loud"}]
SAID = '{"name": "plot", "arguments": {"film": "dull"}}'


def talk(messages: Any, tools: Any = (PLOT,), **more: Any) -> Conversation:
    return conversation(
        {"messages": messages, "tools": list(tools) if isinstance(tools, tuple) else tools, **more}, "messages"
    )


def reader(template: str) -> PreTrainedTokenizerFast:
    found = tokenizer()
    found.chat_template = template
    return found


def learned(template: str, found: Conversation) -> list[str]:
    return rendered(reader(template), found)[1::2]


def chat_model(folder: Path, template: str = HERMES) -> Path:
    causal_checkpoint(folder, "llama")
    (folder / "chat_template.jinja").write_text(template)
    return folder


def ingest(run: Run, store: Path, file: Path, dataset: str, model: Path, *more: object) -> dict[str, Any]:
    given = ("--task", "causal-lm", "--model", model, "--json", *more)
    result = run("--store", store, "ingest", file, "--dataset", dataset, *given)
    assert result.objects, result.err
    return {**result.objects[0], "err": result.err}


# ------------------------------------------------------------------------------------------------- under templates


@pytest.mark.parametrize(
    ("template", "call", "answer"),
    [
        (HERMES, f"<tool_call>{SAID}</tool_call><|im_end|>\n", "not funny<|im_end|>\n"),
        (QWEN, f"<tool_call>{SAID}</tool_call><|im_end|>\n", "<think>\n\n</think>\n\nnot funny<|im_end|>\n"),
        (LLAMA, SAID.replace("arguments", "parameters") + "<|eot|>", "not funny<|eot|>"),
        (MISTRAL, f"[CALLS][{SAID}]</s>", "not funny</s>"),
        (chat_templates.SILENT, f"<tool_call>{SAID}</tool_call><|im_end|>\n", "not funny<|im_end|>\n"),
        (chat_templates.JOINS, '<tool_call>plot {"film": "dull"}</tool_call><|im_end|>\n', "not funny<|im_end|>\n"),
        (chat_templates.PRINTS, '<tool_call>plot {"film": "dull"}</tool_call><|im_end|>\n', "not funny<|im_end|>\n"),
    ],
)
def test_a_call_and_the_answer_are_learned_and_what_the_tool_says_is_not(template: str, call: str, answer: str) -> None:
    pieces = rendered(reader(template), talk(ASKED))
    assert pieces[1::2] == [call, answer]
    assert "slow" in pieces[2]
    assert "the plot" in pieces[0]
    # The very text of the template, nothing added and nothing left out.
    whole = str(reader(template).apply_chat_template(_plain(ASKED, template), tools=[PLOT], tokenize=False))
    assert "".join(pieces) == whole
    # A turn before is read; by weights it is learned.
    assert learned(template, talk([*GREETED, *ASKED])) == [call, answer]
    weighted = [GREETED[0], {**GREETED[1], "weight": 1}, *ASKED]
    assert [text.startswith("loud") for text in learned(template, talk(weighted))] == [True, False, False]
    assert learned(template, talk(weighted))[1:] == [call, answer]
    # So it is with two answers in turn.
    twice = [*ASKED[:3], {**ASKED[2], "content": "moving"}, ASKED[3]]
    pieces = rendered(reader(template), talk(twice))
    assert pieces[1::2] == [call, answer]
    assert "moving" in pieces[2]


def _plain(messages: list[dict[str, Any]], template: str) -> list[dict[str, Any]]:
    """The messages as the documentation of transformers wants them, or with arguments as text."""
    as_text = template in (chat_templates.JOINS, chat_templates.PRINTS)
    arguments = CALL["function"]["arguments"] if as_text else {"film": "dull"}  # type: ignore[index]
    call = {**CALL, "function": {"name": "plot", "arguments": arguments}}
    empty = {} if template == chat_templates.SILENT else {"content": ""}
    caller = {"role": "assistant", "tool_calls": [call], **empty}
    return [messages[0], caller, {**messages[2], "name": "plot"}, messages[3]]


def test_a_conversation_may_end_with_a_call() -> None:
    assert learned(HERMES, talk(ASKED[:2])) == [f"<tool_call>{SAID}</tool_call><|im_end|>\n"]
    said = [ASKED[0], {**ASKED[1], "content": "the plot"}]
    assert learned(HERMES, talk(said)) == [f"the plot<tool_call>{SAID}</tool_call><|im_end|>\n"]
    twice = [ASKED[0], {**ASKED[1], "tool_calls": [CALL, CALL]}]
    assert learned(MISTRAL, talk(twice)) == [f"[CALLS][{SAID}, {SAID}]</s>"]
    with pytest.raises(RowProblem, match=r"refuses the conversation \(TemplateError: one call at a time\)"):
        rendered(reader(LLAMA), talk(twice))


def test_a_template_that_leaves_something_out_is_refused() -> None:
    cases = [
        (NO_TOOLS, talk(ASKED), "leaves out the tool 'plot'.*leave the column of the tools out"),
        (NO_TOOLS, talk(ASKED, None), "leaves out the call of 'plot'; use a model whose chat template knows tools"),
        (NO_TOOLS, talk(GREETED), "leaves out the tool 'plot'"),
        (NO_CALLS, talk(ASKED), "leaves out the call of 'plot'"),
        (chat_templates.JOINS.replace("{{ t | tojson }}", ""), talk(ASKED), "leaves out the tool 'plot'"),
        (HERMES.replace("{{ m.name }}: {{ m.content }}", ""), talk(ASKED), r"leaves out a tool's answer \(message 3\)"),
        (HERMES.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"), talk(_two_calls()), "the call of 'film'"),
    ]
    for template, found, reason in cases:
        with pytest.raises(RowProblem, match=reason):
            rendered(reader(template), found)
    assert learned(NO_CALLS, talk(GREETED)) == ["loud\n"]  # nothing is called


def _two_calls() -> list[dict[str, Any]]:
    film = {**CALL, "function": {"name": "film", "arguments": {}}}
    return [ASKED[0], {**ASKED[1], "tool_calls": [CALL, film]}, *ASKED[2:]]


def test_names_that_a_template_looks_up_are_found_as_they_are() -> None:
    strict = HERMES.replace(
        "{% for c in m.tool_calls or [] %}",
        "{% for c in m.tool_calls or [] %}{% if c.function.name != 'plot' %}{{ raise_exception('what') }}{% endif %}",
    )
    assert learned(strict, talk(ASKED))[0] == f"<tool_call>{SAID}</tool_call><|im_end|>\n"


def test_thoughts_are_given_under_every_name() -> None:
    for given in ("reasoning_content", "reasoning", "thinking"):
        messages = [*ASKED[:3], {**ASKED[3], given: "very slow"}]
        for read in ("reasoning_content", "reasoning", "thinking"):
            template = HERMES.replace("reasoning_content", read)
            assert learned(template, talk(messages))[1] == "<think>very slow</think>not funny<|im_end|>\n"
    assert learned(QWEN, talk([*ASKED[:3], {**ASKED[3], "thinking": "slow"}]))[1].startswith("<think>\nslow\n</think>")
    with pytest.raises(RowProblem, match=r"the reasoning \['x'\]; expected text"):
        talk([GREETED[0], {**GREETED[1], "thinking": ["x"]}])


def test_a_last_message_that_is_rendered_in_another_way() -> None:
    thought = [{**m, "thinking": "very slow"} if m["role"] == "assistant" else m for m in ASKED]
    call = ' to=plot<|message|>{"film": "dull"}<|call|>'
    answer = "<|channel|>analysis<|message|>very slow<|end|><|start|>assistant<|channel|>final<|message|>not funny"
    assert learned(chat_templates.CHANNELS, talk(thought)) == [call, answer + "<|return|>"]
    thoughts = "<|channel|>analysis<|message|>very slow<|end|><|start|>assistant"
    assert learned(chat_templates.CHANNELS, talk(thought[:2])) == [thoughts + call]
    weighted = [GREETED[0], {**GREETED[1], "weight": 1}, *thought]
    first = "<|channel|>final<|message|>loud"  # what closes the last message is not there
    found = reader(chat_templates.CHANNELS)
    found.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|return|>", "<|end|>"]})
    assert rendered(found, talk(weighted))[1::2] == [first, call, answer + "<|return|>"]


def test_what_a_rows_template_is_told() -> None:
    told = {"enable_thinking": False, "other": None}
    for given in (told, json.dumps(told)):
        pieces = rendered(reader(QWEN), talk(GREETED, None, chat_template_kwargs=given))
        assert pieces[1] == "loud<|im_end|>\n"
        assert pieces[0].endswith("<think>\n\n</think>\n\n")
    for wrong, reason in (([1], r"holds \[1\]; expected an object"), ({"tools": []}, "names 'tools'")):
        with pytest.raises(RowProblem, match=f"'chat_template_kwargs' {reason}"):
            talk(GREETED, None, chat_template_kwargs=wrong)


def test_a_template_for_tools_of_its_own_is_taken(tmp_path: Path) -> None:
    found = tokenizer()
    found.chat_template = {"default": NO_TOOLS, "tool_use": HERMES}
    assert rendered(found, talk(ASKED))[1] == f"<tool_call>{SAID}</tool_call><|im_end|>\n"


# --------------------------------------------------------------------------------------------------- what is read


def test_every_way_to_write_the_same_is_the_same() -> None:
    arguments = {"film": "dull"}
    function = {"name": "plot", "arguments": arguments}
    nulls = {"name": None, "tool_call_id": None, "tool_calls": None, "reasoning_content": None, "weight": None}
    calls: list[Any] = [
        [{"id": "c1", **function}],
        [{"id": "c1", "function": {"name": "plot", "arguments": {**arguments, "actor": None}}, "name": None}],
        json.dumps([{"id": "c1", "type": "function", "function": {**function, "arguments": json.dumps(arguments)}}]),
    ]
    tools: list[Any] = [
        json.dumps([PLOT]),
        [json.dumps(PLOT)],
        [PLOT["function"]],
        [{**PLOT, "strict": None, "function": {**PLOT["function"], "strict": None}}],  # type: ignore[dict-item]
    ]
    expected = talk(ASKED)
    assert expected.messages[2]["name"] == "plot"  # by the call's id
    for call in calls:
        messages = [nulls | ASKED[0], nulls | ASKED[1] | {"tool_calls": call}, nulls | ASKED[2], nulls | ASKED[3]]
        assert talk(messages) == expected
        assert talk(messages).identity() == expected.identity()
    for given in tools:
        assert talk(ASKED, given) == expected
    parts = {**ASKED[2], "content": [{"type": "text", "text": "sl"}, {"type": "text", "text": "ow"}]}
    assert talk([*ASKED[:2], parts, ASKED[3]]) == expected
    old = [
        ASKED[0],
        {**GREETED[1], "content": None, "function_call": CALL["function"]},
        {**ASKED[2], "role": "function"},
    ]
    found = conversation({"messages": [*old, ASKED[3]], "functions": [PLOT["function"]]}, "messages")
    assert (found.tools, found.messages[2]["role"]) == (expected.tools, "tool")
    assert found.messages[1]["tool_calls"][0]["function"] == function
    assert talk(GREETED, "[]") == talk(GREETED, None) == talk(GREETED, []) == talk(GREETED, "null")


def test_arguments_as_text_keep_their_nulls_and_order() -> None:
    call = {"name": "plot", "arguments": '{"b": null, "a": 1.50}'}
    found = talk([ASKED[0], {**ASKED[1], "tool_calls": [call]}])
    assert learned(HERMES, found) == [
        '<tool_call>{"name": "plot", "arguments": {"b": null, "a": 1.5}}</tool_call><|im_end|>\n'
    ]
    turned = talk([ASKED[0], {**ASKED[1], "tool_calls": [{**call, "arguments": '{"a": 1.5, "b": null}'}]}])
    assert turned.identity() != found.identity()
    for empty in ("", None, "{}"):
        bare = talk([ASKED[0], {**ASKED[1], "tool_calls": [{**call, "arguments": empty}]}])
        assert bare.messages[1]["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        ("plot", r"whose tool_calls are 'plot'; expected a list of calls"),
        ({"name": "plot"}, r"whose tool_calls are \{'name': 'plot'\}; expected a list of calls"),
        (["plot"], r"the call 'plot', which names no function"),
        ([{"function": {"arguments": {}}}], r"which names no function; expected one such as"),
        ([{"name": "plot", "arguments": "film=dull"}], r"call of 'plot' with the arguments 'film=dull' \(not JSON: "),
        ([{"name": "plot", "arguments": "[1]"}], r"arguments '\[1\]' .*expected an object, or JSON text of one"),
        ([{"name": "plot", "arguments": '{"a": NaN}'}], r"\(NaN is not JSON\)"),
        ([{"name": "plot", "arguments": '{"a": 1, "a": 2}'}], r"\(a JSON object has a key twice: 'a'\)"),
        ([{"name": "plot", "arguments": 3}], r"arguments 3; expected an object"),
        ([{"name": "plot", "arguments": '{"a": 1e999}'}], r"a number that is not finite"),
    ],
)
def test_calls_that_cannot_be_read(calls: Any, reason: str) -> None:
    with pytest.raises(RowProblem, match=reason):
        talk([ASKED[0], {**ASKED[1], "tool_calls": calls}])


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("hammer", r"column 'tools' holds 'hammer'; expected a list of tools"),
        ({"name": "plot"}, r"column 'tools' holds \{'name': 'plot'\}; expected a list of tools"),
        (["hammer"], r"column 'tools' holds the tool 'hammer', which names no function"),
        ([{"type": "web"}], r"rename the column where it holds no tools"),
        ('[{"name": "plot"', r"expected a list of tools"),
    ],
)
def test_tools_that_cannot_be_read(tools: Any, reason: str) -> None:
    with pytest.raises(RowProblem, match=reason):
        talk(ASKED, tools)


def test_calls_are_the_assistants() -> None:
    with pytest.raises(RowProblem, match="tool_calls by 'user'; expected them in messages of the assistant"):
        talk([{**ASKED[0], "tool_calls": [CALL]}, *ASKED[1:]])
    with pytest.raises(RowProblem, match="the last message in column 'messages' is 'slow' by 'tool'"):
        talk(ASKED[:3])


# ---------------------------------------------------------------------------------------------- which are learned


def test_sharegpts_messages_are_the_same_conversations(tmp_path: Path) -> None:
    said = json.dumps({"name": "plot", "arguments": {"film": "dull"}})
    shared = [
        {"from": "system", "value": "short"},
        {"from": "human", "value": "a funny film", "weight": None},
        {"from": "function_call", "value": said},
        {"from": "observation", "value": "slow"},
        {"from": "gpt", "value": "not funny", "role": None, "content": None},
    ]
    call = {"type": "function", "function": {"name": "plot", "arguments": {"film": "dull"}}}
    answers = [{"role": "tool", "content": "slow"}, ASKED[3]]
    usual = [{"role": "system", "content": "short"}, ASKED[0], {**ASKED[1], "tool_calls": [call]}, *answers]
    row = {"conversations": shared, "tools": json.dumps([PLOT])}
    assert conversation(row, "conversations") == talk(usual)
    assert learned(HERMES, talk(shared))[1] == "not funny<|im_end|>\n"
    assert conversation({**row, "conversations": json.dumps(shared)}, "conversations") == talk(usual)
    assert talk([*shared[:2], {"from": "function_call", "value": f"[{said}]"}]).learned == (2,)
    with pytest.raises(RowProblem, match="the call 'plot', which names no function"):
        talk([*shared[:2], {"from": "function_call", "value": "plot"}, *shared[3:]])
    opened = open_rows([str(write_rows(tmp_path / "a.jsonl", [row]))], FieldChoice(), kind=TASKS["causal-lm"])
    assert [type(found) for chunk in opened for found in chunk] == [Row]
    assert (opened.fields.form, opened.fields.text_field) == ("messages", "conversations")


def test_which_messages_are_learned() -> None:
    assert talk(GREETED).learned == (1,)
    assert talk([*GREETED, *GREETED]).learned == (3,)
    assert talk(ASKED).learned == (1, 3)
    assert talk([*ASKED, *GREETED]).learned == (5,)
    assert talk([*GREETED, *ASKED]).learned == (3, 5)
    assert talk([GREETED[1], *GREETED, GREETED[1]]).learned == (3,)  # no call led to it

    def weighted(*weights: Any) -> list[dict[str, Any]]:
        left = iter(weights)
        return [{**m, "weight": next(left)} if m["role"] == "assistant" else m for m in [*GREETED, *ASKED]]

    assert talk(weighted(1, None, None)).learned == (1, 3, 5)
    assert talk(weighted(0, None, None)).learned == (3, 5)
    assert talk(weighted(1, 0, 0.0)).learned == (1,)
    assert talk(weighted(None, None, None)).learned == (3, 5)
    assert talk([{"role": "assistant", "content": "loud", "weight": 1}, *GREETED]).learned == (2,)  # answers nothing
    with pytest.raises(RowProblem, match="has weight 0, so nothing is learned"):
        talk(weighted(0, 0, 0))
    with pytest.raises(RowProblem, match=r"the weight 0\.5; expected 1 \(learned\) or 0 \(not\)"):
        talk(weighted(1, 0.5, 1))


def test_a_prompt_and_a_completion_may_be_messages(tmp_path: Path) -> None:
    row = {"prompt": [*GREETED, *ASKED[:1]], "completion": ASKED[1:], "tools": [PLOT]}
    found = conversation(row, "prompt", "completion")
    assert (found.learned, found.messages) == ((3, 5), talk([*GREETED, *ASKED]).messages)
    assert found.identity() == talk([*GREETED, *ASKED]).identity()
    told = {**row, "completion": [*GREETED[::-1], *ASKED[1:]]}
    assert conversation(told, "prompt", "completion").learned == (3, 5, 7)  # all that the completion says
    assert conversation({"prompt": GREETED[:1], "completion": "loud"}, "prompt", "completion") == talk(GREETED, None)
    for wrong in (None, [], 3, "  "):
        with pytest.raises(RowProblem, match=r"column 'completion' holds .*expected a list of one or more messages"):
            conversation({**row, "completion": wrong}, "prompt", "completion")
    for rows, columns in (
        ([row], ("prompt", "completion")),
        ([{**row, "prompt": json.dumps(row["prompt"]), "completion": json.dumps(ASKED[1:])}], ("prompt", "completion")),
        ([{"prompt": ASKED}], ("prompt", None)),
        ([{"messages": ASKED, "completion": "x"}], ("messages", None)),
    ):
        opened = open_rows([str(write_rows(tmp_path / "r.jsonl", rows))], FieldChoice(), kind=TASKS["causal-lm"])
        ((made,),) = list(opened)
        assert isinstance(made, Row), made
        assert (opened.fields.form, opened.fields.text_field, opened.fields.text_pair_field) == ("messages", *columns)


def test_tokens_between_what_is_learned_count_for_nothing(tmp_path: Path) -> None:
    task = causal.CausalLanguage(reader(HERMES), causal.CHAT, 60, "messages")
    row = Row("r", json.dumps({"messages": ASKED, "tools": [PLOT]}), "", "", "", "", "", "here", 1)
    short = replace(row, json=json.dumps({"messages": GREETED}))

    def kept(max_length: int) -> tuple[list[int], list[int]]:
        task.max_length = max_length
        example, other = task.encode([row, short])
        made = task.collate([example, other])
        ids, labels = made["input_ids"][0].tolist(), made["labels"][0].tolist()
        assert example.truncated == (max_length < 200)
        assert "gaps" not in other.features
        assert next(label for label in made["labels"][1].tolist() if label != causal.IGNORED) == ids_of(task, "loud")[0]
        assert all(label in (causal.IGNORED, token) for token, label in zip(ids, labels, strict=True))
        return ids, [label for label in labels if label != causal.IGNORED]

    pieces = rendered(task.tokenizer, talk(ASKED))
    wanted = [token for piece in pieces[1::2] for token in ids_of(task, piece)]
    whole = [token for piece in pieces for token in ids_of(task, piece)]
    assert kept(1000) == (whole, wanted)
    follows = len(whole) - len(ids_of(task, pieces[0]))
    assert kept(follows + 3) == (whole[-follows - 3 :], wanted)  # of the prompt the end
    for cut in (1, len(ids_of(task, pieces[3])), len(ids_of(task, pieces[3])) + 2):
        ids, labels = kept(follows + 1 - cut)
        assert ids == whole[-follows - 1 :][: len(ids)]
        assert labels == wanted[: max(len(ids_of(task, pieces[1])), len(wanted) - cut)]


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_tokens_are_those_of_the_whole_text(scheme: Any) -> None:
    signs = [*'\n ▁<>|/_"{}:,', *"abcdefghijklmnopqrstuvwxyz", "▁quiet", "▁loud", "loud", "▁▁"]
    words = Tokenizer(models.BPE({sign: i for i, sign in enumerate(["<unk>", *signs])}, [], unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    spaced = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>")
    spaced.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    spaced.chat_template = HERMES
    task = causal.CausalLanguage(spaced, causal.CHAT, 1000, "messages")
    weighted = [GREETED[0], {**GREETED[1], "weight": 1}, *GREETED[:1], {"role": "assistant", "content": " so  "}]
    row = Row("r", json.dumps({"messages": weighted}), "", "", "", "", "", "here", 1)
    for template in (HERMES, MISTRAL.replace("</s>", "<end>").replace("<s>", "")):
        spaced.chat_template = template
        ids, labels = (task.collate(task.encode([row]))[name][0].tolist() for name in ("input_ids", "labels"))
        assert ids == spaced.apply_chat_template(weighted, tokenize=True, return_dict=False)
        said = spaced.convert_ids_to_tokens([label for label in labels if label != causal.IGNORED])
        assert said[:4] == [*"loud"]  # no space before it, which the template has not


def test_a_token_is_not_partly_of_the_prompt() -> None:
    signs = ["<unk>", "a", "b", "\n", "\n\n"]
    words = Tokenizer(models.BPE({sign: i for i, sign in enumerate(signs)}, [("\n", "\n")], unk_token="<unk>"))
    lines = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<unk>")
    lines.chat_template = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
    task = causal.CausalLanguage(lines, causal.CHAT, 1000, "messages")
    asked = [{"role": "user", "content": "a\n"}, {"role": "assistant", "content": "\nb"}]
    found = task.encode([Row("r", json.dumps({"messages": asked}), "", "", "", "", "", "here", 1)])[0].features
    # As after the prompt that a model is given to answer; the whole text's third line break would belong to both.
    assert (lines.convert_ids_to_tokens(found["input_ids"]), found["prompt"]) == (["a", "\n\n", "\n", "b", "\n"], 2)


def test_the_loss_is_the_mean_over_what_is_learned(tmp_path: Path) -> None:
    bench = Workbench.build(Settings(model=str(chat_model(tmp_path)), task="causal-lm", device="cpu"), "messages")
    task = bench.task((), Fields("id", "messages", None, "label", "messages"))
    row = Row("r", json.dumps({"messages": ASKED, "tools": [PLOT]}), "", "", "", "", "", "here", 1)
    task.max_length = 1000
    pieces = rendered(task.tokenizer, talk(ASKED))
    ids = torch.tensor([[token for piece in pieces for token in ids_of(task, piece)]])
    asked = torch.tensor([i % 2 == 1 for i, piece in enumerate(pieces) for _ in ids_of(task, piece)])
    module = bench.module(0)
    each = functional.cross_entropy(module(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
    (loss,) = task.losses(module, task.collate(task.encode([row])))
    torch.testing.assert_close(loss, each[asked[1:]].mean())
    assert abs(float(loss - each[int(asked.nonzero()[0]) - 1 :].mean())) > 1e-3  # not that over all that follows


def ids_of(task: causal.CausalLanguage, text: str) -> list[int]:
    found: list[int] = task.tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


# ------------------------------------------------------------------------------------------------------ end to end


def many(count: int, **more: Any) -> list[dict[str, object]]:
    words = ("slow", "dull", "loud", "quiet", "moving")
    return [
        {
            "id": f"c{i}",
            "messages": [*ASKED[:2], {**ASKED[2], "content": words[i % 5]}, ASKED[3]],
            "tools": [PLOT],
            **more,
        }
        for i in range(count)
    ]


def test_rows_with_calls_from_ingest_to_export(run: Run, tmp_path: Path) -> None:
    model, store = chat_model(tmp_path / "m"), tmp_path / "s"
    file = write_rows(tmp_path / "c.jsonl", many(6))
    (planned,) = run("plan", file, "--task", "causal-lm", "--model", model, "--json").objects
    assert (planned["rows"], planned["bad"]) == (6, 0)
    assert ingest(run, store, file, "c", model)["new"] == 6
    assert run("--store", store, "export", "c").out == file.read_text()
    shown = run("--store", store, "inspect", "c", "c1").out
    assert 'assistant: plot({"film": "dull"})\ntool: dull\n--\nnot funny' in shown
    nearest = run("--store", store, "nearest", "c", "c1", "-k", 2)
    assert (nearest.code, "user: a funny film" in nearest.out) == (0, True), nearest.err
    typed = run("--store", store, "nearest", "c", "--text", "a film", "--text-pair", "dull", "-k", 2, "--json")
    assert (typed.code, len(typed.objects)) == (0, 2), typed.err
    assert run("--store", store, "select", "c", "-k", 2, "--name", "few").code == 0
    assert run("--store", store, "info").code == 0


def test_tools_are_part_of_what_a_row_is(run: Run, tmp_path: Path) -> None:
    model, store = chat_model(tmp_path / "m"), tmp_path / "s"
    other = {**PLOT, "function": {**PLOT["function"], "description": "dull"}}  # type: ignore[dict-item]
    rows = [{"messages": ASKED, "tools": [PLOT]}, {"messages": ASKED, "tools": [other]}, {"messages": ASKED}]
    assert ingest(run, store, write_rows(tmp_path / "n.jsonl", rows), "n", model)["new"] == 3
    with repmatch.open(store, mode="r") as held:
        assert len(set(held.ids("n"))) == 3  # by the digest of the row
        assert len({row.task_hash for row in held.tasks("n")}) == 3
    file = write_rows(tmp_path / "c.jsonl", many(3))
    ingest(run, store, file, "c", model)
    rows = many(3, tools=json.dumps([PLOT]))  # the same in other words
    changed = ingest(run, store, write_rows(file, rows), "c", model)
    assert (changed["changed"], changed["precision"]) == (3, None)
    rows[1]["tools"] = [other]
    changed = ingest(run, store, write_rows(file, rows), "c", model)
    assert (changed["changed"], changed["unchanged"]) == (1, 2)
    assert changed["precision"] is not None


def test_arguments_in_another_order_are_computed_again_once(run: Run, tmp_path: Path) -> None:
    model, store = chat_model(tmp_path / "m"), tmp_path / "s"

    def rows(arguments: dict[str, str]) -> list[dict[str, object]]:
        call = {"name": "plot", "arguments": arguments}
        return [{"id": "a", "messages": [ASKED[0], {**ASKED[1], "tool_calls": [call]}]}]

    one = write_rows(tmp_path / "1.jsonl", rows({"film": "dull", "actor": "good"}))
    other = write_rows(tmp_path / "2.jsonl", rows({"actor": "good", "film": "dull"}))
    assert ingest(run, store, one, "a", model)["new"] == 1
    assert ingest(run, store, other, "b", model)["new"] == 1
    assert ingest(run, store, other, "a", model)["changed"] == 1
    again = ingest(run, store, other, "a", model)
    assert (again["unchanged"], again["changed"], again["precision"]) == (1, 0, None)
    assert run("--store", store, "export", "a").out == other.read_text()
    with repmatch.open(store, mode="r") as held:
        assert held.factors("a").norms.tolist() == held.factors("b").norms.tolist()


def test_ids_and_hashes_of_rows_without_tools_are_what_they_were(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"messages": GREETED}, {"messages": [*GREETED, *GREETED], "tools": None}]
    opened = open_rows([str(write_rows(tmp_path / "r.jsonl", rows))], FieldChoice(), kind=TASKS["causal-lm"])
    (made,) = list(opened)
    assert [(row.id, row.task_hash) for row in made if isinstance(row, Row)] == [
        ("39c720596a871d53132da82aa9659ea8", "79cf81f1c2e94d024f5e2dc5a3e1a420"),
        ("6934314cc7cef6ff4fb19dde10d2b4f2", "c5290bd8b3a32c5e94cbcabe4ac717f6"),
    ]


def test_rows_of_a_frame_have_nulls_where_others_have_keys(tmp_path: Path) -> None:
    search = {"type": "function", "function": {"name": "actor", "strict": True}}
    call = {"id": "c2", "type": "function", "function": {"name": "actor", "arguments": {"great": 1, "good": True}}}
    caller = {"role": "assistant", "content": "", "tool_calls": [call]}
    film = {**CALL, "function": {"name": "plot", "arguments": {"film": "dull"}}}
    talks = [[ASKED[0], {**ASKED[1], "content": "", "tool_calls": [film]}, *ASKED[2:]], [ASKED[0], caller]]
    rows: list[dict[str, object]] = [{"id": "a", "messages": talks[0], "tools": [PLOT]}]
    rows += [{"id": "b", "messages": talks[1], "tools": [search]}, {"id": "c", "messages": GREETED, "tools": None}]
    frame = pl.DataFrame(rows, infer_schema_length=None)
    assert frame["messages"][0][0]["tool_calls"] is None
    model = str(chat_model(tmp_path / "m"))
    frame.write_parquet(tmp_path / "f.parquet")
    with repmatch.open(tmp_path / "s") as store:
        curator = repmatch.Curator(store, model, settings=Settings(task="causal-lm"))
        sources = (
            ("lines", write_rows(tmp_path / "l.jsonl", rows)),
            ("frame", frame),
            ("file", tmp_path / "f.parquet"),
        )
        for name, source in sources:
            report = curator.ingest(source, name)
            assert (report.new, report.quarantined) == (3, 0)
        hashes = [[row.task_hash for row in store.tasks(name)] for name, _ in sources]
        assert hashes[0] == hashes[1] == hashes[2]
        made = [store.factors(name).flat.tobytes() for name, _ in sources]
        assert made[0] == made[1] == made[2]


def test_bad_calls_are_set_aside_by_line_with_the_remedy(run: Run, tmp_path: Path) -> None:
    rows = many(4)
    broken = {**CALL, "function": {"name": "plot", "arguments": "{film"}}
    rows[2]["messages"] = [ASKED[0], {**ASKED[1], "tool_calls": [broken]}]
    file, model = write_rows(tmp_path / "c.jsonl", rows), chat_model(tmp_path / "m")
    found = ingest(run, tmp_path / "s", file, "c", model)
    assert (found["new"], found["quarantined"]) == (3, 1)
    assert (
        "c.jsonl:3: column 'messages' holds a call of 'plot' with the arguments '{film' (not JSON: Expecting property "
        "name enclosed in double quotes at character 2, near '{film'); expected an object, or JSON text of one. Fix "
        "the row." in found["err"]
    )
    blind = chat_model(tmp_path / "blind", NO_TOOLS)
    mixed = [{"id": "x", "messages": GREETED}, *many(1)]
    found = ingest(run, tmp_path / "t", write_rows(tmp_path / "mixed.jsonl", mixed), "c", blind)
    assert (found["new"], found["quarantined"]) == (1, 1)
    assert "mixed.jsonl:2: the model's chat template leaves out the tool 'plot'; use a model whose" in found["err"]


def test_a_warm_start_and_a_subset_adapter_learn_calls_too(run: Run, tmp_path: Path) -> None:
    model, store = chat_model(tmp_path / "m"), tmp_path / "s"
    file = write_rows(tmp_path / "c.jsonl", many(8))
    assert ingest(run, store, file, "warm", model, "--warm-start", 4)["new"] == 8
    scored = run("--store", store, "score", "warm", "--json")
    assert (scored.code, len(scored.objects)) == (0, 8), scored.err
