"""Deleting, compacting, verifying and repairing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from store_worker import filled, make_batch, make_row, make_rows, make_space, prepare, start, values_of

from repmatch import store as stores
from repmatch.datamodels import Adapter, Coreset
from repmatch.errors import StoreCorruptError, StoreError, UnknownNameError, UsageError
from repmatch.store.salvage import Salvage
from repmatch.store.segment import HEADER_BYTES


def content(store: stores.Store, dataset: str = "d") -> dict[str, tuple[str, bytes]]:
    """Row and factor of every instance that has one."""
    factors = store.factors(dataset)
    assert factors.flat is not None
    flat = [row.tobytes() for row in factors.flat]
    rows = dict(store.rows(dataset))
    return {name: (rows[name], value) for name, value in zip(factors.ids, flat, strict=True)}


def expected(*numbers: int) -> dict[str, tuple[str, bytes]]:
    space = make_space()
    return {row.id: (row.json, values_of(row, space).tobytes()) for row in make_rows(*numbers)}


def core(name: str, picks: tuple[str, ...], everyone: int = 6) -> Coreset:
    return Coreset(
        name, "d", "top", {}, picks, np.ones(len(picks)), tuple(f"r{i}" for i in range(everyone)),
        np.zeros(everyone, np.int64), np.ones(everyone, np.float32),
    )  # fmt: skip


def test_a_reader_on_its_way_never_mixes_up_who_is_deleted_and_added(tmp_path: Path) -> None:
    store, space = filled(tmp_path / "s")
    sound = expected(*range(12))
    with stores.open(tmp_path / "s", mode="r") as reader:
        parts = reader.iter_factors("d", size=2)
        seen = [next(parts)]
        store.delete("d", ids=["r3", "r5"])  # the last one too, whose key must not go to another
        store.append("d", space.id, "float32", make_batch(make_rows(8, 9), space))
        seen += list(parts)
    assert [part.ids for part in seen] == [("r0", "r1"), ("r2",), ("r4",)]
    for part in seen:
        assert part.flat is not None
        for name, row in zip(part.ids, part.flat, strict=True):
            assert row.tobytes() == sound[name][1]
    assert content(store) == expected(0, 1, 2, 4, 8, 9)
    keys = store.sql("SELECT count(*) AS n FROM factors").item()
    assert keys == 6


def test_delete_leaves_the_rest_untouched(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s")
    store.save_subset("some", "d", ["r1", "r2", "r3"])
    store.save_coreset(core("core", ("r5", "r0")))
    assert store.delete("d", ids=["r2", "r4", "r2"]).rows == 2
    assert content(store) == expected(0, 1, 3, 5)
    assert store.ids("d") == ["r0", "r1", "r3", "r5"]
    assert store.resolve("some").ids == ("r1", "r3")
    kept = store.coreset("core")
    assert kept.ids == ("r5", "r0")
    assert kept.all_ids == ("r0", "r1", "r3", "r5")
    assert store.delete("d", where="n > 90").rows == 0
    assert store.delete("d", where="n = 3").rows == 1
    assert store.verify() == []
    with pytest.raises(UnknownNameError, match="no instance 'r2'"):
        store.delete("d", ids=["r2"])
    with pytest.raises(UsageError, match="one of the two"):
        store.delete("d")


def test_a_coreset_is_in_the_way_of_deleting_its_picks(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s")
    store.save_coreset(core("core", ("r5", "r0")))
    store.save_coreset(core("other", ("r1",)))
    with pytest.raises(UsageError, match=r"in use by coreset 'core'; nothing was deleted.*--coresets"):
        store.delete("d", ids=["r5", "r2"])
    assert len(store.ids("d")) == 6
    assert store.delete("d", ids=["r5", "r2"], coresets=True) == stores.Deleted(2, ("core",))
    assert store.coresets()["name"].to_list() == ["other"]
    with pytest.raises(UsageError, match="'other'"):
        store.delete_dataset("d")
    assert store.delete_dataset("d", coresets=True) == stores.Deleted(4, ("other",))
    assert not store.has_dataset("d")
    assert store.verify() == []


def test_deleting_one_dataset_leaves_another_that_shares_its_segment(tmp_path: Path) -> None:
    store, space = filled(tmp_path / "s")
    prepare(store, space, "float32", "e")
    store.append("e", space.id, "float32", make_batch(make_rows(0, 7), space))
    store.save_subset("some", "d", ["r1"])
    store.delete_dataset("d")
    assert content(store, "e") == expected(0, 7)
    assert store.sql("SELECT count(*) AS n FROM subsets")["n"][0] == 0
    report = store.compact()
    assert report.moved == 2
    assert content(store, "e") == expected(0, 7)
    prepare(store, space)
    store.append("d", space.id, "float32", make_batch(make_rows(3), space))
    assert content(store) == expected(3)
    assert store.verify() == []


def test_compact_gives_the_space_back(tmp_path: Path) -> None:
    store, space = filled(tmp_path / "s", count=60, batch=10)
    store.delete("d", where="n % 2 = 0 AND n < 50")
    changed = make_row("r51", text="another text", n=51)
    store.append("d", space.id, "float32", make_batch([changed], space))
    before = content(store)
    reader = stores.open(tmp_path / "s", mode="r")
    streaming, search = reader.iter_factors("d", size=10), reader.search("d")
    first = next(streaming)
    report = store.compact()
    assert (report.moved, report.segments) == (35, 1)
    assert content(store) == before
    segments = tmp_path / "s" / "segments"
    assert sorted(path.name for path in segments.iterdir()) == ["000002.bin", "000002.journal"]
    row = store.sql("SELECT rows, live FROM segments").rows()
    assert row == [(35, 35)]
    assert (segments / "000002.bin").stat().st_size == HEADER_BYTES + 35 * (134 * 4 + 8)
    assert store.verify() == []
    assert store.compact().moved == 0
    rest = [first, *streaming]  # a reader that had begun goes on with what it saw
    assert sum((part.ids for part in rest), ()) == tuple(before)
    assert len(search.nearest_to(["r1"], 50)[0].ids) == 34
    text = b"".join(path.read_bytes() for path in segments.iterdir())
    assert values_of(make_rows(0)[0], space).tobytes() not in text
    store.append("d", space.id, "float32", make_batch(make_rows(0), space))
    assert len(content(store)) == 36
    assert store.verify() == []


def test_compact_of_everything_deleted(tmp_path: Path) -> None:
    store, space = filled(tmp_path / "s")
    store.delete("d", where="true")
    store.compact()
    assert list((tmp_path / "s" / "segments").iterdir()) == []
    assert store.factors("d").ids == ()
    store.append("d", space.id, "float32", make_batch(make_rows(1, 2), space))
    with stores.open(tmp_path / "s", mode="w") as again:
        assert content(again) == expected(1, 2)
        assert again.verify() == []


def test_segment_files_that_outlived_their_compaction_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = filled(tmp_path / "s")
    store.delete("d", where="n > 0")
    monkeypatch.setattr("repmatch.store.compaction.remove_segments", lambda *_: None)  # as after a kill
    store.compact()
    assert len(list((tmp_path / "s" / "segments").glob("*.bin"))) == 2
    with stores.open(tmp_path / "s", mode="w") as again:
        assert content(again) == expected(0)
        assert [path.name for path in (tmp_path / "s" / "segments").glob("*.bin")] == ["000002.bin"]
        assert again.verify() == []


def test_a_damaged_segment_is_not_compacted(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s")
    store.delete("d", ids=["r0"])
    flip(tmp_path / "s" / "segments" / "000001.bin", HEADER_BYTES + 5)
    with pytest.raises(StoreCorruptError, match="repmatch repair"):
        store.compact()
    assert len(store.ids("d")) == 5


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def damaged_store(path: Path) -> stores.Store:
    """Two sealed segments and an open one, ten instances each, and an adapter with scores."""
    store, space = stores.open(path), make_space()
    store.segment_bytes = HEADER_BYTES + 10 * 544
    prepare(store, space)
    for lo in range(0, 30, 5):
        store.append("d", space.id, "float32", make_batch(make_rows(*range(lo, lo + 5)), space))
    a, b = {"w": np.ones((1, 8), "f4")}, {"w": np.ones((9, 1), "f4")}
    store.save_adapter(Adapter("abc", space.id, "d", "m", {"lr": 1.0}, {}, a, b))
    store.save_scores("d", "abc", ["r1"], np.ones(1), np.ones((1, 2), "f4"))
    return store


@pytest.mark.parametrize("seed", [0])
def test_a_flipped_bit_in_any_file_is_found_or_harmless(tmp_path: Path, seed: int) -> None:
    """Segments, journals and adapters: every flip is found. The catalog: found, or in bytes that hold nothing."""
    store = damaged_store(tmp_path / "s")
    before, rng = content(store), np.random.default_rng(seed)
    scores = store.scores("d", "abc").to_dicts()
    files = [path for path in sorted((tmp_path / "s").rglob("*")) if path.is_file() and path.name != "store.lock"]
    assert len(files) == 3 + 3 + 1 + 1
    for path in files:
        sound = path.read_bytes() if path.name != "catalog.duckdb" else None
        copy = tmp_path / "copy"
        if sound is None:
            subprocess.run(["cp", str(path), str(copy)], check=True)  # by another process: ours may hold its lock
        for at in rng.integers(0, path.stat().st_size, 3 if sound is not None else 5).tolist():
            flip_bit(path, at, int(rng.integers(8)))
            findings = store.verify()
            if sound is not None:
                assert [finding.where for finding in findings][:1] == [str(path)], (path, at)
                path.write_bytes(sound)
            else:
                if not findings:
                    assert content(store) == before
                    assert store.scores("d", "abc").to_dicts() == scores
                subprocess.run(["cp", str(copy), str(path)], check=True)
    assert store.verify() == []


def flip_bit(path: Path, at: int, bit: int) -> None:
    code = (
        "import sys; f=open(sys.argv[1],'r+b'); at=int(sys.argv[2]); f.seek(at); b=f.read(1); f.seek(at); "
        "f.write(bytes([b[0] ^ 1 << int(sys.argv[3])]))"
    )
    subprocess.run([sys.executable, "-I", "-c", code, str(path), str(at), str(bit)], check=True)


def test_every_file_cut_short_is_found(tmp_path: Path) -> None:
    store = damaged_store(tmp_path / "s")
    files = [path for path in sorted((tmp_path / "s").rglob("*")) if path.parent.name in ("segments", "adapters")]
    for path in files:
        sound = path.read_bytes()
        for size in (0, len(sound) // 2, len(sound) - 1):
            os.truncate(path, size)
            assert str(path) in [finding.where for finding in store.verify()], (path, size)
            path.write_bytes(sound)
    assert store.verify() == []


def test_a_full_disk(tmp_path: Path) -> None:
    """A real one: a file system of a few megabytes, filled by appending and by compacting."""
    small = tmp_path / "small"
    small.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(small)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("no right to mount a small file system")
    try:
        store, space = stores.open(small / "s"), make_space()
        prepare(store, space)
        reached = 0
        with pytest.raises(StoreError, match="full"):
            while reached < 60_000:
                rows = make_rows(*range(reached, reached + 1500))
                store.append("d", space.id, "float32", make_batch(rows, space))
                reached += 1500
        assert 0 < reached < 60_000
        assert store.ids("d") == [f"r{i}" for i in range(reached)]
        assert store.verify() == []
        with pytest.raises(StoreError, match="full"):
            store.delete("d", where="n < 10")
            store.compact()
        assert set(content(store)) >= {f"r{i}" for i in range(10, reached)}
        assert store.verify() == []
        subprocess.run(["mount", "-o", "remount,size=60m", str(small)], check=True)
        store.append("d", space.id, "float32", make_batch(make_rows(*range(reached, reached + 1500)), space))
        store.delete("d", where="n < 100")
        store.compact()
        assert content(store) == expected(*range(100, reached + 1500))
        assert store.verify() == []
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_readers_go_on_while_another_process_deletes_and_compacts(tmp_path: Path) -> None:
    store, space = filled(tmp_path / "s", count=200, batch=100)
    process = start("read", tmp_path / "s", 3.0)
    round_ = 0
    with store.writing():
        while process.poll() is None and round_ < 40:
            store.append("d", space.id, "float32", make_batch(make_rows(1000 + round_), space))
            store.delete("d", ids=[f"r{100 + round_}"])
            store.compact()
            round_ += 1
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert int(out) > 1
    assert round_ > 0
    assert store.verify() == []


def test_repair_of_a_sound_store_does_nothing(tmp_path: Path) -> None:
    store = damaged_store(tmp_path / "s")
    assert store.repair() == stores.Repaired((), 0, (), (), (), ())


@pytest.mark.parametrize(
    ("name", "at", "lost"),
    [
        ("segments/000001.bin", HEADER_BYTES + 6 * 544, range(5, 10)),  # the second batch of a sealed segment
        ("segments/000003.bin", HEADER_BYTES, range(20, 25)),  # the first batch of the open segment
        ("segments/000002.bin", 3, ()),  # a header
        ("segments/000003.bin", 4000, ()),  # its padding
        ("segments/000002.journal", 30, ()),
        ("segments/000003.journal", 500, ()),
    ],
)
def test_repair_drops_exactly_what_is_damaged(tmp_path: Path, name: str, at: int, lost: range) -> None:
    store, space = damaged_store(tmp_path / "s"), make_space()
    flip(tmp_path / "s" / name, at)
    findings = store.verify()
    assert [finding.where for finding in findings] == [str(tmp_path / "s" / name)]
    assert sum(finding.factors for finding in findings) == len(lost)
    assert set(store.damaged()["id"].to_list()) == {f"r{i}" for i in lost}
    report = store.repair()
    assert (report.factors, report.left) == (len(lost), ())
    assert report.datasets == (("d",) if lost else ())
    assert report.set_aside
    assert all(Path(path).exists() for path in report.set_aside)
    assert store.verify() == []
    assert content(store) == expected(*(i for i in range(30) if i not in lost))
    assert store.ids("d") == [f"r{i}" for i in range(30)]  # rows stay: the next ingest computes their factors
    with store.stage("d") as stage:
        stage.add(make_rows(*range(30)))
        assert stage.resolve(space.id).todo == len(lost)
        for rows in stage.todo():
            store.append("d", space.id, "float32", make_batch(rows, space))
    assert content(store) == expected(*range(30))
    assert store.verify() == []
    assert store.scores("d", "abc").height == 1


@pytest.mark.parametrize("cut", [HEADER_BYTES + 7 * 544, 100, None])
def test_repair_of_a_short_or_missing_segment(tmp_path: Path, cut: int | None) -> None:
    store = damaged_store(tmp_path / "s")
    path = tmp_path / "s" / "segments" / "000002.bin"
    if cut is None:
        path.unlink()
    else:
        os.truncate(path, cut)
    lost = range(15, 20) if cut and cut > HEADER_BYTES else range(10, 20)
    assert sum(finding.factors for finding in store.verify()) == len(lost)
    with pytest.raises(StoreCorruptError, match=r"000002\.bin"):
        store.save_subset("x", "d", ["r1"])
    report = store.repair()
    assert (report.factors, report.left) == (len(lost), ())
    assert content(store) == expected(*(i for i in range(30) if i not in lost))
    assert store.verify() == []
    store.save_subset("x", "d", ["r1"])


def test_repair_drops_a_damaged_adapter(tmp_path: Path) -> None:
    store = damaged_store(tmp_path / "s")
    flip(tmp_path / "s" / "adapters" / "abc.safetensors", 300)
    report = store.repair()
    assert (report.adapters, report.left) == (("abc",), ())
    assert store.adapter("abc") is None
    assert store.scores("d", "abc").height == 0
    with stores.open(tmp_path / "s", mode="w") as again:
        assert again.adapters().height == 0
        assert again.verify() == []


@pytest.mark.parametrize("how", ["gone", "garbage", "flipped"])
def test_a_lost_catalog_is_rebuilt_from_the_journals(tmp_path: Path, how: str) -> None:
    store = damaged_store(tmp_path / "s")
    store.delete("d", ids=["r3"])
    store.compact()
    uuid, space = store.info()["uuid"], make_space()
    catalog = tmp_path / "s" / "catalog.duckdb"
    if how == "gone":
        catalog.unlink()
    elif how == "garbage":
        catalog.write_bytes(b"hello" * 1000)
    else:
        data = bytearray(catalog.read_bytes())
        for at in range(4096 * 3, len(data), 997):
            data[at] ^= 0xFF
        catalog.write_bytes(data)
    again = stores.open(tmp_path / "s")
    with pytest.raises(StoreCorruptError):
        again.ids("d")
    report = again.repair()
    assert report.left == ()
    assert content(again) == expected(*(i for i in range(30) if i != 3))
    assert again.space(space.id) == space
    assert again.info()["uuid"] == uuid
    assert again.adapter("abc") is not None
    assert again.verify() == []


@pytest.mark.parametrize("core", [True, False])
def test_a_reader_on_its_way_never_mixes_up_who_is_deleted_and_added_after_a_repair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, core: bool
) -> None:
    store, space = filled(tmp_path / "s")
    store.delete("d", ids=["r5"])  # the last one, whose key must not go to another
    store.compact()
    store.append("d", space.id, "float32", make_batch(make_rows(6), space))
    with stores.open(tmp_path / "s", mode="r") as reader:
        parts = reader.iter_factors("d", size=4)
        seen = [next(parts)]
        store.delete("d", ids=["r6"])
        store.compact()
        monkeypatch.setattr(Salvage, "has_core", core)  # tables are copied, or all is entered again from the journals
        with store._locked():
            store._rebuild([])
        store.append("d", space.id, "float32", make_batch(make_rows(5, 8, 9), space))  # a deleted id is free again
        seen += list(parts)
    assert [name for part in seen for name in part.ids] == ["r0", "r1", "r2", "r3", *(["r4"] if core else [])]
    assert content(store) == expected(0, 1, 2, 3, 4, 5, 8, 9)
    assert store.ids("d") == ["r0", "r1", "r2", "r3", "r4", "r5", "r8", "r9"]
    assert store.verify() == []


@pytest.mark.parametrize("encoding", ["float32", "sign"])
def test_stores_of_one_space_unite_without_renumbering(tmp_path: Path, encoding: str) -> None:
    one, space = stores.open(tmp_path / "one"), make_space()
    prepare(one, space, encoding)  # type: ignore[arg-type]
    one.append("d", space.id, encoding, make_batch(make_rows(0, 1, 2), space))  # type: ignore[arg-type]
    two = stores.open(tmp_path / "two")
    prepare(two, space, encoding)  # type: ignore[arg-type]
    prepare(two, space, encoding, "e")  # type: ignore[arg-type]
    two.append("d", space.id, encoding, make_batch(make_rows(5, 2, 4), space))  # type: ignore[arg-type]
    two.append("e", space.id, encoding, make_batch(make_rows(7), space))  # type: ignore[arg-type]
    two.save_adapter(
        Adapter("abc", space.id, "d", "m", {"lr": 1.0}, {}, {"w": np.ones((1, 8))}, {"w": np.ones((9, 1))})
    )
    assert one.absorb(tmp_path / "two") == 3
    whole = stores.open(tmp_path / "whole")
    prepare(whole, space, encoding)  # type: ignore[arg-type]
    whole.append("d", space.id, encoding, make_batch(make_rows(0, 1, 2, 5, 4), space))  # type: ignore[arg-type]
    mine, theirs = one.factors("d"), whole.factors("d")
    assert mine.ids == theirs.ids
    for name in ("flat", "bits"):
        np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
    assert list(one.rows("d")) == list(whole.rows("d"))
    assert one.factors("e").ids == ("r7",)
    assert one.adapter("abc") is not None
    assert one.absorb(tmp_path / "two") == 0
    assert one.verify() == []
    assert two.ids("d") == ["r5", "r2", "r4"]


def test_stores_that_contradict_each_other_are_not_united(tmp_path: Path) -> None:
    one, space = filled(tmp_path / "one", count=3)
    two, _ = filled(tmp_path / "two", count=2)
    two.append("d", space.id, "float32", make_batch([make_row("r1", text="other"), *make_rows(9)], space))
    with pytest.raises(UsageError, match=r"1 instances of 'd' have other content.*'r1'"):
        one.absorb(tmp_path / "two")
    assert one.ids("d") == ["r0", "r1", "r2"]
