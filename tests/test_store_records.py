"""Adapters, scores, coresets, runs, info."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from store_worker import filled, make_batch, make_row

from repmatch import store as stores
from repmatch.datamodels import Adapter, Coreset
from repmatch.errors import StoreCorruptError, UnknownNameError, UsageError


def make_adapter(space_id: str, ident: str = "abc") -> Adapter:
    a = {"w/1": np.arange(8, dtype="f4").reshape(1, 8), "w.0": np.ones((1, 8), "f4")}
    b = {"w/1": np.arange(9, dtype="f4").reshape(9, 1), "w.0": np.ones((7, 1), "f4")}
    return Adapter(ident, space_id, "d", "members", {"lr": 0.001, "name": "adamw"}, {"losses": [0.1, 0.2]}, a, b)


def test_adapters(tmp_path: Path) -> None:
    store, space = filled(tmp_path / "s")
    adapter = make_adapter(space.id)
    store.save_adapter(adapter)
    store.save_adapter(adapter)
    found = store.adapter("abc")
    assert found is not None
    assert replace(found, a={}, b={}) == replace(adapter, a={}, b={})
    assert list(found.a) == ["w/1", "w.0"]
    for name in adapter.a:
        np.testing.assert_array_equal(found.a[name], adapter.a[name])
        np.testing.assert_array_equal(found.b[name], adapter.b[name])
    assert store.adapter("none") is None
    assert store.adapters()["id"].to_list() == ["abc"]
    with pytest.raises(UsageError, match="cannot be the id"):
        store.save_adapter(replace(adapter, id="../x"))


def test_a_damaged_adapter_is_refused_and_can_be_saved_again(tmp_path: Path) -> None:
    store, space = filled(tmp_path / "s")
    store.save_adapter(make_adapter(space.id))
    path = tmp_path / "s" / "adapters" / "abc.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(StoreCorruptError, match="another SHA-256"):
        store.adapter("abc")
    store.save_adapter(make_adapter(space.id))
    assert store.adapter("abc") is not None
    path.unlink()
    with pytest.raises(StoreCorruptError, match="is gone"):
        store.adapter("abc")
    assert "is gone" in str(store.verify()[0])


def test_scores(tmp_path: Path) -> None:
    store, space = filled(tmp_path / "s")
    store.save_adapter(make_adapter(space.id))
    assert store.scores("d", "abc").height == 0
    parts = np.array([[0.5, 0.25], [0.1, 0.2], [0.75, 0.0]], "f4")
    store.save_scores("d", "abc", ["r2", "r0", "r1"], parts.mean(axis=1), parts)
    frame = store.scores("d", "abc")
    assert frame["id"].to_list() == ["r1", "r2", "r0"]
    assert frame["score"].to_list() == parts.mean(axis=1)[[2, 0, 1]].astype("f8").tolist()
    assert frame["per_matrix"].to_list() == parts[[2, 0, 1]].tolist()
    store.save_scores("d", "abc", ["r2", "r0"], np.array([0.5, 0.5]), np.full((2, 2), 0.5, "f4"))
    assert store.scores("d", "abc")["id"].to_list() == ["r0", "r2"]
    store.append("d", space.id, "float32", make_batch([make_row("r2", text="changed")], space))
    assert store.scores("d", "abc")["id"].to_list() == ["r0"]


def test_scores_that_do_not_fit(tmp_path: Path) -> None:
    store, space = filled(tmp_path / "s")
    store.save_adapter(make_adapter(space.id))
    one, two = np.ones(1), np.ones((1, 2), "f4")
    with pytest.raises(UsageError, match=r"received \(1,\) and \(1, 2\)"):
        store.save_scores("d", "abc", ["r0", "r1"], one, two)
    with pytest.raises(UsageError, match="NaN"):
        store.save_scores("d", "abc", ["r0"], one * np.nan, two)
    with pytest.raises(UnknownNameError, match="no adapter 'abd'"):
        store.save_scores("d", "abd", ["r0"], one, two)
    with pytest.raises(UnknownNameError, match="no instance 'r9'"):
        store.save_scores("d", "abc", ["r9"], one, two)


def make_coreset(name: str = "core") -> Coreset:
    return Coreset(
        name=name,
        dataset="d",
        strategy="facility-location",
        arguments={"k": 2, "balance": None},
        ids=("r4", "r1"),
        gains=np.array([3.5, 0.1 + 0.2]),
        all_ids=tuple(f"r{i}" for i in range(6)),
        representative=np.array([1, 1, -1, 0, 0, 0]),
        similarity=np.array([0.1, 1.0, np.nan, 0.5, 1.0, 0.25], "f4"),
    )


def test_coresets(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s")
    coreset = make_coreset()
    store.save_coreset(coreset)
    found = store.coreset("core")
    for name in ("name", "dataset", "strategy", "arguments", "ids", "all_ids"):
        assert getattr(found, name) == getattr(coreset, name)
    for name in ("gains", "representative", "similarity"):
        np.testing.assert_array_equal(getattr(found, name), getattr(coreset, name))
        assert getattr(found, name).dtype == getattr(coreset, name).dtype
    assert store.resolve("core") == stores.Subset("core", "d", None, ("r4", "r1"))
    assert store.coresets().select("name", "dataset", "picks").rows() == [("core", "d", 2)]
    with pytest.raises(UsageError, match="a coreset 'core' already"):
        store.save_coreset(coreset)
    store.save_coreset(replace(coreset, ids=("r1", "r4")), replace=True)
    assert store.coreset("core").ids == ("r1", "r4")
    with pytest.raises(UsageError, match="'d' is a dataset already"):
        store.save_coreset(make_coreset("d"))
    with pytest.raises(UnknownNameError, match="did you mean 'core'"):
        store.coreset("cores")
    assert store.sql("SELECT coreset, rank, id FROM picks ORDER BY rank").rows() == [
        ("core", 0, "r1"),
        ("core", 1, "r4"),
    ]


def test_coresets_that_do_not_fit(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s")
    coreset = make_coreset()
    with pytest.raises(UsageError, match=r"gains have shape \(1,\)"):
        store.save_coreset(replace(coreset, gains=np.ones(1)))
    with pytest.raises(UsageError, match="twice"):
        store.save_coreset(replace(coreset, ids=("r1", "r1")))
    with pytest.raises(UsageError, match="outside of the 2 picks"):
        store.save_coreset(replace(coreset, representative=np.full(6, 2)))
    with pytest.raises(UnknownNameError, match="no instance 'q'"):
        store.save_coreset(replace(coreset, ids=("r1", "q")))
    assert store.coresets().height == 0


def test_runs(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s")
    with store.run("ingest", {"dataset": "d"}) as run:
        run.detail["rows"] = 6
    with pytest.raises(ValueError, match="no"), store.run("score", {}):
        raise ValueError("no")
    with pytest.raises(KeyboardInterrupt), store.run("select", {}):
        raise KeyboardInterrupt
    frame = store.runs()
    assert frame["command"].to_list() == ["ingest", "score", "select"]
    assert frame["status"].to_list() == ["ok", "failed", "interrupted"]
    assert [json.loads(text) for text in frame["detail"]] == [{"rows": 6}, {"error": "ValueError: no"}, {}]
    assert frame["ended"].null_count() == 0


def test_info(tmp_path: Path) -> None:
    store, space = filled(tmp_path / "s", encoding="float16")
    store.save_coreset(make_coreset())
    info = store.info()
    assert json.loads(json.dumps(info)) == info
    assert info["counts"]["instances"] == 6
    assert info["spaces"][0]["id"] == space.id
    assert info["datasets"][0]["name"] == "d"
    assert info["datasets"][0]["labels"] == ["a", "b"]
    assert info["coresets"] == [{"name": "core", "dataset": "d", "strategy": "facility-location", "picks": 2}]
    parts = info["bytes"]
    assert parts["total"] == sum(parts[name] for name in ("catalog", "segments", "journals", "adapters", "cache"))
    assert info["bytes_per_instance"] == round(parts["total"] / 6, 1)
