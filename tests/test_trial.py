"""What is tried on the first rows of an ingest, and models that are refused before a row is computed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, write_rows
from test_engine import make_rows
from test_engine_tasks import CASES
from tiny_models import checkpoint, sentences
from tiny_more import causal_checkpoint, masked_checkpoint, odd_encoder
from torch import nn

from repmatch.curator import base_models, trial
from repmatch.curator.settings import Settings
from repmatch.curator.tasks import OwnModel, RowTask
from repmatch.curator.workbench import Workbench
from repmatch.datamodels import Row
from repmatch.errors import ModelError


class Numbers(RowTask):
    """A row's length as numbers; the loss is a polynomial of what the module makes of them."""

    def batch(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor([[float(len(row.text)), 1.0, 2.0] for row in rows])}

    def losses(self, module: nn.Module, inputs: Any) -> torch.Tensor:
        return (module(inputs["x"]) ** 2 + module(inputs["x"])).sum(dim=1)


class Module(nn.Module):
    """A layer that is called; another whose weight is read past it; and one whose output is thrown away."""

    def __init__(self, batch_statistics: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.used, self.passed, self.deaf = nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(3, 2)
        self.batch_statistics = batch_statistics

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.used(x) @ self.passed.weight
        self.deaf(x)
        return y - y.mean(dim=0) if self.batch_statistics else y


class Sometimes(Module):
    """Calls `passed` for long texts alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.used(x)
        long = x[:, :1] > 60
        return torch.where(long, self.passed(y), y) if long.any() else y


def tried(module: nn.Module, *targets: str, task: type[RowTask] = Numbers, rows: int = 9) -> None:
    bench = Workbench.build(Settings(model=OwnModel(module, task()), targets=targets, device="cpu"))
    reader = bench.task(())
    trial.check(bench.engine(0, reader), reader, reader.encode(make_rows(rows)))


@pytest.mark.parametrize("name", list(CASES))
def test_models_whose_instances_are_apart_pass(tmp_path: Path, name: str) -> None:
    bench, task, rows = CASES[name](tmp_path)
    trial.check(bench.engine(3, task), task, task.encode(rows))


def test_instances_that_see_each_other_are_refused() -> None:
    with pytest.raises(ModelError, match="expected instances that do not see each other"):
        tried(Module(batch_statistics=True), "used")
    tried(Module(batch_statistics=True), "used", rows=1)  # nobody to be seen
    tried(Module(), "used")


def test_a_model_that_reads_its_padding_is_refused(run: Run, tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": t, "label": "yn"[i % 2]} for i, t in enumerate(sentences(12))]
    given = (write_rows(tmp_path / "r.jsonl", rows), "--dataset", "d", "--model", odd_encoder(tmp_path / "m", "xlnet"))
    found = run("--store", tmp_path / "s", "ingest", *given, "--targets", "layer_1,layer_2")
    assert found.code == 1
    assert "layer_" in found.err
    assert "--targets" in found.err


def test_the_pair_is_of_unlike_length() -> None:
    bench = Workbench.build(Settings(model=OwnModel(Module(), Numbers()), targets=("used",), device="cpu"))
    examples = bench.task(()).encode(make_rows(9))
    lengths = sorted(example.tokens for example in examples)
    assert [e.tokens for e in trial.unlike(examples)] == [lengths[0], lengths[4]]
    short = [e for e in examples if e.tokens == lengths[0]][:1]
    longest = max(examples, key=lambda e: e.tokens)
    assert trial.unlike([*short, longest, *short, *short]) == [short[0], longest]
    assert trial.unlike(short) == short


def test_a_layer_that_is_never_called_is_refused() -> None:
    with pytest.raises(ModelError, match=r"does not call 'passed'.*Name others with --targets"):
        tried(Module(), "used", "passed")
    tried(Sometimes(), "used", "passed", rows=60)


def test_a_layer_without_gradient_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "repmatch"):
        tried(Module(), "used", "deaf", rows=5)
    (record,) = caplog.records
    assert record.getMessage().startswith("the gradient of 'deaf' is zero for each of the first 5 rows")
    caplog.clear()
    tried(Module(), "used")
    assert not caplog.records


class Mean(Numbers):
    def losses(self, module: nn.Module, inputs: Any) -> torch.Tensor:
        return super().losses(module, inputs).mean()


class Column(Numbers):
    def losses(self, module: nn.Module, inputs: Any) -> torch.Tensor:
        return super().losses(module, inputs)[:, None]


@pytest.mark.parametrize(("task", "got"), [(Mean, r"\(\)"), (Column, r"\(1, 1\)")])
@pytest.mark.parametrize("steps", [1, 2])
def test_losses_of_another_shape_are_refused(task: type[RowTask], got: str, steps: int) -> None:
    with pytest.raises(ModelError, match=rf"losses are {got} for a batch of 1; expected \(1,\), one number each"):
        tried(Module(), "used", task=task)
    settings = Settings(model=OwnModel(Module(), task()), targets=("used",), device="cpu", steps=steps)
    bench = Workbench.build(settings)
    reader = bench.task(())
    with pytest.raises(ModelError, match=r"one number each"):
        bench.engine(0, reader).compute(reader.collate(reader.encode(make_rows(4))))


@pytest.mark.parametrize("task", ["masked-lm", "causal-lm"])
def test_a_language_model_without_a_head_is_refused(run: Run, tmp_path: Path, task: str) -> None:
    rows = [{"id": "1", "text": "good film", "prompt": "good", "completion": "film"}]
    file = write_rows(tmp_path / "r.jsonl", rows)
    for model in ((), ("--model", checkpoint(tmp_path / "m"))):  # the embedded model has none either
        found = run("--store", tmp_path / "s", "ingest", file, "--dataset", "d", "--task", task, *model)
        assert found.code == 1
        assert f"has no head for --task {task}" in found.err
        assert "Name one with --model" in found.err


def test_a_model_that_sees_the_completion_is_refused(tmp_path: Path) -> None:
    model = masked_checkpoint(tmp_path / "bert")
    with pytest.raises(ModelError, match=r"BertLMHeadModel.* would see the completion .* expected a causal model"):
        Workbench.build(Settings(model=str(model), task="causal-lm", device="cpu"))
    assert Workbench.build(Settings(model=str(model), task="masked-lm", device="cpu")).space.task == "masked-lm"
    for architecture in ("llama", "qwen2", "gpt2"):
        found = base_models.find_model(str(causal_checkpoint(tmp_path / architecture, architecture)))
        assert not base_models._sees_ahead(base_models.load_module(found, "causal-lm", 2, 0))
