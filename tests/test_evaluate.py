from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, toy_rows, write_rows
from tiny_more import odd_encoder
from torch.nn import functional

import repmatch
from repmatch.curator import start
from repmatch.curator.evaluate.candidates import imbalance, nearest_to_centres, parse
from repmatch.curator.evaluate.evaluation import EvaluateOptions, evaluate, read_test
from repmatch.curator.evaluate.results import Trial, summarise
from repmatch.curator.evaluate.retraining import Job, Retrainer, RetrainRecipe, order
from repmatch.curator.settings import Settings
from repmatch.curator.workbench import Workbench
from repmatch.datamodels import Row
from repmatch.errors import InputError, UnknownNameError, UsageError

pytest.importorskip("scipy")
LABELS = ("no", "yes")
SHORT = RetrainRecipe(steps=6, batch_size=4, rank=2)


def rows_of(records: list[dict[str, object]]) -> list[Row]:
    return [
        Row(str(r["id"]), json.dumps(r), str(r["text"]), None, str(r["label"]), "", "", "rows", i + 1)
        for i, r in enumerate(records)
    ]


@pytest.fixture(scope="module")
def bench(tiny_model: Path) -> Workbench:
    return Workbench.build(Settings(model=str(tiny_model), device="cpu"))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that are none of the dataset's, but for the last."""
    fresh = [
        {
            "id": f"held-{i}",
            "text": f"quiet {i % 3} actor plot {'good' if i % 2 else 'dull'} {i}",
            "label": LABELS[i % 2],
        }
        for i in range(20)
    ]
    fresh.append({**toy_rows()[3], "id": "leaked"})
    return write_rows(tmp_path_factory.mktemp("held") / "held.jsonl", fresh)


def literal_losses(
    bench: Workbench, job: Job, recipe: RetrainRecipe, names: list[str] | None = None
) -> tuple[list[float], torch.nn.Module]:
    """Train with peft's LoRA layers and torch's optimiser on one selection, and return its losses."""
    from peft import LoraConfig, get_peft_model

    module, task = bench.module(2), bench.task(LABELS)
    names = names or list(bench.space.layout.names)
    with torch.random.fork_rng(devices=[]):
        config = LoraConfig(r=recipe.rank, lora_alpha=int(recipe.alpha), lora_dropout=0.0, target_modules=names)
        wrapped = get_peft_model(module, config)
    layers = dict(module.named_modules())
    with torch.no_grad():
        for matrix in (m for m in bench.space.matrices if m.name in names):
            a = start.draw_a(job.seed, matrix.name, recipe.rank, matrix.d_in)
            layers[matrix.name].lora_A["default"].weight.copy_(torch.from_numpy(a))
        kept = module.classifier.weight.clone(), module.classifier.bias.clone()
        std = module.config.initializer_range
        module.classifier.weight.copy_(
            torch.from_numpy(start.draw_head_rows(job.seed, "classifier.weight", (2, 32), std))
        )
        module.classifier.bias.zero_()
    wrapped.requires_grad_(False)
    trained = [p for n, p in wrapped.named_parameters() if "lora_" in n or "classifier" in n]
    for parameter in trained:
        parameter.requires_grad_(True)
    wrapped.eval()
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    losses = []
    for at in order(job.examples, job.seed, recipe):
        batch = task.collate([job.examples[i] for i in at])
        wanted = batch.pop("labels")
        loss = functional.cross_entropy(wrapped(**batch).logits, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        wrapped.unload()
        module.classifier.weight.copy_(kept[0])
        module.classifier.bias.copy_(kept[1])
    module.requires_grad_(False)
    return losses, module


def test_side_by_side_equals_one_by_one_and_the_literal_training(bench: Workbench) -> None:
    task = bench.task(LABELS)
    examples = task.encode(rows_of(toy_rows()))
    test = task.encode(rows_of(toy_rows(24)[10:]))
    recipe = RetrainRecipe(steps=6, batch_size=4, rank=2, learning_rate=1e-2)
    jobs = [Job(examples[:10], 0), Job(examples[10:13], 0), Job(examples[20:45], 1)]
    together = Retrainer(bench, LABELS, recipe).retrain(jobs, test)
    for job, found in zip(jobs, together, strict=True):
        (alone,) = Retrainer(bench, LABELS, recipe).retrain([job], test)
        losses, _ = literal_losses(bench, job, recipe)
        assert alone.last_loss == pytest.approx(losses[-1], rel=1e-4)
        assert found.last_loss == pytest.approx(losses[-1], rel=1e-4)
        assert found.right == alone.right
        assert losses[-1] != pytest.approx(losses[0], rel=1e-3)
        assert (found.steps, found.instances_read) == (6, 24)
    assert not any(p.requires_grad for p in bench.module(2).parameters())


def test_every_training_reads_as_many_instances_and_each_once_before_any_twice(bench: Workbench) -> None:
    examples = bench.task(LABELS).encode(rows_of(toy_rows()))
    recipe = RetrainRecipe(steps=30, batch_size=16)
    for count in (3, 16, 20, 60):
        batches = list(order(examples[:count], 7, recipe))
        assert [len(at) for at in batches] == [16] * 30
        seen = np.bincount(np.concatenate(batches), minlength=count)
        assert seen.max() - seen.min() <= 1
    assert list(order(examples, 7, recipe)) == list(order(examples, 7, recipe))
    assert list(order(examples, 7, recipe)) != list(order(examples, 8, recipe))


def test_an_evaluation_has_every_baseline_equal_steps_and_no_leak(toy_store: Path, held_out: Path) -> None:
    options = EvaluateOptions(sizes=(6, "20%"), seeds=2, recipe=SHORT)
    with repmatch.open(toy_store) as store:
        curator = repmatch.Curator(store)
        found = evaluate(curator, "toy", [str(held_out)], options)
        asked = {(line.candidate, line.size) for line in found.lines}
        names = ("facility-location", "random", "longest", "embeddings")
        assert asked == {(n, k) for n in names for k in (6, 12)} | {("full", 60)}
        assert {line.steps for line in found.lines} == {6}
        assert [leak.test_id for leak in found.leaks] == ["leaked"]
        assert found.test_rows == 20
        assert "toy-3" in found.notes[0]
        runs = store.sql("SELECT detail FROM runs WHERE command = 'retrain'")
        assert len(runs) == 2 * 9
        again = evaluate(curator, "toy", [str(held_out)], options)
        assert again.lines == found.lines
        assert again.reused == 18
        assert len(store.sql("SELECT 1 FROM runs WHERE command = 'retrain'")) == 18
    for line in found.lines:
        if line.candidate == "longest" and line.size == 6:
            assert line.tokens == sum(sorted(len(str(r["text"]).split()) + 2 for r in toy_rows())[-6:])
        assert (line.against_random is None) == (line.candidate in ("random", "full"))


def test_an_evaluation_that_was_killed_goes_on(toy_store: Path, held_out: Path) -> None:
    options = EvaluateOptions(sizes=(6,), seeds=2, recipe=SHORT)
    done = 0

    def stop(stage: str, at: int, total: int | None) -> None:
        nonlocal done
        if stage == "retraining" and at == 3 * SHORT.steps + 2:
            raise KeyboardInterrupt

    with repmatch.open(toy_store) as store:
        with pytest.raises(KeyboardInterrupt):
            evaluate(repmatch.Curator(store, progress=stop), "toy", [str(held_out)], options)
        assert len(store.sql("SELECT 1 FROM runs WHERE command = 'retrain' AND status = 'ok'")) == 3
        found = evaluate(repmatch.Curator(store), "toy", [str(held_out)], options)
        assert found.reused == 3
        fresh = evaluate(repmatch.Curator(store), "toy", [str(held_out)], options)
    assert fresh.lines == found.lines


def test_coresets_are_compared_with_as_many_random_rows(toy_store: Path, held_out: Path) -> None:
    options = EvaluateOptions(
        candidates=("random+balance=label",), coresets=("mine",), sizes=(6,), seeds=2, recipe=SHORT
    )
    with repmatch.open(toy_store) as store:
        curator = repmatch.Curator(store)
        curator.select("toy", 9, name="mine")
        found = evaluate(curator, "toy", [str(held_out)], options)
    sizes = {(line.candidate, line.size): line for line in found.lines}
    assert sizes["mine", 9].against_random is not None
    assert ("random", 9) in sizes
    assert sizes["random+balance=label", 6].imbalance == 0.0


def test_test_rows_that_cannot_be_used(toy_store: Path, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", [{"id": "a", "text": "good film", "label": "maybe"}])
    same = write_rows(tmp_path / "same.jsonl", toy_rows()[:3])
    with repmatch.open(toy_store) as store:
        curator = repmatch.Curator(store)
        with pytest.raises(InputError, match=r"other\.jsonl:1: the label 'maybe' is none"):
            read_test(curator, "toy", [str(other)], 0.8)
        with pytest.raises(InputError, match="'toy-0' as 'toy-0'; test on rows that were held out"):
            read_test(curator, "toy", [str(same)], 0.8)


def test_candidates_by_name() -> None:
    assert parse("facility-location+balance=label").balance == "label"
    assert parse("random+stratify=area code").stratify == "area code"
    with pytest.raises(UnknownNameError, match="did you mean 'facility-location'"):
        parse("facility-locatoin")
    with pytest.raises(UsageError, match=r"'label' is no rule; expected NAME, or NAME\+RULE"):
        parse("random+label")
    with pytest.raises(UsageError, match="takes no rule"):
        parse("full+balance=label")
    with pytest.raises(UsageError, match="picks of clusters take no rule"):
        parse("embeddings-k-means+balance=label")
    with pytest.raises(UsageError, match="random is a baseline"):
        parse("random+signed")
    several = parse("facility-location+balance=label+signed+matrices=*.value")
    assert (several.balance, several.signed, several.matrices) == ("label", True, "*.value")
    with pytest.raises(UsageError, match="--seeds 0"):
        EvaluateOptions(seeds=0)


def test_rows_nearest_to_centres_cover_the_clusters() -> None:
    rng = np.random.default_rng(0)
    centres = np.eye(4, dtype=np.float32)
    rows = np.repeat(centres, 10, axis=0) + rng.normal(0, 0.01, (40, 4)).astype(np.float32)
    picks = nearest_to_centres(rows, 4)
    assert sorted(picks // 10) == [0, 1, 2, 3]
    assert len(set(nearest_to_centres(np.repeat(centres, 10, axis=0), 20).tolist())) == 20  # empty clusters


@pytest.mark.parametrize("upper", [1, 2])
def test_lower_layers_run_once_change_nothing(bench: Workbench, upper: int) -> None:
    task = bench.task(LABELS)
    examples, test = task.encode(rows_of(toy_rows())), task.encode(rows_of(toy_rows(24)[10:]))
    recipe = RetrainRecipe(steps=4, batch_size=4, rank=2, layers=upper)
    jobs = [Job(examples[:10], 0), Job(examples[10:30], 1)]
    short = Retrainer(bench, LABELS, recipe)
    found = short.retrain(jobs, test)
    whole = Retrainer(bench, LABELS, recipe)
    whole.lower = None  # the same upper matrices, every layer run
    kept = list(short.space.matrices)
    assert all(
        int(m.name.split(".layer.")[1].split(".")[0]) >= bench.module(2).config.num_hidden_layers - upper for m in kept
    )
    for a, b in zip(found, whole.retrain(jobs, test), strict=True):
        assert a.last_loss == pytest.approx(b.last_loss, rel=1e-4)
        assert a.right == b.right
    literal, _ = literal_losses(bench, jobs[0], recipe, [m.name for m in kept])
    assert found[0].last_loss == pytest.approx(literal[-1], rel=1e-4)


def test_imbalance_by_hand() -> None:
    assert imbalance(["a", "b"], ["a", "b", "a", "b"]) == 0.0
    assert imbalance(["a", "a"], ["a", "b"]) == pytest.approx(0.5)
    assert imbalance(["c"], ["a"]) == 1.0


def test_lines_pair_seed_with_seed() -> None:
    def trial(name: str, seed: int, accuracy: float) -> Trial:
        return Trial(name, 5, seed, ("x",), accuracy=accuracy)

    trials = [trial("a", 1, 0.9), trial("a", 0, 0.5), trial("random", 0, 0.4), trial("random", 1, 0.8)]
    lines = summarise(trials, ["a", "random"])
    assert lines[0].accuracies == (0.5, 0.9)
    assert lines[0].against_random is not None
    assert lines[0].against_random.mean == pytest.approx(0.1)
    assert lines[0].against_random.low == pytest.approx(0.1)
    assert lines[1].against_random is None


def test_the_command_prints_a_table_json_and_a_picture(
    run: Run, toy_store: Path, held_out: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "curves.svg"
    asked = ("--store", toy_store, "evaluate", "toy", "--test", held_out, "--sizes", "6", "--seeds", 2, "--steps", 2)
    shown = run(*asked, "--plot", picture)
    assert shown.code == 0
    assert shown.out.splitlines()[0] == "toy: accuracy on 20 held-out rows, 2 steps each"
    assert "6 rows: " in shown.out
    assert "1 test rows stand in toy too" in shown.err
    assert "2 seeds say next to nothing" in shown.err
    assert "<svg" in picture.read_text()
    lines = run(*asked, "--json").objects
    assert {line["candidate"] for line in lines} == {"facility-location", "random", "full", "longest", "embeddings"}
    assert all(len(line["accuracies"]) == 2 for line in lines)  # type: ignore[arg-type]
    refused = run(*asked, "--plot", tmp_path / "curves.doc")
    assert refused.code == 2
    assert "no picture format" in refused.err


@pytest.mark.parametrize(("model", "layers"), [("deberta-v2", None), ("deberta-v2", 1), ("xlnet", None), ("xlnet", 1)])
def test_a_model_that_mixes_a_batch_is_trained_one_selection_after_the_other(
    tmp_path: Path, model: str, layers: int | None
) -> None:
    targets = ("layer_1",) if model == "xlnet" else None
    bench = Workbench.build(Settings(model=str(odd_encoder(tmp_path, model)), targets=targets, device="cpu"))
    task = bench.task(LABELS)
    examples, test = task.encode(rows_of(toy_rows())), task.encode(rows_of(toy_rows(24)[10:]))
    recipe = RetrainRecipe(steps=3, batch_size=4, rank=2, layers=layers)
    jobs = [Job(examples[:10], 0), Job(examples[10:13], 0)]
    ticks: list[tuple[int, int]] = []
    found = Retrainer(bench, LABELS, recipe).retrain(jobs, test, lambda *at: ticks.append(at))
    assert ticks == [(0, 3), (1, 3), (1, 3), (2, 3), (2, 3), (3, 3)]
    for job, one in zip(jobs, found, strict=True):
        (alone,) = Retrainer(bench, LABELS, recipe).retrain([job], test)
        assert one.last_loss == pytest.approx(alone.last_loss, rel=1e-5)
        assert one.right == alone.right


def test_layers_that_hand_on_more_than_hidden_states_run_every_time(bench: Workbench) -> None:
    task = bench.task(LABELS)
    examples = task.encode(rows_of(toy_rows()))
    recipe = RetrainRecipe(steps=2, batch_size=4, rank=2, layers=1)
    plain = Retrainer(bench, LABELS, recipe)
    plain.retrain([Job(examples[:6], 0)], examples[6:8])
    assert plain.lower is not None
    odd = Retrainer(bench, LABELS, recipe)
    odd.module = copy.deepcopy(odd.module)
    layers = odd.module.base_model.encoder.layer
    handed: list[Any] = []
    layers[0].register_forward_hook(lambda _module, _args, output: handed.append(output.mean()))
    layers[1].register_forward_hook(lambda _module, _args, output: output * handed.pop())
    odd.lower = None if odd.lower is None else replace(odd.lower, module=odd.module, blocks=layers)
    odd.retrain([Job(examples[:6], 0)], examples[6:8])
    assert odd.lower is None


def test_a_model_that_pads_to_its_windows_runs_its_lower_layers_every_time(tmp_path: Path) -> None:
    settings = Settings(model=str(odd_encoder(tmp_path, "longformer")), targets=("output.dense",), device="cpu")
    bench = Workbench.build(settings)
    task = bench.task(LABELS)
    examples, test = task.encode(rows_of(toy_rows())), task.encode(rows_of(toy_rows(24)[10:]))
    recipe = RetrainRecipe(steps=3, batch_size=4, rank=2, layers=1)
    whole = Retrainer(bench, LABELS, recipe)
    whole.lower = None
    jobs = [Job(examples[:10], 0)]
    (one,), (other,) = whole.retrain(jobs, test), Retrainer(bench, LABELS, recipe).retrain(jobs, test)
    assert (one.right, one.last_loss) == (other.right, other.last_loss)
