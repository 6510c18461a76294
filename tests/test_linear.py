"""Frozen layers by oneDNN give what torch's own products give."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from test_engine import build, make_rows
from tiny_models import checkpoint
from torch import nn

from repmatch.curator import linear
from repmatch.curator.packed import Packed

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(),  # type: ignore[no-untyped-call]
    reason="torch was built without oneDNN",
)


@pytest.fixture(autouse=True)
def pays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(linear, "onednn_pays", lambda: True)
    yield


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 7, 12), (1, 12), (3, 1, 2, 12), (0, 12)])
def test_outputs_and_gradients_are_those_of_a_linear_layer(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 20, bias=bias).requires_grad_(False)
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(*shape[:-1], 20)
    expected = layer(x)
    (gradient,) = torch.autograd.grad((expected * weight).sum(), x)
    with linear.by_onednn(layer):
        assert "forward" in vars(layer)
        found = layer(x)
        (found_gradient,) = torch.autograd.grad((found * weight).sum(), x)
        # Not every input lies in one piece.
        turned = torch.randn(12, 6).t()
        torch.testing.assert_close(layer(turned), turned @ layer.weight.t() + (layer.bias if bias else 0))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_gradient, gradient)
    assert "forward" not in vars(layer)


def test_layers_that_learn_or_compute_in_less_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4).bfloat16())
    model[2].requires_grad_(False)
    with linear.by_onednn(model):
        assert ["forward" in vars(layer) for layer in model] == [False, True, False]
    assert not any("forward" in vars(layer) for layer in model)


def test_half_precision_inputs_go_to_torch() -> None:
    layer = nn.Linear(4, 4).requires_grad_(False)
    x = torch.ones(2, 4, requires_grad=True)
    with linear.by_onednn(layer):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = layer(x)
        assert found.dtype is torch.bfloat16
        found.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(dim=0).expand(2, 4), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rank", [1, 4])
def test_factors_are_the_same_by_either(tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, task = build(checkpoint(tmp_path), rank)
    batch = task.collate(task.encode(make_rows(9)))
    found, losses = engine.gradients(batch)
    monkeypatch.setattr(linear, "onednn_pays", lambda: False)
    expected, plain = engine.gradients(batch)
    torch.testing.assert_close(losses, plain, rtol=1e-5, atol=1e-6)
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= 1e-4 * float(gradient.norm()), name


def test_one_machine_gives_the_same_bytes_again(tmp_path: Path) -> None:
    engine, task = build(checkpoint(tmp_path), 1)
    batch = task.collate(task.encode(make_rows(9)))
    np.testing.assert_array_equal(engine.compute(batch).values, engine.compute(batch).values)


def test_a_weight_is_packed_once_a_direction_and_goes_with_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = Packed(1 << 20)
    monkeypatch.setattr(linear, "PACKED", packed)
    layer = nn.Linear(64, 32).requires_grad_(False)
    x = torch.randn(40, 64, requires_grad=True)
    for _ in range(2):
        with linear.by_onednn(layer):
            layer(x).sum().backward()
    assert packed.used == 2 * layer.weight.nbytes
    del layer
    gc.collect()
    assert packed.used == 0


@pytest.mark.parametrize("rows", [1, 2, 31, 50, 1000, 1300])
def test_packing_changes_no_product(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(384, 1536).requires_grad_(False)
    x = torch.randn(rows, 384, requires_grad=True)
    found = []
    for limit in (0, 1 << 30):
        packed = Packed(limit)
        monkeypatch.setattr(linear, "PACKED", packed)
        with linear.by_onednn(layer):
            y = layer(x)
            found.append((y, *torch.autograd.grad(y.square().sum(), x)))
        assert (packed.used > 0) == (limit > 0)
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-5, atol=1e-4)


def test_a_weight_that_is_changed_in_place_is_packed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = Packed(1 << 20)
    monkeypatch.setattr(linear, "PACKED", packed)
    layer = nn.Linear(16, 8, bias=False).requires_grad_(False)
    x = torch.randn(3, 16)
    with linear.by_onednn(layer):
        layer(x)
        layer.weight.mul_(2)
        torch.testing.assert_close(layer(x), x @ layer.weight.t())
    assert packed.used == layer.weight.nbytes


def test_copies_stay_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [nn.Linear(16, 16).requires_grad_(False) for _ in range(3)]
    packed = Packed(2 * layers[0].weight.nbytes)
    monkeypatch.setattr(linear, "PACKED", packed)
    model = nn.Sequential(*layers)
    x = torch.randn(3, 16)
    expected = model(x)
    with linear.by_onednn(model):
        torch.testing.assert_close(model(x), expected)
    assert packed.used == packed.limit
