"""What is left out of an encoder's last layer changes neither losses nor gradients, and is not left out elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import build, make_rows
from tiny_models import checkpoint
from tiny_more import image_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from repmatch.curator import targets
from repmatch.curator.classification import SequenceClassification
from repmatch.curator.engine import FactorEngine
from repmatch.curator.shortcuts import LastLayer, Shortcut


def engine_of(
    folder: Path, architecture: str = "bert", adapted: Sequence[str] | None = None
) -> tuple[FactorEngine, SequenceClassification]:
    engine, task = build(checkpoint(folder, architecture), 1)
    if adapted is None:
        return engine, task
    space = replace(engine.space, matrices=targets.find_matrices(engine.module, list(adapted)))
    return FactorEngine(engine.module, space, engine._loss), task


def batch(task: SequenceClassification, words: range, count: int = 6) -> dict[str, Tensor]:
    """Rows of so many tokens, padded to the longest."""
    examples = [e for e in task.encode(make_rows(200)) if e.tokens in words][:count]
    assert len(examples) == count
    return task.collate(examples)


CASES = [
    *((name, adapted) for name in ("bert", "roberta", "electra") for adapted in (None, ["query", "key", "value"])),
    *(("bert", [adapted]) for adapted in ("dense", "key")),
    *(("distilbert", adapted) for adapted in (None, ["q_lin", "k_lin", "v_lin"], ["out_lin", "lin1"])),
]


@pytest.mark.parametrize(("architecture", "adapted"), CASES)
@pytest.mark.parametrize("words", [range(3, 5), range(6, 20)], ids=["short", "long"])
def test_losses_and_gradients_are_those_of_the_whole_model(
    tmp_path: Path, architecture: str, adapted: list[str] | None, words: range
) -> None:
    engine, task = engine_of(tmp_path, architecture, adapted)
    inputs = batch(task, words)
    engine.try_shortcut(inputs)
    assert engine._shortcut is Shortcut.LAYER
    found, losses = engine.gradients(inputs)
    engine._shortcut = Shortcut.NONE
    whole, expected = engine.gradients(inputs)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    for name, gradient in whole.items():
        size = float(gradient.norm())
        assert float((found[name] - gradient).norm()) <= 1e-4 * size, name


def test_the_attention_of_the_other_tokens_is_not_computed(tmp_path: Path) -> None:
    engine, task = engine_of(tmp_path)
    inputs = batch(task, range(6, 20))
    seen: dict[str, list[tuple[int, ...]]] = {}
    last: Any = LastLayer.of(engine.module)
    for name in ("query", "key", "value"):
        getattr(last.attention, name).register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(tuple(args[0].shape))
        )
    last.output.dense.register_forward_pre_hook(
        lambda _, args: seen.setdefault("output", []).append(tuple(args[0].shape))
    )
    with torch.no_grad(), last.cut(Shortcut.LAYER):
        engine._loss(engine.module, inputs)
    heads = last.attention.heads
    assert seen["query"] == [(6, 1, 32)]
    assert seen["value"] == [(6, heads, 32)]
    assert seen["output"] == [(6, 1, 32)]


def test_keys_that_nobody_watches_are_not_computed(tmp_path: Path) -> None:
    engine, task = engine_of(tmp_path)
    last: Any = LastLayer.of(engine.module)
    last.attention.key.forward = lambda x: pytest.fail("the keys of all tokens were computed")
    with torch.no_grad(), last.cut(Shortcut.LAYER):
        assert torch.isfinite(engine._loss(engine.module, batch(task, range(6, 20)))).all()


class MeanPooler(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.mean(dim=1)


def test_a_head_that_reads_every_token_gets_every_token(tmp_path: Path) -> None:
    engine, task = engine_of(tmp_path)
    engine.module.bert.pooler = MeanPooler()  # type: ignore[union-attr]
    inputs = batch(task, range(6, 20))
    engine.gradients(inputs)
    assert engine._shortcut is Shortcut.NONE


def test_an_attention_that_computes_something_else_is_left_as_it_is(tmp_path: Path) -> None:
    engine, task = engine_of(tmp_path)
    attention: Any = LastLayer.of(engine.module).attention.module  # type: ignore[union-attr]
    whole = type(attention).forward

    class Doubled(type(attention)):  # type: ignore[misc]
        def forward(self, *args: Any, **options: Any) -> Any:
            return 2 * whole(self, *args, **options)[0], None

    attention.__class__ = Doubled
    engine.gradients(batch(task, range(6, 20)))
    assert engine._shortcut is Shortcut.OUTPUT


def test_dropout_while_training_meets_the_shares_of_all_tokens(tmp_path: Path) -> None:
    engine, task = engine_of(tmp_path)
    last: Any = LastLayer.of(engine.module)
    inputs = batch(task, range(6, 20))
    last.attention.module.train()
    last.attention.module.dropout.p = 0.5
    losses = []
    for shortcut in (Shortcut.NONE, Shortcut.LAYER):
        torch.manual_seed(0)
        with torch.no_grad(), last.cut(shortcut):
            losses.append(engine._loss(engine.module, inputs))
    assert torch.equal(*losses)


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    last: Any = LastLayer.of(engine_of(tmp_path)[0].module)
    for shortcut in Shortcut:
        with pytest.raises(RuntimeError, match="stop"), last.cut(shortcut):
            raise RuntimeError("stop")
        assert not [m for m in last.layer.modules() if "forward" in vars(m) or m._forward_pre_hooks]


def test_an_image_classifier_that_reads_its_first_token_has_the_shortcut(tmp_path: Path) -> None:
    model: Any = AutoModelForImageClassification.from_pretrained(image_checkpoint(tmp_path, "vit"), num_labels=2).eval()
    last: Any = LastLayer.of(model)
    torch.manual_seed(0)
    inputs = {"pixel_values": torch.randn(5, 3, 32, 32)}

    def loss(module: Any, given: Any) -> Tensor:
        found: Tensor = torch.nn.functional.cross_entropy(
            module(**given).logits, torch.zeros(5, dtype=torch.long), reduction="none"
        )
        return found

    assert last.try_out(model, loss, inputs) is Shortcut.LAYER
    weights = [p for n, p in model.named_parameters() if p.requires_grad and "layers" in n]
    expected = torch.autograd.grad(loss(model, inputs).sum(), weights, allow_unused=True)
    with last.cut(Shortcut.LAYER):
        found = torch.autograd.grad(loss(model, inputs).sum(), weights, allow_unused=True)
    keyless = 0
    for one, other in zip(found, expected, strict=True):
        if one is None or other is None:  # the bias of the keys changes nothing, and is not read
            keyless += 1
            assert other is None or float(other.abs().max()) < 1e-6
            continue
        assert float((one - other).norm()) <= 1e-4 * float(other.norm()) + 1e-6  # keys: rounding alone
    assert keyless <= 1


def test_other_architectures_have_none(tmp_path: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(image_checkpoint(tmp_path, "resnet"), num_labels=2)
    assert LastLayer.of(model) is None
    assert LastLayer.of(nn.Linear(2, 2)) is None


def test_a_loss_that_is_not_finite_decides_nothing(tmp_path: Path) -> None:
    engine, task = engine_of(tmp_path)
    last: Any = LastLayer.of(engine.module)
    inputs = batch(task, range(6, 20))
    assert last.try_out(engine.module, lambda *_: torch.full((2,), torch.nan), inputs) is None
