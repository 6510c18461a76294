from __future__ import annotations

import json
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pytest
from conftest import Run, toy_rows

import repmatch
from repmatch.errors import RepMatchError


def as_frame(kind: str, rows: list[dict[str, object]]) -> Any:
    if kind == "polars":
        return pl.DataFrame(rows)
    if kind == "arrow":
        return pa.Table.from_pylist(rows)
    if kind == "reader":
        return pa.Table.from_pylist(rows).to_reader()
    if kind == "pandas":
        pandas = pytest.importorskip("pandas", reason="pandas is not installed")
        return pandas.DataFrame(rows).set_index("stars", drop=False).drop(columns=["x"])
    datasets = pytest.importorskip("datasets", reason="datasets is not installed (extra 'hub')")
    numbered = [row | {"label": ["no", "yes"].index(str(row["label"]))} for row in rows]
    return datasets.Dataset.from_list(numbered).cast_column("label", datasets.ClassLabel(names=["no", "yes"]))


@pytest.mark.parametrize("kind", ["polars", "arrow", "reader", "pandas", "datasets"])
def test_a_frame_is_ingested_as_its_rows_are(toy_store: Path, tiny_model: Path, kind: str) -> None:
    rows = toy_rows(60)
    with repmatch.open(toy_store) as store:
        curator = repmatch.Curator(store, str(tiny_model))
        assert curator.ingest(as_frame(kind, rows), "again").new == 60
        frame = curator.frame("again")
        assert frame["id"].to_list() == [row["id"] for row in rows]
        assert frame["label"].to_list() == [row["label"] for row in rows]
        assert frame["stars"].to_list() == [row["stars"] for row in rows]
        assert set(frame.columns) <= set(rows[0])  # no index column
        near = [curator.nearest(name, "toy-4", k=5).ids for name in ("toy", "again")]
        assert near[0] == near[1]
        assert curator.ingest(as_frame(kind, rows), "again").unchanged == 60


def test_frames_that_are_none(toy_store: Path) -> None:
    with repmatch.open(toy_store) as store:
        with pytest.raises(RepMatchError, match="no rows"):
            repmatch.Curator(store).ingest(pl.DataFrame({"text": []}).clear(), "empty")
        datasets = pytest.importorskip("datasets", reason="datasets is not installed (extra 'hub')")
        splits = datasets.DatasetDict({"train": as_frame("datasets", toy_rows(4))})
        with pytest.raises(RepMatchError, match="several splits"):
            repmatch.Curator(store).ingest(splits, "splits")


def test_rows_come_out_as_frames(toy_store: Path) -> None:
    with repmatch.open(toy_store) as store:
        curator = repmatch.Curator(store)
        core = curator.select("toy", 5, name="core")
        frame = curator.frame("core", with_scores=True)
        assert frame["id"].to_list() == list(core.ids)
        assert [extra["rank"] for extra in frame["repmatch"]] == [1, 2, 3, 4, 5]
        assert duckdb.sql("SELECT count(*) FROM frame").fetchall() == [(5,)]
        pytest.importorskip("datasets", reason="datasets is not installed (extra 'hub')")
        out = curator.to_dataset("core")
        assert out["id"][:] == list(core.ids)
        assert out.column_names == frame.columns[:-1]


def test_results_are_tables(toy_store: Path) -> None:
    with repmatch.open(toy_store) as store:
        curator = repmatch.Curator(store)
        near = curator.nearest("toy", "toy-4", k=3)
        assert pa.table(near).column("id").to_pylist() == list(near.ids)
        assert near.to_arrow().num_rows == 3
        core = curator.select("toy", 5, name="core")
        assert pl.DataFrame(core)["id"].to_list() == list(core.ids)
        pandas = pytest.importorskip("pandas", reason="pandas is not installed")
        assert isinstance(near.to_pandas(), pandas.DataFrame)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)


def test_notebooks_show_tables_and_texts_are_escaped(tmp_path: Path, tiny_model: Path) -> None:
    rows = toy_rows(20)
    for row in rows:
        row["id"] = f"{row['id']}<script>alert(1)</script>"
    with repmatch.open(tmp_path / "store") as store:
        curator = repmatch.Curator(store, str(tiny_model))
        curator.ingest(pl.DataFrame(rows), "toy")
        results = [
            curator.score("toy"),
            curator.compare("toy", "toy[label = 'no']"),
            curator.nearest("toy", str(rows[0]["id"])),
            curator.select("toy", 3, name="core"),
            store,
        ]
        for result in results:
            seen = Tags()
            seen.feed(result._repr_html_())
            assert "table" in seen.tags
            assert not seen.tags - {"p", "b", "code", "table", "thead", "tbody", "tr", "th", "td"}
        assert "the first 12 of 20 rows" in results[0]._repr_html_()


def test_a_card_says_how_the_rows_were_chosen(run: Run, toy_store: Path, tmp_path: Path) -> None:
    run("--store", toy_store, "select", "toy", "-k", 6, "--balance", "group", "--name", "core")
    target = tmp_path / "out" / "core.jsonl"
    target.parent.mkdir()
    asked = ("--store", toy_store, "export", "core", "-o", target, "--card")
    tried = run(*asked, "--dry-run")
    assert (tried.code, "6 rows would be written" in tried.err) == (0, True)
    assert not list(target.parent.iterdir())
    assert run(*asked).code == 0
    card = (target.parent / "README.md").read_text()
    head = card.split("---")[1]
    import yaml

    about = yaml.safe_load(head)
    assert about["configs"][0]["data_files"] == "core.jsonl"
    assert about["size_categories"] == ["n<1K"]
    assert "6 of the 60 instances of toy" in card
    (command,) = [line[2:] for line in card.splitlines() if line.startswith("$ repmatch select ")]
    chosen = json.loads(target.with_name("core.jsonl.manifest.json").read_text())["selection"]
    assert command == chosen["command"]
    again = run("--store", toy_store, *shlex.split(command)[1:], "--replace", "--json")
    assert [row["id"] for row in again.objects] == [json.loads(line)["id"] for line in target.read_text().splitlines()]
    labels = [json.loads(line)["label"] for line in target.read_text().splitlines()]
    assert f"| no | {labels.count('no')} | 30 |" in card
    assert run(*asked).code == 0  # its own card may be replaced
    (target.parent / "README.md").write_text("# Mine\n")
    refused = run(*asked)
    assert (refused.code, "is no card of repmatch" in refused.err) == (2, True)
    assert (target.parent / "README.md").read_text() == "# Mine\n"
    assert run("--store", toy_store, "export", "core", "--card").code == 2
