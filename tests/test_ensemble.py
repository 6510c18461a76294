"""Ensembles: the same rows from several starts, compared by the mean of their kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run, toy_rows, write_rows
from oracle_similarity import make_factors

import repmatch
from repmatch.curator.ensemble import side_by_side
from repmatch.curator.suspects import suspects
from repmatch.errors import UsageError
from repmatch.selectors import FactorKernel, SignedKernel
from repmatch.similarity import mean_scores


@pytest.mark.parametrize(("encoding", "rank"), [("float32", 1), ("float16", 1), ("sign", 1), ("float32", 3)])
def test_an_ensembles_kernels_are_the_means_of_its_parts(encoding: str, rank: int) -> None:
    parts = [make_factors(20, (16, 70), rank, encoding, seed=seed) for seed in (0, 1, 2)]
    whole: Any = side_by_side(parts, ["a", "b", "c"])
    assert len(whole.matrices) == 6
    assert whole.matrices[0].endswith("@a")
    assert whole.matrices[5].endswith("@c")
    for kind in (FactorKernel, SignedKernel):
        expected = np.mean([np.asarray(kind(part).dense(), np.float64) for part in parts], axis=0)
        assert np.asarray(kind(whole).dense(), np.float64) == pytest.approx(expected, abs=1e-4)


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match=r"'b' has the rank 2, 'a' 1"):
        side_by_side([make_factors(3, (16,), 1, "float32"), make_factors(3, (16,), 2, "float32")], ["a", "b"])
    with pytest.raises(UsageError, match=r"'b' has the encoding sign, 'a' float32.*--encoding"):
        side_by_side([make_factors(3, (16,), 1, "float32"), make_factors(3, (16,), 1, "sign")], ["a", "b"])


@pytest.fixture(scope="module")
def two_starts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ensemble")
    rows = toy_rows()
    with repmatch.open(folder / "store") as store:
        for name, seed, some in (("toy", 0, rows), ("again", 1, rows[::-1]), ("part", 2, rows[:-1])):
            file = write_rows(folder / f"{name}.jsonl", some)
            repmatch.Curator(store, settings=repmatch.Settings(seed=seed)).ingest(file, name)
    return folder / "store"


def test_selection_by_several_starts(two_starts: Path) -> None:
    with repmatch.open(two_starts) as store:
        curator = repmatch.Curator(store)
        found = curator.select("toy", 6, ensemble=("again",))
        ids = tuple(sorted(store.ids("toy")))
        parts = [FactorKernel(store.factors(name, ids=ids)).dense() for name in ("toy", "again")]
        kernel = np.mean([np.asarray(part, np.float64) for part in parts], axis=0)
        value = kernel[[ids.index(name) for name in found.ids]].max(axis=0).mean()
        assert found.coreset.arguments["ensemble"] == ["again"]
        assert found.coreset.arguments["options"][:4] == ["-k", "6", "--ensemble", "again"]
        assert found.selection.value in (pytest.approx(value, rel=1e-4), pytest.approx(value * len(ids), rel=1e-4))
        one = curator.select("toy", 6, matrices=("*.value",))
        both = curator.select("toy", 6, matrices=("*.value",), ensemble=("again",))
        assert both.selection.value != one.selection.value
        assert curator.select("toy", 3, ensemble=("again",), represent="toy[label = 'yes']").ids
        with pytest.raises(UsageError, match=r"'toy' twice"):
            curator.select("toy", 3, ensemble=("toy",))
        with pytest.raises(UsageError, match=r"the dataset 'part' cannot join an ensemble with 'toy'.*same rows"):
            curator.select("toy", 3, ensemble=("part",))
        with pytest.raises(UsageError, match=r"--represent again is of the dataset 'again'"):
            curator.select("toy", 3, ensemble=("again",), represent="again")
        with pytest.raises(UsageError, match="compares none"):
            curator.select("toy", 3, strategy="random", ensemble=("again",))


def test_suspects_by_several_starts(two_starts: Path, run: Run) -> None:
    with repmatch.open(two_starts) as store:
        found = suspects(store, "toy", k=60, ensemble=("again",))
        losses = [
            dict(store.sql("SELECT id, loss FROM instances WHERE dataset = ?", [name]).iter_rows())
            for name in ("toy", "again")
        ]
        expected = [(losses[0][name] + losses[1][name]) / 2 for name in found.ids]
        assert found.losses == pytest.approx(expected)
    result = run("--store", two_starts, "suspects", "toy", "--ensemble", "again", "-k", 3, "--json")
    assert [o["id"] for o in result.objects] == list(found.ids[:3])
    studied = run("--store", two_starts, "study", "field", "toy", "--field", "label", "--no-embeddings", "--json")
    both = run(
        *("--store", two_starts, "study", "field", "toy", "--field", "label", "--no-embeddings", "--json"),
        *("--ensemble", "again"),
    )
    alone = run("--store", two_starts, "study", "field", "again", "--field", "label", "--no-embeddings", "--json")
    means = [result.objects[0]["within"] for result in (studied, alone, both)]
    assert means[2] == pytest.approx((means[0] + means[1]) / 2, abs=1e-5)  # type: ignore[operator]
    wrong = run("--store", two_starts, "suspects", "toy", "--ensemble", "agian")
    assert wrong.code == 1
    assert "did you mean 'again'? Make" in wrong.err


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("where", [None, "label = 'yes'"])
def test_neighbours_by_several_starts(two_starts: Path, signed: bool, where: str | None) -> None:
    with repmatch.open(two_starts) as store:
        ids = store.ids("toy")
        parts = [store.factors(name, ids=ids) for name in ("toy", "again")]
        scores = np.mean([mean_scores(part, part, signed=signed).astype(np.float64) for part in parts], axis=0)
        labels = dict(zip(ids, store.column("toy", "label"), strict=True))
        curator = repmatch.Curator(store)
        asked = [ids[0], ids[7], ids[31]]
        for found, own in zip(
            curator.nearest_all("toy", asked, k=5, signed=signed, where=where, ensemble=("again",)), asked, strict=True
        ):
            row = scores[ids.index(own)]
            others = [i for i in range(len(ids)) if ids[i] != own and (where is None or labels[ids[i]] == "yes")]
            expected = sorted(others, key=lambda i: (-row[i], ids[i]))[:5]
            assert list(found.ids) == [ids[i] for i in expected]
            assert found.scores == pytest.approx(row[expected], abs=1e-4)
        everything = curator.nearest("toy", ids[3], k=99, ensemble=("again",))
        assert set(everything.ids) == {*ids} - {ids[3]}
        with pytest.raises(UsageError, match="goes with ids"):
            curator.nearest("toy", text="a film", ensemble=("again",))


def test_an_ensemble_is_a_rule_of_evaluation() -> None:
    from repmatch.curator.evaluate.candidates import parse

    assert parse("facility-location+ensemble=again,third").ensemble == "again,third"
    with pytest.raises(UsageError, match="ensemble=NAME go with strategies"):
        parse("embeddings+ensemble=again")
