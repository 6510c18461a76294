from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Run, toy_rows

import repmatch
from repmatch.curator.report.gather import short_names


def test_inspect_explains_one_instance(run: Run, toy_store: Path) -> None:
    asked = ("--store", toy_store)
    run(*asked, "score", "toy", "--epochs", 1)
    run(*asked, "score", "toy", "--where", "label = 'no'", "--epochs", 1)
    run(*asked, "select", "toy", "-k", 6, "--name", "core")
    (found,) = run(*asked, "inspect", "toy", "toy-4", "-k", 3, "--json").objects
    row = toy_rows()[4]
    assert found["row"] == row
    assert (found["place"], found["label"]) == ([5, 60], row["label"])
    scores = found["scores"]
    assert isinstance(scores, dict)
    assert set(scores) == {"toy", "toy[label = 'no']"}
    listed = {r["id"]: r["score"] for r in run(*asked, "score", "toy", "--epochs", 1, "--json").objects}
    assert scores["toy"]["score"] == pytest.approx(listed["toy-4"])
    assert np.mean(scores["toy"]["layers"]) == pytest.approx(scores["toy"]["score"], abs=1e-6)
    for option, name in (((), "nearest"), (("--signed",), "signed")):
        near = run(*asked, "nearest", "toy", "toy-4", "-k", 3, "--json", *option).objects
        shown = found[name]
        assert isinstance(shown, list)
        assert [n["id"] for n in shown] == [n["id"] for n in near]
    opposed = found["opposed"]
    assert isinstance(opposed, list)
    everyone = run(*asked, "nearest", "toy", "toy-4", "-k", 59, "--signed", "--json").objects
    assert [o["id"] for o in opposed] == [n["id"] for n in everyone[::-1][:3]]
    assert opposed[0]["score"] == pytest.approx(everyone[-1]["score"], abs=1e-5)
    with repmatch.open(toy_store, mode="r") as store:
        core = store.coreset("core")
    (stand_in,) = found["stand_ins"]  # type: ignore[misc]
    at = core.all_ids.index("toy-4")
    assert stand_in["pick"] == core.ids[int(core.representative[at])]
    assert found["adapters"] == ["toy"] if row["label"] == "yes" else ["toy", "toy[label = 'no']"]
    runs = found["runs"]
    assert isinstance(runs, list)
    assert {r["command"] for r in runs} >= {"ingest", "select"}
    text = run(*asked, "inspect", "toy", "toy-4").out
    for part in (
        "toy-4, instance 5 of 60",
        str(row["text"]),
        "coreset core: ",
        "most opposed by cosine",
        "run 1: ingest",
    ):
        assert part in text
    (picked,) = run(*asked, "inspect", "toy", core.ids[0], "--json").objects
    (own,) = picked["stand_ins"]  # type: ignore[misc]
    assert (own["rank"], own["represents"]) == (1, int((core.representative == 0).sum()))


def test_inspect_of_what_is_not_there(run: Run, toy_store: Path) -> None:
    result = run("--store", toy_store, "inspect", "toy", "toy-999")
    assert (result.code, "there is no instance 'toy-999'" in result.err) == (1, True)


def test_inspect_takes_any_id(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    rows = toy_rows(4)
    rows[1]["id"] = "it's; DROP TABLE x --"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ("--store", tmp_path / "store")
    run(*asked, "ingest", tmp_path / "rows.jsonl", "--dataset", "d", "--model", tiny_model)
    (found,) = run(*asked, "inspect", "d", rows[1]["id"], "--json").objects
    assert found["id"] == rows[1]["id"]


def test_names_of_matrices_are_short() -> None:
    names = [f"bert.encoder.layer.{i}.attention.self.{kind}" for i in (0, 1) for kind in ("query", "value")]
    assert short_names(names) == ["0 query", "0 value", "1 query", "1 value"]
    assert short_names(["a.b"]) == ["a.b"]
    assert short_names(["a.b", "a.b.c"]) == ["a.b", "a.b.c"]


def test_sql_prints_rows_and_cannot_write(run: Run, toy_store: Path, tmp_path: Path) -> None:
    asked = ("--store", toy_store, "sql")
    query = "SELECT label, count(*) AS n FROM instances GROUP BY label ORDER BY label"
    assert run(*asked, query, "--json").objects == [{"label": "no", "n": 30}, {"label": "yes", "n": 30}]
    assert run(*asked, query).out.splitlines() == ["label   n", "no     30", "yes    30"]
    assert run(*asked, query, "--csv").out == "label,n\nno,30\nyes,30\n"
    cut = run(*asked, "SELECT id FROM instances ORDER BY position", "--limit", 2)
    assert cut.out.splitlines() == ["id", "toy-0", "toy-1"]
    assert "the first 2 of 60 rows" in cut.err
    for bad in ("DELETE FROM instances", "SELECT 1; SELECT 2", "SELECT * FROM read_csv('/etc/passwd')", "SELEC"):
        result = run(*asked, bad)
        assert (result.code, result.out) == (2, "")
    assert run(*asked).code == 2


def test_sql_values_of_every_kind_are_json(run: Run, toy_store: Path) -> None:
    query = "SELECT created, columns, 'nan'::DOUBLE AS n, [1.5, 2] AS l, {'a': 1} AS s, NULL AS z FROM datasets"
    (row,) = run("--store", toy_store, "sql", query, "--json").objects
    assert row["n"] is None and row["z"] is None
    assert (row["l"], row["s"]) == ([1.5, 2.0], {"a": 1})
    assert str(row["created"]).startswith("20")


def test_sql_lists_the_views(run: Run, toy_store: Path) -> None:
    views = {str(row["view"]): row["columns"] for row in run("--store", toy_store, "sql", "--views", "--json").objects}
    assert {"instances", "scores", "coresets", "runs"} <= set(views)
    columns = views["instances"]
    assert isinstance(columns, dict)
    assert {"dataset", "id", "label", "text", "loss", "tokens"} <= set(columns)
    help_text = run("sql", "--help").out
    for view in views:
        assert view in help_text
