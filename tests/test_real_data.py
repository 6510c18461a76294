from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import Run

DATA = os.environ.get("REPMATCH_DATA")
pytestmark = pytest.mark.skipif(not DATA, reason="REPMATCH_DATA does not name a folder with the real datasets")


def head(name: str, count: int, folder: Path) -> Path:
    """The first rows of a real dataset, byte for byte."""
    target = folder / name
    with (Path(DATA or "") / name).open("rb") as lines:
        target.write_bytes(b"".join(line for line, _ in zip(lines, range(count), strict=False)))
    return target


def test_sentiment_goes_in_and_comes_out(run: Run, tmp_path: Path) -> None:
    rows = head("sst2.train.jsonl", 120, tmp_path)
    store = tmp_path / "store"
    report = run("--store", store, "ingest", rows, "--dataset", "sst2", "--json").objects[0]
    assert (report["new"], report["quarantined"]) == (120, 0)
    assert run("--store", store, "export", "sst2").out == rows.read_text(encoding="utf-8")
    picked = run("--store", store, "select", "sst2", "-k", "10", "--balance", "label", "--name", "core")
    assert "labels: negative 5 of " in picked.out
    near = run("--store", store, "nearest", "sst2", "sst2-train-3", "-k", 3, "--json").objects
    assert len(near) == 3
    assert "sst2-train-3" not in [row["id"] for row in near]


def test_pairs_share_a_space_with_single_texts(run: Run, tmp_path: Path) -> None:
    store = tmp_path / "store"
    for name in ("snli.train", "trec.train"):
        rows = head(f"{name}.jsonl", 48, tmp_path)
        assert run("--store", store, "ingest", rows, "--dataset", name.split(".")[0], "--encoding", "sign").code == 0
    (found,) = run("--store", store, "compare", "snli", "trec", "--epochs", 1, "--json").objects
    scores = found["scores"]
    assert isinstance(scores, list)
    assert 0 < scores[0][1] < 0.9  # three labels and six, pairs and single texts: comparable, and not alike
    one = run("--store", store, "nearest", "snli", "snli-train-0", "-k", 2)
    assert one.code == 0
