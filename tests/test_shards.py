from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run, toy_rows, write_rows
from hypothesis import given
from hypothesis import strategies as st
from store_worker import make_batch, make_row, make_rows, make_space, prepare

import repmatch
from repmatch import store as stores
from repmatch.curator import windows
from repmatch.curator.ingest import IngestReport
from repmatch.curator.shards import Shard, divide
from repmatch.curator.tasks import Example
from repmatch.errors import SpaceMismatchError, UsageError
from repmatch.store import union

WINDOW = 10
OF = 3


@pytest.fixture(autouse=True, scope="module")
def small_windows() -> Iterator[None]:
    before, windows._WINDOW_ROWS = windows._WINDOW_ROWS, (WINDOW, WINDOW)
    yield
    windows._WINDOW_ROWS = before


@pytest.fixture(scope="module")
def messy_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty rows, one of them twice, and three bad ones: two without text, one with the id of another."""
    rows = toy_rows(50)
    rows.insert(0, {"id": "textless", "label": "no"})
    rows.insert(20, dict(rows[3]))
    rows.insert(30, {**rows[5], "text": "quite another text"})
    rows.append({"id": "last", "label": "no"})
    return write_rows(tmp_path_factory.mktemp("messy") / "messy.jsonl", rows)


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, messy_file: Path
) -> tuple[Path, dict[str, IngestReport]]:
    """A folder with the store "whole" and its shards "1" to "3", and what each ingest reported."""
    folder = tmp_path_factory.mktemp("made-shards")
    reports = {"whole": curator(folder / "whole", tiny_model, rank=2).ingest(messy_file, "toy")}
    for i in range(1, OF + 1):
        part = curator(folder / str(i), tiny_model, rank=2)
        reports[str(i)] = part.ingest(messy_file, "toy", shard=f"{i}/{OF}")
    return folder, reports


def curator(path: Path, model: Path, **settings: Any) -> repmatch.Curator:
    return repmatch.Curator(repmatch.open(path), settings=repmatch.Settings(model=str(model), **settings))


def content(path: Path, name: str = "toy") -> dict[str, Any]:
    """Everything that a dataset is, in its order."""
    with repmatch.open(path, mode="r") as store:
        assert store.verify() == []
        factors = store.factors(name)
        found = store.sql(f"SELECT id, loss, tokens, truncated FROM instances WHERE dataset = '{name}' ORDER BY id")
        aside = store.sql("SELECT source, line, id, reason FROM quarantine ORDER BY ALL")
        return {
            "ids": store.ids(name),
            "factor ids": factors.ids,
            "bytes": np.asarray(factors.flat if factors.bits is None else factors.bits).tobytes(),
            "norms": factors.norms.tobytes(),
            "rows": list(store.rows(name)),
            "facts": found.rows(),
            "bad": aside.rows(),
            "record": store.dataset(name),
        }


def test_shards_merged_are_what_one_process_makes(
    tmp_path: Path, made: tuple[Path, dict[str, IngestReport]], tiny_model: Path, messy_file: Path
) -> None:
    folder, reports = made
    parts = [reports[str(i)] for i in (1, 2, 3)]
    assert all(part.computed for part in parts)
    for count in ("rows", "new", "unchanged", "changed", "quarantined", "computed"):
        assert sum(getattr(part, count) for part in parts) == getattr(reports["whole"], count)
    assert reports["whole"].quarantined == 3
    with repmatch.open(tmp_path / "merged") as store:
        # In any order: each shard knows its place.
        done = store.merge([folder / "3", folder / "1", folder / "2"])
        assert (done.taken, done.there, done.rows, done.missing) == (50, 0, {"toy": 50}, {})
        again = store.merge([folder / "3", folder / "1", folder / "2"])
        assert (again.taken, again.there) == (0, 50)
    assert content(tmp_path / "merged") == content(folder / "whole")
    more = curator(tmp_path / "merged", tiny_model, rank=2).ingest(messy_file, "toy")
    assert (more.computed, more.unchanged) == (0, 51)


@pytest.mark.slow
def test_shards_of_sign_codes_merged_are_what_one_process_makes(
    tmp_path: Path, tiny_model: Path, messy_file: Path
) -> None:
    for name, shard in (("whole", None), ("1", "1/4"), ("2", "2/4"), ("3", "3/4"), ("4", "4/4")):
        curator(tmp_path / name, tiny_model).ingest(messy_file, "toy", encoding="sign", shard=shard)
    with repmatch.open(tmp_path / "merged") as store:
        store.merge([tmp_path / name for name in ("1", "2", "3", "4")])
    assert content(tmp_path / "merged") == content(tmp_path / "whole")


def test_a_missing_shard_is_told_and_can_be_taken_in_later(
    tmp_path: Path, made: tuple[Path, dict[str, IngestReport]], run: Run
) -> None:
    folder, _ = made
    out = run("merge", tmp_path / "out", folder / "1", folder / "3", "--json")
    assert out.code == 0
    assert out.objects[0]["missing"] == {"toy": ["2/3"]}
    assert "toy: shards '2/3' are in none of the stores" in out.err
    out = run("merge", tmp_path / "out", folder / "2")
    assert out.err == ""
    assert "toy has 50 rows" in out.out
    merged, whole = content(tmp_path / "out"), content(folder / "whole")
    assert sorted(merged["rows"]) == sorted(whole["rows"])
    assert merged["facts"] == whole["facts"]


def test_an_interrupted_shard_goes_on_with_its_own_rows(
    tmp_path: Path,
    made: tuple[Path, dict[str, IngestReport]],
    tiny_model: Path,
    messy_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, reports = made
    append, calls = stores.Store.append, []

    def broken(self: stores.Store, *given: Any) -> None:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        append(self, *given)

    monkeypatch.setattr(stores.Store, "append", broken)
    with pytest.raises(KeyboardInterrupt):
        curator(tmp_path / "3", tiny_model, rank=2).ingest(messy_file, "toy", shard="3/3")
    with repmatch.open(tmp_path / "out") as store:
        assert store.merge([folder / "1", tmp_path / "3"]).missing == {"toy": ("2/3", "3/3")}
    monkeypatch.setattr(stores.Store, "append", append)
    report = curator(tmp_path / "3", tiny_model, rank=2).ingest(messy_file, "toy", shard="3/3")
    assert report.computed == reports["3"].computed - WINDOW > 0
    with repmatch.open(tmp_path / "all") as store:
        assert store.merge([folder / "1", folder / "2", tmp_path / "3"]).missing == {}
    assert content(tmp_path / "all") == content(folder / "whole")


@pytest.mark.slow
def test_a_killed_merge_goes_on(
    tmp_path: Path, made: tuple[Path, dict[str, IngestReport]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = made
    parts = [folder / str(i) for i in (1, 2, 3)]
    append, calls = stores.Store._append_raw, []

    def broken(self: stores.Store, *given: Any, **more: Any) -> None:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        append(self, *given, **more)

    monkeypatch.setattr(stores.Store, "_append_raw", broken)
    with repmatch.open(tmp_path / "out") as store:
        with pytest.raises(KeyboardInterrupt):
            store.merge(parts)
        there = store.datasets()["rows"].to_list()[0]
        assert 0 < there < 50
        done = store.merge(parts)
        assert (done.there, done.taken) == (there, 50 - there)
    assert content(tmp_path / "out") == content(folder / "whole")


def test_shards_share_one_warm_start(tmp_path: Path, tiny_model: Path, toy_file: Path) -> None:
    def ingest(name: str, shard: str | None) -> IngestReport:
        return curator(tmp_path / name, tiny_model, warm_start="20").ingest(toy_file, "toy", shard=shard)

    ingest("whole", None)
    ingest("1", "1/2")  # trains the start itself: the same rows, whatever the shard
    base = ingest("2", "0/2")  # made ahead, to be copied for each shard: what machines of different kinds need
    assert (base.rows, base.computed) == (0, 0)
    with repmatch.open(tmp_path / "2", mode="r") as store:
        start = store.adapters()["id"].to_list()
    assert ingest("2", "2/2").computed > 0
    with repmatch.open(tmp_path / "out") as store:
        assert store.merge([tmp_path / "1", tmp_path / "2"]).missing == {}
        assert store.adapters()["id"].to_list() == start
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.slow
def test_two_shards_in_one_store_keep_each_others_bad_rows(
    tmp_path: Path, made: tuple[Path, dict[str, IngestReport]], tiny_model: Path, messy_file: Path
) -> None:
    folder, _ = made
    shutil.copytree(folder / "2", tmp_path / "one")
    for i in (1, 3, 1):
        curator(tmp_path / "one", tiny_model, rank=2).ingest(messy_file, "toy", shard=f"{i}/3")
    one, whole = content(tmp_path / "one"), content(folder / "whole")
    assert one["bad"] == whole["bad"]
    assert one["facts"] == whole["facts"]


def test_stores_of_other_spaces_are_refused_with_the_fields_that_differ(
    tmp_path: Path, made: tuple[Path, dict[str, IngestReport]], tiny_model: Path, messy_file: Path, run: Run
) -> None:
    folder, _ = made
    curator(tmp_path / "2", tiny_model, seed=3).ingest(messy_file, "toy", shard="2/3", encoding="float32")
    with repmatch.open(tmp_path / "out") as store, pytest.raises(SpaceMismatchError) as caught:
        store.merge([folder / "1", tmp_path / "2"])
    assert caught.value.differences == {"rank": (2, 1), "seed": (0, 3), "encoding": ("float16", "float32")}
    assert not (tmp_path / "out").exists()
    out = run("merge", tmp_path / "out", folder / "1", tmp_path / "2")
    assert out.code == 1
    assert "rank: 2 against 1; seed: 0 against 3; encoding: 'float16' against 'float32'" in out.err


def test_conflicting_rows_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    space = make_space()
    rows = {"one": make_rows(0, 1, 2), "two": make_rows(3, 4), "three": [make_row("r4", text="other"), *make_rows(9)]}
    for name, some in rows.items():
        store = stores.open(tmp_path / name)
        prepare(store, space)
        store.append("d", space.id, "float32", make_batch(some, space))
    out = stores.open(tmp_path / "out")
    with pytest.raises(UsageError, match=r"1 instances of 'd' have other content in another of .*three: 'r4'"):
        out.merge([tmp_path / name for name in rows])
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="named twice"):
        out.merge([tmp_path / "one", tmp_path / "one"])
    with pytest.raises(UsageError, match="named twice"):
        out.merge([tmp_path / "out"])
    assert out.merge([tmp_path / "one", tmp_path / "two"]).taken == 5
    with pytest.raises(UsageError, match=r"other content"):
        out.merge([tmp_path / "three"])
    assert out.ids("d") == ["r0", "r1", "r2", "r3", "r4"]


def test_columns_that_only_one_store_has_are_kept(tmp_path: Path) -> None:
    space = make_space()
    for name, columns, number in (
        ("one", {"id": "string", "n": "number"}, 0),
        ("two", {"n": "string", "m": "json"}, 1),
    ):
        store = stores.open(tmp_path / name)
        prepare(store, space, columns=columns)
        store.append("d", space.id, "float32", make_batch(make_rows(number), space))
    out = stores.open(tmp_path / "out")
    out.merge([tmp_path / "one", tmp_path / "two"])
    assert dict(out.dataset("d").columns) == {"id": "string", "n": "json", "m": "json"}


def test_shards_are_missing_only_where_no_division_is_complete() -> None:
    def parts(of: int, *numbers: int, source: str = "in") -> list[union._Part]:
        return [union._Part("d", source, number, of, 9) for number in numbers]

    assert union._missing(parts(3, 1, 3)) == {"d": ("2/3",)}
    assert union._missing([*parts(3, 1, 3), *parts(2, 1, 2)]) == {}
    assert union._missing([*parts(3, 1), *parts(2, 1, 2, source="other")]) == {"d": ("2/3", "3/3")}
    other = union._Part("d", "in", 2, 2, 500)
    assert union._missing([*parts(2, 1), other]) == {
        "d": ("2/2 of windows of 9 tokens", "1/2 of windows of 500 tokens")
    }


class Counting:
    """A task whose rows have as many tokens as their text says."""

    def encode(self, rows: Any) -> list[Example]:
        return [Example({}, 0, False, size=int(row.text)) for row in rows]


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=120), of=st.integers(1, 9), tokens=st.integers(1, 400))
def test_stretches_cover_every_row_once_and_end_with_windows(lengths: list[int], of: int, tokens: int) -> None:
    rows = [make_row(f"r{i}", text=str(n)) for i, n in enumerate(lengths)]
    task: Any = Counting()
    found = [divide(iter([rows[:7], rows[7:]]), task, tokens, Shard(i, of)) for i in range(1, of + 1)]
    assert [s.lo for s in found] == [0, *(s.hi for s in found[:-1])]
    assert found[-1].hi == found[-1].total == len(rows)
    cut = [0]
    for some, _ in windows.windows(iter([rows]), task, tokens):
        cut.append(cut[-1] + len(some))
    assert {s.hi for s in found} <= set(cut)
    work = np.cumsum([0, *lengths])
    largest = max(int(work[hi] - work[lo]) for lo, hi in pairwise(cut))
    assert all(work[s.hi] - work[s.lo] <= work[-1] / of + largest for s in found)


@pytest.mark.parametrize("text", ["0/0", "3/2", "1", "a/b", "-1/3", "1/00"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no shard; expected I/N"):
        Shard.parse(text)


def test_windows_computed_together_give_the_bytes_of_one_after_the_other(
    tmp_path: Path,
    made: tuple[Path, dict[str, IngestReport]],
    tiny_model: Path,
    messy_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, _ = made
    group, sizes = windows.grouped, []

    def together(stream: Any, count: int) -> Iterator[Any]:
        cut = list(stream)
        monkeypatch.setattr(windows, "_WINDOW_ROWS", (WINDOW, 25))
        for rows, examples, some in group(iter(cut), 3):
            sizes.append(some)
            yield rows, examples, some
        monkeypatch.setattr(windows, "_WINDOW_ROWS", (WINDOW, WINDOW))

    monkeypatch.setattr("repmatch.curator.work.grouped", together)
    curator(tmp_path / "s", tiny_model, rank=2).ingest(messy_file, "toy")
    assert sizes == [[10, 10], [10, 10], [10]]  # three would be more rows than are held at once
    assert content(tmp_path / "s") == content(folder / "whole")


def test_a_run_keeps_its_shard(made: tuple[Path, dict[str, IngestReport]]) -> None:
    with repmatch.open(made[0] / "2", mode="r") as store:
        arguments, detail = store.runs().select("arguments", "detail").row(0)
    assert json.loads(arguments)["shard"] == "2/3"
    shard = json.loads(detail)["shard"]
    assert (shard["number"], shard["of"], shard["total"]) == (2, 3, 50)
    assert 0 < shard["lo"] < shard["hi"] < 50


def test_a_dataset_that_is_there_may_be_without_factors(tmp_path: Path) -> None:
    space = make_space()
    one = stores.open(tmp_path / "one")
    prepare(one, space)
    one.append("d", space.id, "float32", make_batch(make_rows(0), space))
    out = stores.open(tmp_path / "out")
    out.save_dataset(replace(one.dataset("d"), space_id=None))
    out.merge([tmp_path / "one"])
    assert out.dataset("d").space_id == space.id
    assert out.factors("d").ids == ("r0",)
