from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from conftest import Run, toy_rows, write_rows

import repmatch
from repmatch.curator import start
from repmatch.curator.scoring import directions
from repmatch.curator.study.batches import _Draw, _gradients, study_batches
from repmatch.curator.study.fields import study_field
from repmatch.curator.study.information import _compared, study_information
from repmatch.curator.study.layers import study_layers
from repmatch.curator.study.nearest import expected, precision
from repmatch.curator.study.seeds import SeedStudy, study_seeds
from repmatch.curator.study.spaces import study_spaces
from repmatch.curator.training import Recipe, train
from repmatch.curator.workbench import Workbench
from repmatch.errors import SelectionError, SpaceMismatchError, UnknownNameError, UsageError
from repmatch.similarity import kernel_block, matrix_scores, orthonormal


def test_precision_counts_the_nearest_but_never_the_query_itself() -> None:
    rng = np.random.default_rng(0)
    similarity = rng.random((40, 40))
    values = [str(v) for v in rng.integers(0, 3, 40)]
    shares = []
    for i in range(40):
        order = [j for j in np.argsort(-similarity[i]) if j != i][:5]
        shares.append(np.mean([values[j] == values[i] for j in order]))
    assert precision(lambda at: similarity[at], values, k=5) == pytest.approx(np.mean(shares))
    pairs = [values[i] == values[j] for i, j in combinations(range(40), 2)]
    assert expected(values) == pytest.approx(np.mean(pairs))
    with pytest.raises(SelectionError, match="more than 10"):
        precision(lambda at: similarity[at], values[:10])


def test_within_and_between_are_means_over_pairs(toy_store: Path) -> None:
    with repmatch.open(toy_store) as store:
        found = study_field(store, "toy", "group")
        factors = store.factors("toy")
    kernel = kernel_block(factors, factors).astype(np.float64)
    group = np.array([str(r["group"]) for r in toy_rows()])
    assert found.values == ("c", "b", "a")
    assert found.counts == (30, 20, 10)
    within = [kernel[i, j] for i, j in combinations(range(60), 2) if group[i] == group[j]]
    between = [kernel[i, j] for i, j in combinations(range(60), 2) if group[i] != group[j]]
    assert found.within == pytest.approx(np.mean(within), rel=1e-4)
    assert found.between == pytest.approx(np.mean(between), rel=1e-4)
    both = kernel[np.ix_(group == "c", group == "a")]
    assert found.similarity[0, 2] == pytest.approx(both.mean(), rel=1e-4)
    assert found.nearest == pytest.approx(precision(lambda at: kernel[at].astype(np.float32), group.tolist()), abs=0.01)
    assert found.nearest_embeddings is None
    assert found.verdict()[-1].startswith("of the ten nearest ")


def test_the_label_of_a_cold_start_is_seen_and_a_column_of_chance_is_not(toy_store: Path) -> None:
    with repmatch.open(toy_store) as store:
        shown = study_field(store, "toy", "stars").verdict()
        assert "no more alike than others" in shown[0] or "1.0 times" in shown[0] or "1.1 times" in shown[0]
        with pytest.raises(SelectionError, match="0 different values"):
            study_field(store, "toy", "x")
        with pytest.raises(UnknownNameError):
            study_field(store, "toy", "nothing")


def test_layers_alone_and_left_out(toy_store: Path) -> None:
    with repmatch.open(toy_store) as store:
        found = study_layers(store, "toy")
        factors = store.factors("toy")
    labels = [str(r["label"]) for r in toy_rows()]
    assert found.matrices == factors.matrices
    kernels = []
    for m in range(4):
        block = factors.matrix(m)[:, :, 0].astype(np.float64)
        kernels.append(np.square(block @ block.T))
    rest = np.mean(kernels[1:], axis=0)
    assert found.alone[2] == pytest.approx(precision(lambda at: kernels[2][at].astype(np.float32), labels), abs=0.01)
    assert found.without[0] == pytest.approx(precision(lambda at: rest[at].astype(np.float32), labels), abs=0.01)
    assert found.zero.max() == 0.0
    assert found.verdict()[0].startswith("all 4 matrices together: ")


def test_orders_of_the_same_rows_are_compared(toy_store: Path) -> None:
    with repmatch.open(toy_store) as store:
        trainer = repmatch.Curator(store, recipe=Recipe(epochs=2)).trainer
        names = ("toy", "toy[stars > 0]")
        found = study_seeds(trainer, names, seeds=2)
        space = trainer.space_of("toy")
        first, second = (
            directions(replace(trainer, recipe=Recipe(epochs=2, seed=s)).adapter(names[0]), space) for s in (0, 1)
        )
        assert found.mean[0, 0] == pytest.approx(float(matrix_scores(first, second).mean()))
        assert found.spread[0, 0] == 0.0  # one pair of orders
        assert found.mean[0, 1] == found.mean[1, 0]
        assert found.spread[0, 1] > 0
        assert ((found.halves > 0) & (found.halves <= 1)).all()
        count = len(store.adapters())
        assert study_seeds(trainer, names, seeds=2).mean.tolist() == found.mean.tolist()
        assert len(store.adapters()) == count == 8
        with pytest.raises(UsageError, match="shows no spread"):
            study_seeds(trainer, names, seeds=1)


def test_spaces_are_compared_on_the_rows_they_share(
    run: Run, toy_store: Path, tiny_model: Path, tmp_path: Path
) -> None:
    stats = pytest.importorskip("scipy.stats")
    rows = [r if i else {**r, "text": "another text"} for i, r in enumerate(toy_rows())]
    file = write_rows(tmp_path / "changed.jsonl", rows)
    run("--store", toy_store, "ingest", file, "--dataset", "two", "--model", tiny_model, "--rank", 2)
    with repmatch.open(toy_store) as store:
        found = study_spaces(store, ("toy", "two"))
        ids = [f"toy-{i}" for i in range(1, 60)]  # the first row's text differs
        one, two = (store.factors(name, ids=ids) for name in ("toy", "two"))
        same = study_spaces(store, ("toy", "two", "toy"))
    assert found.rows == 59
    assert found.differences == {(0, 1): ("rank",)}
    kernels = [kernel_block(f, f).astype(np.float64) for f in (one, two)]
    centre = np.eye(59) - 1 / 59
    k, other = (centre @ kernel @ centre for kernel in kernels)
    expected_alignment = np.trace(k @ other) / np.sqrt(np.trace(k @ k) * np.trace(other @ other))
    assert found.alignment[0, 1] == pytest.approx(expected_alignment)
    means = [(kernel.sum(axis=1) - np.diag(kernel)) / 58 for kernel in kernels]
    assert found.rank[0, 1] == pytest.approx(stats.spearmanr(*means).statistic)
    assert same.alignment[0, 2] == pytest.approx(1.0)
    assert same.nearest[0, 2] == 1.0
    assert "see the same" in same.verdict()[1]
    assert "differ in rank" in found.verdict()[0]
    shown = run("--store", toy_store, "study", "spaces", "toy", "two")
    assert shown.out.startswith("centred kernel alignment on 59 shared rows")
    assert run("--store", toy_store, "study", "spaces", "toy").code == 2


def test_other_spaces_are_refused(run: Run, toy_store: Path, tiny_model: Path, toy_file: Path) -> None:
    run("--store", toy_store, "ingest", toy_file, "--dataset", "other", "--model", tiny_model, "--rank", 2)
    with repmatch.open(toy_store) as store, pytest.raises(SpaceMismatchError, match="rank: 1 against 2"):
        study_seeds(repmatch.Curator(store).trainer, ("toy", "other"))


def test_the_verdict_tells_likeness_in_units_of_the_noise() -> None:
    mean = np.array([[0.6, 0.5, 0.1], [0.5, 0.6, 0.1], [0.1, 0.1, 0.6]])
    spread = np.full((3, 3), 0.05)
    halves = np.array([0.4, math.nan, 0.4])
    said = SeedStudy(("a", "b", "c"), 3, mean, spread, halves, 0.002).verdict()
    assert said[0] == "a: the same rows in another order score 0.600, of two halves 0.400; chance 0.0020"
    assert "most alike: a and b (0.500), 8.0 spreads of the seeds above the mean of the others (0.100)" in said
    unstable = SeedStudy(("a",), 3, np.array([[0.01]]), np.array([[0.0]]), np.array([math.nan]), 0.0026).verdict()
    assert "training is unstable" in unstable[1]


def test_a_batch_is_the_step_that_training_takes_on_it(toy_store: Path) -> None:
    with repmatch.open(toy_store) as store:
        trainer = repmatch.Curator(store).trainer
        space, known = trainer.space_of("toy"), store.dataset("toy")
        ids = store.ids("toy")[:4]
        gradients, labels = _gradients(trainer, "toy", ids)
        a = {m.name: start.draw_a(space.seed, m.name, space.rank, m.d_in) for m in space.matrices}
        drawn = _Draw(space, gradients, np.array(labels), a, np.random.default_rng(0))
        bench = Workbench.of_space(space, trainer.settings, store)
        task = bench.task(known.labels)
        examples = task.encode(list(store.tasks("toy", ids=list(ids))))
        recipe = Recipe(batch_size=4, epochs=1, max_steps=1)
        trained = train(bench.start(known.labels), space, task, examples, recipe)
        literal = [orthonormal(trained.b[m.name], trained.a[m.name]) for m in space.matrices]
        assert matrix_scores(drawn.step([0, 1, 2, 3]), literal) == pytest.approx(1.0, abs=1e-4)
        found = study_batches(trainer, "toy", sizes=(1, 2, 8))
        assert found.inside[0] == pytest.approx(1.0)
        assert (found.inside > found.outside)[:2].all()
        assert np.isnan(found.alike[0])
        assert not np.isnan(found.alike[1:]).any()
        assert any("batch" in said for said in found.verdict())
        with pytest.raises(UsageError, match="from 1 on"):
            study_batches(trainer, "toy", sizes=(0,))
        with pytest.raises(SelectionError, match="batches of 900"):
            study_batches(trainer, "toy", sizes=(900,))


def test_what_lora_holds_of_a_full_update() -> None:
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.normal(size=(6, 3)))
    delta = u @ np.diag([3.0, 2.0, 1.0]) @ np.linalg.qr(rng.normal(size=(5, 3)))[0].T
    vectors, values, _ = np.linalg.svd(delta, full_matrices=False)
    b = (u[:, [0, 2]] * 7.0).astype(np.float32)  # the first and the third direction
    overlap, captured, best = _compared(b, delta, vectors, values)
    assert overlap == pytest.approx(0.5)
    assert captured == pytest.approx((9 + 1) / 14)
    assert best == pytest.approx((9 + 4) / 14)
    assert _compared(b, np.zeros((6, 5)), vectors, np.zeros(5)) == (0.0, 0.0, 0.0)


def test_lora_and_full_fine_tuning_are_trained_on_the_same_rows(toy_store: Path) -> None:
    with repmatch.open(toy_store) as store:
        trainer = repmatch.Curator(store, recipe=Recipe(epochs=2, batch_size=8, learning_rate=1e-2)).trainer
        found = study_information(trainer, "toy", ranks=(1, 2), rate=1e-3)
        n = len(store.ids("toy"))
        assert found.held == round(0.2 * n)
        assert found.trained + found.held == n
        assert found.chance == pytest.approx(np.array([1, 2]) / 32)
        assert (found.captured <= found.best + 1e-9).all()
        assert found.captured[1] > found.captured[0]
        assert found.full_loss < 1.0
        assert "held-out instances" in found.verdict()[0] or "neither learns" in found.verdict()[0]
        with pytest.raises(UsageError, match="1 to 32"):
            study_information(trainer, "toy", ranks=(0,))


def test_the_commands_print_tables_and_json(run: Run, toy_store: Path) -> None:
    at = ("--store", toy_store, "study")
    shown = run(*at, "field", "toy", "--field", "group")
    assert shown.code == 0
    assert shown.out.splitlines()[0].split() == ["value", "instances", "c", "b", "a"]
    assert "by embeddings" in shown.out
    (found,) = run(*at, "field", "toy", "--field", "label", "--no-embeddings", "--json").objects
    assert found["values"] == ["no", "yes"]
    assert found["nearest_embeddings"] is None
    (layers,) = run(*at, "layers", "toy", "--json").objects
    assert len(layers["matrices"]) == 4  # type: ignore[arg-type]
    assert "without it" in run(*at, "layers", "toy").out
    seeds = run(*at, "seeds", "toy", "--seeds", 2, "--epochs", 1, "--no-halves")
    assert "toy: the same rows in another order score" in seeds.out
    batches = run(*at, "batches", "toy", "--sizes", "1,2")
    assert batches.out.splitlines()[1].split()[:2] == ["1", "1.0000"]
    assert run(*at, "batches", "toy", "--sizes", "1,two").code == 2
    (full,) = run(*at, "information", "toy", "--ranks", 1, "--epochs", 1, "--json").objects
    assert full["ranks"] == [1]
    assert "LoRA, rank 1" in run(*at, "information", "toy", "--ranks", 1, "--epochs", 1).out
