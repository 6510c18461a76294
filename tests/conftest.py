from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("REPMATCH_STORE", None)
sys.path.insert(0, str(Path(__file__).parent))

import pytest


class Result(NamedTuple):
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def objects(self) -> list[dict[str, object]]:
        """Standard output as JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process."""
    from repmatch.cli import main

    def call(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(int(left.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with random weights."""
    from tiny_models import checkpoint

    return checkpoint(tmp_path_factory.mktemp("tiny") / "bert")


def toy_rows(count: int = 60) -> list[dict[str, object]]:
    """Rows of two labels in three groups, each with a column of its own kind."""
    from tiny_models import sentences

    groups = ("a", "b", "b", "c", "c", "c")
    return [
        {
            "id": f"toy-{i}",
            "text": text,
            "label": ("no", "yes")[i % 2],
            "group": groups[i % 6],
            "stars": i % 5,
            "x": None,
        }
        for i, text in enumerate(sentences(count, seed=7))
    ]


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def toy_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty toy rows as JSON lines."""
    return write_rows(tmp_path_factory.mktemp("rows") / "toy.jsonl", toy_rows())


@pytest.fixture(scope="session")
def made_store(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, toy_file: Path) -> Path:
    """A store with the dataset "toy", made once; use `toy_store` for a copy of one's own."""
    import repmatch

    path = tmp_path_factory.mktemp("made") / "store"
    with repmatch.open(path) as store:
        report = repmatch.Curator(store, str(tiny_model)).ingest(toy_file, "toy")
    assert report.new == 60
    return path


@pytest.fixture
def toy_store(made_store: Path, tmp_path: Path) -> Path:
    """A store with the dataset "toy" that a test may change."""
    return shutil.copytree(made_store, tmp_path / "toy-store")
