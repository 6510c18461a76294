"""Staging: what rows are to the store, duplicates, resuming, touching."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from store_worker import filled, make_batch, make_dataset, make_row, make_rows, make_space, prepare

from repmatch import store as stores
from repmatch.datamodels import BadRow
from repmatch.errors import StoreError, UsageError


def summary(*counts: int, labels: tuple[str, ...] = ("a",)) -> stores.StageSummary:
    rows, new, unchanged, changed, rejected, todo = counts
    return stores.StageSummary(rows, new, unchanged, changed, rejected, todo, labels)


def test_new_rows_stream_out_in_input_order(tmp_path: Path) -> None:
    store = stores.open(tmp_path / "s")
    rows = make_rows(*range(10), label="b") + make_rows(*range(10, 20))
    with store.stage("d") as stage:
        stage.add(rows[:7])
        stage.add([])
        stage.add(rows[7:])
        assert stage.resolve(None) == summary(20, 20, 0, 0, 0, 20, labels=("a", "b"))
        parts = list(stage.todo(size=8))
    assert [len(part) for part in parts] == [8, 8, 4]
    assert [row for part in parts for row in part] == rows
    assert not (tmp_path / "s").exists()


def test_resume_gives_what_is_left(tmp_path: Path) -> None:
    store, space = filled(tmp_path / "s", count=6)
    with store.stage("d") as stage:
        stage.add(make_rows(*range(9)))
        assert stage.resolve(space.id) == summary(9, 3, 6, 0, 0, 3)
        assert [row.id for part in stage.todo() for row in part] == ["r6", "r7", "r8"]
        assert stage.touch() == 0
    with store.stage("d") as stage:
        stage.add(make_rows(*range(3)))
        assert stage.resolve(make_space(seed=9).id) == summary(3, 0, 3, 0, 0, 3)
    with store.stage("d") as stage:
        stage.add(make_rows(*range(3)))
        assert stage.resolve(space.id, encoding="sign") == summary(3, 0, 3, 0, 0, 3)
    with store.stage("d") as stage:
        stage.add(make_rows(*range(3)))
        assert stage.resolve(None) == summary(3, 0, 3, 0, 0, 0)
    with store.stage("other") as stage:
        stage.add(make_rows(*range(3)))
        assert stage.resolve(space.id) == summary(3, 3, 0, 0, 0, 3)


def test_an_interrupted_ingest_ends_in_the_same_order(tmp_path: Path) -> None:
    store, space = stores.open(tmp_path / "s"), make_space()
    prepare(store, space)
    rows = make_rows(*range(10))
    for stop in (1, 99):
        with store.stage("d") as stage:
            stage.add(rows)
            stage.resolve(space.id)
            for i, part in enumerate(stage.todo(size=4)):
                if i == stop:
                    break
                store.append("d", space.id, "float32", make_batch(part, space))
    assert store.ids("d") == [row.id for row in rows]
    assert list(store.tasks("d")) == rows


def test_changed_rows(tmp_path: Path) -> None:
    store, space = filled(tmp_path / "s")
    outside = make_row("r1", text="text of r1", n=99, line=2)
    inside = make_row("r2", text="other", n=2, line=3)
    with store.stage("d") as stage:
        stage.add([*make_rows(0), outside, inside])
        assert stage.resolve(space.id) == summary(3, 0, 1, 2, 0, 1)
        assert list(stage.todo()) == [(inside,)]
        assert stage.touch() == 1
    stored = {row.id: row for row in store.tasks("d")}
    assert stored["r1"] == outside
    assert stored["r2"].text == "text of r2"
    assert len(store.factors("d")) == 6
    store.append("d", space.id, "float32", make_batch([inside], space))
    assert store.ids("d") == [f"r{i}" for i in range(6)]
    with store.stage("d") as stage:
        stage.add([*make_rows(0), outside, inside])
        assert stage.resolve(space.id) == summary(3, 0, 3, 0, 0, 0)


def test_repeats_within_an_input(tmp_path: Path) -> None:
    store = stores.open(tmp_path / "s")
    first = make_row("it's", line=1)
    with store.stage("d") as stage:
        stage.add([first, replace(first, line=2)])
        stage.add([make_row("it's", text="x", label="z", line=3), replace(first, line=4)])
        stage.reject([BadRow("rows.jsonl", 2, None, "not JSON"), BadRow("a.jsonl", 9, "q", "no label")])
        assert stage.resolve(None) == summary(6, 1, 2, 0, 3, 1)
        assert list(stage.todo()) == [(first,)]
        bad = stage.rejected()
        assert [(row.source, row.line, row.id) for row in bad] == [
            ("a.jsonl", 9, "q"),
            ("rows.jsonl", 2, None),
            ("rows.jsonl", 3, "it's"),
        ]
        assert "it's was on line 1" in bad[2].reason
        assert stage.rejected(limit=1) == bad[:1]


def test_the_quarantine_is_replaced_by_source(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s")

    def ingest(*bad: BadRow) -> None:
        with store.stage("d") as stage:
            stage.add(make_rows(0))
            stage.reject(bad)
            stage.resolve(None)
            stage.touch()

    ingest(BadRow("rows.jsonl", 5, None, "one"), BadRow("b.jsonl", 1, "x", "two"))
    ingest(BadRow("rows.jsonl", 6, None, "three"))
    frame = store.sql("SELECT source, line, reason FROM quarantine ORDER BY reason")
    assert frame.rows() == [("rows.jsonl", 6, "three"), ("b.jsonl", 1, "two")]
    ingest()
    assert store.sql("SELECT reason FROM quarantine")["reason"].to_list() == ["two"]
    assert store.info()["quarantined"] == 1


def test_half_a_surrogate_pair_is_set_aside(tmp_path: Path) -> None:
    store = stores.open(tmp_path / "s")
    with store.stage("d") as stage:
        stage.add([make_row("r1", text="fine"), make_row("r2", text="\ud800"), make_row("\udfff")])
        assert stage.resolve(None) == summary(3, 1, 0, 0, 2, 1)
        assert [row.id for row in stage.rejected()] == ["r2", None]


def test_no_rows(tmp_path: Path) -> None:
    store = stores.open(tmp_path / "s")
    with store.stage("d") as stage:
        stage.add([])
        stage.reject([])
        assert stage.resolve(None) == summary(0, 0, 0, 0, 0, 0, labels=())
        assert list(stage.todo()) == []
        assert stage.touch() == 0
    assert not (tmp_path / "s").exists()


def test_a_stage_is_resolved_before_it_is_read_and_once(tmp_path: Path) -> None:
    store = stores.open(tmp_path / "s")
    with store.stage("d") as stage:
        with pytest.raises(UsageError, match="resolve"):
            list(stage.todo())
        stage.resolve(None)
        for attempt in (lambda: stage.add(make_rows(1)), lambda: stage.resolve(None)):
            with pytest.raises(StoreError, match="open another stage"):
                attempt()


def test_scratch_files_are_removed_stale_ones_too(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s")
    folder = tmp_path / "s" / "staging"
    folder.mkdir()
    (folder / "dead.lock").touch()
    (folder / "dead.duckdb").write_bytes(b"x")
    (folder / "dead.spill").mkdir()
    (folder / "dead.spill" / "part").touch()
    with store.stage("d") as stage:
        stage.add(make_rows(1))
        with store.writing():
            names = {path.name for path in folder.iterdir()}
        assert not any(name.startswith("dead") for name in names)
        assert any(name.endswith(".duckdb") for name in names)
        stage.resolve(None)
    assert list(folder.iterdir()) == []


def test_many_rows_go_through(tmp_path: Path) -> None:
    store, space = stores.open(tmp_path / "s"), make_space(dims=(4,))
    prepare(store, space, "sign")
    rows = make_rows(*range(5000))
    with store.stage("d") as stage:
        for lo in range(0, 5000, 1000):
            stage.add(rows[lo : lo + 1000])
        assert stage.resolve(space.id).new == 5000
        for part in stage.todo(size=2000):
            store.append("d", space.id, "sign", make_batch(part, space))
    assert store.ids("d") == [row.id for row in rows]
    assert store.dataset("d") == make_dataset(space, encoding="sign")
