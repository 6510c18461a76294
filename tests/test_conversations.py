from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, write_rows
from tiny_more import causal_checkpoint

import repmatch
from repmatch.curator.conversations import conversation, messages_in
from repmatch.curator.forms import TASKS
from repmatch.curator.records import RowProblem
from repmatch.curator.rows import FieldChoice, open_rows

TALK = [{"role": "user", "content": "good film"}, {"role": "assistant", "content": "very good plot"}]


def form_of(path: Path, choice: FieldChoice | None = None) -> str:
    reader = open_rows([str(path)], choice or FieldChoice(), kind=TASKS["causal-lm"])
    list(reader)
    return reader.fields.form


def in_parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def test_messages_as_json_text_are_the_same_conversations(run: Run, tmp_path: Path) -> None:
    talks = [TALK, [*TALK, {"role": "user", "content": "the actor"}, {"role": "assistant", "content": "was great"}]]
    rows: list[dict[str, object]] = [{"id": str(i), "messages": talk} for i, talk in enumerate(talks)]
    lists = write_rows(tmp_path / "lists.jsonl", rows)
    with (tmp_path / "texts.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "messages"])
        writer.writerows([row["id"], json.dumps(row["messages"])] for row in rows)
    parts = [[{**m, "content": in_parts(m["content"][:3], m["content"][3:])} for m in talk] for talk in talks]
    pieces = write_rows(tmp_path / "parts.jsonl", [{"id": str(i), "messages": talk} for i, talk in enumerate(parts)])
    model = causal_checkpoint(tmp_path / "m", "qwen2")
    given = ("--task", "causal-lm", "--model", model, "--json")
    for name, file_of in (("lists", lists), ("texts", tmp_path / "texts.csv"), ("parts", pieces)):
        result = run("--store", tmp_path / "s", "ingest", file_of, "--dataset", name, *given)
        assert (result.code, result.objects[0]["new"]) == (0, 2), result.err
    with repmatch.open(tmp_path / "s", mode="r") as store:
        norms = [store.factors(name).norms.tolist() for name in ("lists", "texts", "parts")]
        assert norms[0] == norms[1] == norms[2]
        hashes = [[row.task_hash for row in store.tasks(name)] for name in ("lists", "texts", "parts")]
        assert hashes[0] == hashes[1] == hashes[2]
    changed = run("--store", tmp_path / "s", "ingest", pieces, "--dataset", "lists", *given)
    assert (changed.objects[0]["changed"], changed.objects[0]["precision"]) == (2, None)  # nothing is computed again


def test_a_conversation_may_be_typed(run: Run, tmp_path: Path) -> None:
    longer = [*TALK, {"role": "user", "content": "the actor"}, {"role": "assistant", "content": "was great"}]
    store, model = tmp_path / "s", causal_checkpoint(tmp_path / "m", "qwen2")
    talks = (TALK, longer, [*longer[2:], *longer[2:]])
    whole = [{"id": f"r{i}", "messages": talk} for i, talk in enumerate(talks)]
    cut = [{"id": f"r{i}", "prompt": talk[:-1], "completion": talk[-1:]} for i, talk in enumerate(talks)]
    for name, rows in (("whole", whole), ("cut", cut)):
        file = write_rows(tmp_path / f"{name}.jsonl", rows)
        result = run("--store", store, "ingest", file, "--dataset", name, "--task", "causal-lm", "--model", model)
        assert result.code == 0, result.err

    def first(*given: str) -> tuple[str, bool]:
        result = run("--store", store, "nearest", *given, "-k", 1, "--json")
        assert result.code == 0, result.err
        return result.objects[0]["id"], result.objects[0]["score"] > 0.999

    assert first("whole", "--text", json.dumps(longer)) == ("r1", True)
    for name in ("whole", "cut"):
        asked, told = json.dumps(longer[:-1]), json.dumps(longer[-1:])
        assert first(name, "--text", asked, "--text-pair", told) == ("r1", True)
        assert first(name, "--text", asked, "--text-pair", "was great") == ("r1", True)
        assert first(name, "--text", TALK[0]["content"], "--text-pair", json.dumps(TALK[1:])) == ("r0", True)
        result = run("--store", store, "nearest", name, "--text", asked)
        reason = "by 'user'; expected an answer of the assistant" if name == "whole" else "give the answer with"
        assert (result.code, reason in result.err, "Fix the row" in result.err) == (2, True, False), result.err


def test_a_prompt_may_look_like_a_conversation(tmp_path: Path) -> None:
    text = json.dumps(TALK)
    assert form_of(write_rows(tmp_path / "a.jsonl", [{"prompt": text, "completion": "x"}])) == "completion"
    assert form_of(write_rows(tmp_path / "b.jsonl", [{"messages": "broken"}, {"messages": text}])) == "messages"
    assert form_of(write_rows(tmp_path / "c.jsonl", [{"talk": text}]), FieldChoice(text_field="talk")) == "messages"
    for other in ("good", "[1]", "[]", "[", '["a"]', "[" * 100_000, '{"role": "user"}', 3, None):
        assert messages_in(other) == other


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "assistant", "content": [{"type": "image_url", "image_url": {}}]}, "expected parts of text only"),
        ({"role": "assistant", "content": [{"type": "text"}]}, "expected parts of text only"),
        ({"role": "assistant", "content": ["x"]}, "expected parts of text only"),
        ({"role": "assistant", "content": []}, "expected an answer of the assistant"),
        ({"role": "assistant", "content": None}, "whose role and content are text"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, "which names no function"),
        ("x", "whose role and content are text"),
    ],
)
def test_messages_that_cannot_be_learned_from(message: Any, reason: str) -> None:
    with pytest.raises(RowProblem, match=reason):
        conversation({"messages": [TALK[0], message]}, "messages")


def test_fields_beside_role_and_content_are_left_out() -> None:
    more = {**TALK[1], "tool_calls": None, "name": "x"}
    found = conversation({"messages": [TALK[0], more]}, "messages")
    assert list(found.messages) == TALK
    assert found.identity() == json.dumps(TALK, sort_keys=True, separators=(",", ":"))
