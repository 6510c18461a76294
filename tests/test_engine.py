from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from oracle_reference import literal_deltas, literal_phi
from tiny_models import ARCHITECTURES, checkpoint, sentences

from repmatch.curator import base_models, classification, engine, targets
from repmatch.datamodels import Row, Space

ADAMW = {"name": "adamw", "lr": 1e-3, "eps": 1e-8}
LABELS = ("no", "perhaps", "yes")


def make_rows(count: int, seed: int = 0, pairs: bool = False) -> list[Row]:
    firsts, seconds = sentences(count, seed), sentences(count, seed + 1)
    return [
        Row(f"r{i}", "{}", firsts[i], seconds[i] if pairs else None, LABELS[i % 3], "", "", "here", i + 1)
        for i in range(count)
    ]


def build(
    folder: Path | None, rank: int, seed: int = 0
) -> tuple[engine.FactorEngine, classification.SequenceClassification]:
    model = base_models.find_model(None if folder is None else str(folder))
    tokenizer = base_models.load_tokenizer(model)
    module = base_models.load_classifier(model, 3, seed)
    space = Space(
        model=model.name,
        model_fingerprint=model.fingerprint,
        tokenizer_fingerprint=base_models.tokenizer_fingerprint(tokenizer),
        task=classification.NAME,
        template=classification.TEMPLATE,
        max_length=60,
        rank=rank,
        alpha=4.0,
        seed=seed,
        matrices=targets.find_matrices(module, None),
        optimizer=ADAMW,
    )
    task = classification.SequenceClassification(tokenizer, LABELS, 60)
    return engine.FactorEngine(module, space, classification.losses), task


def compare_with_literal(
    built: tuple[engine.FactorEngine, classification.SequenceClassification], rows: list[Row]
) -> tuple[np.ndarray, np.ndarray]:
    """Signed squared cosine of ΔW, and φ at full rank, per instance and matrix: one padded batch against one by one."""
    factors, task = built
    examples = task.encode(rows)
    found = factors.compute(task.collate(examples))
    expected = literal_deltas(factors.module, factors.space, [task.collate([e]) for e in examples])
    layout, rank = factors.layout, factors.layout.rank
    cosines = np.empty((len(rows), len(layout.matrices)))
    phis = np.empty_like(cosines)
    for i in range(len(rows)):
        for m, matrix in enumerate(layout.matrices):
            lo, hi = layout.offsets[m : m + 2]
            u = found.values[i, lo:hi].reshape(matrix.d_out, rank).astype(np.float64)
            core = np.ones((1, 1)) if found.cores is None else found.cores[i, m].astype(np.float64)
            a = factors._a[matrix.name].double().numpy()
            q = a.T / np.linalg.norm(a) if rank == 1 else torch.linalg.qr(torch.from_numpy(a.T)).Q.numpy()
            full = int(np.count_nonzero(np.linalg.norm(u, axis=0)))
            delta = u @ core @ q.T
            truth = expected[i][m]
            cosines[i, m] = np.sum(delta * truth) * abs(np.sum(delta * truth))
            cosines[i, m] /= np.sum(delta**2) * np.sum(truth**2)
            phis[i, m] = literal_phi(delta, truth, full, full)
    return cosines, phis


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rank", [1, 4])
def test_factors_equal_the_literal_procedure(tmp_path: Path, architecture: str, rank: int) -> None:
    built = build(checkpoint(tmp_path, architecture), rank)
    cosines, phis = compare_with_literal(built, make_rows(12))
    assert cosines.shape == (12, 4)
    assert cosines.min() >= 0.99999  # signed: the direction is that of ΔW, not of its negative
    assert phis.min() >= 0.99999


def test_factors_of_pairs_equal_the_literal_procedure(tmp_path: Path) -> None:
    cosines, phis = compare_with_literal(build(checkpoint(tmp_path), 1), make_rows(8, pairs=True))
    assert min(cosines.min(), phis.min()) >= 0.99999


@pytest.mark.parametrize("rank", [1, 4])
def test_the_embedded_model_equals_the_literal_procedure(rank: int) -> None:
    rows = make_rows(6)
    cosines, phis = compare_with_literal(build(None, rank), rows)
    assert cosines.shape == (6, 12)
    assert min(cosines.min(), phis.min()) >= 0.99999
