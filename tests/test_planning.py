"""Plans against what ingests then take: memory and size in processes of their own, time loosely."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, toy_rows, write_rows
from test_engine_tasks import WordTask
from tiny_models import WORDS
from tiny_more import GatedLstm

import repmatch
from repmatch.curator import planning
from repmatch.curator.ingest import IngestOptions
from repmatch.curator.settings import Settings
from repmatch.curator.tasks import OwnModel

# Runs a command and says what its process took at most, in bytes.
MEASURED = """
import resource, subprocess, sys
done = subprocess.run([sys.executable, "-m", "repmatch", *sys.argv[1:]], capture_output=True, text=True)
sys.stderr.write(done.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
print(done.stdout)
sys.exit(done.returncode)
"""


def measured(*arguments: object) -> tuple[int, dict[str, Any]]:
    """Run a command; return its peak memory and what it printed."""
    command = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, printed = done.stdout.split("\n", 1)
    return int(peak), json.loads(printed)


@pytest.mark.parametrize(
    ("rows", "more"), [(1500, ("--encoding", "sign")), (300, ("--steps", 3, "--warm-start", 60))], ids=["sign", "warm"]
)
def test_memory_size_and_time_are_those_of_the_ingest(
    tmp_path: Path, tiny_model: Path, rows: int, more: tuple[object, ...]
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", toy_rows(rows))
    given = (file, "--model", tiny_model, "--device", "cpu", *more)
    _, plan = measured("--store", tmp_path / "none", "plan", *given, "--json")
    peak, report = measured("--store", tmp_path / "s", "ingest", *given, "--dataset", "d", "--json")
    size = sum(path.stat().st_size for path in (tmp_path / "s").rglob("*") if path.is_file())
    assert plan["memory_bytes"] == pytest.approx(peak, rel=0.25)
    assert plan["store_bytes"] == pytest.approx(size, rel=0.25)
    assert report["seconds"] / 6 < plan["seconds"] < 6 * report["seconds"] + 10
    assert not (tmp_path / "none").exists()


def test_the_adapter_of_a_warm_start_counts(tmp_path: Path, tiny_model: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", toy_rows(40))
    sizes = []
    for start in (None, "20"):
        settings = Settings(model=str(tiny_model), warm_start=start, device="cpu")
        found = planning.plan([str(file)], settings, IngestOptions())
        sizes.append(found.store_bytes)
        assert found.start_rows == (20 if start else 0)
    # Four matrices of rank 8, 32 by 32, and a head of two labels, in float32.
    assert sizes[1] - sizes[0] >= 4 * (4 * 8 * (32 + 32) + 2 * 33)


def test_the_first_batches_of_a_trial_are_of_very_different_lengths() -> None:
    from repmatch.curator.tasks import Example

    examples = [Example({"input_ids": [0] * (1 + i % 40)}, 0, False) for i in range(400)]
    groups = planning._groups(examples, 128)
    assert sorted(i for group in groups for i in group) == list(range(400))
    longest = [max(examples[i].tokens for i in group) for group in groups[:5]]
    assert max(longest) - min(longest) >= 20


def test_memory_grows_with_the_shapes_that_were_not_tried() -> None:
    assert planning._growth(300, 1, 5, 5) == 0
    assert planning._growth(300, 1, 5, 17) == 300
    assert planning._growth(300, 2, 2, 17) == 0


def test_a_curator_plans_for_a_frame(tmp_path: Path, tiny_model: Path) -> None:
    import polars as pl

    with repmatch.open(tmp_path / "s") as store:
        curator = repmatch.Curator(store, str(tiny_model))
        found = curator.plan(pl.DataFrame(toy_rows(40)))
        assert found.rows == curator.plan(write_rows(tmp_path / "rows.jsonl", toy_rows(40))).rows == 40


def test_a_curator_plans_for_a_module_of_ones_own(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "r.jsonl", toy_rows(20))
    own = OwnModel(GatedLstm(len(WORDS) + 1, 2), WordTask(), "gates")
    settings = Settings(model=own, targets=("input", "recurrent"), device="cpu")
    with repmatch.open(tmp_path / "s") as store:
        found = repmatch.Curator(store, settings=settings).plan(file, encoding="float32")
        assert (found.rows, found.matrices, found.factor_bytes) == (20, 2, 4 * (2 * 48 + 2))
    assert not (tmp_path / "s" / "catalog.duckdb").exists()


def test_the_help_tells_the_defaults_of_a_new_dataset(run: Run) -> None:
    text = " ".join(run("plan", "--help").out.split())
    assert "dataset's own" not in text
    for default in ("'embedded'", "sequence-classification", "adamw", "none"):
        assert f"[default: {default}]" in text or f"default: {default}]" in text
    assert "[default: the dataset's own; adamw for a new one]" in " ".join(run("ingest", "--help").out.split())
