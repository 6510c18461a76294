"""Search over the store against brute force: every encoding, ties by id, one query as many, filters, moved segments."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from oracle_similarity import blocks_of, make_factors
from store_worker import make_row, make_space, prepare

import repmatch.best
import repmatch.store.search as searching
from repmatch import store as stores
from repmatch.blocks import take
from repmatch.datamodels import FactorBatch, Factors
from repmatch.errors import InputError, SpaceMismatchError, UnknownNameError, UsageError
from repmatch.similarity import mean_scores, mean_similarity, score_instance

ENCODINGS = [("float32", 1), ("float16", 1), ("sign", 1), ("float32", 3), ("float16", 3)]
DIMS = (70, 64, 5)


def stored(path: Path, encoding: str, rank: int, n: int = 300, zeros: int = 3) -> stores.Store:
    """A store of random instances whose ids are in no order; every tenth factor is that of its predecessor."""
    made = make_factors(n, DIMS, rank, seed=rank, zeros=zeros)
    assert made.flat is not None
    values, norms = np.array(made.flat, np.float32), np.array(made.norms)
    cores = None if made.cores is None else made.cores.copy()
    for i in range(10, n, 10):
        values[i], norms[i] = values[i - 1], norms[i - 1]
        if cores is not None:
            cores[i] = cores[i - 1]
    names = [f"n{(i * 7919) % n}" for i in range(n)]
    space = make_space(rank, DIMS)
    store = stores.open(path)
    store.segment_bytes = 40_000
    with store.writing():
        prepare(store, space, encoding)  # type: ignore[arg-type]
        for lo in range(0, n, 70):
            cut = slice(lo, min(n, lo + 70))
            rows = tuple(make_row(name, label="ab"[i % 2], n=i) for i, name in enumerate(names[cut], lo))
            ones = np.ones(len(rows), np.float32)
            more = (ones, ones.astype(np.int32), ones > 2)
            core = None if cores is None else cores[cut]
            store.append("d", space.id, encoding, FactorBatch(rows, values[cut], core, norms[cut], *more))  # type: ignore[arg-type]
    return store


def brute(factors: Factors, query: Factors, k: int, signed: bool, skip: str | None) -> list[tuple[str, float]]:
    """Every score on its own in float64, sorted by score and id."""
    rows = []
    for i, name in enumerate(factors.ids):
        if name != skip:
            one = score_one(take(factors, [i]), query, signed)
            rows.append((-np.float32(one), name))
    return [(name, -float(score)) for score, name in sorted(rows)[:k]]


def score_one(one: Factors, query: Factors, signed: bool) -> float:
    total = 0.0
    for m, (u, v) in enumerate(zip(blocks_of(one, 0), blocks_of(query, 0), strict=True)):
        if one.norms[0, m] == 0 or query.norms[0, m] == 0:
            continue
        if signed:
            a = u if one.cores is None else u @ one.cores[0, m].astype(np.float64)
            b = v if query.cores is None else v @ query.cores[0, m].astype(np.float64)
            size = 1.0 if one.cores is None else np.linalg.norm(one.cores[0, m].astype(np.float64))
            total += float(np.clip((a * b).sum() / (size * np.linalg.norm(b)), -1, 1))
        else:
            best = 0.0
            for i in range(1, u.shape[1] + 1):
                for j in range(1, v.shape[1] + 1):
                    best = max(best, float(np.square(u[:, :i].T @ v[:, :j]).sum()) / min(i, j))
            total += min(best, 1.0)
    return total / len(DIMS)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("encoding", "rank"), ENCODINGS)
def test_search_is_exact(tmp_path: Path, encoding: str, rank: int, signed: bool) -> None:
    store = stored(tmp_path / "s", encoding, rank)
    assert len(list((tmp_path / "s" / "segments").glob("*.bin"))) > 1 or encoding == "sign"
    factors = store.factors("d")
    search = store.search("d")
    wanted = ["n5", "n120", factors.ids[9], factors.ids[10]]
    many = search.nearest_to(wanted, 25, signed=signed)
    for name, hits in zip(wanted, many, strict=True):
        query = store.factors("d", ids=[name])
        expected = brute(factors, query, 25, signed, name)
        scores = dict(brute(factors, query, len(factors), signed, name))
        np.testing.assert_allclose(hits.scores, [score for _, score in expected], atol=2e-7)
        assert (np.diff(hits.scores) <= 0).all()
        close = [pair for pair in zip(hits.ids, (i for i, _ in expected), strict=True) if pair[0] != pair[1]]
        assert all(abs(scores[a] - scores[b]) < 2e-7 for a, b in close)  # the last bit of a sum may fall either way
        (one,) = search.nearest_to([name], 25, signed=signed)
        assert one.ids == hits.ids
        np.testing.assert_array_equal(one.scores, hits.scores)
        same = [(a, b) for a, b in zip(hits.ids, hits.ids[1:], strict=False)]
        for (a, b), x, y in zip(same, hits.scores, hits.scores[1:], strict=False):
            assert x > y or a < b


@pytest.mark.parametrize("encoding", ["float32", "float16", "sign"])
def test_equal_factors_come_in_order_of_their_ids(
    tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, space = stores.open(tmp_path / "s"), make_space(1, DIMS)
    prepare(store, space, encoding)  # type: ignore[arg-type]
    made = make_factors(1, DIMS)
    assert made.flat is not None
    names = [f"{(i * 37) % 500:03d}" for i in range(500)]
    ones = np.ones(500, np.float32)
    values, norms = np.repeat(made.flat, 500, 0), np.ones((500, 3), np.float32)
    rows = tuple(make_row(name) for name in names)
    batch = FactorBatch(rows, values, None, norms, ones, ones.astype(np.int32), ones > 2)
    store.append("d", space.id, encoding, batch)  # type: ignore[arg-type]
    expected = tuple(sorted(names))
    for limit in (repmatch.best.BUFFER_BYTES, 1):  # 1: equal scores are settled while they stream by
        monkeypatch.setattr(repmatch.best, "BUFFER_BYTES", limit)
        monkeypatch.setattr(repmatch.best, "ROOM", 0)
        monkeypatch.setattr(searching, "_ROWS", (64, 64))
        for hits in store.search("d").nearest_to(["250"] * 3, 5):
            assert hits.ids == expected[:5]
            assert len(set(hits.scores.tolist())) == 1
    assert store.nearest("d", "000", 3)["id"].to_list() == ["001", "002", "003"]
    assert store.nearest("d", ["499"], 500)["id"].to_list() == list(expected[:-1])


def test_filters(tmp_path: Path) -> None:
    store = stored(tmp_path / "s", "sign", 1)
    factors = store.factors("d")
    labels = dict(zip(store.ids("d"), store.column("d", "label"), strict=True))
    search = store.search("d", where="label = 'b' AND n > 20")
    (hits,) = search.nearest_to(["n5"], 10)
    allowed = store.ids("d", where="label = 'b' AND n > 20")
    assert {labels[name] for name in hits.ids} == {"b"}
    among = store.factors("d", ids=allowed)
    assert list(hits.ids) == [name for name, _ in brute(among, store.factors("d", ids=["n5"]), 10, False, "n5")]
    assert store.nearest("d", "n5", where="n < 0").height == 0
    assert len(store.search("d", where="n < 0").nearest_to(["n5", "n6"], 3)) == 2
    with pytest.raises(UsageError, match="not one SQL expression"):
        store.nearest("d", "n5", where="; DROP TABLE x")
    assert len(factors) == 300


def test_all_are_found_where_k_is_more(tmp_path: Path) -> None:
    store = stored(tmp_path / "s", "float16", 1, n=30)
    (hits,) = store.search("d").nearest_to(["n5"], 1000)
    assert sorted(hits.ids) == sorted(f"n{i}" for i in range(30) if i != 5)
    frame = store.nearest("d", ["n5", "n7"], 2)
    assert frame.columns == ["query", "rank", "id", "score"]
    assert frame["query"].to_list() == ["n5", "n5", "n7", "n7"]
    assert frame["rank"].to_list() == [1, 2, 1, 2]
    assert hits.to_polars()["rank"].to_list() == list(range(1, 30))


def test_refusals(tmp_path: Path) -> None:
    store = stored(tmp_path / "s", "float32", 1, n=30)
    search = store.search("d")
    with pytest.raises(UsageError, match="k = 0"):
        search.nearest_to(["n5"], 0)
    with pytest.raises(UnknownNameError, match="no instance 'nope'"):
        search.nearest_to(["n5", "nope"], 3)
    with pytest.raises(SpaceMismatchError):
        search.nearest(replace(search.factors(["n5"]), space_id="another"), 3)
    query = search.factors(["n5"])
    assert query.flat is not None
    with pytest.raises(InputError, match="not a number"):
        search.nearest(replace(query, flat=np.full_like(query.flat, np.nan)), 3)


def test_mean_similarity_to_a_set_in_one_pass(tmp_path: Path) -> None:
    for encoding, rank in ENCODINGS:
        store = stored(tmp_path / f"{encoding}{rank}", encoding, rank)
        factors = store.factors("d")
        chosen = store.ids("d", where="label = 'a'")
        expected = mean_similarity(factors, store.factors("d", ids=chosen))
        found = store.mean_similarity("d", "d[label = 'a']")
        assert found.columns == ["id", "score"]
        assert found["id"].to_list() == list(factors.ids)
        np.testing.assert_allclose(found["score"].to_numpy(), expected, atol=1e-6)
        store.save_subset("chosen", "d", chosen)
        again = store.mean_similarity("d", "chosen")
        np.testing.assert_allclose(again["score"].to_numpy(), expected, atol=1e-6)
    with pytest.raises(UsageError, match="empty"):
        store.mean_similarity("d", "d[n < 0]")


def test_one_query_scores_as_the_arrays_do(tmp_path: Path) -> None:
    store = stored(tmp_path / "s", "sign", 1)
    factors = store.factors("d")
    expected = score_instance(factors, take(factors, [4])).mean(axis=1)
    (hits,) = store.search("d").nearest(take(factors, [4]), 300)
    found = dict(zip(hits.ids, hits.scores.tolist(), strict=True))
    np.testing.assert_allclose([found[name] for name in factors.ids], expected, atol=1e-6)


def test_hostile_ids_are_found_and_deleted(tmp_path: Path) -> None:
    odd = ["it's", 'say "hi"', "a\0b", "0012", "12", "", " ", "日本語 🙂", "x" * 10_000, "a\nb", "'; DROP TABLE x; --"]
    store, space = stores.open(tmp_path / "s"), make_space(1, DIMS)
    prepare(store, space, "sign")
    made = make_factors(len(odd), DIMS)
    assert made.flat is not None
    ones = np.ones(len(odd), np.float32)
    rows = tuple(make_row(name) for name in odd)
    norms = np.ones((len(odd), 3), np.float32)
    store.append(
        "d", space.id, "sign", FactorBatch(rows, made.flat, None, norms, ones, ones.astype(np.int32), ones > 2)
    )
    frame = store.nearest("d", odd, 100)
    for name in odd:
        found = frame.filter(frame["query"] == name)["id"].to_list()
        assert sorted(found) == sorted(other for other in odd if other != name)
    store.delete("d", ids=odd[::2])
    assert store.ids("d") == odd[1::2]
    store.compact()
    assert store.factors("d").ids == tuple(odd[1::2])
    assert store.verify() == []


@pytest.mark.parametrize("encoding", ["float32", "float16", "sign"])
def test_factors_as_arrow(tmp_path: Path, encoding: str) -> None:
    store = stored(tmp_path / "s", encoding, 1, n=50)
    table = store.arrow_factors("d", size=20).read_all()
    factors = store.factors("d")
    assert table["id"].to_pylist() == list(factors.ids)
    name = "codes" if encoding == "sign" else "values"
    raw = factors.bits if factors.bits is not None else factors.flat
    assert raw is not None
    flat = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table[name].chunks])
    np.testing.assert_array_equal(flat.reshape(50, -1), raw)
    np.testing.assert_array_equal(np.asarray(table["norms"].to_pylist(), np.float32), factors.norms)
    assert table.schema.metadata[b"encoding"] == encoding.encode()
    assert store.arrow("SELECT id FROM instances LIMIT 3").num_rows == 3


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("encoding", "rank"), [("float32", 1), ("sign", 1), ("float16", 3)])
def test_scores_on_a_device(tmp_path: Path, encoding: str, rank: int, signed: bool) -> None:
    from repmatch.curator.device_scores import DeviceScores

    store = stored(tmp_path / "s", encoding, rank)
    factors = store.factors("d")
    found = DeviceScores("cpu")(take(factors, [1, 4, 9]), factors, signed=signed)
    expected = mean_scores(take(factors, [1, 4, 9]), factors, signed=signed)
    if encoding == "sign":
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, atol=1e-6)
    here, there = (store.search("d", scorer=s) for s in (mean_scores, DeviceScores("cpu")))
    for a, b in zip(here.nearest_to(["n5", "n6"], 9), there.nearest_to(["n5", "n6"], 9), strict=True):
        assert a.ids == b.ids
        np.testing.assert_array_equal(a.scores, b.scores)


@pytest.mark.parametrize("encoding", ["float16", "sign"])
def test_instances_deleted_while_a_search_is_open_are_found_no_more(tmp_path: Path, encoding: str) -> None:
    with stored(tmp_path / "s", encoding, 1, 120) as store:
        search = store.search("d")
        assert len(search._breaks) == 0 or search._breaks.max() < 120
        query = store.factors("d", ids=["n5"])
        best = search.nearest(query, 6)[0].ids
        store.delete("d", ids=best[1:4])
        store.append("d", query.space_id, encoding, FactorBatch((make_row("new", label="a", n=0),), *_filler()))  # type: ignore[arg-type]
        found = search.nearest(query, 6)[0]
        assert not set(found.ids) & {*best[1:4], "new"}
        assert found.ids[:3] == (best[0], *best[4:6])
        assert [hit.ids for hit in search.nearest_to(["n5", best[0]], 3)] == [
            hit.ids for hit in store.search("d", where="id <> 'new'").nearest_to(["n5", best[0]], 3)
        ]
        store.delete("d", where="true")
        assert search.nearest(query, 6)[0].ids == ()


def test_mean_similarity_leaves_out_what_is_deleted_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stored(tmp_path / "s", "float32", 1, 60) as store:
        before = store.mean_similarity("d", "d[n < 20]")
        project = searching.mean_projectors

        def delete_first(parts: object) -> object:
            out = project(parts)  # type: ignore[arg-type]
            store.delete("d", where="n >= 50")
            return out

        monkeypatch.setattr(searching, "mean_projectors", delete_first)
        found = store.mean_similarity("d", "d[n < 20]")
        assert found["id"].to_list() == store.ids("d")
        assert found.equals(before.filter(before["id"].is_in(store.ids("d"))))


def _filler() -> tuple[object, ...]:
    ones = np.ones(1, np.float32)
    return (
        np.ones((1, sum(DIMS)), np.float32),
        None,
        np.ones((1, len(DIMS)), np.float32),
        ones,
        ones.astype(int),
        ones > 2,
    )
