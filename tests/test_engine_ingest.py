"""Ingests of every task through the command line, warm starts, and what keeps an ingest going."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, toy_rows, write_rows
from test_engine import build, make_rows
from test_engine_tasks import WordTask
from tiny_models import WORDS, checkpoint, sentences
from tiny_more import GatedLstm, causal_checkpoint, image_checkpoint, masked_checkpoint, write_images

import repmatch
from repmatch.curator import precision, windows, work
from repmatch.curator.batches import Batches, Window, batches_by_tokens, factors_of
from repmatch.curator.classification import SequenceClassification
from repmatch.curator.engine import BatchFactors
from repmatch.curator.overlap import ahead, behind
from repmatch.curator.settings import Settings
from repmatch.curator.tasks import OwnModel
from repmatch.curator.workbench import Workbench
from repmatch.datamodels import Row
from repmatch.errors import ModelError, UsageError


def ingested(run: Run, store: Path, file: Path, name: str, *more: object) -> dict[str, Any]:
    result = run("--store", store, "ingest", file, "--dataset", name, "--json", *more)
    assert result.code == 0, result.err
    return result.objects[0]


def test_prompts_and_completions_go_in_and_find_their_neighbours(run: Run, tmp_path: Path) -> None:
    texts = sentences(12, 3)
    rows = [{"id": f"p{i}", "prompt": t, "completion": texts[-i - 1], "topic": i % 2} for i, t in enumerate(texts)]
    file, model = write_rows(tmp_path / "p.jsonl", rows), causal_checkpoint(tmp_path / "m", "llama")
    store = tmp_path / "s"
    report = ingested(run, store, file, "d", "--task", "causal-lm", "--model", model)
    assert (report["new"], report["quarantined"]) == (12, 0)
    asked = ("--store", store, "nearest", "d", "--text", texts[0], "--text-pair", texts[-1], "-k", 1, "--json")
    (best,) = run(*asked).objects
    assert best["id"] == "p0"
    assert float(str(best["score"])) == pytest.approx(1, abs=1e-3)
    without = run("--store", store, "nearest", "d", "--text", texts[0])
    assert "give the answer with --text-pair" in without.err
    score = run("--store", store, "score", "d", "--epochs", 1, "--json")
    assert score.code == 0, score.err
    assert len(score.objects) == 12
    rows[3]["topic"] = 7  # not part of the task: nothing is computed again
    changed = ingested(run, store, write_rows(file, rows), "d")
    assert (changed["changed"], changed["new"]) == (1, 0)
    assert run("--store", store, "export", "d").out == file.read_text()


def test_conversations_go_in(run: Run, tmp_path: Path) -> None:
    def talk(*words: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[i % 2], "content": w} for i, w in enumerate(words)]

    rows: list[dict[str, object]] = [
        {"id": "one", "messages": talk("good film", "very good plot")},
        {"id": "two", "messages": talk("dull film", "not slow", "and the actor", "was great")},
        {"id": "no-answer", "messages": talk("good film", "the plot", "the actor")},
        {"id": "no-list", "messages": "good film"},
        {"id": "no-content", "messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]},
    ]
    file, model = write_rows(tmp_path / "c.jsonl", rows), causal_checkpoint(tmp_path / "m", "qwen2")
    given = ("ingest", file, "--dataset", "c", "--task", "causal-lm", "--model", model, "--json")
    result = run("--store", tmp_path / "s", *given)
    assert (result.code, result.objects[0]["new"], result.objects[0]["quarantined"]) == (1, 2, 3)
    for reason in ("expected an answer of the assistant", "expected a list of two or more", "content are text"):
        assert reason in result.err
    with repmatch.open(tmp_path / "s", mode="r") as store:
        (two,) = store.tasks("c", ids=["two"])
        assert two.text == "user: dull film\nassistant: not slow\nuser: and the actor"
        assert two.text_pair == "was great"
        space = json.loads(store.spaces()["json"][0])
    assert (space["task"], space["template"]) == ("causal-lm", "chat")


def test_numbers_texts_and_images_go_in(run: Run, tmp_path: Path) -> None:
    texts = sentences(6, 2)
    numbers: list[dict[str, object]] = [{"id": str(i), "text": t, "label": i / 2} for i, t in enumerate(texts)]
    numbers.append({"id": "bad", "text": "good", "label": "good"})
    file = write_rows(tmp_path / "n.jsonl", numbers)
    model = checkpoint(tmp_path / "bert")
    given = ("--dataset", "n", "--task", "text-regression", "--model", model, "--json")
    result = run("--store", tmp_path / "s", "ingest", file, *given)
    assert (result.objects[0]["new"], result.objects[0]["quarantined"]) == (6, 1)
    assert "is 'good'; expected a finite number" in result.err
    near = run("--store", tmp_path / "s", "nearest", "n", "--text", texts[2], "--label", 1, "-k", 1, "--json")
    assert near.objects[0]["id"] == "2"
    assert "give it with --label" in run("--store", tmp_path / "s", "nearest", "n", "--text", texts[2]).err

    plain = write_rows(tmp_path / "t.jsonl", [{"id": str(i), "text": t} for i, t in enumerate(texts)])
    model = masked_checkpoint(tmp_path / "masked")
    assert ingested(run, tmp_path / "s", plain, "t", "--task", "masked-lm", "--model", model)["new"] == 6

    pytest.importorskip("PIL", reason="Pillow is not installed (the extra 'images')")
    rows = write_images(tmp_path, 6)
    rows.append({"id": "gone", "image": "gone.png", "label": "cat"})
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows.append({"id": "broken", "image": "broken.png", "label": "cat"})
    file = write_rows(tmp_path / "i.jsonl", rows)
    model = image_checkpoint(tmp_path / "vit", "vit")
    given = ("--dataset", "i", "--task", "image-classification", "--model", model, "--json")
    result = run("--store", tmp_path / "s", "ingest", file, *given)
    assert (result.objects[0]["new"], result.objects[0]["quarantined"]) == (6, 2)
    assert "gone.png" in result.err
    assert "broken.png" in result.err


def test_a_task_is_kept_and_another_one_refused(run: Run, tmp_path: Path, toy_store: Path, toy_file: Path) -> None:
    result = run("--store", toy_store, "ingest", toy_file, "--dataset", "toy", "--task", "text-regression")
    assert result.code == 1
    assert "task: 'sequence-classification' against 'text-regression'" in result.err
    assert ingested(run, toy_store, toy_file, "toy", "--task", "sequence-classification")["unchanged"] == 60
    wrong = run("--store", tmp_path / "x", "ingest", toy_file, "--dataset", "toy", "--steps", 0)
    assert "--steps 0 is out of range" in wrong.err


def test_layers_and_steps_make_spaces_of_their_own(run: Run, tmp_path: Path, tiny_model: Path, toy_file: Path) -> None:
    store = tmp_path / "s"
    for name, more in {
        "one": ("--layers", "1"),
        "steps": ("--steps", 3, "--rank", 2),
        "sgd": ("--optimizer", "sgd", "--learning-rate", 0.5),
    }.items():
        assert ingested(run, store, toy_file, name, "--model", tiny_model, *more)["new"] == 60
        assert ingested(run, store, toy_file, name, *more)["unchanged"] == 60
    with repmatch.open(store, mode="r") as held:
        spaces = [json.loads(text) for text in held.spaces()["json"]]
        assert {m[0].split(".")[3] for m in spaces[0]["matrices"]} == {"1"}
        assert spaces[1]["optimizer"] == {"name": "adamw", "lr": 1e-3, "eps": 1e-8, "steps": 3}
        assert spaces[2]["optimizer"] == {"name": "sgd", "lr": 0.5}
        assert held.factors("steps").cores is not None
    refused = run("--store", store, "ingest", toy_file, "--dataset", "one", "--layers", "7", "--model", tiny_model)
    assert "names layer 7" in refused.err


def test_a_start_of_its_own_choice(
    run: Run, tmp_path: Path, toy_file: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from repmatch.curator import warm

    bench = Workbench.build(Settings(model=str(tiny_model), device="cpu"))
    sizes = {n: warm.default_size(bench, n) for n in (999, 1000, 1500, 10**6)}
    assert sizes == {999: None, 1000: 333, 1500: 500, 10**6: 640}
    other = replace(bench, space=replace(bench.space, task="causal-lm"))
    assert warm.default_size(other, 5000) is None
    monkeypatch.setattr(warm, "AUTO_FROM", 40)
    store = tmp_path / "store"
    planned = run("plan", toy_file, "--model", tiny_model, "--warm-start", "auto", "--json").objects[0]
    assert planned["start_rows"] == 20
    assert float(str(planned["start_seconds"])) > 0
    assert run("plan", toy_file, "--model", tiny_model, "--json").objects[0]["start_rows"] == 0
    assert ingested(run, store, toy_file, "toy", "--model", tiny_model, "--warm-start", "auto")["new"] == 60
    assert ingested(run, store, toy_file, "paper", "--model", tiny_model)["new"] == 60
    assert ingested(run, store, toy_file, "toy")["unchanged"] == 60
    assert ingested(run, store, toy_file, "toy", "--warm-start", "auto")["unchanged"] == 60
    with repmatch.open(store) as held:
        (start,) = held.adapters().to_dicts()
        assert held.space(held.dataset("toy").space_id or "").warm_start == start["id"]
        assert held.space(held.dataset("paper").space_id or "").warm_start is None
        adapter = held.adapter(start["id"])
        assert adapter is not None
        assert adapter.recipe["instances"] == 20
        assert adapter.recipe["learning_rate"] == warm.RATE
    assert warm.steps_for(640) * min(warm.RATE, warm.DISTANCE / warm.steps_for(640)) == pytest.approx(warm.DISTANCE)


def test_a_warm_start_is_stored_once_and_used_by_everything(
    run: Run, tmp_path: Path, tiny_model: Path, toy_file: Path
) -> None:
    store = tmp_path / "s"
    ingested(run, store, toy_file, "cold", "--model", tiny_model)
    ingested(run, store, toy_file, "warm", "--model", tiny_model, "--warm-start", 20)
    with repmatch.open(store, mode="r") as held:
        first = held.adapters()
        assert first["subset"].to_list() == ["warm start of warm"]
        record = json.loads(first["record"][0])
        assert (record["instances"], record["steps"]) == (20, 10)
        spaces = {name: held.space(held.dataset(name).space_id or "") for name in ("cold", "warm")}
        assert set(spaces["cold"].differences(spaces["warm"])) == {"warm_start"}
        assert spaces["warm"].warm_start == first["id"][0]
        assert np.abs(held.factors("cold").values - held.factors("warm").values).max() > 0.01
    more = write_rows(tmp_path / "more.jsonl", [{"id": "new", "text": "good film", "label": "yes"}])
    assert ingested(run, store, more, "warm")["new"] == 1
    assert ingested(run, store, more, "warm", "--warm-start", 20)["unchanged"] == 1
    row = toy_rows()[4]
    near = run("--store", store, "nearest", "warm", "--text", row["text"], "--label", row["label"], "-k", 1, "--json")
    assert near.objects[0]["id"] == row["id"]
    assert float(str(near.objects[0]["score"])) == pytest.approx(1, abs=1e-3)
    assert run("--store", store, "score", "warm", "--epochs", 1).code == 0
    both = run("--store", store, "compare", "cold", "warm", "--epochs", 1)
    assert both.code == 0, both.err
    assert "trained from the cold one" in both.err  # what a cold and a warm dataset have in common
    alone = run("--store", store, "compare", "cold", "cold[stars > 1]", "--epochs", 1)
    assert "trained from the cold one" not in alone.err
    assert run("--store", store, "compare", "warm", "cold", "--epochs", 1, "--json").objects[0]["scores"][0][0] == 1.0  # type: ignore[index]
    assert "is another start" in run("--store", store, "ingest", more, "--dataset", "warm", "--warm-start", 30).err
    assert "is another start" in run("--store", store, "ingest", more, "--dataset", "cold", "--warm-start", 20).err
    three = [{**r, "label": ("a", "no", "yes")[i % 3]} for i, r in enumerate(toy_rows(12))]
    file = write_rows(tmp_path / "three.jsonl", three)
    assert ingested(run, store, file, "three", "--model", tiny_model, "--warm-start", "warm")["new"] == 12
    assert run("--store", store, "compare", "three", "warm", "--epochs", 1).code == 0
    for asked in ("cold", "0", "200%"):
        result = run("--store", store, "ingest", file, "--dataset", "x", "--model", tiny_model, "--warm-start", asked)
        assert result.code == 2, asked
    with repmatch.open(store, mode="r") as held:
        assert sum(s == "warm start of warm" for s in held.adapters()["subset"]) == 1


def test_a_merged_start_equals_the_trained_model(tmp_path: Path) -> None:
    from repmatch.curator import warm
    from repmatch.curator.settings import Settings
    from repmatch.curator.stack import AdapterStack
    from repmatch.curator.workbench import Workbench

    bench = Workbench.build(Settings(model=str(checkpoint(tmp_path)), device="cpu"))
    labels = ("no", "perhaps", "yes")
    rows = make_rows(24)
    cold = {name: value.clone() for name, value in bench.module(3).state_dict().items()}
    adapter = warm.train(bench, labels, rows, asked="24")
    assert adapter.record["last_loss"] < adapter.record["first_loss"]
    assert warm.train(bench, labels, rows, asked="24").id == adapter.id
    assert all((value == cold[name]).all() for name, value in bench.module(3).state_dict().items())
    task = bench.task(labels)
    batch = task.collate(task.encode(rows))
    trained = warm.shared_copy(bench.module(3))
    for name, value in adapter.full.items():
        warm._replace(trained, name, torch.from_numpy(value))
    space = replace(bench.space, rank=warm.RANK, alpha=warm.ALPHA)
    stack = AdapterStack(trained, space, [adapter.recipe["a_seed"]], torch.device("cpu"))
    with torch.no_grad():
        for name in stack.b:
            stack.a[name].copy_(torch.from_numpy(adapter.a[name])[None])
            stack.b[name].copy_(torch.from_numpy(adapter.b[name])[None])
        with stack.attached():
            expected = task.losses(trained, batch)
        started = bench.from_warm(adapter).start(labels)
        torch.testing.assert_close(task.losses(started, batch), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(expected, task.losses(bench.module(3), batch), rtol=1e-2)
    # A label keeps its trained row of the head whatever its index; one that was not there has the cold row.
    head = bench.from_warm(adapter).start(("maybe", "yes"))
    (name,) = [n for n in adapter.full if n.endswith("classifier.weight")]
    rows_of = head.get_parameter(name).detach().numpy()
    np.testing.assert_array_equal(rows_of[1], adapter.full[name][2])
    np.testing.assert_array_equal(rows_of[0], bench.module(2).get_parameter(name).detach().numpy()[0])


def test_a_module_of_ones_own_goes_in(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "r.jsonl", toy_rows(20))
    own = OwnModel(GatedLstm(len(WORDS) + 1, 2), WordTask(), "gates")
    settings = repmatch.Settings(model=own, targets=("input", "recurrent"), device="cpu")
    with repmatch.open(tmp_path / "s") as store:
        curator = repmatch.Curator(store, settings=settings)
        assert curator.ingest(file, "r").new == 20
        assert curator.nearest("r", text=str(toy_rows()[3]["text"]), label="yes", k=1).ids == ("toy-3",)
        with pytest.raises(UsageError, match="surrogate"):
            curator.nearest("r", text="half \ud800", label="yes")
        assert len(curator.score("r").ids) == 20
        other = OwnModel(GatedLstm(len(WORDS) + 1, 2, seed=1), WordTask(), "gates")
        with pytest.raises(repmatch.RepMatchError, match="model_fingerprint"):
            repmatch.Curator(store, settings=replace(settings, model=other)).nearest("r", text="good", label="yes")
        with pytest.raises(repmatch.RepMatchError, match="only Python can give"):
            repmatch.Curator(store).nearest("r", text="good", label="yes")


def test_a_plan_counts_what_an_ingest_then_does(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [*toy_rows(200), {"id": "bad", "text": "", "label": "no"}])
    given = ("--model", tiny_model, "--max-length", 12)
    (found,) = run("--store", tmp_path / "none", "plan", file, *given, "--json").objects
    assert (found["rows"], found["bad"], found["matrices"], found["tried"]) == (200, 1, 4, 200)
    assert not (tmp_path / "none").exists()
    result = run("--store", tmp_path / "s", "ingest", file, "--dataset", "d", *given, "--json")
    assert result.objects[0]["new"] == 200
    with repmatch.open(tmp_path / "s", mode="r") as store:
        tokens = store.sql("SELECT avg(tokens) AS tokens, avg(truncated::INT) AS cut FROM instances")
        size = store.info()["bytes"]["total"]
    assert found["tokens_per_row"] == pytest.approx(tokens["tokens"][0], abs=0.01)
    assert found["truncated"] == pytest.approx(tokens["cut"][0], abs=1e-3)
    assert found["store_bytes"] == pytest.approx(size, rel=0.3)
    assert float(str(found["instances_per_second"])) > 1
    assert "cannot be used" in run("plan", file, *given).out
    empty = write_rows(tmp_path / "empty.jsonl", [{"id": "bad", "text": "", "label": "no"}])
    assert "no row can be used (1 are bad)" in run("plan", empty, *given).err


def test_sign_codes_say_what_they_cost(run: Run, tmp_path: Path, tiny_model: Path, toy_file: Path) -> None:
    given = ("ingest", toy_file, "--dataset", "d", "--model", tiny_model, "--encoding", "sign")
    result = run("--store", tmp_path / "s", *given)
    assert re.search(r"sign codes: squared cosine with the exact factor [01]\.\d{4} on average", result.err)
    with repmatch.open(tmp_path / "s", mode="r") as store:
        detail = json.loads(store.runs()["detail"][0])
    assert detail["precision"] == "float32"
    cost = detail["sign_error"]
    assert cost["instances"] == 60
    assert 0.5 < cost["minimum"] <= cost["first_percentile"] <= cost["mean"] <= 1


def test_the_cost_of_sign_codes_by_hand() -> None:
    from repmatch.datamodels import Layout, Matrix

    layout = Layout((Matrix("a", 4, 1), Matrix("b", 2, 1)), 1)
    values = np.asarray([[0.5, -0.5, 0.5, 0.5, 1.0, 0.0], [0, 0, 0, 0, 0.6, 0.8]], np.float32)
    cost = work.sign_error(values, layout)
    # a: exact, then a zero factor that is left out; b: (1 + 0)² / 2 and (0.6 + 0.8)² / 2
    assert cost == {"instances": 2, "mean": round((1 + 0.5 + 0.98) / 3, 6)} | {
        "first_percentile": pytest.approx(0.5 + 0.02 * 0.48, abs=1e-5),
        "minimum": 0.5,
    }


class Small:
    """An engine whose memory holds so many instances."""

    def __init__(self, engine: Any, most: int) -> None:
        self.engine, self.most, self.seen = engine, most, list[int]()
        self.layout, self.device = engine.layout, engine.device

    def compute(self, inputs: dict[str, torch.Tensor]) -> BatchFactors:
        count = len(inputs["labels"])
        self.seen.append(count)
        if count > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        found: BatchFactors = self.engine.compute(inputs)
        return found


def test_out_of_memory_halves_the_batch_and_goes_on_smaller(tmp_path: Path) -> None:
    engine, task = build(checkpoint(tmp_path), 1)
    rows = make_rows(24)
    examples = task.encode(rows)
    whole, _ = factors_of(engine, task, rows, examples, 10_000)
    small = Small(engine, 5)
    batches = Batches(small, task, 200, 1)  # type: ignore[arg-type]
    ticks: list[int] = []
    found, bad = batches.factors(rows, examples, tick=ticks.append)
    assert not bad
    np.testing.assert_allclose(found.values, whole.values, atol=2e-3)
    assert batches.limit < 200
    assert sum(ticks) == 24
    failures = sum(count > 5 for count in small.seen)
    before = len(small.seen)
    batches.factors(rows, examples)
    assert sum(count > 5 for count in small.seen[before:]) < failures  # it has learned
    with pytest.raises(ModelError, match="alone does not fit into memory"):
        Batches(Small(engine, 0), task, 200, 1).factors(rows, examples)  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [1, 2])
def test_batches_side_by_side_give_the_same_bytes_every_time(tmp_path: Path, rank: int) -> None:
    engine, task = build(checkpoint(tmp_path), rank)
    rows = make_rows(40)
    examples = task.encode(rows)
    one_by_one, _ = Batches(engine, task, 60, 1).factors(rows, examples)
    threads = torch.get_num_threads()
    beside = Batches(engine, task, 60, 3)
    found = [beside.factors(rows, examples)[0] for _ in range(3)]
    assert torch.get_num_threads() == threads
    for batch in found:
        assert batch.values.tobytes() == found[0].values.tobytes()
        assert batch.norms.tobytes() == found[0].norms.tobytes()
        np.testing.assert_allclose(batch.losses, one_by_one.losses, rtol=1e-5)
    as_batch = [BatchFactors(b.values, b.cores, b.norms, b.losses) for b in (one_by_one, found[0])]
    assert precision.agreement(*as_batch, engine.layout).min() > 0.9999
    assert all(not m._forward_hooks for twin in beside._twins for m in twin.module.modules())
    engine._loss = lambda module, inputs: module(input_ids=inputs["nothing"])
    with pytest.raises(KeyError, match="nothing"):
        Batches(engine, task, 60, 3).factors(rows, examples)
    assert torch.get_num_threads() == threads


def windows_of(rows: list[Row], task: SequenceClassification, *sizes: int) -> Iterator[Window]:
    for size in sizes:
        some, rows = rows[:size], rows[size:]
        yield some, task.encode(some), [size]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_stream_of_windows_gives_what_each_window_gives(tmp_path: Path, workers: int) -> None:
    engine, task = build(checkpoint(tmp_path), 1)
    rows, sizes = make_rows(61), (20, 1, 25, 15)
    ticks: list[int] = []
    found = list(Batches(engine, task, 60, workers).stream(windows_of(rows, task, *sizes), ticks.append))
    assert sum(ticks) == 61
    alone = Batches(engine, task, 60, workers)
    for (batch, bad), (some, examples, _) in zip(found, windows_of(rows, task, *sizes), strict=True):
        expected, _ = alone.factors(some, examples)
        assert not bad
        assert batch.rows == expected.rows == tuple(some)
        assert batch.values.tobytes() == expected.values.tobytes()
        assert batch.losses.tobytes() == expected.losses.tobytes()
    assert list(Batches(engine, task, 60, workers).stream(iter([]))) == []
    assert len(Batches(engine, task, 60, workers).factors([], [])[0].rows) == 0


def test_a_factor_does_not_depend_on_the_number_of_cores(tmp_path: Path) -> None:
    engine, task = build(checkpoint(tmp_path), 1)
    rows, threads, found = make_rows(5), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(Batches(engine, task, 1024).factors(rows, task.encode(rows))[0])
    finally:
        torch.set_num_threads(threads)
    for batch in found[1:]:
        assert batch.values.tobytes() == found[0].values.tobytes()
        assert batch.losses.tobytes() == found[0].losses.tobytes()


def test_the_next_window_is_begun_before_the_last_one_is_taken(tmp_path: Path) -> None:
    engine, task = build(checkpoint(tmp_path), 1)
    loss, begun = engine._loss, threading.Semaphore(0)

    def counted(module: torch.nn.Module, inputs: Any) -> torch.Tensor:
        begun.release()
        return loss(module, inputs)

    beside = Batches(engine, task, 60, 2)
    beside.factors(make_rows(20), task.encode(make_rows(20)))  # the first batch of all is computed more than once
    engine._loss = counted
    for twin in beside._twins:
        twin._loss = counted
    sizes = (20, 20, 20)
    planned = [len(batches_by_tokens([e.tokens for e in x], 60)) for _, x, _ in windows_of(make_rows(60), task, *sizes)]
    made = beside.stream(windows_of(make_rows(60), task, *sizes))
    next(made)
    for _ in range(planned[0] + planned[1]):  # nobody asks for the second window, and it is computed
        assert begun.acquire(timeout=30)
    assert not begun.acquire(timeout=0.2)  # but not the third
    made.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("repmatch-batch")]


def test_an_error_in_a_window_comes_after_the_windows_before_it(tmp_path: Path) -> None:
    engine, task = build(checkpoint(tmp_path), 1)

    def broken() -> Iterator[Window]:
        yield from windows_of(make_rows(40), task, 20, 20)
        raise OSError("the disk is gone")

    made = Batches(engine, task, 60, 2).stream(broken())
    assert [len(next(made)[0].rows) for _ in range(2)] == [20, 20]
    with pytest.raises(OSError, match="the disk is gone"):
        list(made)
    assert not [t for t in threading.enumerate() if t.name.startswith("repmatch-batch")]


def test_batches_on_cuda_are_sized_from_free_memory() -> None:
    from repmatch.curator.memory import Meter, fitting_tokens

    inputs = {"input_ids": torch.zeros(4, 50, dtype=torch.int64)}

    def tokens(each: int, free: int) -> int:
        meter = Meter(lambda: None, lambda: 1000, lambda: 1000 + 200 * each, lambda: free)
        return fitting_tokens(lambda _: None, inputs, meter)

    assert tokens(10_000, 100_000_000) == 6912  # 0.7 · 1e8 / 1e4 = 7,000, in whole 256s
    assert tokens(10_000, 1_000_000) == 256
    assert tokens(1, 10**12) == 262_144


class Wide(torch.nn.Module):
    """One linear layer, wide enough for blocks of quantised numbers."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.used = torch.nn.Linear(64, 32)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.used(x).relu()
        return y


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_a_quantised_layer_is_adapted_but_not_merged(kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from test_engine_steps import toy_space

    from repmatch.curator import layers
    from repmatch.curator.engine import FactorEngine
    from repmatch.datamodels import Matrix

    def loss(module: torch.nn.Module, inputs: Any) -> torch.Tensor:
        squares: torch.Tensor = (module(inputs["x"]) ** 2).sum(dim=(1, 2))
        return squares

    module = Wide()
    quantised = getattr(bnb.nn, kind)(64, 32)
    quantised.load_state_dict(module.used.state_dict(), strict=False)
    module.used = quantised.to("cpu").requires_grad_(False)
    inputs = {"x": torch.randn(4, 6, 64, generator=torch.Generator().manual_seed(1))}
    space = toy_space(1, Matrix("used", 32, 64))
    gradients, _ = FactorEngine(module, space, loss).gradients(inputs)
    expected = FactorEngine(Wide(), space, loss).gradients(inputs)[0]["used"]
    cosine = torch.nn.functional.cosine_similarity(gradients["used"].flatten(1), expected.flatten(1))
    assert float(cosine.min()) > 0.95  # the forward pass is quantised, so not equal
    with pytest.raises(ModelError, match="quantised layer"):
        layers.add_to_weight(module.used, torch.zeros(32, 64))


@pytest.mark.parametrize("rank", [1, 2])
def test_many_steps_keep_a_broken_instance_to_itself(rank: int) -> None:
    from test_engine_steps import Toy, toy_inputs, toy_loss, toy_space

    from repmatch.curator.engine import FactorEngine
    from repmatch.datamodels import Matrix

    space = replace(
        toy_space(rank, Matrix("used", 5, 3)), optimizer={"name": "adamw", "lr": 0.01, "eps": 1e-8, "steps": 3}
    )
    engine = FactorEngine(Toy(), space, toy_loss)
    good = engine.compute(toy_inputs())
    scale = torch.tensor([1.0, float("nan"), 0.0, 1.0])
    found = engine.compute(toy_inputs(scale=scale))
    assert not np.isfinite(found.values[1]).all()
    assert np.isnan(found.losses[1])
    np.testing.assert_allclose(found.values[[0, 3]], good.values[[0, 3]], atol=1e-5)
    assert (found.values[2] == 0).all()  # a gradient of exactly zero has a factor of zeros
    assert found.norms[2, 0] == 0


def test_another_error_is_not_taken_for_lack_of_memory() -> None:
    def fail(_: list[int]) -> BatchFactors:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        precision.halving(fail, [1, 2, 3], lambda: None)
    assert precision.is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not precision.is_out_of_memory(ValueError("out of memory"))


def test_the_fastest_precision_that_agrees_is_taken(tmp_path: Path) -> None:
    engine, task = build(checkpoint(tmp_path), 1)
    batch = task.collate(task.encode(make_rows(8)))
    real = engine.compute

    def rough(inputs: dict[str, torch.Tensor]) -> BatchFactors:
        found = real(inputs)
        if engine.precision == "bf16":
            values = np.roll(found.values, 1, axis=0)  # those of another instance
            return BatchFactors(values, found.cores, found.norms, found.losses)
        return found

    engine.compute = rough  # type: ignore[assignment]
    chosen, measured = precision.choose(engine, batch, ("bf16", "tf32"))
    assert chosen == engine.precision == "tf32"
    assert measured["bf16"] < 0.999 <= measured["tf32"]
    assert precision.choose(engine, batch, ("bf16",))[0] == engine.precision == "float32"
    assert precision.choose(engine, batch) == ("float32", {})  # nothing to choose on the CPU


def test_bf16_changes_little_and_float32_is_restored(tmp_path: Path) -> None:
    engine, task = build(checkpoint(tmp_path), 2)
    batch = task.collate(task.encode(make_rows(4)))
    exact = engine.compute(batch)
    engine.precision = "bf16"
    rough = engine.compute(batch)
    engine.precision = "float32"
    again = engine.compute(batch)
    assert exact.values.tobytes() == again.values.tobytes()
    assert 0.5 < precision.agreement(exact, rough, engine.layout).mean() < 1
    np.testing.assert_allclose(precision.agreement(exact, again, engine.layout), 1, atol=1e-5)


@pytest.mark.parametrize("on", [True, False])
def test_work_beside_work_keeps_order_and_errors(on: bool) -> None:
    kept: list[int] = []
    with behind(kept.append, on) as keep:
        for item in ahead(iter(range(20)), on):
            keep(item)
    assert kept == list(range(20))

    def broken() -> Any:
        yield 1
        raise ValueError("the third row")

    stream = ahead(broken(), on)
    assert next(stream) == 1
    with pytest.raises(ValueError, match="third row"):
        next(stream)

    def refuse(_: int) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), behind(refuse, on) as keep:
        keep(1)
        keep(2)


def test_a_stream_that_is_left_early_ends_its_thread() -> None:
    import threading

    stream = ahead(iter(range(1000)))
    assert next(stream) == 0
    stream.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name == "repmatch-ahead"]


def test_an_overlapping_ingest_stores_the_same_bytes(
    tmp_path: Path, tiny_model: Path, toy_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: list[bytes] = []
    monkeypatch.setattr(windows, "_WINDOW_ROWS", (8, 16))

    def always(function: Any) -> Any:
        return lambda given, on: function(given, True)

    for overlapping in (False, True):
        if overlapping:
            monkeypatch.setattr("repmatch.curator.overlap.ahead", always(ahead))
            monkeypatch.setattr("repmatch.curator.overlap.behind", always(behind))
        with repmatch.open(tmp_path / str(overlapping)) as store:
            repmatch.Curator(store, str(tiny_model)).ingest(toy_file, "toy")
            values.append(np.asarray(store.factors("toy").flat).tobytes())
    assert values[0] == values[1]


def test_old_spaces_keep_their_ids(tmp_path: Path) -> None:
    """The id of a space with every value at its default is that of stores written before there were other tasks."""
    from repmatch.datamodels import Matrix, Space

    optimizer = {"name": "adamw", "lr": 1e-3, "eps": 1e-8}
    names = (Matrix("bert.encoder.layer.0.attention.self.query", 4, 4),)
    task = ("sequence-classification", "tokenizer:text[,text_pair]")
    space = Space("m", "f", "t", *task, 256, 1, 4.0, 0, names, optimizer)
    assert space.id == "6b668db0ae964d45b1b9dc91383a15c0"
    bench = __import__("repmatch.curator.workbench", fromlist=["x"]).Workbench.build(
        repmatch.Settings(model=str(checkpoint(tmp_path)))
    )
    assert (bench.space.task, bench.space.template) == task
    assert dict(bench.space.optimizer) == optimizer
    assert bench.space.warm_start is None


def test_rows_without_a_finite_loss_at_the_beginning_leave_the_bytes_the_same(tmp_path: Path) -> None:
    engine, task = build(checkpoint(tmp_path), 1)
    loss, rows = engine._loss, make_rows(60)
    shortest = min(e.tokens for e in task.encode(rows))

    def undefined(module: torch.nn.Module, inputs: Any) -> torch.Tensor:
        short = inputs["attention_mask"].sum(dim=1) <= shortest
        return torch.where(short, torch.nan, loss(module, inputs))

    engine._loss = undefined
    streams = [list(Batches(engine.twin(), task, 60, 3).stream(windows_of(rows, task, 30, 30))) for _ in range(3)]
    assert sum(len(bad) for _, bad in streams[0]) >= 1
    for found in streams[1:]:
        for (one, _), (other, _) in zip(found, streams[0], strict=True):
            assert one.values.tobytes() == other.values.tobytes()


def test_the_precision_is_told(run: Run, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, object]] = [{"id": str(i), "text": t, "label": i % 2} for i, t in enumerate(sentences(6, 2))]
    file = write_rows(tmp_path / "r.jsonl", rows)
    given = ("ingest", file, "--dataset", "d", "--model", tiny_model, "--device", "cpu")
    plain = run("--store", tmp_path / "plain", *given)
    assert "computed" not in plain.err
    signs = run("--store", tmp_path / "signs", *given, "--encoding", "sign", "--json").objects[0]
    assert (signs["device"], signs["precision"], signs["agreement"]) == ("cpu", "float32", None)
    assert set(signs["sign_error"]) == {"instances", "mean", "first_percentile", "minimum"}  # type: ignore[call-overload]
    again = run("--store", tmp_path / "signs", *given, "--json").objects[0]
    assert (again["unchanged"], again["device"], again["precision"], again["sign_error"]) == (6, None, None, None)

    cases: list[tuple[str, dict[str, float], str]] = [
        ("bf16", {"bf16": 0.9998}, "computed in bf16 on cpu, squared cosine with float32 0.99980 on the first rows.\n"),
        (
            "tf32",
            {"bf16": 0.5, "tf32": 0.9999},
            "computed in tf32 on cpu, squared cosine with float32 0.99990 on the first rows; not in bf16 (0.50000): "
            "below 0.999.\n",
        ),
        (
            "float32",
            {"bf16": 0.5, "tf32": 0.9},
            "computed in float32 on cpu; not in bf16 (0.50000) and tf32 (0.90000): below 0.999.\n",
        ),
    ]
    for chosen, measured, line in cases:
        monkeypatch.setattr(precision, "choose", lambda *_, found=(chosen, measured): found)
        result = run("--store", tmp_path / chosen, *given, "--json")
        assert line in result.err
        assert (result.objects[0]["precision"], result.objects[0]["agreement"]) == (chosen, measured)


def test_steps_that_diverge_are_blamed_and_not_the_text(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    rows: list[dict[str, object]] = [{"id": str(i), "text": t, "label": i % 2} for i, t in enumerate(sentences(4, 2))]
    file = write_rows(tmp_path / "r.jsonl", rows)
    given = ("ingest", file, "--dataset", "d", "--model", tiny_model, "--device", "cpu", "--optimizer", "sgd")
    result = run("--store", tmp_path / "s", *given, "--learning-rate", "1e30", "--steps", 10)
    assert (
        "after 10 steps of sgd at the learning rate 1e+30 the adapter holds values that are not finite; expected "
        "finite numbers. The steps diverge: take a smaller --learning-rate or fewer --steps\n" in result.err
    )
    assert "cannot learn" not in result.err


def test_a_form_that_does_not_exist_is_named() -> None:
    class Odd(WordTask):
        form = "clases"

    with pytest.raises(UsageError, match=r"there is no form 'clases'; did you mean 'classes'\?"):
        OwnModel(GatedLstm(3, 2), Odd())
