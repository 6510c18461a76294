"""Kernels of embeddings, alone and joined with factors: the maths, the store's cache, and select on top of both."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Run, toy_rows, write_rows
from numpy.typing import NDArray
from oracle_selectors import coverage, facility_greedy
from oracle_similarity import make_factors

import repmatch
from repmatch.curator import embeddings as curator_embeddings
from repmatch.errors import SelectionError, UnknownNameError, UsageError
from repmatch.selectors import FactorKernel, JoinedKernel, facility_location
from repmatch.store.cache import CachedRows


def with_embeddings(count: int, encoding: str = "float32", rank: int = 1, seed: int = 0) -> Any:
    rows = np.random.default_rng(seed).normal(0.2, 1.0, (count, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return replace(make_factors(count, (16, 24), rank, encoding, seed=seed), embeddings=rows)


def literal(factors: Any) -> NDArray[np.float64]:
    own = np.asarray(FactorKernel(factors).dense(), np.float64)
    cosines = np.maximum(factors.embeddings.astype(np.float64) @ factors.embeddings.astype(np.float64).T, 0.0)
    summed = own / own.mean() + cosines / cosines.mean()
    return np.asarray(summed / (1 / own.mean() + 1 / cosines.mean()))


@pytest.mark.parametrize(("encoding", "rank"), [("float32", 1), ("sign", 1), ("float32", 3)])
def test_a_joined_kernel_is_the_sum_of_both_over_their_means(encoding: str, rank: int) -> None:
    factors = with_embeddings(40, encoding, rank)
    expected = literal(factors)
    kernel = JoinedKernel(factors)
    whole = np.asarray(JoinedKernel(factors).dense(), np.float64)
    assert whole == pytest.approx(expected, abs=1e-5)
    assert sum(kernel.weights) == pytest.approx(1.0)
    assert kernel.means() == pytest.approx(expected.mean(axis=0), abs=1e-5)
    assert kernel.diagonal() == pytest.approx(np.diag(expected), abs=1e-4)
    assert kernel.columns(np.array([3, 1])) == pytest.approx(expected[:, [3, 1]], abs=1e-5)
    assert kernel.part(np.array([5, 2]), np.array([7])).dense() == pytest.approx(expected[[7]][:, [5, 2]], abs=1e-5)
    sums = kernel.sums()
    assert sums is not None
    assert (sums >= expected.sum(axis=0)).all()
    assert (sums < 3.0 * expected.sum(axis=0)).all()


@pytest.mark.parametrize("algorithm", ["incremental", "lazy", "pruned"])
def test_exact_algorithms_pick_what_a_literal_greedy_picks(algorithm: Any) -> None:
    factors = with_embeddings(60)
    limit = None if algorithm == "incremental" else 0
    found = facility_location(JoinedKernel(factors, memory_limit=limit), 9, algorithm=algorithm)
    assert found.indices.tolist() == facility_greedy(literal(factors), 9)[0]
    assert found.value == pytest.approx(coverage(literal(factors), found.indices), rel=1e-5)


def test_embeddings_alone_and_those_that_say_nothing() -> None:
    factors = with_embeddings(30)
    alone = JoinedKernel(factors, weights=(0.0, 1.0))
    cosines = np.maximum(factors.embeddings @ factors.embeddings.T, 0.0)
    assert alone.dense() == pytest.approx(cosines, abs=1e-6)
    sums = alone.sums()
    assert sums is not None
    assert (sums >= cosines.sum(axis=0)).all()
    silent = replace(factors, embeddings=np.zeros((30, 8), np.float32))
    assert JoinedKernel(silent).weights == (1.0, 0.0)
    with pytest.raises(SelectionError, match="these factors have none"):
        JoinedKernel(make_factors(3, (16,), 1, "float32"))


def test_cached_rows_survive_an_interruption_and_no_damage(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    cached = CachedRows(tmp_path, "toy", "a")

    def until(stop: int) -> Any:
        def make(done: int) -> Iterator[NDArray[np.float32]]:
            for lo in range(done, 10, 2):
                if lo >= stop:
                    raise KeyboardInterrupt
                seen.append(lo)
                yield rows[lo : lo + 2]

        return make

    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        cached.fill(10, 4, until(6))
    assert cached.read(10) is None
    (part,) = (tmp_path / "cache").glob("*.part")
    with part.open("ab") as file:
        file.write(b"\0" * 21)  # a torn row and one that never reached the disk
    assert cached.fill(10, 4, until(10)).tolist() == rows.tolist()
    assert seen == [0, 2, 4, 6, 8]
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".f32"]
    kept = cached.read(10)
    assert kept is not None
    assert kept.tolist() == rows.tolist()
    assert cached.read(9) is None
    assert CachedRows(tmp_path, "toy", "b").read(10) is None
    other = CachedRows(tmp_path, "other", "a")
    other.fill(2, 4, lambda _: iter([rows[:2]]))
    CachedRows(tmp_path, "toy", "b").fill(10, 4, lambda _: iter([rows]))
    assert cached.read(10) is None  # what was kept for the dataset before is gone, and nothing else
    assert other.read(2) is not None
    for file in (tmp_path / "cache").glob("*.f32"):
        data = bytearray(file.read_bytes())
        data[3] ^= 1
        file.write_bytes(data)
    assert other.read(2) is None


def picks(run: Run, store: Path, *arguments: object) -> list[str]:
    found = run("--store", store, "select", "toy", *arguments, "--json")
    assert found.code == 0, found.err
    return [str(row["id"]) for row in found.objects]


def test_select_joins_embeddings_that_it_makes_once(run: Run, toy_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joined = picks(run, toy_store, "-k", 8, "--kernel", "joined", "--name", "both")
    with repmatch.open(toy_store) as store:
        curator = repmatch.Curator(store)
        factors = store.factors("toy")
        rows = curator_embeddings.embeddings(curator, "toy", factors.ids)
        expected = facility_greedy(literal(replace(factors, embeddings=rows.astype(np.float32))), 8)[0]
        assert joined == [factors.ids[i] for i in expected]
        assert store.coreset("both").arguments["options"][-2:] == ["--kernel", "joined"]
        assert store.info()["bytes"]["cache"] == rows.nbytes

    def never(*_: object) -> None:
        raise AssertionError("the embeddings are in the store")

    monkeypatch.setattr(curator_embeddings, "embed", never)
    alone = picks(run, toy_store, "-k", 8, "--kernel", "embeddings")
    assert alone != joined
    for part in ("toy[label = 'yes']", "both"):
        with repmatch.open(toy_store) as store:
            assert len(repmatch.Curator(store).select(part, 3, kernel="joined").ids) == 3


def test_changed_rows_are_embedded_anew_and_deleted_ones_leave_the_cache(
    run: Run, toy_store: Path, tmp_path: Path
) -> None:
    cache = toy_store / "cache"
    picks(run, toy_store, "-k", 2, "--kernel", "joined")
    (before,) = cache.iterdir()
    rows = toy_rows()
    rows[0]["text"] = "another text"
    with repmatch.open(toy_store) as store:
        model = store.space(store.dataset("toy").space_id or "").model
        repmatch.Curator(store, model).ingest(write_rows(tmp_path / "new.jsonl", rows), "toy")
    picks(run, toy_store, "-k", 2, "--kernel", "joined")
    (after,) = cache.iterdir()
    assert after.name != before.name
    assert run("--store", toy_store, "delete", "toy", "--all", "--coresets").code == 0
    assert not list(cache.iterdir())


def test_other_sets_are_embedded_too(toy_store: Path, tmp_path: Path) -> None:
    rows = [{**row, "id": f"dev-{i}"} for i, row in enumerate(toy_rows(70)[60:])]
    with repmatch.open(toy_store) as store:
        model = store.space(store.dataset("toy").space_id or "").model
        curator = repmatch.Curator(store, model)
        curator.ingest(write_rows(tmp_path / "dev.jsonl", rows), "dev")
        for k in (2, 5):
            found = curator.select("toy", k, represent="dev", given="dev[label = 'no']", kernel="joined")
            assert len(found.ids) == k
            assert set(found.ids) <= {str(row["id"]) for row in toy_rows()}


def test_what_does_not_go_together_is_refused(run: Run, toy_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, message in (
        (("--kernel", "joined", "--signed"), "--signed goes with --kernel repmatch"),
        (("--kernel", "embeddings", "--matrices", "*.value"), "reads none"),
    ):
        found = run("--store", toy_store, "select", "toy", "-k", 2, *arguments)
        assert (found.code, message in found.err) == (2, True), found.err
    with repmatch.open(toy_store) as store:
        curator = repmatch.Curator(store)
        with pytest.raises(UnknownNameError, match="no kernel"):
            curator.select("toy", 2, kernel="cosine")  # type: ignore[arg-type]
        bench = SimpleNamespace(module=lambda _: object(), space=SimpleNamespace(model="theirs"))
        with pytest.raises(UsageError, match="theirs has none"):
            curator_embeddings.embed(bench, (), None, ())  # type: ignore[arg-type]


def test_a_store_without_its_cache_is_whole(run: Run, toy_store: Path) -> None:
    first = picks(run, toy_store, "-k", 5, "--kernel", "joined")
    shutil.rmtree(toy_store / "cache")
    assert run("--store", toy_store, "verify").code == 0
    assert picks(run, toy_store, "-k", 5, "--kernel", "joined", "--name", "again") == first


def test_a_store_opened_for_reading_is_not_written_to(toy_store: Path, tmp_path: Path) -> None:
    path = tmp_path / "store"
    shutil.copytree(toy_store, path)
    shutil.rmtree(path / "cache", ignore_errors=True)
    with repmatch.open(path, mode="r") as store:
        ids = store.ids("toy")
        rows = curator_embeddings.embedder(repmatch.Curator(store), "toy")(ids)
    assert not (path / "cache").exists()
    with repmatch.open(path) as store:
        assert curator_embeddings.embedder(repmatch.Curator(store), "toy")(ids).tolist() == rows.tolist()
    assert list((path / "cache").glob("*.f32"))
