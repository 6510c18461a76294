"""A store's name decides where it lies and nothing else; a folder that is no store, or no longer one, is told so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import pytest
from store_worker import filled, make_space, prepare

from repmatch import store as stores
from repmatch.errors import RepMatchError, StoreCorruptError, StoreError, StoreNotFoundError, UsageError
from repmatch.store import turn
from repmatch.store.catalog import NAME


@pytest.mark.parametrize(
    "name", ["run:1", "md:x", "sqlite:x", "duckdb:x", "a*b", "a b", "it's", "a#b", "a%20b", "[x]", "über", "-x", "a;b"]
)
def test_any_name_is_a_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store, _ = filled(Path(name))
    assert len(store.ids("d")) == 6
    assert store.sql("SELECT count(*) AS n FROM instances")["n"].to_list() == [6]
    assert store.verify() == []
    other = stores.open("other:2")
    other.merge([name])
    assert other.ids("d") == store.ids("d")
    assert {path.name for path in tmp_path.iterdir()} == {name, "other:2"}


def test_a_tilde_is_the_home_folder_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    with stores.open("~/st", mode="w") as store:
        assert store.path == home / "st"
    assert list(here.iterdir()) == []
    filled(here / "~")  # a folder of that name by its whole path
    assert {path.name for path in home.iterdir()} == {"st"}
    assert (here / "~" / NAME).exists()


@pytest.mark.parametrize(
    ("name", "message"), [("", "empty"), ("\udcff", "not UTF-8"), ("a?b", "a question mark"), ("a\\b", "a backslash")]
)
def test_names_that_duckdb_would_cut_are_refused(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        stores.open(name)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_too_long_is_told(tmp_path: Path) -> None:
    for mode in ("r", "w", None):
        with pytest.raises(UsageError, match="too long"):
            stores.open(tmp_path / ("x" * 300), mode=mode)


def test_a_file_of_another_kind_loads_no_extension(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s")
    store.close()
    (tmp_path / "s" / NAME).write_bytes(b"SQLite format 3\0" + bytes(4096))
    for mode in ("r", "w"):
        with pytest.raises(StoreCorruptError) as caught, stores.open(tmp_path / "s", mode=mode) as opened:
            opened.ids("d")
        assert "extension" not in str(caught.value).lower()
    with stores.open(tmp_path / "s") as opened:
        done = opened.repair()
    assert done.left == ()
    assert len(stores.open(tmp_path / "s").ids("d")) == 6


CREATE = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
from repmatch import store as stores
from repmatch.errors import RepMatchError
try:
    with stores.open(sys.argv[1], mode="w"):
        print("made")
except RepMatchError as error:
    print(error)
"""


@pytest.mark.parametrize("size", [4 << 10, 30 << 10, 100 << 10, 300 << 10, 500 << 10])
def test_a_store_that_a_full_disk_kept_from_being_made_is_made_later(size: int, tmp_path: Path) -> None:
    path = tmp_path / "s"
    command = [sys.executable, "-c", CREATE, str(path), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(("made", "cannot write"))
    with stores.open(path, mode="w") as store:
        prepare(store, make_space())
        assert store.verify() == []


def test_nothing_is_cut_on_the_catalogs_word_alone(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s")
    store.close()
    segment = tmp_path / "s" / "segments" / "000001.bin"
    before = segment.read_bytes()
    with duckdb.connect(str(tmp_path / "s" / NAME)) as conn:
        conn.execute("UPDATE registry.segments SET row_bytes = 100")
    with pytest.raises(StoreCorruptError, match="whose own header says"), stores.open(tmp_path / "s", mode="w"):
        pass
    assert segment.read_bytes() == before
    with stores.open(tmp_path / "s") as opened:
        assert opened.repair().left == ()  # the header is right: the rows' checksums say so
        assert len(opened.factors("d").ids) == 6
        assert opened.factors("d").flat is not None


def _meta(path: Path, statement: str) -> None:
    with duckdb.connect(str(path / NAME)) as conn:
        conn.execute(statement)


def _as_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


ODD: dict[str, Any] = {
    "uuid is gone": lambda s: _meta(s, "DELETE FROM registry.meta WHERE key = 'uuid'"),
    "created is gone": lambda s: _meta(s, "DELETE FROM registry.meta WHERE key = 'created'"),
    "a schema below one": lambda s: _meta(s, "UPDATE registry.meta SET value = '-5' WHERE key = 'schema'"),
    "segments is a file": lambda s: ((s / "segments").rename(s / "old"), (s / "segments").write_text("")),
    "a segment is a folder": lambda s: _as_folder(s / "segments" / "000001.bin"),
    "a journal is a folder": lambda s: _as_folder(s / "segments" / "000001.journal"),
    "a catalog is a folder": lambda s: _as_folder(s / NAME),
    "an adapter is a folder": lambda s: _as_folder(s / "adapters" / "z.safetensors"),
    "a half-written adapter is a folder": lambda s: _as_folder(s / "adapters" / "y.tmp"),
}


@pytest.mark.parametrize("damage", ODD)
def test_odd_damage_is_told_and_no_defect(damage: str, tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s")
    store.close()
    ODD[damage](tmp_path / "s")
    for use in (
        lambda opened: opened.info(),
        lambda opened: opened.verify(),
        lambda opened: opened.delete("d", ids=["r0"]),
        lambda opened: opened.compact(),
        lambda opened: opened.repair(),
        lambda opened: opened.ids("d"),
    ):
        try:
            with stores.open(tmp_path / "s") as opened:
                use(opened)
        except RepMatchError as error:
            assert re.search(r"backup|repair|elsewhere|Name another", str(error)), error


def test_a_file_with_an_odd_number_is_left_alone(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s")
    (tmp_path / "s" / "segments" / "².bin").write_bytes(b"x")
    with store.writing():
        pass
    assert store.repair().left == ()
    assert len(store.ids("d")) == 6
    assert (tmp_path / "s" / "segments" / "².bin").exists()


def test_rows_that_nothing_names_any_more_are_counted(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s", 6, 3)
    store.close()
    journal = tmp_path / "s" / "segments" / "000001.journal"
    journal.write_bytes(journal.read_bytes()[:-5])
    (tmp_path / "s" / NAME).unlink()
    (tmp_path / "s" / "store.lock").unlink()  # a copy of a store may lack it
    with pytest.raises(StoreCorruptError, match="repmatch repair"):
        stores.open(tmp_path / "s", mode="r")
    with stores.open(tmp_path / "s") as opened:
        done = opened.repair()
    assert done.factors == 3
    assert any("3 of its 6 rows are named by no journal" in str(finding) for finding in done.findings)
    assert len(stores.open(tmp_path / "s").ids("d")) == 3
    assert any((tmp_path / "s" / "segments").glob("*.damaged"))


def test_journals_alone_are_no_store(tmp_path: Path) -> None:
    store, _ = filled(tmp_path / "s")
    store.close()
    (tmp_path / "s" / NAME).unlink()
    (tmp_path / "s" / "segments" / "000001.bin").unlink()
    with pytest.raises(StoreError, match="only journals are left"), stores.open(tmp_path / "s") as opened:
        opened.repair()
    with pytest.raises(StoreNotFoundError):
        stores.open(tmp_path / "s", mode="r")


def test_sql_of_a_user_ends_for_a_writer_that_has_waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = filled(tmp_path / "s")
    monkeypatch.setattr(turn, "GIVES_WAY_AFTER", 1.0)
    code = (
        "import sys, time\nfrom repmatch import store as stores\n"
        "with stores.open(sys.argv[1]) as store:\n    time.sleep(1)\n"
        "    store.delete('d', ids=['r0'])\n    print('deleted')\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "s")], stdout=subprocess.PIPE) as writer:
        with pytest.raises(StoreError, match="another process had waited"):
            store.sql("SELECT sum(hash(range)) FROM range(2_000_000_000_000)")
        assert writer.communicate()[0] == b"deleted\n"
    assert len(store.ids("d")) == 5
