"""Models whose habits keep the instances of a batch from being told apart, or are met on a way of computing them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle_reference import literal_adapters
from test_engine import make_rows
from test_engine_tasks import WordTask
from tiny_models import WORDS, tokenizer
from torch import nn
from torch.nn import functional

from repmatch.curator import training, trial
from repmatch.curator.apart import Way
from repmatch.curator.settings import Settings
from repmatch.curator.side_by_side import Job, train_side_by_side
from repmatch.curator.targets import find_matrices
from repmatch.curator.tasks import OwnModel
from repmatch.curator.tasks.short_head import ShortHead
from repmatch.curator.training import Recipe
from repmatch.curator.workbench import Workbench
from repmatch.errors import ModelError

LABELS = ("no", "perhaps", "yes")


class Plain(nn.Module):
    """Two layers over each word, and the mean of what they make."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embedding = nn.Embedding(len(WORDS) + 1, 12)
            self.first = nn.Linear(12, 12)
            self.second = nn.Linear(12, 12)
            self.head = nn.Linear(12, 3)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(self.first(x).tanh()).tanh()
        return found

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.body(self.embedding(ids)) * mask[:, :, None]
        found: torch.Tensor = self.head(hidden.sum(dim=1) / mask.sum(dim=1, keepdim=True))
        return found


class TokensFirst(Plain):
    def body(self, x: torch.Tensor) -> torch.Tensor:
        return super().body(x.transpose(0, 1)).transpose(0, 1)


class Remembers(TokensFirst):
    """Makes a table of positions the first time that it is as long, and looks at what it saw last."""

    table: torch.Tensor | None = None
    last: torch.Tensor | None = None

    def body(self, x: torch.Tensor) -> torch.Tensor:
        if self.table is None or len(self.table) < x.shape[1]:
            self.table = torch.arange(x.shape[1])[:, None].sin() + 0 * x[0]
        if self.last is not None:
            _ = self.last.sum()
        self.last = x
        return super().body(x + self.table[: x.shape[1]])


class SharesALittle(Plain):
    """Maps six rows that the batch shares by a layer that it maps the words by, to little effect."""

    def body(self, x: torch.Tensor) -> torch.Tensor:
        shared = self.first(self.embedding.weight[:6]).sum(dim=0)
        found: torch.Tensor = self.second(self.first(x) + 0.02 * shared).tanh()
        return found


class LongestFirst(Plain):
    """Brings the rows into the order of their lengths, as packed sequences have them."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        order = mask.sum(dim=1).argsort(descending=True, stable=True)
        return super().forward(ids[order], mask[order])[order.argsort()]


class Routed(Plain):
    """Has a layer that gives its product and more."""

    class Router(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            found = super().forward(x)
            return found, found.argmax(dim=-1)

    def __init__(self) -> None:
        super().__init__()
        self.first = self.Router(12, 12)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(self.first(x)[0]).tanh()
        return found


class ReadsItsStride(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS) + 1, 12)
        self.convolution = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        stride, kernel = self.convolution.stride, self.convolution.kernel_size
        x = functional.pad((self.embedding(ids) * mask[:, :, None])[:, None], (0, kernel[0] - stride[0]))
        found: torch.Tensor = self.head(self.convolution(x).mean(dim=(2, 3)))
        return found


def bench_of(module: nn.Module, targets: tuple[str, ...] = ("first", "second")) -> Workbench:
    own = OwnModel(module, WordTask(), type(module).__name__)
    bench = Workbench.build(Settings(model=own, targets=targets, device="cpu", rank=2))
    return replace(bench, space=replace(bench.space, optimizer={**bench.space.optimizer, "eps": 1e-4}))


@pytest.mark.parametrize("module", [TokensFirst, Remembers, SharesALittle, LongestFirst])
@pytest.mark.parametrize("steps", [1, 2])
def test_habits_of_a_model_leave_each_instance_its_own_adapter(module: type[nn.Module], steps: int) -> None:
    bench = bench_of(module())
    bench = replace(bench, space=replace(bench.space, optimizer={**bench.space.optimizer, "steps": steps}))
    task, rows = bench.task(LABELS), make_rows(7)
    examples = task.encode(rows)
    engine = bench.engine(3, task)
    trial.check(engine, task, examples)
    assert engine.way is Way.APART
    engine.train(task.collate(examples[:3]))
    stack, _, _ = engine.train(task.collate(examples))
    assert engine.way is Way.APART
    truth = literal_adapters(module(), bench.space, task.losses, [task.collate([e]) for e in examples])
    for i, adapters in enumerate(truth):
        for name, (_, b) in adapters.items():
            assert np.linalg.norm(stack.arrays(i)[1][name] - b) <= 1e-4 * np.linalg.norm(b), (name, i)


class Refusing(WordTask):
    """Has no finite loss for some rows."""

    broken: tuple[int, ...] = ()
    scale = 1.0

    def batch(self, rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        broken = torch.tensor([torch.nan if row.id in {f"r{i}" for i in self.broken} else 1.0 for row in rows])
        return super().batch(rows) | {"broken": broken}

    def losses(self, module: nn.Module, inputs: Any) -> torch.Tensor:
        return super().losses(module, inputs) * inputs["broken"] * self.scale


@pytest.mark.parametrize("finite", [(3,), (3, 5), (2, 3, 5), ()])
@pytest.mark.parametrize("steps", [1, 2])
def test_rows_without_a_finite_loss_do_not_hide_how_a_batch_is_to_be_computed(
    finite: tuple[int, ...], steps: int
) -> None:
    bench = bench_of(TokensFirst())
    bench = replace(bench, space=replace(bench.space, optimizer={**bench.space.optimizer, "steps": steps}))
    task, rows = Refusing(), [replace(row, id=f"r{i}") for i, row in enumerate(make_rows(6))]
    task.labels = LABELS
    task.broken = tuple(i for i in range(6) if i not in finite)
    examples = task.encode(rows)
    engine = bench.engine(3, task)
    found = engine.compute(task.collate(examples))
    assert np.flatnonzero(np.isfinite(found.losses)).tolist() == list(finite)
    for at in finite:
        alone = bench.engine(3, task).compute(task.collate([examples[at]]))
        np.testing.assert_allclose(found.norms[at], alone.norms[0], rtol=1e-4)
        np.testing.assert_allclose(found.values[at], alone.values[0], atol=1e-4)
    task.broken = ()
    task.scale = 0.0
    engine.compute(task.collate(examples))
    assert engine.way is Way.TOGETHER or len(finite) > 1
    task.scale = 1.0
    engine.compute(task.collate(examples))
    assert engine.way is Way.APART


def test_adapters_side_by_side_are_not_mixed_where_the_first_rows_show_nothing() -> None:
    bench = bench_of(LongestFirst())
    task = bench.task(LABELS)
    examples = sorted(task.encode(make_rows(9)), key=lambda example: -example.tokens)
    recipe = Recipe(epochs=1, batch_size=2, max_steps=3)
    jobs = [Job([examples[0], *examples[6:]], recipe), Job(examples[1:6], recipe)]
    together = train_side_by_side(bench.start(LABELS), bench.space, task, jobs)
    for job, found in zip(jobs, together, strict=True):
        (alone,) = train_side_by_side(bench.start(LABELS), bench.space, task, [job])
        for name, b in alone.b.items():
            np.testing.assert_allclose(found.b[name], b, atol=1e-6)


def test_a_layer_that_gives_more_than_its_product_is_refused() -> None:
    bench = bench_of(Routed())
    task = bench.task(LABELS)
    with pytest.raises(ModelError, match=r"the layer 'first' gives a tuple; expected a tensor.*--targets"):
        trial.check(bench.engine(3, task), task, task.encode(make_rows(3)))


def test_a_convolution_whose_stride_the_model_reads_has_subset_adapters() -> None:
    bench = bench_of(ReadsItsStride(), ("convolution",))
    task = bench.task(LABELS)
    found = training.train(bench.start(LABELS), bench.space, task, task.encode(make_rows(4)), Recipe(max_steps=2))
    assert np.abs(found.b["convolution"]).max() > 0


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        (("q_proj", "down_proj"), r"peft does not adapt 'model.layers.0.mlp.shared_expert.down_proj' of"),
        (("q_proj", "up_proj"), r"peft cannot adapt these layers \(.*gate_proj.*--targets"),
    ],
)
def test_layers_that_peft_takes_for_those_of_experts_are_refused(
    tmp_path: Path, targets: tuple[str, ...], reason: str
) -> None:
    from transformers import AutoModel, Qwen3NextConfig

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["full_attention"], "num_experts": 2}
    sizes |= {"num_experts_per_tok": 1, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
    AutoModel.from_config(Qwen3NextConfig(vocab_size=len(WORDS) + 5, pad_token_id=0, **sizes)).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    bench = Workbench.build(Settings(model=str(tmp_path), targets=targets, device="cpu"))
    module = bench.start(LABELS)
    with (
        pytest.raises(ModelError, match=reason),
        training.adapted(module, bench.space),
    ):
        pass
    assert not any("lora" in name for name, _ in module.named_parameters())


def test_a_head_that_gives_several_things_is_run_whole() -> None:
    class Model(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> Any:
            return type("Output", (), {"logits": functional.one_hot(input_ids, 9).float()})

    head = ShortHead(lambda *_: (torch.zeros(4, 9),))
    assert not head.is_right(Model(), {"input_ids": torch.tensor([[1, 2], [3, 4]])})


def test_a_model_that_fails_on_a_row_says_so() -> None:
    class Fails(Plain):
        def body(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(-1, 4, 7)

    bench = bench_of(Fails())
    task = bench.task(LABELS)
    with pytest.raises(ModelError, match=r"cannot be run on a row of \d+ tokens alone \(RuntimeError: shape"):
        trial.check(bench.engine(3, task), task, task.encode(make_rows(3)))


@pytest.mark.parametrize("targets", [None, ("first",)])
def test_a_model_without_a_layer_to_adapt_is_refused(targets: tuple[str, ...] | None) -> None:
    with pytest.raises(ModelError, match="Sequential has no layer that can be adapted"):
        find_matrices(nn.Sequential(nn.Embedding(3, 2), nn.Conv1d(2, 2, 1)), targets)
