"""The arithmetic of the engine: first step, singular vectors, zero and repeated uses of a matrix, non-finite losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle_reference import literal_deltas, literal_phi
from test_engine import ADAMW, build, make_rows
from tiny_models import WORDS, checkpoint, tokenizer
from torch import Tensor, nn
from transformers import AlbertConfig, AutoModel

from repmatch.curator import linear, start
from repmatch.curator.batches import factors_of
from repmatch.curator.engine import FactorEngine, first_step, left_singular
from repmatch.datamodels import Matrix, Space
from repmatch.errors import ModelError


def albert(folder: Path) -> Path:
    """An encoder whose three layers are one: its query is used three times in a forward pass."""
    config = AlbertConfig(
        vocab_size=len(WORDS) + 5,
        embedding_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


class Toy(nn.Module):
    """Two linear layers on numbers; `deaf` is run but does not reach the loss, `idle` is not run at all."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name, shape in (("used", (5, 3)), ("deaf", (5, 3)), ("idle", (4, 3))):
            layer = nn.Linear(shape[1], shape[0])
            layer.weight.data = torch.randn(*shape, generator=generator)
            layer.bias.data = torch.randn(shape[0], generator=generator)
            setattr(self, name, layer)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.deaf(x)
        return self.used(x).relu()


def toy_space(rank: int, *matrices: Matrix) -> Space:
    names = matrices or (Matrix("used", 5, 3), Matrix("deaf", 5, 3), Matrix("idle", 4, 3))
    return Space("toy", "f", "t", "task", "x", 8, rank, 4.0, 0, names, ADAMW)


def toy_loss(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return inputs["scale"] * (module(inputs["x"]) ** 2).sum(dim=(1, 2))


def toy_inputs(count: int = 4, **more: Tensor) -> dict[str, Tensor]:
    x = torch.randn(count, 6, 3, generator=torch.Generator().manual_seed(2))
    return {"x": x, "scale": torch.ones(count), **more}


def toy_gradients(rank: int, inputs: Mapping[str, Tensor]) -> Tensor:
    """∂L/∂B of the layer `used` by autograd, one instance at a time, (n, 5, r)."""
    module = Toy()
    a = torch.from_numpy(start.draw_a(0, "used", rank, 3))
    out = []
    for i in range(len(inputs["x"])):
        b = torch.zeros(5, rank, requires_grad=True)
        x = inputs["x"][i]
        y = module.used(x) + (4.0 / rank) * (x @ a.T) @ b.T
        (inputs["scale"][i] * (y.relu() ** 2).sum()).backward()  # type: ignore[no-untyped-call]
        assert b.grad is not None
        out.append(b.grad)
    return torch.stack(out)


@pytest.mark.parametrize("rank", [1, 2])
def test_the_gradient_is_that_of_autograd(rank: int) -> None:
    inputs = toy_inputs()
    gradients, losses = FactorEngine(Toy(), toy_space(rank), toy_loss).gradients(inputs)
    torch.testing.assert_close(gradients["used"], toy_gradients(rank, inputs), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(losses, toy_loss(Toy(), inputs))


class Named(Toy):
    """Gives its layer the input by name, and changes the output in place."""

    def forward(self, x: Tensor) -> Tensor:
        return self.used(input=x).relu_()


@pytest.mark.parametrize("onednn", [True, False])
def test_inputs_by_name_and_outputs_changed_in_place_make_no_difference(
    onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "onednn_pays", lambda: onednn)
    inputs, space = toy_inputs(), toy_space(2, Matrix("used", 5, 3))
    found, losses = FactorEngine(Named(), space, toy_loss).gradients(inputs)
    expected, plain = FactorEngine(Toy(), space, toy_loss).gradients(inputs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(losses, plain)
    many = replace(space, optimizer={**ADAMW, "eps": 1e-4, "steps": 3})
    stack, _, _ = FactorEngine(Named(), many, toy_loss).train(inputs)
    other, _, _ = FactorEngine(Toy(), many, toy_loss).train(inputs)
    torch.testing.assert_close(stack.b, other.b)


class Shared(Toy):
    """Uses its layer for every instance's own input and for one that all share."""

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + self.used(torch.tensor([[[1.0, -2.0, 0.5]]])).repeat(len(x), 1, 1)


@pytest.mark.parametrize("steps", [1, 4])
def test_an_input_that_a_batch_shares_counts_for_every_instance(steps: int) -> None:
    space = replace(toy_space(2, Matrix("used", 5, 3)), optimizer={**ADAMW, "eps": 1e-4, "steps": steps})
    inputs = toy_inputs()
    engine = FactorEngine(Shared(), space, toy_loss)
    found = engine.compute(inputs)
    for at in range(4):
        one = {name: value[at : at + 1] for name, value in inputs.items()}
        alone = FactorEngine(Shared(), space, toy_loss).compute(one)
        np.testing.assert_allclose(found.values[at], alone.values[0], atol=1e-5)
        np.testing.assert_allclose(found.norms[at], alone.norms[0], rtol=1e-5)
        np.testing.assert_allclose(found.losses[at], alone.losses[0], rtol=1e-5)
    apart = engine.compute({name: value[:1] for name, value in inputs.items()})
    np.testing.assert_allclose(apart.values[0], found.values[0], atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_matrix_without_gradient_has_zero_values_and_norm_zero(rank: int) -> None:
    engine = FactorEngine(Toy(), toy_space(rank), toy_loss)
    found = engine.compute(toy_inputs())
    widths = [5 * rank, 5 * rank, 4 * rank]
    used, deaf, idle = np.split(found.values, np.cumsum(widths)[:-1], axis=1)
    assert (deaf == 0).all()
    assert (idle == 0).all()
    np.testing.assert_array_equal(found.norms[:, 1:], np.zeros((4, 2)))
    assert (found.norms[:, 0] > 0).all()
    lengths = np.linalg.norm(used.reshape(4, 5, rank), axis=1)
    np.testing.assert_allclose(lengths[:, 0], 1, rtol=1e-5)
    assert np.all((np.abs(lengths - 1) < 1e-5) | (lengths == 0))  # a step is nearly a sign: its rank may be one
    if found.cores is not None:
        assert (found.cores[:, 1:] == 0).all()


@pytest.mark.parametrize("rank", [1, 2])
def test_one_instance_without_gradient_has_zero_values_among_others(rank: int) -> None:
    engine = FactorEngine(Toy(), toy_space(rank, Matrix("used", 5, 3)), toy_loss)
    found = engine.compute(toy_inputs(scale=torch.tensor([1.0, 0.0, 1.0, 1.0])))
    assert (found.values[1] == 0).all()
    assert found.norms[:, 0].tolist()[1] == 0
    assert (np.abs(found.values[[0, 2, 3]]).max(axis=1) > 0.1).all()
    assert found.losses[1] == 0


def test_a_loss_that_needs_no_gradient_gives_zeros() -> None:
    engine = FactorEngine(Toy(), toy_space(1), lambda _, inputs: inputs["scale"].clone())
    found = engine.compute(toy_inputs())
    assert (found.values == 0).all()
    assert (found.norms == 0).all()
    assert found.losses.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e18])
def test_very_small_and_very_large_gradients_keep_unit_columns(rank: int, size: float) -> None:
    """Their squares leave the range of float32."""
    engine = FactorEngine(Toy(), toy_space(rank, Matrix("used", 5, 3)), toy_loss)
    plain = engine.compute(toy_inputs())
    found = engine.compute(toy_inputs(scale=torch.full((4,), size)))
    lengths = np.linalg.norm(found.values.reshape(4, 5, rank).astype(np.float64), axis=1)
    assert np.all((np.abs(lengths - 1) < 1e-5) | (lengths == 0))
    assert (lengths[:, 0] > 0.9).all()
    np.testing.assert_allclose(found.norms, plain.norms.astype(np.float64) * size, rtol=1e-4)


def test_repeated_uses_of_a_matrix_add_up(tmp_path: Path) -> None:
    """ALBERT's layers share their weights: the oracle trains one B through all three uses."""
    engine, task = build(albert(tmp_path), 1)
    assert [m.name.rsplit(".", 1)[-1] for m in engine.space.matrices] == ["query", "value"]
    examples = task.encode(make_rows(6))
    engine.find_way(task.collate(examples))
    uses = []
    shared = dict(engine.module.named_modules())[engine.space.matrices[0].name]
    handle = shared.register_forward_hook(lambda *_: uses.append(1))
    found = engine.compute(task.collate(examples))
    handle.remove()
    assert len(uses) == 3
    truth = literal_deltas(engine.module, engine.space, [task.collate([e]) for e in examples])
    for i in range(6):
        for m, matrix in enumerate(engine.space.matrices):
            u = found.values[i, 32 * m : 32 * m + 32].astype(np.float64)[:, None]
            a = engine._a[matrix.name].double().numpy()
            assert literal_phi(u @ a, truth[i][m], 1, 1) >= 0.99999
            assert np.sum((u @ a) * truth[i][m]) > 0


def test_the_first_step_is_that_of_adamw() -> None:
    gradient = torch.tensor([[3.0, -1e-8], [0.0, -2e-3]], dtype=torch.float64)
    b = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([b], lr=1e-3, eps=1e-8, weight_decay=0.01)
    b.grad = gradient.clone()
    optimizer.step()
    found = first_step(gradient, ADAMW)
    torch.testing.assert_close(found, b.detach(), rtol=1e-7, atol=0)
    torch.testing.assert_close(found[0], torch.tensor([-1e-3 * 3 / (3 + 1e-8), 0.5e-3], dtype=torch.float64))
    assert float(found[1, 0]) == 0


def test_the_first_step_of_zeros_is_zeros_and_another_optimiser_is_refused() -> None:
    assert not first_step(torch.zeros(2, 3, 1), ADAMW).any()
    with pytest.raises(ModelError, match=r"'lion' is unknown; expected 'adamw', 'adam' or 'sgd'"):
        first_step(torch.ones(1), {"name": "lion", "lr": 1.0, "eps": 0.0})


def random_matrix(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def cases() -> dict[str, np.ndarray]:
    full = random_matrix((7, 12, 4))
    deficient = random_matrix((7, 12, 2), 1) @ random_matrix((7, 2, 4), 2)
    holes = random_matrix((7, 12, 4), 3)
    holes[:, :, 1] = 0
    parallel = random_matrix((7, 12, 1), 4) + 0.01 * random_matrix((7, 12, 4), 5)
    return {"full": full, "deficient": deficient, "a zero column": holes, "nearly parallel": parallel}


@pytest.mark.parametrize("name", list(cases()))
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12])
def test_left_singular_vectors_equal_those_of_numpy(name: str, size: float) -> None:
    m = cases()[name] * size
    columns, core = (x.numpy() for x in left_singular(torch.from_numpy(m)))
    for i in range(len(m)):
        u, s, _ = np.linalg.svd(m[i], full_matrices=False)
        rank = int((s > 1e-4 * s[0]).sum())
        assert rank == {"full": 4, "deficient": 2, "a zero column": 3, "nearly parallel": 4}[name]
        kept = columns[i, :, :rank]
        np.testing.assert_allclose(kept.T @ kept, np.eye(rank), atol=1e-9)
        np.testing.assert_allclose(np.abs(np.sum(kept * u[:, :rank], axis=0)), 1, atol=1e-6)
        assert (columns[i, :, rank:] == 0).all()
        np.testing.assert_allclose(columns[i] @ core[i], m[i] / np.linalg.norm(m[i]), atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(core[i], axis=1)[:rank], s[:rank] / np.linalg.norm(s), rtol=1e-6)


def test_left_singular_vectors_of_zeros_are_zeros() -> None:
    m = torch.from_numpy(np.stack([np.zeros((5, 3)), random_matrix((5, 3))]))
    columns, core = left_singular(m)
    assert not columns[0].any()
    assert not core[0].any()
    torch.testing.assert_close(columns[1].T @ columns[1], torch.eye(3, dtype=torch.float64))


def test_equal_columns_have_one_direction() -> None:
    column = random_matrix((1, 6, 1))
    columns, core = (x.numpy() for x in left_singular(torch.from_numpy(np.repeat(column, 4, axis=2))))
    np.testing.assert_allclose(np.abs(columns[0, :, 0] @ column[0, :, 0]), np.linalg.norm(column), rtol=1e-9)
    assert not columns[0, :, 1:].any()
    np.testing.assert_allclose(np.abs(core[0, 0]), 0.5, rtol=1e-9)


def test_rows_whose_loss_is_not_finite_are_set_aside(tmp_path: Path) -> None:
    engine, task = build(checkpoint(tmp_path), 1)
    rows = [replace(row, source="f.jsonl") for row in make_rows(5)]
    examples = task.encode(rows)
    good = factors_of(engine, task, rows, examples, 1024)[0]
    spoiled = {2: float("nan"), 3: float("inf")}
    real = engine._loss

    def spoil(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        factor = torch.ones(5)
        for position, value in spoiled.items():
            factor[position] = value
        return real(module, inputs) * factor

    engine._loss = spoil
    order = sorted(range(5), key=lambda i: (examples[i].tokens, i))  # the batch is sorted by length
    batch, bad = factors_of(engine, task, rows, examples, 1024)
    lost = sorted(order[i] for i in spoiled)
    kept = [i for i in range(5) if i not in lost]
    assert [row.id for row in batch.rows] == [f"r{i}" for i in kept]
    assert [(row.source, row.line, row.id) for row in bad] == [("f.jsonl", i + 1, f"r{i}") for i in lost]
    assert all("expected finite numbers" in row.reason for row in bad)
    assert "the loss is nan" in "".join(row.reason for row in bad)
    np.testing.assert_allclose(batch.values, good.values[kept], atol=1e-6)
    assert batch.tokens.tolist() == [examples[i].tokens for i in kept]


def test_every_row_may_be_set_aside(tmp_path: Path) -> None:
    engine, task = build(checkpoint(tmp_path), 4)
    engine._loss = lambda module, inputs: module(inputs["input_ids"]).logits.sum(dim=1) * float("nan")
    rows = make_rows(3)
    batch, bad = factors_of(engine, task, rows, task.encode(rows), 1024)
    assert (len(batch.rows), len(bad)) == (0, 3)
    assert batch.values.shape == (0, engine.layout.width)
    assert batch.cores is not None
    assert batch.cores.shape == (0, 4, 4, 4)


def test_nested_batches_of_a_matrix_keep_the_instances_apart() -> None:
    """An output of more than three dimensions: everything between the first and the last is summed over."""
    engine = FactorEngine(Toy(), toy_space(1, Matrix("used", 5, 3)), toy_deep_loss)
    flat = FactorEngine(Toy(), toy_space(1, Matrix("used", 5, 3)), toy_loss)
    inputs = toy_inputs()
    deep: dict[str, Any] = {**inputs, "x": inputs["x"].reshape(4, 2, 3, 3)}
    np.testing.assert_allclose(engine.compute(deep).norms, flat.compute(inputs).norms, rtol=1e-5)
    np.testing.assert_allclose(engine.compute(deep).values, flat.compute(inputs).values, atol=1e-6)


def toy_deep_loss(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return inputs["scale"] * (module(inputs["x"]) ** 2).flatten(1).sum(dim=1)
