"""Opening, locks, versions, other processes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pytest
from store_worker import filled, make_batch, make_rows, make_space, prepare, start

import repmatch
from repmatch import store as stores
from repmatch.errors import StoreError, StoreLockedError, StoreNotFoundError, StoreVersionError, UsageError
from repmatch.store import migrations


def test_a_missing_store(tmp_path: Path) -> None:
    path = tmp_path / "none"
    with pytest.raises(StoreNotFoundError, match=r"none.*repmatch ingest.*--store") as caught:
        stores.open(path, mode="r")
    assert caught.value.exit_code == 2
    store = stores.open(path)
    for attempt in (store.datasets, lambda: store.dataset("d"), lambda: store.ids("d"), store.verify, store.info):
        with pytest.raises(StoreNotFoundError, match="none"):
            attempt()
    assert not store.has_dataset("d")
    assert not path.exists()
    store.save_space(make_space())
    assert store.spaces().height == 1


def test_a_folder_that_is_no_store_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for mode in (None, "w", "r"):
        with pytest.raises(StoreError, match=r"is no store.*mine\.txt"):
            stores.open(tmp_path, mode=mode)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(StoreError, match="is a file"):
        stores.open(tmp_path / "mine.txt")


def test_an_empty_folder_becomes_a_store(tmp_path: Path) -> None:
    with stores.open(tmp_path, mode="w") as store:
        assert store.datasets().height == 0
    assert stores.open(tmp_path, mode="r").verify() == []


def test_modes(tmp_path: Path) -> None:
    filled(tmp_path / "s")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")}
    with stores.open(tmp_path / "s", mode="r") as store:
        assert len(store.factors("d")) == 6
        store.info()
        store.verify()
        with store.run("score", {}) as run:
            assert run.id is None
        with pytest.raises(StoreError, match="mode='r'"):
            store.save_space(make_space(seed=3))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s").rglob("*")} == before
    with pytest.raises(StoreError, match="was closed"):
        store.ids("d")
    with pytest.raises(UsageError, match="unknown mode"):
        stores.open(tmp_path / "s", mode="x")  # type: ignore[arg-type]


def test_a_second_writer_is_told_who_writes(tmp_path: Path) -> None:
    filled(tmp_path / "s")
    process = start("hold", tmp_path / "s")
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"
    try:
        store = stores.open(tmp_path / "s")
        with pytest.raises(StoreLockedError, match=f"process {process.pid} on "):
            store.save_space(make_space(seed=4))
        began = time.monotonic()
        with pytest.raises(StoreLockedError, match=r"after waiting 0\.3 s"):
            stores.open(tmp_path / "s", mode="w", wait=0.3)
        assert 0.3 <= time.monotonic() - began < 3
        assert len(store.ids("d")) == 6
    finally:
        process.kill()
        process.communicate()
    store.save_space(make_space(seed=4))


def test_two_stores_of_one_process(tmp_path: Path) -> None:
    one, two = stores.open(tmp_path / "s"), stores.open(tmp_path / "s")
    with one.writing(), one.writing():
        one.save_space(make_space())
        with pytest.raises(StoreLockedError):
            two.save_space(make_space(seed=1))
        assert two.spaces().height == 1
    two.save_space(make_space(seed=1))
    with stores.open(tmp_path / "s", mode="w") as three:
        three.save_space(make_space(seed=2))
        with pytest.raises(StoreLockedError):
            one.save_space(make_space(seed=3))
    assert one.spaces().height == 3


def test_reading_while_another_process_writes(tmp_path: Path) -> None:
    store, space = filled(tmp_path / "s", count=60, batch=60)
    process = start("read", tmp_path / "s", 6.0)
    with store.writing():
        for i in range(60, 600):
            if process.poll() is not None:
                break
            store.append("d", space.id, "float32", make_batch(make_rows(i), space))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert int(out) > 2  # complete readings; how many depends on what else the machine does
    assert i > 65
    assert store.verify() == []


def set_schema(path: Path, schema: int, least: int) -> None:
    with duckdb.connect(str(path / "catalog.duckdb")) as conn:
        conn.execute("UPDATE registry.meta SET value = ? WHERE key = 'schema'", [str(schema)])
        conn.execute("UPDATE registry.meta SET value = ? WHERE key = 'min_reader'", [str(least)])


def test_a_newer_schema(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s")
    set_schema(tmp_path / "s", 99, 99)
    for attempt in (store.datasets, lambda: store.save_space(make_space())):
        with pytest.raises(StoreVersionError, match=r"schema 99.*knows schema \d+.*pip install -U .repmatch"):
            attempt()
    set_schema(tmp_path / "s", 99, 1)
    assert len(store.ids("d")) == 6
    with pytest.raises(StoreVersionError):
        store.save_space(make_space())


def test_an_older_schema_is_migrated_with_a_backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, space = filled(tmp_path / "s")
    step = "CREATE TABLE registry.extra (a INTEGER); INSERT INTO registry.extra VALUES (5)"
    monkeypatch.setattr(migrations, "MIGRATIONS", [*migrations.MIGRATIONS, step])
    with pytest.raises(StoreVersionError, match=r"schema 2; .* needs schema 3"):
        stores.open(tmp_path / "s", mode="r").datasets()
    with stores.open(tmp_path / "s", mode="w") as new:
        assert new.sql("SELECT a FROM registry.extra")["a"].to_list() == [5]
        assert new.info()["schema"] == 3
        new.append("d", space.id, "float32", make_batch(make_rows(7), space))
    backup = tmp_path / "s" / "catalog.duckdb.schema-2.backup"
    with duckdb.connect(str(backup), read_only=True) as conn:
        assert conn.execute("SELECT count(*) FROM registry.instances").fetchall() == [(6,)]
    assert store.verify() == []


def test_a_store_of_schema_1_is_brought_up_to_date(tmp_path: Path) -> None:
    store, space = filled(tmp_path / "t")
    with duckdb.connect(str(tmp_path / "t" / "catalog.duckdb")) as conn:  # take step 2 back
        for view in ("factors", "segments", "subsets"):
            conn.execute(f"DROP VIEW main.{view}")
        conn.execute("DROP TABLE registry.dropped")
    set_schema(tmp_path / "t", 1, 1)
    with pytest.raises(StoreVersionError, match=r"schema 1; .* needs schema 2.*mode='w'"):
        store.ids("d")
    store.append("d", space.id, "float32", make_batch(make_rows(6), space))
    assert store.factors("d").ids == tuple(f"r{i}" for i in range(7))
    assert store.sql("SELECT rows, live FROM segments").rows() == [(7, 7)]
    assert store.verify() == []
    assert (tmp_path / "t" / "catalog.duckdb.schema-1.backup").exists()


def test_a_failing_migration_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr(
            migrations, "MIGRATIONS", [*migrations.MIGRATIONS, "CREATE TABLE registry.x (a INT); SELECT 1/'a'"]
        )
        with pytest.raises(StoreError):
            stores.open(tmp_path / "s", mode="w")
    with stores.open(tmp_path / "s", mode="w") as store:
        assert len(store.ids("d")) == 6
        assert store.info()["schema"] == 2


def test_a_read_only_folder(tmp_path: Path) -> None:
    filled(tmp_path / "s")
    root = Path(repmatch.__file__).parent.parent
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r})\n"
        "from repmatch import store as stores\nfrom repmatch.errors import StoreError\n"
        f"store = stores.open({str(tmp_path / 's')!r})\n"
        "print(len(store.ids('d')), len(store.factors('d')), store.verify())\n"
        "try:\n    store.save_subset('x', 'd', [])\n"
        "except StoreError as error:\n    print(error)\n"
    )
    mount = (
        f'mount --bind {tmp_path} {tmp_path} && mount -o remount,bind,ro {tmp_path} && exec {sys.executable} -c "$CODE"'
    )
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", mount], env={"CODE": code, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("no right to mount a folder read-only")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "6 6 []"
    assert "Read-only file system" in lines[1]
    assert "mode='r'" in lines[1]


def test_importing_and_reading_is_light(tmp_path: Path) -> None:
    filled(tmp_path / "s")
    root = Path(repmatch.__file__).parent.parent
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r})\n"
        "import repmatch.store\n"
        "heavy = {'torch', 'transformers', 'peft', 'polars', 'duckdb', 'pyarrow'} & set(sys.modules)\n"
        f"store = repmatch.store.open({str(tmp_path / 's')!r}, mode='r')\n"
        "print(heavy, next(store.rows('d', ids=['r3']))[0], 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "r3", "False"]


def test_the_space_is_kept_whole(tmp_path: Path) -> None:
    store, space = stores.open(tmp_path / "s"), make_space(rank=2)
    prepare(store, space)
    assert store.space(space.id) == space
    assert store.space(space.id).id == space.id
