"""Conditions in SQL, names, columns, queries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from store_worker import filled, make_batch, make_row, make_space, prepare

from repmatch import store as stores
from repmatch.errors import UnknownNameError, UsageError

COLUMNS = {
    "id": "string",
    "text": "string",
    "label": "string",
    "n": "number",
    "ok": "boolean",
    "meta": "json",
    'say "hi"': "string",
    "Label": "string",
    "a/b~c": "number",
    "it's": "string",
    "": "string",
    "select": "number",
    "naïve 🙂": "string",
}


def odd_store(path: Path) -> stores.Store:
    store, space = stores.open(path), make_space(dims=(4,))
    prepare(store, space, columns=COLUMNS)
    rows = [
        make_row("r0", label="a", n=1, ok=True, meta={"k": [1]}, **{'say "hi"': "x", "Label": "big", "a/b~c": 2}),
        make_row("r1", label="b", n=2.5, ok=False, **{"it's": "y", "": "blank", "select": 3, "naïve 🙂": "z"}),
        make_row("r2", label="a", n="three", ok=None),
    ]
    store.append("d", space.id, "float32", make_batch(rows, space))
    return store


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> stores.Store:
    return odd_store(tmp_path_factory.mktemp("odd") / "s")


def test_conditions(odd: stores.Store) -> None:
    store = odd
    cases = {
        "label = 'a'": ["r0", "r2"],
        "n > 1": ["r1"],
        "n <= 2.5 AND ok": ["r0"],
        "NOT ok": ["r1"],
        "ok IS NULL": ["r2"],
        "(meta->'k'->>0) = '1'": ["r0"],
        '"say ""hi""" = \'x\'': ["r0"],
        "label_2 = 'big'": ["r0"],
        '"a/b~c" = 2': ["r0"],
        "\"it's\" = 'y'": ["r1"],
        '"select" = 3': ["r1"],
        "\"naïve 🙂\" = 'z'": ["r1"],
        "id IN ('r2', 'r0')": ["r0", "r2"],
        "label = 'a' -- a remark": ["r0", "r2"],
        "label = 'a' OR label = 'b'": ["r0", "r1", "r2"],
        "id IN (SELECT id FROM instances WHERE label = 'b')": ["r1"],
        "false": [],
    }
    for where, expected in cases.items():
        assert store.ids("d", where=where) == expected, where
    assert [row.id for row in store.tasks("d", where="n > 1")] == ["r1"]


@pytest.mark.parametrize(
    "where",
    [
        "",
        "  ",
        "label = ",
        "label = 'a'; DROP TABLE registry.instances",
        "1=1) OR (1=1",
        "1=1) UNION SELECT (1",
        "label = 'a' FROM rows",
        "true LIMIT 1",
        "true, false",
        "true AS x",
        "nothing = 1",
        "label",
        "? = 1",
        "$1",
        "count(*) > 1",
        "(SELECT count(*) FROM read_text('/etc/hostname')) > 0",
        "(SELECT count(*) FROM '/etc/hostname') > 0",
        "true\0) --",
        "/* true",
        "(",
    ],
)
def test_what_is_no_condition_is_refused(odd: stores.Store, where: str) -> None:
    store = odd
    with pytest.raises(UsageError, match="Columns: id, label, text, n"):
        store.ids("d", where=where)
    assert len(store.ids("d")) == 3


def test_conditions_see_one_dataset(tmp_path: Path) -> None:
    store, space = filled(tmp_path / "s")
    prepare(store, space, name="e")
    store.append("e", space.id, "float32", make_batch([make_row("other")], space))
    assert store.ids("e", where="true OR true") == ["other"]
    assert len(store.ids("d", where="true")) == 6


def test_columns(odd: stores.Store) -> None:
    store = odd
    assert store.column("d", "label") == ["a", "b", "a"]
    assert store.column("d", "id") == ["r0", "r1", "r2"]
    assert store.column("d", "n") == ["1", "2.5", "three"]
    assert store.column("d", "ok") == ["true", "false", None]
    assert store.column("d", 'say "hi"') == ["x", None, None]
    assert store.column("d", "it's") == [None, "y", None]
    assert json.loads(store.column("d", "meta")[0] or "") == {"k": [1]}
    with pytest.raises(UnknownNameError, match="did you mean 'text'"):
        store.column("d", "txt")


def test_a_row_that_duckdb_cannot_parse_is_null_there(tmp_path: Path) -> None:
    store, space = stores.open(tmp_path / "s"), make_space(dims=(4,))
    prepare(store, space)
    good, odd = make_row("r0", n=1), make_row("r1", n=1)
    odd = type(odd)(*[getattr(odd, f) if f != "json" else '{"n":1,"x":"\\ud800"}' for f in odd.__dataclass_fields__])
    store.append("d", space.id, "float32", make_batch([good, odd], space))
    assert store.ids("d", where="n = 1") == ["r0"]
    assert dict(store.rows("d"))["r1"] == '{"n":1,"x":"\\ud800"}'


def test_names(tmp_path: Path) -> None:
    store, space = filled(tmp_path / "s")
    store.save_subset("first", "d", ["r1", "r0"])
    assert store.resolve("d") == stores.Subset("d", "d")
    assert store.resolve("first") == stores.Subset("first", "d", None, ("r1", "r0"))
    assert store.resolve("d[label = 'x[1]']") == stores.Subset("d[label = 'x[1]']", "d", "label = 'x[1]'")
    store.save_subset("first", "d", ["r2"])
    assert store.resolve("first").ids == ("r2",)
    assert store.subsets().drop("created").rows() == [("first", "d", 1)]
    with pytest.raises(UnknownNameError, match="did you mean 'first'"):
        store.resolve("fisrt")
    with pytest.raises(UnknownNameError, match="'e'"):
        store.resolve("e[true]")
    with pytest.raises(UsageError, match="'d' is a dataset already"):
        store.save_subset("d", "d", [])
    with pytest.raises(UsageError, match="'first' is a subset already"):
        prepare(store, space, name="first")
    for bad in ("", " x", "a[b]", "a\nb", "\ud800"):
        with pytest.raises(UsageError, match="cannot name"):
            store.save_subset(bad, "d", [])
    with pytest.raises(UnknownNameError, match="the nearest are 'r1'"):
        store.save_subset("more", "d", ["r11"])
    with pytest.raises(UnknownNameError, match="no dataset 'f'"):
        store.dataset("f")


def test_sql_reads_the_documented_views(tmp_path: Path) -> None:
    store, space = filled(tmp_path / "s")
    for view in ["instances", "datasets", "spaces", "scores", "coresets", "picks", "runs", "adapters", "quarantine"]:
        assert store.sql(f"SELECT * FROM {view}").width > 1
    frame = store.sql("SELECT id, n, tokens, truncated FROM (SELECT *, json->>'n' AS n FROM instances) WHERE n = '4'")
    assert frame.rows() == [("r4", "4", 7, False)]
    assert store.sql("SELECT id FROM spaces")["id"].to_list() == [space.id]


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM registry.instances",
        "SELECT 1; SELECT 2",
        "COPY registry.instances TO '/tmp/x.csv'",
        "SELECT * FROM read_csv('/etc/passwd')",
        "ATTACH '/tmp/x.duckdb'",
        "SET enable_external_access = true",
        "PRAGMA version",
        "SELECT * FROM nowhere",
        "SELEC 1",
        "",
    ],
)
def test_sql_refuses_everything_else(odd: stores.Store, query: str) -> None:
    with pytest.raises(UsageError):
        odd.sql(query)
    assert odd.ids("d") == ["r0", "r1", "r2"]
