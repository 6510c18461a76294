from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import Run

from repmatch.cli import cli
from repmatch.curator.docstrings import gather, write_jsonl

ROOT = Path(__file__).parent.parent
ASKED = "shutil._GiveupOnFastCopy"  # the id that the README asks neighbours of


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(document: str) -> list[list[str]]:
    lines = [line for block in blocks(document, "console") for line in block.splitlines()]
    return [shlex.split(line[2:], comments=True) for line in lines if line.startswith("$ ")]


@pytest.fixture
def docs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rows = gather(limit=4000)
    some = [row for row in rows if row["id"] == ASKED] + [row for row in rows if row["id"] != ASKED][:63]
    write_jsonl(tmp_path / "docs.jsonl", some)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_runs_as_printed(run: Run, docs_folder: Path) -> None:
    printed = [words for words in commands("README.md") if words[0] == "repmatch"]
    assert [words[1] for words in printed] == ["ingest", "select", "nearest", "export"]
    for words in printed:
        result = run(*words[1:])
        assert result.code == 0, (words, result.err)
    assert len((docs_folder / "core.jsonl").read_text().splitlines()) == 3
    (block,) = blocks("README.md", "python")
    exec(compile(block, "README.md", "exec"), {})  # the same again in Python, on the store that is there now


def test_the_readme_names_make_targets_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [words[1] for words in commands("README.md") if words[0] == "make"]
    assert targets == ["demo", "test"]
    for target in targets:
        assert f"\n{target}:" in makefile


def test_the_readme_lists_every_command() -> None:
    text = (ROOT / "README.md").read_text()
    for name in cli.commands:
        assert f"\n| `{name}" in text, name


def test_a_strategy_in_ten_lines_is_one(run: Run, toy_store: Path) -> None:
    (block,) = blocks("CONTRIBUTING.md", "python")
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    exec(compile(block, "CONTRIBUTING.md", "exec"), {})
    picked = run("--store", toy_store, "select", "toy", "-k", 3, "--strategy", "first", "--json").objects
    assert [row["id"] for row in picked] == ["toy-0", "toy-1", "toy-2"]


def test_the_changelog_has_this_version() -> None:
    import repmatch

    assert f"\n## {repmatch.__version__}" in (ROOT / "CHANGELOG.md").read_text()
