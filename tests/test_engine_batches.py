"""An instance's factor does not depend on the company it is computed in."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_engine import build, make_rows
from tiny_models import ARCHITECTURES, checkpoint

from repmatch.curator.batches import batches_by_tokens
from repmatch.curator.classification import Example, SequenceClassification
from repmatch.curator.engine import BatchFactors, FactorEngine
from repmatch.datamodels import Row

REAL = (
    "it 's a charming and often affecting journey .",
    "unflinchingly bleak and desperate",
    "a sometimes tedious film .",
    "the acting , costumes , music , cinematography and sound are all astounding given the austere locales .",
    "slow",
)


def compute(
    engine: FactorEngine, task: SequenceClassification, examples: Sequence[Example], parts: Sequence[Sequence[int]]
) -> BatchFactors:
    """Compute examples in the given parts and put the results back into the examples' order."""
    found = [engine.compute(task.collate([examples[i] for i in part])) for part in parts]
    back = np.argsort(np.concatenate([np.asarray(part) for part in parts]))
    cores = [f.cores for f in found if f.cores is not None]
    return BatchFactors(
        np.concatenate([f.values for f in found])[back],
        np.concatenate(cores)[back] if cores else None,
        np.concatenate([f.norms for f in found])[back],
        np.concatenate([f.losses for f in found])[back],
    )


def squared_cosines(engine: FactorEngine, first: BatchFactors, second: BatchFactors) -> np.ndarray:
    """Signed squared cosine of ΔW, instance by matrix. Q is orthonormal and common, so values · core is enough."""
    layout = engine.layout
    out = np.empty((len(first.losses), len(layout.matrices)))
    for m in range(out.shape[1]):
        lo, hi = layout.offsets[m : m + 2]
        deltas = []
        for found in (first, second):
            blocks = found.values[:, lo:hi].astype(np.float64).reshape(len(out), -1, layout.rank)
            deltas.append(blocks if found.cores is None else blocks @ found.cores[:, m].astype(np.float64))
        one, two = deltas
        inner = (one * two).sum((1, 2))
        out[:, m] = inner * np.abs(inner) / ((one**2).sum((1, 2)) * (two**2).sum((1, 2)))
    return out


def partitions(examples: Sequence[Example]) -> dict[str, list[list[int]]]:
    n = len(examples)
    mixed = [int(i) for i in np.random.default_rng(5).permutation(n)]
    return {
        "alone": [[i] for i in range(n)],
        "pairs, shuffled": [mixed[i : i + 2] for i in range(0, n, 2)],
        "five, backwards": [list(range(n))[::-1][i : i + 5] for i in range(0, n, 5)],
        "by length": batches_by_tokens([e.tokens for e in examples], 48),
    }


def check_invariance(engine: FactorEngine, task: SequenceClassification, rows: Sequence[Row]) -> None:
    examples = task.encode(rows)
    assert len({e.tokens for e in examples}) > 3  # so that the whole batch is padded
    whole = compute(engine, task, examples, [list(range(len(rows)))])
    for name, parts in partitions(examples).items():
        found = compute(engine, task, examples, parts)
        assert squared_cosines(engine, whole, found).min() >= 0.99999, name
        np.testing.assert_allclose(found.norms, whole.norms, rtol=1e-3, err_msg=name)
        np.testing.assert_allclose(found.losses, whole.losses, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rank", [1, 4])
def test_factors_do_not_depend_on_the_batch(tmp_path: Path, architecture: str, rank: int) -> None:
    engine, task = build(checkpoint(tmp_path, architecture), rank)
    check_invariance(engine, task, [*make_rows(11), *make_rows(5, seed=3, pairs=True)])


@pytest.mark.parametrize("rank", [1, 4])
def test_factors_of_the_embedded_model_do_not_depend_on_the_batch(rank: int) -> None:
    engine, task = build(None, rank)
    rows = [Row(f"r{i}", "{}", text, None, ("no", "yes")[i % 2], "", "", "", 1) for i, text in enumerate(REAL)]
    check_invariance(engine, task, rows)


def test_a_batch_of_the_same_text_gives_the_same_factor_and_another_label_another(tmp_path: Path) -> None:
    engine, task = build(checkpoint(tmp_path), 1)
    row = make_rows(1)[0]
    other = Row("o", "{}", row.text, None, "yes", "", "", "", 1)
    found = engine.compute(task.collate(task.encode([row, row, other])))
    np.testing.assert_allclose(found.values[0], found.values[1], atol=1e-3)
    np.testing.assert_allclose(found.losses[0], found.losses[1], rtol=1e-5)
    assert abs(float(found.losses[0] - found.losses[2])) > 1e-4
    assert np.abs(found.values[0] - found.values[2]).max() > 0.01


@pytest.mark.parametrize("rank", [1, 4])
def test_two_runs_give_the_same_bytes(tmp_path: Path, rank: int) -> None:
    folder, rows = checkpoint(tmp_path), make_rows(9)
    found = []
    for _ in range(2):
        engine, task = build(folder, rank)
        for _ in range(2):
            found.append(engine.compute(task.collate(task.encode(rows))))
    for again in found[1:]:
        assert again.values.tobytes() == found[0].values.tobytes()
        assert again.norms.tobytes() == found[0].norms.tobytes()
        assert again.losses.tobytes() == found[0].losses.tobytes()
        assert (None if again.cores is None else again.cores.tobytes()) == (
            None if found[0].cores is None else found[0].cores.tobytes()
        )


def test_another_seed_gives_other_factors(tmp_path: Path) -> None:
    folder, rows = checkpoint(tmp_path), make_rows(3)
    (one, task), (two, _) = build(folder, 1, seed=0), build(folder, 1, seed=1)
    batch = task.collate(task.encode(rows))
    assert squared_cosines(one, one.compute(batch), two.compute(batch)).max() < 0.9


def test_computing_leaves_no_hook_and_no_gradient_behind(tmp_path: Path) -> None:
    engine, task = build(checkpoint(tmp_path), 1)
    state = {name: value.clone() for name, value in engine.module.state_dict().items()}
    engine.compute(task.collate(task.encode(make_rows(3))))
    assert [name for name, m in engine.module.named_modules() if m._forward_hooks] == []
    assert [name for name, p in engine.module.named_parameters() if p.grad is not None or p.requires_grad] == []
    assert all((value == state[name]).all() for name, value in engine.module.state_dict().items())
    with pytest.raises(ValueError, match="input_ids"):
        engine.gradients({"labels": torch.tensor([0])})
    assert [name for name, m in engine.module.named_modules() if m._forward_hooks] == []


def test_batches_by_tokens_by_hand() -> None:
    assert batches_by_tokens([3, 9, 2, 3], 6) == [[2], [0, 3], [1]]  # 17 tokens; [2, 0], [3], [1] would be 18
    assert batches_by_tokens([64, 63, 64], 192) == [[1, 0, 2]]  # one token of padding costs less than another batch
    assert batches_by_tokens([64, 63, 64], 128) == [[1], [0, 2]]
    assert batches_by_tokens([], 6) == []
    assert batches_by_tokens([4, 4, 4], 8) == [[0], [1, 2]]


def padded(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> int:
    return sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 1000))
def test_batches_by_tokens_keeps_the_limit(lengths: list[int], limit: int) -> None:
    batches = batches_by_tokens(lengths, limit)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= limit
        assert batches_by_tokens([lengths[i] for i in batch], limit) == [
            list(range(len(batch)))
        ]  # cut once, cut for good
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(flat)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 200))
def test_no_way_to_cut_costs_less(lengths: list[int], limit: int) -> None:
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    costs = []
    for cuts in itertools.product([False, True], repeat=len(lengths) - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), len(lengths)]
        parts = [order[lo:hi] for lo, hi in pairwise(edges)]
        if all(len(part) == 1 or padded(lengths, [part]) <= limit for part in parts):
            costs.append(padded(lengths, parts) + len(parts) * limit / 32)
    found = batches_by_tokens(lengths, limit)
    assert padded(lengths, found) + len(found) * limit / 32 == pytest.approx(min(costs))
