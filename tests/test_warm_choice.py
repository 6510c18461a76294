"""Starts borrowed from another dataset: what is taken over, what is refused, and what a refusal leaves behind."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, toy_rows, write_rows
from test_engine_tasks import WordTask
from tiny_models import WORDS, checkpoint
from tiny_more import GatedLstm

import repmatch
from repmatch.curator.settings import Settings
from repmatch.curator.tasks import OwnModel


@pytest.fixture(scope="module")
def warm_store(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, toy_file: Path) -> Path:
    """A store with the dataset "a", warm-started in a space that no default makes."""
    path = tmp_path_factory.mktemp("warm") / "store"
    settings = Settings(model=str(tiny_model), rank=2, targets=("value",), max_length=16, seed=3, warm_start="20")
    with repmatch.open(path) as store:
        assert repmatch.Curator(store, settings=settings).ingest(toy_file, "a").new == 60
    return path


@pytest.fixture
def store(warm_store: Path, tmp_path: Path) -> Path:
    return shutil.copytree(warm_store, tmp_path / "store")


@pytest.fixture
def more(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "more.jsonl", [{**row, "id": f"m{i}"} for i, row in enumerate(toy_rows(8))])


def held(path: Path) -> tuple[list[str], int, int]:
    """Names of the datasets, and how many spaces and adapters there are."""
    with repmatch.open(path, mode="r") as found:
        return sorted(found.datasets()["name"].to_list()), len(found.spaces()), len(found.adapters())


def test_a_borrowed_start_brings_its_space_along(run: Run, store: Path, more: Path) -> None:
    result = run("--store", store, "ingest", more, "--dataset", "b", "--warm-start", "a", "--json")
    assert (result.code, result.objects[0]["new"]) == (0, 8), result.err
    with repmatch.open(store, mode="r") as found:
        assert found.dataset("b").space_id == found.dataset("a").space_id
        assert len(found.adapters()) == 1
    again = run("--store", store, "ingest", more, "--dataset", "b", "--warm-start", "a", "--json")
    assert again.objects[0]["unchanged"] == 8, again.err


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        (("--rank", 1), "rank: 2 against 1"),
        (("--targets", "query"), "matrices: ["),
        (("--seed", 0), "seed: 3 against 0"),
        (("--max-length", 12), "max_length: 16 against 12"),
        (("--task", "text-regression"), "task: 'sequence-classification' against 'text-regression'"),
    ],
)
def test_options_that_make_another_space_than_the_borrowed_start_are_refused(
    run: Run, store: Path, more: Path, asked: tuple[object, ...], named: str
) -> None:
    before = held(store)
    result = run("--store", store, "ingest", more, "--dataset", "b", "--warm-start", "a", *asked)
    assert result.code == 1
    assert "--warm-start 'a' is a start in another space" in result.err
    assert named in result.err
    assert held(store) == before
    assert run("--store", store, "ingest", more, "--dataset", "b", "--warm-start", "a").code == 0


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_a_start_of_another_model_is_refused(
    run: Run, store: Path, more: Path, tmp_path: Path, architecture: str
) -> None:
    before = held(store)
    other = checkpoint(tmp_path / "other", architecture, seed=9)  # the same shapes, other weights or names
    result = run("--store", store, "ingest", more, "--dataset", "b", "--warm-start", "a", "--model", other)
    assert result.code == 1
    assert "model_fingerprint" in result.err
    assert str(other) in result.err
    assert "defect" not in result.err
    assert held(store) == before


def test_a_start_that_cannot_be_merged_leaves_nothing_behind(
    run: Run, store: Path, more: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from repmatch.curator import workbench
    from repmatch.errors import ModelError

    def broken(*_: Any) -> Any:
        raise ModelError("no merging today.")

    before = held(store)
    monkeypatch.setattr(workbench, "merged", broken)
    for asked in ("a", "4"):
        result = run("--store", store, "ingest", more, "--dataset", "b", "--warm-start", asked, "--model", tiny_model)
        assert "no merging today" in result.err
        assert held(store) == before


def test_a_start_of_a_module_of_ones_own_needs_the_module(tmp_path: Path, run: Run, more: Path) -> None:
    own = OwnModel(GatedLstm(len(WORDS) + 1, 2), WordTask(), "gates")
    settings = Settings(model=own, targets=("input",), device="cpu", warm_start="8")
    with repmatch.open(tmp_path / "s") as store:
        assert repmatch.Curator(store, settings=settings).ingest(more, "a").new == 8
        borrowing = repmatch.Curator(store, settings=Settings(model=own, device="cpu", warm_start="a"))
        assert borrowing.ingest(more, "b").new == 8
        assert store.dataset("a").space_id == store.dataset("b").space_id
    assert (
        "only Python can give"
        in run("--store", tmp_path / "s", "ingest", more, "--dataset", "c", "--warm-start", "a").err
    )


def test_a_plan_looks_the_borrowed_start_up(run: Run, store: Path, more: Path, tmp_path: Path) -> None:
    (found,) = run("--store", store, "plan", more, "--warm-start", "a", "--json").objects
    assert (found["matrices"], found["start_rows"]) == (2, 0)
    for path in (store, tmp_path / "none"):
        planned = run("--store", path, "plan", more, "--warm-start", "nosuch")
        assert planned.code == 1
        assert "there is no dataset 'nosuch'" in planned.err
        assert planned.err == run("--store", path, "ingest", more, "--dataset", "b", "--warm-start", "nosuch").err
    assert "rank: 2 against 1" in run("--store", store, "plan", more, "--warm-start", "a", "--rank", 1).err
