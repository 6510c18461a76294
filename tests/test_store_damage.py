"""Crash safety: kills, torn tails, lost commits, flipped bits."""

from __future__ import annotations

import logging
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import numpy as np
import pytest
from store_worker import filled, make_batch, make_rows, make_space, prepare, start, values_of

from repmatch import store as stores
from repmatch.datamodels import Adapter
from repmatch.errors import StoreCorruptError, StoreError, StoreLockedError
from repmatch.store import factors
from repmatch.store.segment import HEADER_BYTES


def check_rows(store: stores.Store, least: int) -> None:
    """Every row that was reported is there, whole batches only, every value as it was made."""
    space = make_space()
    ids = store.ids("d")
    assert len(ids) >= least
    assert len(ids) % 20 == 0
    assert ids == [f"r{i}" for i in range(len(ids))]
    factors = store.factors("d")
    assert factors.ids == tuple(ids)
    expected = [values_of(row, space) for row in make_rows(*range(len(ids)))]
    np.testing.assert_array_equal(factors.flat, np.stack(expected) if expected else np.zeros((0, 134), "f4"))
    assert store.verify() == []


def kill_and_check(path: Path, kills: int, seed: int) -> None:
    rng, committed = random.Random(seed), 0
    for _ in range(kills):
        process = start("append", path, 1000)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.05, 0.6))
        process.kill()
        reported = [int(line) for line in process.stdout.read().split("\n") if line]
        process.wait()
        committed = max([committed, *reported])
        with stores.open(path, mode="r") as store:  # readers bear the tail
            ids = store.ids("d")
            assert len(ids) >= committed
            assert store.factors("d").ids == tuple(ids)
        with stores.open(path, mode="w") as store:
            check_rows(store, committed)
            committed = len(store.ids("d"))
    assert committed > 0


def test_kills_lose_nothing(tmp_path: Path) -> None:
    kill_and_check(tmp_path / "s", kills=5, seed=1)


@pytest.mark.slow
def test_many_kills_lose_nothing(tmp_path: Path) -> None:
    kill_and_check(tmp_path / "s", kills=40, seed=2)


def segment_of(path: Path) -> Path:
    return path / "segments" / "000001.bin"


def test_a_torn_tail_is_cut(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s")
    segment, journal = segment_of(tmp_path / "s"), segment_of(tmp_path / "s").with_suffix(".journal")
    sizes = segment.stat().st_size, journal.stat().st_size
    with segment.open("ab") as file:
        file.write(b"torn" * 100)
    with journal.open("ab") as file:
        file.write(b"RPMJ\xff\0\0\0half")
    with stores.open(tmp_path / "s", mode="r") as reader:
        assert len(reader.factors("d")) == 6
        assert reader.verify() == []
    with store.writing():
        pass
    assert (segment.stat().st_size, journal.stat().st_size) == sizes
    assert len(store.factors("d")) == 6


def test_a_short_segment_is_damage_and_never_cut(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s")
    segment = segment_of(tmp_path / "s")
    expected = segment.stat().st_size
    os.truncate(segment, expected - 10)
    for attempt in (lambda: store.factors("d"), lambda: store.save_space(make_space(seed=5))):
        with pytest.raises(StoreCorruptError, match=rf"000001\.bin.*{expected} bytes, found {expected - 10}"):
            attempt()
    assert segment.stat().st_size == expected - 10
    assert any("000001.bin" in finding.where for finding in store.verify())
    segment.unlink()
    with pytest.raises(StoreCorruptError, match="no file"):
        store.factors("d")


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_commits_that_the_catalog_lost_are_entered_again(
    tmp_path: Path, lost: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "s"
    store, space = filled(path, count=6)
    shutil.copy(path / "catalog.duckdb", tmp_path / "old")
    for i in range(lost):
        rows = make_rows(6 + i) if i else make_rows(6, 1, text="changed")
        store.append("d", space.id, "float32", make_batch(rows, space))
    before = store.factors("d"), list(store.rows("d")), list(store.tasks("d"))
    shutil.copy(tmp_path / "old", path / "catalog.duckdb")
    assert len(store.ids("d")) == 6
    with caplog.at_level(logging.INFO), stores.open(path, mode="w") as again:
        assert list(again.rows("d")) == before[1]
        assert list(again.tasks("d")) == before[2]
        factors = again.factors("d")
        assert factors.ids == before[0].ids
        np.testing.assert_array_equal(factors.flat, before[0].flat)
        assert again.verify() == []
    assert ("lost its last" in caplog.text) == (lost > 1)


def test_a_whole_lost_dataset_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "s"
    store = stores.open(path)
    with store.writing():
        pass
    shutil.copy(path / "catalog.duckdb", tmp_path / "old")
    store, space = filled(path, count=9)
    dataset = store.dataset("d")
    shutil.copy(tmp_path / "old", path / "catalog.duckdb")
    with stores.open(path, mode="w") as again:
        assert again.dataset("d") == dataset
        assert again.space(space.id) == space
        assert again.ids("d") == [f"r{i}" for i in range(9)]
        assert again.verify() == []
    assert "lost its last 3 commits (9 rows)" in caplog.text


def test_an_emptied_write_ahead_log_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "s"
    filled(path, count=3)
    process = start("append", path, 1000)  # from 3 rows on, in batches of 20
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(4)]
    process.kill()
    process.wait()
    reported = int(lines[-1])
    wal = path / "catalog.duckdb.wal"
    if wal.exists():
        os.truncate(wal, 0)
    with stores.open(path, mode="w") as store:
        assert len(store.ids("d")) >= reported
        assert store.verify() == []


def wal_places(data: bytes) -> dict[str, int]:
    """Where the head of a DuckDB write-ahead log keeps what. The database's id is 16 numbers of one or two bytes."""
    at = 9
    for _ in range(16):
        at += 2 if data[at] & 0x80 else 1
    assert data[at : at + 2] == b"g\0"
    return {"its version": 5, "the database that it belongs to": 9, "the checkpoint that it follows": at + 2}


@pytest.mark.parametrize("what", ["its version", "the database that it belongs to", "the checkpoint that it follows"])
def test_a_write_ahead_log_whose_head_is_damaged_costs_nothing_that_the_journals_hold(
    tmp_path: Path, what: str
) -> None:
    path, log = tmp_path / "s", tmp_path / "s" / "catalog.duckdb.wal"
    filled(path)
    program = "import duckdb, os, sys; c = duckdb.connect(sys.argv[1]); c.execute(sys.argv[2]); os._exit(9)"
    change = "INSERT INTO registry.meta VALUES ('note', 'one commit more')"
    subprocess.run([sys.executable, "-c", program, str(path / "catalog.duckdb"), change], check=False)
    data = bytearray(log.read_bytes())
    at = wal_places(data)[what]
    data[at] ^= 4
    log.write_bytes(data)
    with pytest.raises(StoreCorruptError, match="is damaged"):
        stores.open(path, mode="r").ids("d")
    with stores.open(path) as store:
        report = store.repair()
        assert report.findings
        assert report.left == ()
        assert any("wal" in name for name in report.set_aside)
        assert store.ids("d") == [f"r{i}" for i in range(6)]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_flipped_bits_are_found(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store, space = filled(path)
    adapter = Adapter(
        "abc", space.id, "d", "m", {"lr": 1.0}, {}, {"w": np.ones((1, 8), "f4")}, {"w": np.ones((9, 1), "f4")}
    )
    store.save_adapter(adapter)
    assert store.verify() == []
    segment = segment_of(path)
    for file, at, words in (
        (segment, HEADER_BYTES + 700, "CRC-32"),
        (segment, 20, "header"),
        (segment.with_suffix(".journal"), segment.with_suffix(".journal").stat().st_size - 5, "damaged after byte"),
        (path / "adapters" / "abc.safetensors", 300, "SHA-256"),
    ):
        flip(file, at)
        findings = store.verify()
        assert [finding.where for finding in findings] == [str(file)], file
        assert words in str(findings[0])
        assert findings[0].remedy
        flip(file, at)
    assert store.verify() == []


def test_the_padding_of_a_header_is_checked(tmp_path: Path) -> None:
    store, space = stores.open(tmp_path / "s"), make_space()
    store.segment_bytes = 1
    prepare(store, space)
    for i in range(2):
        store.append("d", space.id, "float32", make_batch(make_rows(i), space))
    for number in (1, 2):  # sealed and not
        flip(tmp_path / "s" / "segments" / f"{number:06d}.bin", 4000)
    findings = [str(finding).replace(str(tmp_path), "") for finding in store.verify()]
    assert ["header of a segment" in text for text in findings] == [True, True]
    assert [(text.count("from a backup"), ".." in text) for text in findings] == [(1, False)] * 2


def test_flipped_bits_in_the_catalog_are_found_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store, _ = filled(path, count=60, batch=20)
    rows = list(store.rows("d"))
    rng, size, found = random.Random(3), (path / "catalog.duckdb").stat().st_size, 0
    shutil.copy(path / "catalog.duckdb", tmp_path / "sound")
    for _ in range(12):
        shutil.copy(tmp_path / "sound", path / "catalog.duckdb")
        flip(path / "catalog.duckdb", rng.randrange(size))
        findings = store.verify()
        found += bool(findings)
        if not findings:
            assert list(store.rows("d")) == rows
    assert found > 0


def test_what_is_no_database_is_said_to_be_none(tmp_path: Path) -> None:
    path = tmp_path / "s"
    filled(path)
    (path / "catalog.duckdb").write_bytes(b"hello" * 1000)
    store = stores.open(path)
    for attempt in (store.datasets, lambda: store.save_space(make_space())):
        with pytest.raises(StoreCorruptError, match="not a valid DuckDB database"):
            attempt()
    (finding,) = store.verify()
    assert "not a valid DuckDB" in str(finding)
    assert str(finding).count("Restore the store from a backup") == 1
    assert ".." not in str(finding).replace(str(path), "")
    (path / "catalog.duckdb").unlink()
    with duckdb.connect(str(path / "catalog.duckdb")) as conn:
        conn.execute("CREATE TABLE mine (a INTEGER)")
    with pytest.raises(StoreCorruptError, match="not a catalog of repmatch"):
        store.datasets()


def test_a_lost_catalog_is_said_to_be_lost(tmp_path: Path) -> None:
    filled(tmp_path / "s")
    (tmp_path / "s" / "catalog.duckdb").unlink()
    with pytest.raises(StoreCorruptError, match="catalog"):
        stores.open(tmp_path / "s", mode="w")


def test_an_adapter_without_row_is_entered_again(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store, space = filled(path)
    shutil.copy(path / "catalog.duckdb", tmp_path / "old")
    a, b = {"x": np.ones((1, 8), "f4")}, {"x": np.full((9, 1), 2.0, "f4")}
    adapter = Adapter("abc", space.id, "d", "members", {"lr": 0.1}, {"losses": [1.0, 0.5]}, a, b)
    store.save_adapter(adapter)
    shutil.copy(tmp_path / "old", path / "catalog.duckdb")
    (path / "adapters" / "half.safetensors.tmp").write_bytes(b"half")
    with stores.open(path, mode="w") as again:
        found = again.adapter("abc")
    assert found is not None
    assert (found.recipe, found.record) == ({"lr": 0.1}, {"losses": [1.0, 0.5]})
    np.testing.assert_array_equal(found.b["x"], b["x"])
    assert not list((path / "adapters").glob("*.tmp"))


def test_a_full_disk_keeps_what_was_committed(tmp_path: Path) -> None:
    store, space = filled(tmp_path / "s")
    resource = pytest.importorskip("resource")
    import signal

    old_limit, old_handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (segment_of(tmp_path / "s").stat().st_size, old_limit[1]))
    try:
        with pytest.raises(StoreError):
            store.append("d", space.id, "float32", make_batch(make_rows(6, 7), space))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert store.verify() == []
    store.append("d", space.id, "float32", make_batch(make_rows(6, 7), space))
    assert store.factors("d").ids == tuple(f"r{i}" for i in range(8))
    assert store.verify() == []


def test_a_failed_commit_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, space = filled(tmp_path / "s")
    sizes = [path.stat().st_size for path in sorted((tmp_path / "s" / "segments").iterdir())]
    module = sys.modules["repmatch.store.factors"]

    def fail(*_: object) -> None:
        raise duckdb.IOException("IO Error: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "enter_batch", fail)
        with pytest.raises(StoreError, match=r"disk of .* is full"):
            store.append("d", space.id, "float32", make_batch(make_rows(6), space))
    assert [path.stat().st_size for path in sorted((tmp_path / "s" / "segments").iterdir())] == sizes
    with store.writing():
        assert len(store.ids("d")) == 6


def test_a_repair_goes_on_where_one_was_killed_before_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    store, _ = filled(path, count=6, batch=3)
    expected = np.asarray(store.factors("d").flat)[:3].copy()
    segment = segment_of(path)
    spoilt = bytearray(segment.read_bytes())
    spoilt[-3] ^= 1  # in the second batch
    segment.write_bytes(bytes(spoilt))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # rows and journal of the moved batch are written, its commit never comes
        patch.setattr(factors, "enter_batch", killed)
        patch.setattr(factors, "settle", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            store.repair()
    assert (path / "segments" / "000002.journal").stat().st_size > 0
    with stores.open(path) as again:
        report = again.repair()
        assert report.left == ()
        assert again.verify() == []
        assert again.factors("d").ids == ("r0", "r1", "r2")
        np.testing.assert_array_equal(again.factors("d").flat, expected)
    with stores.open(path, mode="w") as sound:
        assert sound.verify() == []


def test_a_store_that_is_open_for_writing_repairs_itself(tmp_path: Path) -> None:
    filled(tmp_path / "s")
    with stores.open(tmp_path / "s", mode="w") as store:
        segment = segment_of(tmp_path / "s")
        segment.write_bytes(segment.read_bytes()[:-1] + b"\x7f")
        assert store.repair().left == ()
        assert store.verify() == []
        with stores.open(tmp_path / "s") as other, pytest.raises(StoreLockedError):
            other.save_space(make_space(seed=5))  # it still is the one writer
