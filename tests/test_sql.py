from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import duckdb
import pytest
from conftest import Run

import repmatch
from repmatch.errors import UsageError
from repmatch.output import Output
from repmatch.store.values import distinct_names

SIGNS = set("\x1b\x07\x9b\u202e\r")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def sql(store: Path, query: str) -> dict[str, object]:
    """The first row that DuckDB alone gives, each value as its text."""
    with duckdb.connect(str(store / "catalog.duckdb"), read_only=True) as conn:
        found = conn.sql(query)
        texts = found.project(", ".join(f"#{i}::VARCHAR" for i in range(1, len(found.columns) + 1)))
        return dict(zip(found.columns, texts.fetchall()[0], strict=True))


def reject(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_columns_of_one_name_are_told_apart_in_every_form(run: Run, toy_store: Path) -> None:
    assert run("--store", toy_store, "select", "toy", "-k", 2, "--strategy", "random", "--name", "c").code == 0
    query = "SELECT * FROM picks p JOIN instances i USING (id)"
    first = run("--store", toy_store, "sql", query, "--json").objects[0]
    assert (first["dataset"], first["dataset_1"]) == ("toy", "toy")
    head = run("--store", toy_store, "sql", query, "--csv").out.splitlines()[0].split(",")
    assert head[:6] == ["coreset", "dataset", "rank", "id", "gain", "dataset_1"]
    assert run("--store", toy_store, "sql", query).out.split()[5] == "dataset_1"
    with repmatch.open(toy_store, mode="r") as store:
        assert store.sql(query).columns == head == store.arrow(query).column_names


@pytest.mark.parametrize("names", ["x x x_1 x", "x_1 x x", "x X x", "a b", "x x x_1 x_1 x"])
def test_names_are_those_of_duckdbs_own_client(names: str) -> None:
    listed = names.split()
    query = "SELECT " + ", ".join(f'{i} AS "{name}"' for i, name in enumerate(listed))
    assert distinct_names(listed) == list(duckdb.sql(query).fetchnumpy())


def test_every_type_is_printed_in_every_form(run: Run, toy_store: Path) -> None:
    query = "SELECT * FROM test_all_types()"
    plain = run("--store", toy_store, "sql", query, "--json")
    assert (plain.code, plain.err) == (0, "")
    rows = [json.loads(line, parse_constant=reject) for line in plain.out.splitlines()]
    with duckdb.connect() as conn:
        found = conn.sql(query)
        texts = found.project(", ".join(f"#{i}::VARCHAR" for i in range(1, len(found.columns) + 1))).fetchall()
        kinds = dict(zip(found.columns, found.types, strict=True))
    assert len(rows) == len(texts) == 3
    held = ("boolean", "float", "double", "decimal", "list", "array", "struct", "tuple", "map")
    for row, text in zip(rows, texts, strict=True):
        for (name, value), expected in zip(row.items(), text, strict=True):
            if value is None or expected is None:
                assert value is expected, name
            elif kinds[name].id not in held:
                assert str(value) == expected, name
    high = rows[1]
    assert high["hugeint"] == 2**127 - 1
    assert (high["dec_4_1"], high["double_array"]) == (999.9, [42, None, "inf", "-inf", None, -42])
    assert high["date_array"] == ["1970-01-01", "infinity", "-infinity", None, "2022-05-12"]
    assert high["map"] == {"key1": "🦆🦆🦆🦆🦆🦆", "key2": "goose"}
    table = run("--store", toy_store, "sql", query)
    assert (table.code, table.err, len(table.out.splitlines())) == (0, "", 4)
    written = run("--store", toy_store, "sql", query, "--csv")
    assert (written.code, written.err) == (0, "")
    again = list(csv.reader(io.StringIO(written.out)))
    assert again[0] == list(kinds)
    assert dict(zip(again[0], again[2], strict=True))["interval"] == "83 years 3 months 999 days 00:16:39.999999"


VALUES = [
    "DATE 'infinity'",
    "'infinity'::TIMESTAMP",
    "'-infinity'::TIMESTAMPTZ",
    "DATE '294247-01-01'",
    "DATE '-5000-01-01'",
    "TIME '24:00:00'",
    "INTERVAL 1 DAY",
    "union_value(n := 1)",
    "'101'::BIT",
    "'\\x00a'::BLOB",
    "340282366920938463463374607431768211455::UHUGEINT",
]


@pytest.mark.parametrize("value", VALUES)
def test_what_json_has_no_type_for_is_duckdbs_text(run: Run, toy_store: Path, value: str) -> None:
    query = f"SELECT {value} AS v, [{value}] AS l, {{'a': {value}}} AS s, map {{{value}: {value}}} AS m"
    text = sql(toy_store, f"SELECT {value} AS v")["v"]
    result = run("--store", toy_store, "sql", query, "--json")
    assert (result.code, result.err) == (0, "")
    assert result.objects == [{"v": text, "l": [text], "s": {"a": text}, "m": {text: text}}]
    assert str(text) in run("--store", toy_store, "sql", query).out
    assert run("--store", toy_store, "sql", f"SELECT {value} AS v", "--csv").out.splitlines()[1].strip('"') == text


def test_numbers_that_are_none_and_keys_that_are_no_texts_are_json(run: Run, toy_store: Path) -> None:
    query = (
        "SELECT {'a': 'infinity'::DOUBLE} AS a, '-infinity'::FLOAT AS b, 'nan'::DOUBLE AS c, map {1: 2} AS d, "
        "map {[1]: {'x': INTERVAL 1 DAY}} AS e, row(1, DATE 'infinity') AS f, sum(1) AS g, 0::DECIMAL(38, 10) AS h"
    )
    (row,) = run("--store", toy_store, "sql", query, "--json").objects
    assert row == {
        **{"a": {"a": "inf"}, "b": "-inf", "c": None, "d": {"1": 2}, "e": {"[1]": {"x": "1 day"}}},
        **{"f": {"element1": 1, "element2": "infinity"}, "g": 1, "h": 0.0},
    }
    assert "0.0000000000" in run("--store", toy_store, "sql", query).out


def test_an_order_and_parameters_outlive_the_casts(toy_store: Path) -> None:
    with repmatch.open(toy_store, mode="r") as store:
        query = "SELECT range AS a, now() AS b, INTERVAL 1 DAY AS c, ? AS d FROM range(300000) ORDER BY a DESC"
        found = store.arrow(query, ["x"], plain=True)
        assert found.column("a").to_pylist() == list(range(299_999, -1, -1))
        assert found.column("d")[0].as_py() == "x"
        assert store.sql(query, ["x"])["a"].to_list() == list(range(299_999, -1, -1))


def test_in_python_what_polars_has_no_type_for_is_text_and_what_it_cannot_hold_is_named(toy_store: Path) -> None:
    with repmatch.open(toy_store, mode="r") as store:
        found = store.sql(
            "SELECT INTERVAL 2 DAY AS a, [union_value(n := 1)] AS b, DATE '2020-01-02' AS c, map {[1]: 2} d"
        )
        assert [str(v) for v in found.row(0)] == ["2 days", "['1']", "2020-01-02", "{'[1]': 2}"]
        for value in ("DATE 'infinity'", "DATE '-5000-01-01'", "'infinity'::TIMESTAMPTZ", "TIME '24:00:00'"):
            text = sql(toy_store, f"SELECT {value} AS v")["v"]
            for query in (f"SELECT {value} AS v", f"SELECT [{{'a': {value}}}] AS v", f"SELECT map {{1: {value}}} AS v"):
                with pytest.raises(UsageError, match="column 'v' holds") as caught:
                    store.sql(query)
                assert f"holds {text}, " in str(caught.value)
                assert "::VARCHAR" in str(caught.value)
        with pytest.raises(UsageError, match=str(2**127 - 1)):
            store.sql(f"SELECT {2**127 - 1}::HUGEINT AS v")
        edge = store.sql(
            "SELECT DATE '9999-12-31' AS a, DATE '0001-01-01' AS b, TIMESTAMP '9999-12-31 23:59:59.999999' c"
        )
        assert [str(v) for v in edge.row(0)] == ["9999-12-31", "0001-01-01", "9999-12-31 23:59:59.999999"]


def test_a_store_with_times_that_are_none_is_shown_or_refused_by_name(
    run: Run, toy_store: Path, tmp_path: Path
) -> None:
    assert run("--store", toy_store, "select", "toy", "-k", 2, "--strategy", "random", "--name", "c").code == 0
    with duckdb.connect(str(toy_store / "catalog.duckdb")) as conn:
        conn.execute("UPDATE registry.coresets SET created = '294247-01-01'")
        conn.execute("UPDATE registry.datasets SET created = '-infinity'")
        conn.execute("UPDATE registry.runs SET started = 'infinity'")
    assert "toy" in run("--store", toy_store, "info").out
    shown = run("--store", toy_store, "inspect", "toy", "toy-1")
    assert (shown.code, "error" in shown.err) == (0, False)
    assert "run 1: ingest, infinity, ok" in shown.out
    report = run("--store", toy_store, "report", "toy", "-o", tmp_path / "report.html")
    assert report.code == 1
    assert "the record of a run cannot be right: column 'started' holds infinity" in report.err
    assert "defect" not in report.err
    with repmatch.open(toy_store, mode="r") as store:
        assert store.datasets()["created"].to_list() == ["-infinity"]


def test_csv_is_escaped_on_a_terminal_and_exact_elsewhere(
    run: Run, toy_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\x1b[2J\x9b\u202e\r\né"
    query = f"SELECT '{text}' AS a, 1 AS b"
    assert list(csv.reader(io.StringIO(run("--store", toy_store, "sql", query, "--csv").out, newline=""))) == [
        ["a", "b"],
        [text, "1"],
    ]
    seen = Terminal()
    monkeypatch.setattr("sys.stdout", seen)
    run("--store", toy_store, "sql", query, "--csv")
    assert not SIGNS & set(seen.getvalue()), repr(seen.getvalue())
    assert "\\u001b[2J\\u009b\\u202e\\u000d\né" in seen.getvalue()


def test_raw_lines_of_json_stay_json_on_a_terminal() -> None:
    value = {"text": "\x9b2J\u202e\x7f\té"}
    out = Terminal()
    Output(out=out).raw(json.dumps(value, ensure_ascii=False))
    assert json.loads(out.getvalue()) == value
    assert not SIGNS & set(out.getvalue())


def test_a_panic_of_polars_is_no_traceback(run: Run, toy_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from polars.exceptions import PanicException

    def panic(*_: object, **__: object) -> None:
        raise PanicException("out-of-range date")

    assert not issubclass(PanicException, Exception)
    monkeypatch.setattr("repmatch.store.Store.arrow", panic)
    result = run("--store", toy_store, "sql", "SELECT 1")
    assert (result.code, result.out) == (1, "")
    assert "PanicException: out-of-range date" in result.err
    assert "Traceback" not in result.err
