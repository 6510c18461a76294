"""Rows that a task refuses are set aside as other bad rows are, and the rest goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, toy_rows, write_rows
from test_engine import make_rows
from test_engine_tasks import WordTask, conversations
from tiny_models import WORDS, sentences
from tiny_more import CHAT, GatedLstm, causal_checkpoint

import repmatch
from repmatch.curator import warm, windows
from repmatch.curator.settings import Settings
from repmatch.curator.shards import Shard, divide
from repmatch.curator.tasks import Example, OwnModel, causal
from repmatch.curator.workbench import Workbench
from repmatch.datamodels import Row
from repmatch.errors import InputError, RefusedRowsError

NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT
# Two kinds of template under which a conversation does not begin with the prompt for its answer.
THINKS = CHAT.replace("'[assistant] '", "'[assistant] slow '")
STRIPS = THINKS.replace("m['content']", "(m['content'].split('loud')[-1] | trim)")


def talk(*words: str, system: bool = False) -> list[dict[str, str]]:
    said = [{"role": ("user", "assistant")[i % 2], "content": w} for i, w in enumerate(words)]
    return [{"role": "system", "content": "very quiet"}, *said] if system else said


def chats(count: int, bad: Sequence[int] = ()) -> list[dict[str, object]]:
    texts = sentences(2 * count, 4)
    return [{"id": f"c{i}", "messages": talk(texts[2 * i], texts[2 * i + 1], system=i in bad)} for i in range(count)]


def chat_model(folder: Path, template: str) -> Path:
    causal_checkpoint(folder, "llama")
    (folder / "chat_template.jinja").write_text(template)
    return folder


def given(model: Path, *more: object) -> tuple[object, ...]:
    return ("--task", "causal-lm", "--model", model, *more)


def test_a_conversation_that_the_template_refuses_is_set_aside(run: Run, tmp_path: Path) -> None:
    model, store = chat_model(tmp_path / "m", NO_SYSTEM), tmp_path / "s"
    file = write_rows(tmp_path / "c.jsonl", chats(20, bad=(0, 7, 19)))
    (found,) = run("plan", file, *given(model), "--json").objects
    assert (found["rows"], found["bad"]) == (17, 3)
    ingest = ("--store", store, "ingest", file, "--dataset", "c", "--json")
    strict = run(*ingest, *given(model), "--strict")
    assert "3 of 20 rows are bad, and --strict refuses them all" in strict.err
    with repmatch.open(store, mode="r") as held:
        assert len(held.datasets()) == len(held.spaces()) == 0
    for new in (17, 0):  # a second time nothing but the bad rows is looked at
        result = run(*ingest, *given(model))
        assert (result.code, result.objects[0]["new"], result.objects[0]["quarantined"]) == (1, new, 3)
        for line in (1, 8, 20):
            assert (
                f"c.jsonl:{line}: the model's chat template refuses the conversation (TemplateError: no" in result.err
            )
    with repmatch.open(store, mode="r") as held:
        assert len(held.ids("c")) == 17
        assert len(held.sql("SELECT * FROM quarantine")) == 3
    good = [row for i, row in enumerate(chats(20)) if i not in (0, 7, 19)]
    alone = run("--store", store, "ingest", write_rows(tmp_path / "g.jsonl", good), "--dataset", "g", *given(model))
    assert alone.code == 0, alone.err
    with repmatch.open(store, mode="r") as held:
        for i in range(4):
            assert held.factors("c").matrix(i).tobytes() == held.factors("g").matrix(i).tobytes()


def test_where_every_row_is_refused_nothing_is_kept(run: Run, tmp_path: Path) -> None:
    model, store = chat_model(tmp_path / "m", NO_SYSTEM), tmp_path / "s"
    file = write_rows(tmp_path / "c.jsonl", chats(12, bad=range(12)))
    for more in ((), ("--warm-start", 4)):
        result = run("--store", store, "ingest", file, "--dataset", "c", *given(model), *more)
        assert result.code == 1
        assert "none of the first 12 rows can be used:" in result.err
        assert "and 2 more" in result.err
    assert "none of 12 rows can be used: the model's chat template" in run("plan", file, *given(model)).err
    with repmatch.open(store, mode="r") as held:
        assert len(held.datasets()) == 0


def test_a_completion_without_tokens_is_set_aside(run: Run, tmp_path: Path) -> None:
    model = causal_checkpoint(tmp_path / "m", "llama")
    reader = json.loads((model / "tokenizer_config.json").read_text())
    reader.pop("eos_token")
    (model / "tokenizer_config.json").write_text(json.dumps(reader))
    rows: list[dict[str, object]] = [{"id": i, "prompt": "good film", "completion": "dull plot"} for i in range(4)]
    rows[2]["completion"] = "\x0b"
    file = write_rows(tmp_path / "p.jsonl", rows)
    result = run("--store", tmp_path / "s", "ingest", file, "--dataset", "p", *given(model), "--json")
    assert (result.code, result.objects[0]["new"], result.objects[0]["quarantined"]) == (1, 3, 1), result.err


@pytest.mark.parametrize("template", [THINKS, STRIPS])
def test_the_answer_is_found_where_the_prompt_for_it_says_more(tmp_path: Path, template: str) -> None:
    bench = Workbench.build(Settings(model=str(chat_model(tmp_path, template)), task="causal-lm"), "messages")
    task = causal.CausalLanguage(bench.task(()).tokenizer, causal.CHAT, 60, "messages")
    plain = causal.CausalLanguage(task.tokenizer, causal.CHAT, 60, "messages")
    rows = conversations()
    found = task.encode(rows)
    task.tokenizer.chat_template = CHAT
    expected = plain.encode(rows)
    if template == THINKS:
        assert found == expected
    task.tokenizer.chat_template = template
    said = "1 2 loud good film"
    messages = talk("dull plot", said)
    (example,) = task.encode([Row("r", json.dumps({"messages": messages}), "", said, "", "", "", "here", 1)])
    answer = task.tokenizer.decode(example.features["input_ids"][example.features["prompt"] :])
    assert answer == ("good film [SEP]" if template == STRIPS else f"{said} [SEP]")


def test_an_answer_that_is_not_in_the_rendering_is_refused(tmp_path: Path) -> None:
    hides = "{% if add_generation_prompt %}{{ 'good' }}{% else %}{{ 'dull ' ~ (messages | length) }}{% endif %}"
    bench = Workbench.build(Settings(model=str(chat_model(tmp_path, hides)), task="causal-lm"), "messages")
    task = causal.CausalLanguage(bench.task(()).tokenizer, causal.CHAT, 60, "messages")
    with pytest.raises(RefusedRowsError, match=r"^here, line 1: .*cannot be told from the prompt") as error:
        task.encode(conversations(3))
    assert sorted(error.value.reasons) == [0, 1, 2]


class Picky(WordTask):
    """Refuses rows by the protocol, in place of an example."""

    def encode(self, rows: Sequence[Row]) -> list[Example]:
        short = {i: "too short" for i, row in enumerate(rows) if len(row.text.split()) < 6}
        if short:
            raise RefusedRowsError("short rows.", short)
        return super().encode(rows)


def test_shards_of_rows_that_are_refused_cover_every_row_once(tmp_path: Path, tiny_model: Path) -> None:
    task, rows = Picky(), make_rows(300)
    refused: list[Any] = []
    cut = list(windows.windows(iter([rows[:9], rows[9:]]), task, 10, refused))
    kept = [row.id for some, _ in cut for row in some]
    assert len(kept) + len(refused) == 300
    assert len(refused) > 20
    assert sorted([*kept, *(row.id for row in refused)]) == sorted(row.id for row in rows)
    parts = [divide(iter([rows[:9], rows[9:]]), task, 10, Shard(i, 3)) for i in (1, 2, 3)]
    assert [part.lo for part in parts[1:]] == [part.hi for part in parts[:-1]]
    assert (parts[0].lo, parts[-1].hi, parts[0].total) == (0, 300, 300)
    joined = []
    for part in parts:
        joined += [some for some, _ in windows.windows(iter([rows[part.lo : part.hi]]), task, 10, [])]
    assert joined == [some for some, _ in cut]
    with pytest.raises(RefusedRowsError):
        list(windows.windows(iter([rows]), task, 10))


def test_shards_merged_are_what_one_process_makes_of_rows_that_are_refused(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", toy_rows(200))
    own = OwnModel(GatedLstm(len(WORDS) + 1, 2), Picky(), "gates")
    settings = Settings(model=own, targets=("input",), device="cpu")

    def ingest(name: str, shard: str | None) -> repmatch.IngestReport:
        with repmatch.open(tmp_path / name) as store:
            return repmatch.Curator(store, settings=settings).ingest(file, "d", shard=shard)

    whole, parts = ingest("whole", None), [ingest(f"{i}", f"{i}/2") for i in (1, 2)]
    assert whole.quarantined > 10
    assert whole.new == 200 - whole.quarantined == sum(part.new for part in parts)
    assert sum(part.quarantined for part in parts) == whole.quarantined
    with repmatch.open(tmp_path / "out") as out:
        assert out.merge([tmp_path / "1", tmp_path / "2"]).missing == {}
        with repmatch.open(tmp_path / "whole", mode="r") as one:
            assert out.ids("d") == one.ids("d")
            assert out.factors("d").values.tobytes() == one.factors("d").values.tobytes()
            listed = "SELECT line, reason FROM quarantine ORDER BY line"
            assert out.sql(listed).rows() == one.sql(listed).rows()


class Undefined(WordTask):
    """The loss of some rows is no number."""

    name = "undefined"

    def batch(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        out = super().batch(rows)
        return {**out, "broken": torch.tensor([row.text.startswith("broken") for row in rows])}

    def losses(self, module: Any, inputs: Any) -> torch.Tensor:
        found = super().losses(module, {k: v for k, v in inputs.items() if k != "broken"})
        return torch.where(inputs["broken"], torch.nan, found)


def test_rows_without_a_finite_loss_are_left_out_of_a_warm_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import test_engine_tasks

    monkeypatch.setattr(test_engine_tasks, "WORDS", ["broken", *WORDS])
    rows = toy_rows(40)
    for i in (3, 30):
        rows[i]["text"] = f"broken {rows[i]['text']}"
    own = OwnModel(GatedLstm(len(WORDS) + 2, 2), Undefined(), "gates")
    settings = Settings(model=own, targets=("input",), device="cpu", warm_start="100%")
    with repmatch.open(tmp_path / "s") as store:
        report = repmatch.Curator(store, settings=settings).ingest(write_rows(tmp_path / "r.jsonl", rows), "d")
        assert (report.new, report.quarantined) == (38, 2)
        assert json.loads(store.adapters()["record"][0])["instances"] == 38
        assert np.isfinite(store.factors("d").values).all()
    assert "2 rows are left out of the warm start" in caplog.text
    bench = Workbench.build(replace_start(settings))
    broken = [Row(r.id, "{}", f"broken {r.text}", None, r.label, "", "", "here", 1) for r in make_rows(4)]
    with pytest.raises(InputError, match="none of the 4 rows drawn for the warm start can be used: here:1: the loss"):
        warm.train(bench, ("no", "perhaps", "yes"), broken)


def replace_start(settings: Settings) -> Settings:
    from dataclasses import replace

    own = OwnModel(GatedLstm(len(WORDS) + 2, 3), Undefined(), "gates")
    return replace(settings, model=own, warm_start=None)
