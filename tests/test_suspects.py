from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import Run, toy_rows

from repmatch.blocks import take
from repmatch.curator.suspects import agreement
from repmatch.datamodels import Factors, Layout, Matrix
from repmatch.errors import UsageError
from repmatch.similarity import score_instance


def factors(n: int, rank: int, seed: int = 0, *, zero: int | None = None) -> Factors:
    rng = np.random.default_rng(seed)
    layout = Layout((Matrix("a", 12, 5), Matrix("b", 9, 5)), rank)
    flat = np.empty((n, layout.width), np.float32)
    for i in range(n):
        parts = [np.linalg.qr(rng.standard_normal((d, rank)))[0] for d in layout.dims]
        flat[i] = np.concatenate([part.ravel() for part in parts])
    norms = np.ones((n, 2), np.float32)
    if zero is not None:
        flat[zero], norms[zero] = 0.0, 0.0
    cores = None if rank == 1 else rng.standard_normal((n, 2, rank, rank)).astype(np.float32)
    return Factors(tuple(f"i{j}" for j in range(n)), layout, "float32", flat, None, norms, cores, "s")


@pytest.mark.parametrize("rank", [1, 3])
def test_agreement_is_the_mean_signed_cosine_with_all_others(rank: int) -> None:
    held = factors(11, rank, zero=4)
    pairs = np.stack([score_instance(held, take(held, [i]), signed=True).mean(axis=1) for i in range(11)])
    np.fill_diagonal(pairs, 0.0)
    np.testing.assert_allclose(agreement(held), pairs.sum(axis=1) / 10, atol=1e-6)
    assert agreement(held)[4] == 0.0


def test_agreement_needs_two() -> None:
    with pytest.raises(UsageError, match="two or more"):
        agreement(factors(1, 1))


def test_the_command_lists_the_worst_first_and_names_a_conflict(run: Run, toy_store: Path) -> None:
    result = run("--store", toy_store, "suspects", "toy", "-k", 60, "--json")
    assert result.code == 0
    found = result.objects
    assert {o["id"] for o in found} == {r["id"] for r in toy_rows()}
    agreed = [float(str(o["agreement"])) for o in found]
    assert agreed == sorted(agreed)
    labels = {r["id"]: r["label"] for r in toy_rows()}
    # Two labels under a random head: what opposes an instance most has the other label.
    assert all(labels[o["conflict"]] != labels[o["id"]] for o in found if float(str(o["opposition"])) < -0.5)
    assert sum(float(str(o["opposition"])) < -0.5 for o in found) > 30
    assert "cold start" in result.err
    top = run("--store", toy_store, "suspects", "toy", "-k", 5)
    assert top.out.splitlines()[1].split()[1] == found[0]["id"]
    assert len(top.out.splitlines()) == 7
