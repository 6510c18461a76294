"""Subset adapters side by side against each alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run, write_rows
from test_engine import make_rows
from test_engine_tasks import CASES, WordTask, causal_case, encoder_case
from tiny_models import WORDS, checkpoint
from tiny_more import GatedLstm

import repmatch
from repmatch.curator import training
from repmatch.curator.settings import Settings
from repmatch.curator.side_by_side import Job, seeds_of, train_side_by_side
from repmatch.curator.tasks import OwnModel
from repmatch.curator.training import Recipe
from repmatch.curator.workbench import Workbench
from repmatch.errors import ModelError, UsageError

LABELS = ("no", "perhaps", "yes")


def close(one: training.Trained, other: training.Trained, tolerance: float = 1e-3) -> None:
    for name, b in other.b.items():
        assert np.linalg.norm(one.b[name] - b) <= tolerance * np.linalg.norm(b), name
        assert np.linalg.norm(one.a[name] - other.a[name]) <= tolerance * np.linalg.norm(other.a[name]), name
    np.testing.assert_allclose(one.record["losses"], other.record["losses"], rtol=1e-3, atol=1e-4)
    assert one.record["instances_read"] == other.record["instances_read"]


@pytest.mark.parametrize("rank", [1, 2])
def test_subsets_of_several_sizes_side_by_side_equal_each_alone(tmp_path: Path, rank: int) -> None:
    bench = Workbench.build(Settings(model=str(checkpoint(tmp_path)), device="cpu", rank=rank))
    task = bench.task(LABELS)
    examples = task.encode(make_rows(40))
    recipe = Recipe(batch_size=8, epochs=2)
    jobs = [
        Job(examples[:40], recipe),
        Job(examples[:11], recipe),  # a batch of three at the end, and done long before the first
        Job(examples[20:36], replace(recipe, seed=3, epochs=1)),
    ]
    module = bench.module(3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    ticks: list[tuple[int, int]] = []
    found = train_side_by_side(module, bench.space, task, jobs, lambda done, total: ticks.append((done, total)))
    for job, one in zip(jobs, found, strict=True):
        close(one, training.train(module, bench.space, task, job.examples, job.recipe))
    assert ticks[-1] == (10 + 4 + 2, 16)
    assert all((value == before[name]).all() for name, value in module.state_dict().items())
    assert not any(m._forward_hooks for m in module.modules())


def test_several_starts_side_by_side_equal_each_alone(tmp_path: Path) -> None:
    bench, task, rows = causal_case("gpt2")(tmp_path)
    examples = task.encode(rows)
    jobs = seeds_of(Job(examples, Recipe(batch_size=4, epochs=2)), (0, 5))
    found = train_side_by_side(bench.module(0), bench.space, task, jobs)
    for job, one in zip(jobs, found, strict=True):
        space = replace(bench.space, seed=job.seed or 0)
        close(one, training.train(bench.module(0), space, task, job.examples, job.recipe))


def test_jobs_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    bench = Workbench.build(Settings(model=str(checkpoint(tmp_path)), device="cpu"))
    task = bench.task(LABELS)
    examples = task.encode(make_rows(4))
    jobs = [Job(examples, Recipe()), Job(examples, Recipe(learning_rate=1.0))]
    with pytest.raises(UsageError, match="share learning rate"):
        train_side_by_side(bench.module(3), bench.space, task, jobs)
    with pytest.raises(UsageError, match="one or more examples"):
        train_side_by_side(bench.module(3), bench.space, task, [Job([], Recipe())])
    task.losses = lambda module, inputs: torch.full(inputs["labels"].shape, torch.nan, requires_grad=True)
    with pytest.raises(ModelError, match="subset adapter 1 of 2 diverged at step 1"):
        train_side_by_side(bench.module(3), bench.space, task, jobs[:1] * 2)


def test_the_trainer_trains_what_is_missing_in_one_pass(run: Run, toy_store: Path) -> None:
    names = ["toy[label = 'yes']", "toy[label = 'no']", "toy"]
    with repmatch.open(toy_store) as store:
        curator = repmatch.Curator(store, recipe=Recipe(epochs=1))
        alone = curator.adapter(names[0])
        found = curator.trainer.adapters(names)
        assert found[0].id == alone.id
        assert [adapter.subset for adapter in found] == names
        assert [adapter.record.get("side_by_side") for adapter in found] == [None, 2, 2]
        assert len(store.adapters()) == 3
        again = curator.trainer.adapters(names)
        assert [adapter.id for adapter in again] == [adapter.id for adapter in found]
        assert len(store.adapters()) == 3


@pytest.mark.parametrize("name", ["deberta-v2, positions shared by the batch", "xlnet, tokens first"])
def test_adapters_of_a_model_that_mixes_a_batch_are_trained_one_by_one(tmp_path: Path, name: str) -> None:
    bench, task, _ = CASES[name](tmp_path)
    examples = task.encode(make_rows(12))
    jobs = [Job(examples[:7], Recipe(batch_size=4, epochs=1)), Job(examples[7:], Recipe(batch_size=3, epochs=2))]
    ticks: list[tuple[int, int]] = []
    found = train_side_by_side(bench.module(3), bench.space, task, jobs, lambda *at: ticks.append(at))
    assert ticks == [(i + 1, 6) for i in range(6)]
    for job, one in zip(jobs, found, strict=True):
        close(one, training.train(bench.module(3), bench.space, task, job.examples, job.recipe))


class Named(GatedLstm):
    """Gives one of its layers the input by name."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.input(input=self.embedding(ids)).tanh() * mask[:, :, None]
        logits: torch.Tensor = self.head(hidden.sum(dim=1)[:, :12])
        return logits


def test_a_layer_may_be_given_its_input_by_name(tmp_path: Path) -> None:
    own = OwnModel(Named(len(WORDS) + 1, 3), WordTask())
    settings = Settings(model=own, targets=("input",), device="cpu")
    rows = [{"id": r.id, "text": r.text, "label": r.label} for r in make_rows(12)]
    with repmatch.open(tmp_path / "s") as store:
        curator = repmatch.Curator(store, settings=settings)
        assert curator.ingest(write_rows(tmp_path / "r.jsonl", rows), "d").new == 12
        assert len(curator.score("d").ids) == 12


def test_torchs_own_encoder_is_trained_with_adapters_in_its_layers(tmp_path: Path) -> None:
    bench, task, rows = encoder_case(tmp_path)
    examples, recipe = task.encode(rows), Recipe(batch_size=3, epochs=1)
    alone = training.train(bench.module(3), bench.space, task, examples, recipe)
    assert all(b.any() for b in alone.b.values())
    (found,) = train_side_by_side(bench.module(3), bench.space, task, [Job(examples, recipe)])
    close(found, alone)
