"""Ties go to the lowest id: the same picks whatever order the rows were ingested in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_selectors import facility_greedy
from oracle_similarity import kernel as literal_kernel
from oracle_similarity import make_factors
from store_worker import make_row, make_space, prepare

from repmatch import store as stores
from repmatch.blocks import take
from repmatch.curator.id_order import id_order, in_id_order, natural_key
from repmatch.curator.select_problem import pose
from repmatch.curator.selection import Selected, SelectOptions, select
from repmatch.datamodels import FactorBatch
from repmatch.selectors import select as solve
from repmatch.store import Store

N, DIMS = 60, (70, 33)
COPIES = 6  # of every factor
SCORES = {f"n{i}": float(i % 3) for i in range(N)}
EXACT = ("incremental", "pruned", "lazy")


def stored(path: Path, order: list[int], encoding: str) -> Store:
    """A store of `N` instances of which six each are alike, ingested in some order."""
    made = make_factors(N // COPIES, DIMS, 1, seed=5)
    assert made.flat is not None
    which = np.array(order) % (N // COPIES)
    store, space = stores.open(path), make_space(1, DIMS)
    with store.writing():
        prepare(store, space, encoding)  # type: ignore[arg-type]
        rows = tuple(make_row(f"n{i}", label="ab"[i % 2], n=i % 7) for i in order)
        ones = np.ones(N, np.float32)
        batch = FactorBatch(rows, made.flat[which], None, made.norms[which], ones, ones.astype(np.int32) * 3, ones > 2)
        store.append("d", space.id, encoding, batch)  # type: ignore[arg-type]
    return store


def no_embedding(dataset: str, ids: Sequence[str]) -> Any:
    raise AssertionError(f"nothing asks for the embeddings of {dataset}")


def chosen(store: Store, **options: object) -> Selected:
    return select(store, "d", SelectOptions(**{"k": 12, **options}), lambda _: SCORES, no_embedding)  # type: ignore[arg-type]


RUNS: dict[str, dict[str, object]] = {
    **{a: {"algorithm": a} for a in ("incremental", "pruned", "lazy", "sparse", "partitioned", "stochastic")},
    **{s: {"strategy": s} for s in ("graph-cut", "saturated-coverage", "herding", "k-center", "dpp", "k-medoids")},
    **{s: {"strategy": s} for s in ("top", "random")},
    "balance": {"balance": "label", "exclude": ["n0", "n1"], "include": ["n31"]},
    "budget": {"k": None, "budget": 20.0},
    "represent": {"represent": "d[n > 2]"},
    "given": {"given": "d[n = 1]", "at_most": {"a": 4}, "quota_field": "label"},
    "signed": {"signed": True},
}


def solved(store: Store, options: dict[str, object]) -> tuple[tuple[str, ...], list[float], list[int]]:
    """What a selection picks and gains, kept nowhere."""
    posed = pose(store, "d", SelectOptions(**{"k": 12, **options}), lambda _: SCORES, no_embedding)  # type: ignore[arg-type]
    found = solve(str(options.get("strategy", "facility-location")), posed.problem)
    return tuple(posed.ids[i] for i in found.indices), found.gains.tolist(), found.weights.tolist()


@pytest.mark.parametrize("encoding", ["sign", "float32"])
def test_the_order_of_ingestion_changes_no_pick(tmp_path: Path, encoding: str) -> None:
    orders = [list(range(N)), np.random.default_rng(3).permutation(N).tolist()]
    first, second = (stored(tmp_path / str(i), order, encoding) for i, order in enumerate(orders))
    for name, options in RUNS.items():
        if encoding == "sign" or name in EXACT:
            assert solved(first, options) == solved(second, options), name
    options = {"given": "d[n = 1]", "represent": "d[n > 2]"}
    frames = [chosen(store, **options).represented() for store in (first, second)]
    assert [list(frame["id"]) for frame in frames] == [[f"n{i}" for i in order] for order in orders]
    assert frames[0].sort("id").equals(frames[1].sort("id"))


def test_ties_go_to_the_lowest_id(tmp_path: Path) -> None:
    store = stored(tmp_path / "s", list(range(N))[::-1], "sign")
    for algorithm in EXACT:
        picks = chosen(store, k=N // COPIES, algorithm=algorithm).ids
        assert sorted(picks, key=natural_key) == [f"n{i}" for i in range(N // COPIES)]  # of six alike the lowest each
    kernel = literal_kernel(*[take(store.factors("d"), np.arange(N)[::-1])] * 2)
    assert [f"n{i}" for i in facility_greedy(kernel.astype(np.float32), 12)[0]] == list(chosen(store, k=12).ids)


def test_thin_keeps_the_row_that_came_first(tmp_path: Path) -> None:
    picks = chosen(stored(tmp_path / "s", list(range(N))[::-1], "sign"), k=N, strategy="thin", apart=0.9).ids
    assert picks == tuple(f"n{i}" for i in range(N - 1, N - 1 - N // COPIES, -1))


def test_factors_too_many_to_sort_stay_and_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = stored(tmp_path / "s", list(range(N))[::-1], "sign")
    monkeypatch.setattr("repmatch.curator.select_problem.in_id_order", lambda factors: in_id_order(factors, limit=9))
    found = chosen(store, k=N // COPIES)
    assert sorted(found.ids, key=natural_key) == [f"n{i}" for i in range(N - N // COPIES, N)]
    assert "too many to be sorted by id" in found.selection.notes[0]
    assert found.coreset.arguments["notes"] == list(found.selection.notes)


def test_factors_in_order_are_not_copied(tmp_path: Path) -> None:
    store = stored(tmp_path / "s", list(range(N)), "sign")
    factors = store.factors("d")
    same, places, done = in_id_order(factors)
    assert same is factors
    assert done
    assert places.tolist() == list(range(N))


def test_ids_in_natural_order() -> None:
    ids = ["b", "a10", "a9", "", "7", "07", "a9b", "10", "é", "a" + "9" * 5000, "٣", "a1.10", "a1.9"]
    order = id_order(ids)
    assert order is not None
    found = [ids[i] for i in order]
    assert found == ["", "07", "7", "10", "a1.9", "a1.10", "a9", "a9b", "a10", "a" + "9" * 5000, "b", "é", "٣"]
    assert id_order(found) is None


@settings(deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=6), unique=True, max_size=8), st.randoms())
def test_every_order_of_ids_sorts_alike(ids: list[str], chance: object) -> None:
    shuffled = list(ids)
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    both = [id_order(names) for names in (ids, shuffled)]
    a, b = ([n[i] for i in (range(len(n)) if o is None else o)] for n, o in zip((ids, shuffled), both, strict=True))
    assert a == b


@settings(deadline=None)
@given(st.integers(0, 10**30), st.integers(0, 10**30))
def test_numbers_in_ids_compare_as_numbers(a: int, b: int) -> None:
    assert (natural_key(f"row-{a}-x") < natural_key(f"row-{b}-x")) == (a < b)
