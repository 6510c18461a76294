from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_similarity import best_phi, blocks_of, kernel, make_factors, phi_from_updates

from repmatch import signcodes
from repmatch.blocks import choose_matrices, second_moment, take
from repmatch.datamodels import Factors, Layout, Matrix
from repmatch.errors import InputError, SpaceMismatchError, UsageError
from repmatch.ranking import best_k, top_k
from repmatch.similarity import (
    chance,
    directions_of,
    grassmann,
    kernel_block,
    matrix_scores,
    mean_similarity,
    orthonormal,
    repmatch_score,
    score_against,
    score_instance,
    signed_against,
)

ENCODINGS = [("float32", 1), ("float16", 1), ("sign", 1), ("float32", 4), ("float16", 4)]
DIMS = (70, 64, 5)


def frame(seed: int, d: int, r: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((d, r)))[0]


def test_grassmann_matches_full_svd() -> None:
    rng = np.random.default_rng(1)
    b1, a1, b2, a2 = (rng.standard_normal(s) for s in ((20, 4), (4, 30), (20, 4), (4, 30)))
    u1, u2 = orthonormal(b1, a1), orthonormal(b2, a2)
    for i in range(1, 5):
        for j in range(1, 5):
            assert grassmann(u1, u2, i, j) == pytest.approx(phi_from_updates(b1 @ a1, b2 @ a2, i, j), abs=1e-10)
    assert matrix_scores([u1], [u2])[0] == pytest.approx(best_phi(u1, u2), abs=1e-12)


def test_grassmann_rank_one_is_the_squared_cosine() -> None:
    assert grassmann([1.0, 0.0], [0.6, 0.8]) == pytest.approx(0.36)
    assert grassmann([1.0, 0.0], [-0.6, -0.8]) == pytest.approx(0.36)


def test_score_is_the_mean_over_ragged_matrices_and_ranks() -> None:
    u1 = [frame(0, 7, 2), frame(1, 9, 3)]
    u2 = [frame(2, 7, 4), frame(3, 9, 1)]
    expected = [best_phi(a, b) for a, b in zip(u1, u2, strict=True)]
    assert repmatch_score(u1, u2) == pytest.approx(np.mean(expected), abs=1e-12)
    assert repmatch_score(np.stack([frame(0, 7, 2)] * 3), np.stack([frame(0, 7, 2)] * 3)) == pytest.approx(1.0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 4), st.integers(4, 12))
def test_score_invariants(seed: int, r1: int, r2: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    u, v = frame(seed, d, r1), frame(seed + 1, d, r2)
    score = repmatch_score([u], [v])
    assert 0.0 <= score <= 1.0
    assert score == pytest.approx(repmatch_score([v], [u]), abs=1e-12)
    assert repmatch_score([u], [u]) == pytest.approx(1.0, abs=1e-12)
    rotation = frame(seed + 2, d, d)
    assert repmatch_score([rotation @ u], [rotation @ v]) == pytest.approx(score, abs=1e-9)
    signs = rng.choice([-1.0, 1.0], r1)
    assert repmatch_score([u * signs], [v]) == pytest.approx(score, abs=1e-12)
    mixed = u @ frame(seed + 3, r1, r1)  # φ(r, r) depends on the subspace only, not on its basis
    assert grassmann(mixed, v) == pytest.approx(grassmann(u, v), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-3, 1e3), st.integers(1, 3))
def test_orthonormal_ignores_scale_and_factorisation(seed: int, scale: float, r: int) -> None:
    rng = np.random.default_rng(seed)
    b, a = rng.standard_normal((9, r)), rng.standard_normal((r, 11))
    u = orthonormal(b, a)
    assert u.T @ u == pytest.approx(np.eye(r), abs=1e-9)
    mix = rng.standard_normal((r, r)) + 3 * np.eye(r)
    other = orthonormal(scale * b @ np.linalg.inv(mix), mix @ a)
    assert repmatch_score([u], [other]) == pytest.approx(1.0, abs=1e-6)
    assert np.abs(u.T @ other) == pytest.approx(np.eye(r), abs=1e-5)


def test_orthonormal_leaves_zero_columns_for_missing_rank() -> None:
    b = np.array([[3.0, 3.0], [4.0, 4.0], [0.0, 0.0]])
    u = orthonormal(b, np.ones((2, 5)))
    assert np.abs(u[:, 0]) == pytest.approx([0.6, 0.8, 0.0])
    assert not u[:, 1].any()
    assert repmatch_score([u], [u]) == pytest.approx(1.0)
    assert not orthonormal(np.zeros((4, 2)), np.ones((2, 5))).any()
    assert repmatch_score([np.zeros((4, 2))], [frame(0, 4, 2)]) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: grassmann(2 * np.eye(3), np.eye(3)), "not orthonormal"),
        (lambda: grassmann(np.eye(3), np.eye(4)), "length 3 and 4"),
        (lambda: grassmann(np.eye(3), np.eye(3), 0), "i = 0"),
        (lambda: grassmann(np.eye(3), np.eye(3), 1, 4), "j = 4"),
        (lambda: grassmann(np.full((3, 1), np.nan), np.eye(3)), "not orthonormal"),
        (lambda: repmatch_score([np.eye(3)], []), "1 and 0 matrices"),
        (lambda: repmatch_score([], []), "without matrices"),
        (lambda: orthonormal(np.ones((3, 2)), np.ones((3, 2))), "don't multiply"),
    ],
)
def test_refusals(call, message: str) -> None:  # noqa: ANN001
    with pytest.raises(UsageError, match=message):
        call()


def test_chance() -> None:
    assert chance(Layout((Matrix("a", 384, 1), Matrix("b", 96, 1)), 1)) == pytest.approx((1 / 384 + 1 / 96) / 2)
    for d, r in ((24, 3), (5, 4)):
        layout = Layout((Matrix("a", d, 1),), r)
        drawn = [best_phi(frame(2 * i, d, r), frame(2 * i + 1, d, r)) for i in range(1500)]
        error = np.std(drawn) / np.sqrt(len(drawn))
        assert chance(layout) == pytest.approx(np.mean(drawn), abs=5 * error)
        assert chance(layout) == chance(layout)
    assert chance(Layout((Matrix("a", 3, 1),), 3)) == pytest.approx(1.0)


@pytest.mark.parametrize(("encoding", "rank"), ENCODINGS)
def test_scores_against_an_adapter(encoding: str, rank: int) -> None:
    factors = make_factors(9, DIMS, rank, encoding, zeros=2)
    for adapter_rank in (1, 3):
        adapter = [frame(m, d, adapter_rank) for m, d in enumerate(DIMS)]
        scores = score_against(factors, adapter)
        assert scores.shape == (9, 3)
        assert scores.dtype == np.float32
        for i in range(9):
            expected = [best_phi(u, v) for u, v in zip(blocks_of(factors, i), adapter, strict=True)]
            assert scores[i] == pytest.approx(expected, abs=2e-3 if encoding == "float16" else 1e-5)
        assert not scores[:2, 0].any()


@pytest.mark.parametrize(("encoding", "rank"), ENCODINGS)
def test_signed_cosine(encoding: str, rank: int) -> None:
    factors = make_factors(7, DIMS, rank, encoding, zeros=1)
    other = directions_of(factors, 3)
    signed = signed_against(factors, other)
    for i in range(7):
        mine = directions_of(factors, i)
        for m in range(3):
            lengths = np.linalg.norm(mine[m]) * np.linalg.norm(other[m])
            expected = (mine[m] * other[m]).sum() / lengths if lengths else 0.0
            assert signed[i, m] == pytest.approx(expected, abs=1e-3 if encoding == "float16" else 1e-5)
    assert signed_against(factors, [-5.0 * d for d in other]) == pytest.approx(-signed, abs=1e-6)
    if rank == 1:
        assert np.square(signed) == pytest.approx(score_against(factors, other), abs=2e-3)


@pytest.mark.parametrize(("encoding", "rank"), ENCODINGS)
def test_kernel_and_mean_similarity(encoding: str, rank: int) -> None:
    factors = make_factors(13, DIMS, rank, encoding, zeros=2)
    other = take(factors, slice(1, 12))
    expected = kernel(factors, other)
    tolerance = 2e-3 if encoding == "float16" else 1e-5
    block = kernel_block(factors, other)
    assert block.dtype == np.float32
    assert block == pytest.approx(expected, abs=tolerance)
    assert mean_similarity(factors, other) == pytest.approx(expected.mean(axis=1), abs=tolerance)
    whole = kernel_block(factors, factors)
    assert np.linalg.eigvalsh(whole.astype(np.float64)).min() > -1e-5
    assert np.diag(whole)[2:] == pytest.approx(np.ones(11), abs=tolerance)
    assert np.diag(whole)[:2] == pytest.approx(np.full(2, 2 / 3), abs=tolerance)


def test_kernel_of_mixed_encodings_and_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    signs = make_factors(11, DIMS, 1, "sign")
    floats = make_factors(11, DIMS, 1, "float32")
    expected = kernel(floats, signs)
    for name in ("repmatch.similarity.sets.BLOCK_BYTES", "repmatch.blocks.BLOCK_BYTES"):
        monkeypatch.setattr(name, 1000)
    assert kernel_block(floats, signs) == pytest.approx(expected, abs=1e-5)
    assert mean_similarity(floats, signs) == pytest.approx(expected.mean(axis=1), abs=1e-5)


def test_sign_codes_of_many_columns_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((700, 75))
    bits, live = signcodes.encode(values, (70, 5)), np.ones((700, 2), np.bool_)
    signs = np.where(values < 0, -1.0, 1.0)
    expected = ((signs[:, :70] @ signs[:, :70].T / 70) ** 2 + (signs[:, 70:] @ signs[:, 70:].T / 5) ** 2) / 2
    for threads in ("1", "3"):
        monkeypatch.setenv("REPMATCH_THREADS", threads)
        assert signcodes.kernel((bits, live), (bits, live), (2, 1), (70, 5)) == pytest.approx(expected, abs=1e-6)
        wide = signcodes.kernel((bits[:3], live[:3]), (bits, live), (2, 1), (70, 5))
        assert wide == pytest.approx(expected[:3], abs=1e-6)
        tall = signcodes.kernel((bits, live), (bits[:3], live[:3]), (2, 1), (70, 5))
        assert np.array_equal(tall, wide.T)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 200))
def test_sign_codes_round_trip(seed: int, d: int) -> None:
    values = np.random.default_rng(seed).standard_normal((3, d + 1)).astype(np.float32)
    bits = signcodes.encode(values, (1, d))
    decoded = signcodes.decode(bits, 1, d)
    assert np.array_equal(decoded < 0, values[:, 1:] < 0)
    assert np.linalg.norm(decoded, axis=1) == pytest.approx(np.ones(3), abs=1e-5)
    used = np.bitwise_count(bits[:, 1:]).sum(axis=1)
    assert np.array_equal(used, (values[:, 1:] < 0).sum(axis=1))


@pytest.mark.parametrize(("encoding", "rank"), ENCODINGS)
@pytest.mark.parametrize("signed", [False, True])
def test_top_k_is_exact(encoding: str, rank: int, signed: bool) -> None:
    factors = make_factors(40, DIMS, rank, encoding, zeros=1)
    scores = score_instance(factors, take(factors, [5]), signed=signed).mean(axis=1)
    places, found = top_k(5, factors, 12, signed=signed)
    assert places[0] == 5
    assert found[0] == pytest.approx(1.0, abs=2e-3)
    assert found == pytest.approx(np.sort(scores)[::-1][:12], abs=1e-5)
    assert found == pytest.approx(scores[places], abs=1e-5)
    without, _ = top_k(take(factors, [5]), factors, 100, signed=signed, exclude=[5, 7])
    assert len(without) == 38
    assert not {5, 7} & set(without.tolist())


@pytest.mark.parametrize(("encoding", "rank"), ENCODINGS)
def test_top_k_breaks_ties_by_id(encoding: str, rank: int) -> None:
    base = make_factors(3, DIMS, rank, encoding)
    copies = take(base, [0, 1, 2] * 37)
    ids = tuple(f"{(i * 7919) % 1000:03d}" for i in range(111))
    factors = dataclasses.replace(copies, ids=ids)
    places, scores = top_k(1, factors, 20)
    same = sorted((i for i in range(111) if i % 3 == 1), key=lambda i: ids[i])
    assert places.tolist() == same[:20]
    assert len(set(scores.tolist())) == 1


def test_best_k() -> None:
    scores = np.array([0.5, 0.9, 0.5, 0.1], np.float32)
    assert best_k(scores, ["b", "c", "a", "d"], 2)[0].tolist() == [1, 2]
    assert best_k(scores, ["b", "c", "a", "d"], 9)[0].tolist() == [1, 2, 0, 3]
    assert best_k(scores, ["b", "c", "a", "d"], 0)[0].tolist() == []
    with pytest.raises(InputError, match="'c'"):
        best_k(np.array([0.0, np.nan], np.float32), ["b", "c"], 1)
    with pytest.raises(UsageError, match="negative"):
        best_k(scores, "bcad", -1)


def test_choice_of_matrices_and_second_moment() -> None:
    for encoding, rank in ENCODINGS:
        factors = make_factors(6, DIMS, rank, encoding, zeros=1)
        chosen = choose_matrices(factors, [2, 0])
        assert chosen.layout.dims == (5, 70)
        assert kernel_block(chosen, chosen) == pytest.approx(kernel(chosen, chosen), abs=2e-3)
        assert np.array_equal(chosen.norms, factors.norms[:, [2, 0]])
        weights = np.arange(6.0)
        blocks = [blocks_of(factors, i)[1] for i in range(6)]
        expected = sum(w * b @ b.T for w, b in zip(weights, blocks, strict=True))
        assert second_moment(factors, 1, weights) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(UsageError, match="0 to 2"):
        choose_matrices(factors, [3])


def test_other_spaces_are_refused() -> None:
    factors = make_factors(3, DIMS)
    with pytest.raises(SpaceMismatchError, match="space_id"):
        kernel_block(factors, dataclasses.replace(factors, space_id="other"))
    with pytest.raises(UsageError, match="empty set"):
        mean_similarity(factors, take(factors, []))
    with pytest.raises(UsageError, match="expected the same"):
        score_against(factors, [np.eye(70)[:, :1]])
    with pytest.raises(UsageError, match="cores"):
        signed_against(dataclasses.replace(make_factors(2, (6,), 2), cores=None), [np.zeros((6, 2))])


def test_import_is_light() -> None:
    heavy = "[m for m in ('torch', 'duckdb', 'numba') if m in sys.modules]"
    code = f"import sys, repmatch.similarity, repmatch.selectors; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_kernel_is_one_on_itself_at_lower_rank_too() -> None:
    draw = np.random.default_rng(3)
    layout = Layout((Matrix("q", 12, 5),), 3)
    frames = np.stack([np.linalg.qr(draw.normal(size=(12, 3)))[0] for _ in range(4)])
    frames[1, :, 1:] = 0.0  # rank 1
    frames[2, :, 2:] = 0.0  # rank 2
    ids, cores = tuple("abcd"), np.tile(np.eye(3, dtype=np.float32), (4, 1, 1, 1))
    flat = frames.reshape(4, -1).astype(np.float32)
    some = Factors(ids, layout, "float32", flat, None, np.ones((4, 1), np.float32), cores, "s")
    kernel = kernel_block(some, some)
    ranks = np.array([3, 1, 2, 3])
    expected = np.square(np.einsum("adr,bds->abrs", frames, frames)).sum(axis=(2, 3)) / np.sqrt(np.outer(ranks, ranks))
    np.testing.assert_allclose(kernel, expected, atol=1e-6)
    np.testing.assert_allclose(np.diag(kernel), 1.0, atol=1e-6)
    np.testing.assert_allclose(mean_similarity(some, some), expected.mean(axis=1), atol=1e-6)
    assert np.linalg.eigvalsh(kernel.astype(np.float64)).min() > -1e-6
