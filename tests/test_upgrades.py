"""Stores that earlier versions wrote (tests/data) open, are brought up to date and hold what they held."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import duckdb
import pytest
from conftest import Run
from data.make_store import contents

import repmatch
from repmatch import store as stores
from repmatch.errors import StoreError, StoreVersionError
from repmatch.store import migrations

FIXTURES = sorted((Path(__file__).parent / "data").glob("schema-*.tar.xz"))
OLD = [path for path in FIXTURES if not path.name.startswith(f"schema-{migrations.schema()}-")]
CATALOG = "catalog.duckdb"


def unpack(fixture: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the store of a fixture and what the code of its time read from it."""
    with tarfile.open(fixture) as tar:
        tar.extractall(folder, filter="data")
    return folder / "store", json.loads((folder / "contents.json").read_text())


def schema_of(catalog: Path) -> int:
    with duckdb.connect(str(catalog), read_only=True) as conn:
        return int(conn.execute("SELECT value FROM registry.meta WHERE key = 'schema'").fetchall()[0][0])


def shape_of(store: Path) -> list[Any]:
    """Tables, columns and views of a store's catalog."""
    with duckdb.connect(str(store / CATALOG), read_only=True) as conn:
        columns = "SELECT schema_name, table_name, column_name, data_type, is_nullable FROM duckdb_columns()"
        views = "SELECT schema_name, view_name, sql FROM duckdb_views()"
        queries = (f"{columns} WHERE NOT internal ORDER BY ALL", f"{views} WHERE NOT internal ORDER BY ALL")
        return [row for query in queries for row in conn.execute(query).fetchall()]


def test_there_is_a_store_of_every_schema() -> None:
    found = {int(re.match(r"schema-(\d+)-", path.name)[1]) for path in FIXTURES}  # type: ignore[index]
    assert found == set(range(1, migrations.schema() + 1)), "make one by tests/data/make_store.py"


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda path: path.name.partition(".")[0])
def test_an_earlier_store_holds_what_it_held(fixture: Path, tmp_path: Path) -> None:
    path, expected = unpack(fixture, tmp_path)
    before = (path / CATALOG).read_bytes()
    assert expected["rows"]["floats"]
    assert len(expected["adapters"]) == 2
    with repmatch.open(path, mode="w") as store:
        assert contents(store) == expected
        assert store.verify() == []
        assert store.nearest("floats", ["r1"], k=3).height == 3
    backups = list(path.glob("*.backup"))
    if fixture in OLD:
        (backup,) = backups
        assert backup.name == f"{CATALOG}.schema-{fixture.name.split('-')[1]}.backup"
        assert backup.read_bytes() == before
    else:
        assert not backups
    with repmatch.open(path, mode="r") as store:  # for everybody who only reads, too
        assert contents(store) == expected
    with repmatch.open(tmp_path / "new", mode="w"):
        pass
    assert shape_of(path) == shape_of(tmp_path / "new")


def test_what_was_computed_then_is_not_computed_again(tmp_path: Path, tiny_model: Path) -> None:
    path, expected = unpack(FIXTURES[0], tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(text + "\n" for _, text in expected["rows"]["signs"]) + '{"id":"x","text":"a","label":"no"}'
    )
    with repmatch.open(path) as store, store.writing():
        space = store.dataset("signs").space_id
        report = repmatch.Curator(store, str(tiny_model)).ingest(rows, "signs")
        assert (report.new, report.changed, report.unchanged) == (1, 0, 10)
        assert store.dataset("signs").space_id == space
        assert len(store.factors("signs")) == 11


@pytest.mark.parametrize("fixture", OLD, ids=lambda path: path.name.partition(".")[0])
def test_reading_an_earlier_store_names_the_command_that_helps(run: Run, fixture: Path, tmp_path: Path) -> None:
    path, expected = unpack(fixture, tmp_path)
    for arguments in (["info"], ["sql", "SELECT 1"], ["verify"], ["export", "floats", "-o", tmp_path / "out.jsonl"]):
        refused = run("--store", path, *arguments)
        assert refused.code == 1
        assert "needs schema" in refused.err
    command = shlex.split(re.search(r"repmatch (--store .* compact)", refused.err)[1])  # type: ignore[index]
    assert run(*command).code == 0
    assert run("--store", path, "verify").code == 0
    with repmatch.open(path, mode="r") as store:
        assert contents(store) == expected


def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the last step do all that it does, and then fail."""
    steps = [*migrations.MIGRATIONS[:-1], migrations.MIGRATIONS[-1] + "; SELECT error('in the middle')"]
    monkeypatch.setattr(migrations, "MIGRATIONS", steps)


@pytest.mark.parametrize("fixture", OLD, ids=lambda path: path.name.partition(".")[0])
def test_a_step_that_fails_leaves_the_old_store(fixture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, expected = unpack(fixture, tmp_path)
    with monkeypatch.context() as patch:
        broken(patch)
        with pytest.raises(StoreError, match=r"could not be brought from schema 1 .*in the middle.*schema-1.backup"):
            repmatch.open(path, mode="w")
    assert schema_of(path / CATALOG) == 1
    with duckdb.connect(str(path / CATALOG), read_only=True) as conn:
        tables = {row[0] for row in conn.execute("SELECT table_name FROM duckdb_tables()").fetchall()}
        rows = conn.execute("SELECT id, json FROM registry.instances WHERE dataset_pk = 1 ORDER BY pk").fetchall()
    assert "dropped" not in tables
    assert sorted(map(list, rows)) == sorted(expected["rows"]["floats"])
    with repmatch.open(path, mode="w") as store:
        assert contents(store) == expected


KILLED = """
import os, signal
from repmatch import store as stores
from repmatch.store import catalog
class Connection:
    def __init__(self, inner): self._inner = inner
    def __getattr__(self, name): return getattr(self._inner, name)
    def commit(self): os.kill(os.getpid(), signal.SIGKILL)
real = catalog.Catalog._connect
catalog.Catalog._connect = lambda *given, **more: Connection(real(*given, **more))
stores.open({path!r}, mode="w")
"""


def test_a_kill_in_the_middle_leaves_the_old_store(tmp_path: Path) -> None:
    path, expected = unpack(OLD[0], tmp_path)
    root = str(Path(repmatch.__file__).parent.parent)
    code = KILLED.format(path=str(path))
    done = subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ, "PYTHONPATH": root})
    assert done.returncode == -signal.SIGKILL
    assert schema_of(path / CATALOG) == 1
    assert schema_of(path / f"{CATALOG}.schema-1.backup") == 1
    with repmatch.open(path, mode="w") as store:
        assert contents(store) == expected
        assert store.verify() == []


def test_without_a_backup_nothing_is_changed(tmp_path: Path) -> None:
    path, _ = unpack(OLD[0], tmp_path)
    (path / f"{CATALOG}.schema-1.backup").mkdir()
    with pytest.raises(StoreError, match="could not back up"):
        repmatch.open(path, mode="w")
    assert schema_of(path / CATALOG) == 1


def test_a_newer_store_names_the_version_that_can_read_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    with monkeypatch.context() as future:
        future.setattr(migrations, "__version__", "7.5.0")
        future.setattr(migrations, "MIGRATIONS", [*migrations.MIGRATIONS, "CREATE TABLE registry.more (a INTEGER)"])
        future.setattr(migrations, "MIN_READER", migrations.schema())
        with repmatch.open(path, mode="w"):
            pass
    for arguments in (["info"], ["compact"], ["verify"], ["repair"]):
        refused = run("--store", path, *arguments)
        assert refused.code == 1
        assert "pip install -U 'repmatch>=7.5.0'" in refused.err
        assert f"knows schema {migrations.schema()}" in refused.err
    with duckdb.connect(str(path / CATALOG)) as conn:  # one that older versions may read
        conn.execute("UPDATE registry.meta SET value = '1' WHERE key = 'min_reader'")
    with stores.open(path, mode="r") as store:
        assert store.datasets().height == 0
    with pytest.raises(StoreVersionError, match=r"can read this store.*not write.*repmatch>=7.5.0"):
        stores.open(path, mode="w")
