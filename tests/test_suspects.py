from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import Run, toy_rows

import repmatch.curator.suspects as module
from repmatch.blocks import take
from repmatch.curator.suspects import oppose, suspicion
from repmatch.datamodels import Factors, Layout, Matrix
from repmatch.errors import UsageError
from repmatch.similarity import kernel_block, score_instance


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


@pytest.mark.parametrize("block_bytes", [1, 64 << 20])
def test_neighbours_are_found_by_repmatch_and_asked_by_sign(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", block_bytes)
    held = factors(13, 1, zero=4)
    kernel = kernel_block(held, held).astype(np.float64)
    signed = np.stack([score_instance(held, take(held, [i]), signed=True).mean(axis=1) for i in range(13)])
    found = oppose(held, near=3)
    for i in range(13):
        near = sorted((j for j in range(13) if j != i), key=lambda j: -kernel[i, j])[:3]
        if i != 4:
            assert found.agreement[i] == pytest.approx(signed[i, near].mean(), abs=1e-6)
        assert found.cosine[i] == pytest.approx(signed[i].min(), abs=1e-6)
    assert found.agreement[4] == 0.0


def test_many_instances_ask_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    held = factors(40, 1)
    whole = oppose(held, near=5)
    monkeypatch.setattr(module, "REFERENCE", 10)
    sampled = oppose(held, near=5)
    assert len(set(sampled.conflict.tolist())) <= 10
    assert np.isfinite(sampled.agreement).all()
    assert not np.array_equal(whole.agreement, sampled.agreement)


def test_suspicion_is_the_mean_of_two_ranks() -> None:
    losses, agreement = np.array([3.0, 1.0, 2.0, 2.0]), np.array([-0.5, 0.5, 0.1, 0.2])
    # By loss: 1, 0, 1/2 and 1/2; by opposition: 1, 0, 2/3, 1/3.
    assert suspicion(losses, agreement) == pytest.approx([1.0, 0.0, (0.5 + 2 / 3) / 2, (0.5 + 1 / 3) / 2])


def test_one_instance_has_no_neighbours() -> None:
    with pytest.raises(UsageError, match="two or more"):
        oppose(factors(1, 1))


def test_the_command_lists_the_worst_first_and_names_a_conflict(run: Run, toy_store: Path) -> None:
    result = run("--store", toy_store, "suspects", "toy", "-k", 60, "--json")
    assert result.code == 0
    found = result.objects
    assert {o["id"] for o in found} == {r["id"] for r in toy_rows()}
    suspicious = [float(str(o["suspicion"])) for o in found]
    assert suspicious == sorted(suspicious, reverse=True)
    labels = {r["id"]: r["label"] for r in toy_rows()}
    # Two labels under a random head: what opposes an instance most has the other label.
    clear = [o for o in found if float(str(o["opposition"])) < -0.5]
    assert len(clear) > 30
    assert all(labels[o["conflict"]] != labels[o["id"]] for o in clear)
    assert "cold start" in result.err
    top = run("--store", toy_store, "suspects", "toy", "-k", 5)
    assert top.out.splitlines()[1].split()[1] == found[0]["id"]
    assert len(top.out.splitlines()) == 6
