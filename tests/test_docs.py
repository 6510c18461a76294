from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

from repmatch.cli import cli
from repmatch.curator.docstrings import gather, write_jsonl

ROOT = Path(__file__).parent.parent
# Guides whose every block runs below. The store's and the selectors' own pages have tests of their own.
GUIDES = (
    *(
        "index",
        "scores",
        "coresets",
        "evaluation",
        "instruction-tuning",
        "label-errors",
        "adapters",
        "report",
        "scale",
        "extending",
        "configuration",
        "sql",
    ),
)
ASKED = "shutil._GiveupOnFastCopy"  # the id that the README asks neighbours of


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(document: str) -> list[list[str]]:
    lines = [line for block in blocks(document, "console") for line in block.splitlines()]
    return [shlex.split(line[2:], comments=True) for line in lines if line.startswith("$ ")]


@pytest.fixture(scope="session")
def docs_rows() -> list[dict[str, Any]]:
    rows = gather(limit=4000)
    return [row for row in rows if row["id"] == ASKED] + [row for row in rows if row["id"] != ASKED][:63]


@pytest.fixture
def docs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, docs_rows: list[dict[str, Any]]) -> Path:
    write_jsonl(tmp_path / "docs.jsonl", docs_rows)
    known, labels = {row["id"] for row in docs_rows}, {row["label"] for row in docs_rows}
    fresh = [row for row in gather(limit=600) if row["id"] not in known and row["label"] in labels]
    write_jsonl(tmp_path / "held-out.jsonl", fresh[:24])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def docs_store(tmp_path_factory: pytest.TempPathFactory, docs_rows: list[dict[str, Any]]) -> Path:
    """The store that a reader has after the quick start's first command."""
    import repmatch

    folder = tmp_path_factory.mktemp("docs")
    write_jsonl(folder / "docs.jsonl", docs_rows)
    with repmatch.open(folder / "store") as store:
        repmatch.Curator(store, settings=repmatch.Settings(max_length=64)).ingest(folder / "docs.jsonl", "docs")
    return folder / "store"


def fenced(document: str) -> list[tuple[str, str]]:
    """Every block of a page: its language and its text."""
    return re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / document).read_text(), flags=re.DOTALL | re.MULTILINE)


SLOW = (
    "index",
    "scores",
    "coresets",
    "evaluation",
    "instruction-tuning",
    "label-errors",
    "adapters",
    "report",
    "scale",
)  # they train, or draw a map


@pytest.mark.parametrize("guide", [pytest.param(g, marks=[pytest.mark.slow] * (g in SLOW)) for g in GUIDES])
def test_every_block_of_a_guide_runs(run: Run, docs_folder: Path, docs_store: Path, guide: str) -> None:
    shutil.copytree(docs_store, docs_folder / "repmatch-store")
    names: dict[str, object] = {"__name__": guide}
    ran = 0
    for language, text in fenced(f"docs/{guide}.md"):
        if language == "toml":
            (docs_folder / "repmatch.toml").write_text(text)
        elif language == "python":
            exec(compile(text, f"docs/{guide}.md", "exec"), names)
            ran += 1
        elif language == "console":
            lines = text.splitlines()
            for line, following in zip(lines, [*lines[1:], ""], strict=True):
                if line.startswith("$ repmatch "):
                    result = run(*shlex.split(line[2:], comments=True)[1:])
                    if following.startswith("error: "):  # named in the docs, so it must be what the command says
                        assert (result.code != 0, following in result.err) == (True, True), result.err
                    else:
                        assert result.code == 0, (line, result.err)
                    ran += 1
        else:
            assert language == "text", f"a block of {language!r} is not run; call it text"
    assert ran > 0


def test_the_configuration_guide_names_every_variable() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "repmatch").rglob("*.py"))
    text = (ROOT / "docs" / "configuration.md").read_text()
    internal = {"REPMATCH_COMPLETE"}
    found = set(re.findall(r"\bREPMATCH_[A-Z]+\b", sources)) | {"REPMATCH_DEVICE", "REPMATCH_MODEL"}
    for name in sorted(found - internal):
        assert f"`{name}" in text, name


def test_the_sql_guide_lists_the_views_and_their_columns(run: Run, docs_store: Path) -> None:
    text = (ROOT / "docs" / "sql.md").read_text()
    for view in run("--store", docs_store, "sql", "--views", "--json").objects:
        (line,) = re.findall(rf"^\| `{view['view']}` \|.*$", text, flags=re.MULTILINE)
        listed = re.sub(r" \(.*?\)", "", line.split("|")[3]).split(",")
        columns = view["columns"]
        assert isinstance(columns, dict)
        assert [name.strip() for name in listed] == list(columns), view["view"]


def site() -> Any:
    spec = importlib.util.spec_from_file_location("repmatch_site", ROOT / "docs" / "site.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_reference_has_every_option() -> None:
    import click

    page = site().commands_page()

    def check(name: str, command: click.Command) -> None:
        assert re.search(rf"^#+ {name}$", page, flags=re.MULTILINE), name
        if isinstance(command, click.Group):
            for inner, child in command.commands.items():
                check(f"{name} {inner}", child)
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.opts[0] in page, (name, parameter.opts)

    for name, command in cli.commands.items():
        check(f"repmatch {name}", command)


def test_every_page_is_in_the_site() -> None:
    module = site()
    listed = {path for pages in module.PAGES.values() for _, path in pages}
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert there <= listed
    assert set(module.generated()) <= listed | {f"api/{key}.md" for key in module.API}
    missing = {path for path in listed - there - set(module.generated())}
    assert missing <= {"instruction-tuning.md", "store.md", "selection.md"}, missing


def test_every_public_object_has_an_api_entry_and_a_docstring() -> None:
    module = site()
    for key, names in module.public_names().items():
        page = module.api_page(key)
        assert names
        for name in names:
            assert f"::: {name}\n" in page
            where, _, attribute = name.rpartition(".")
            value = getattr(importlib.import_module(where), attribute)
            assert value.__doc__ and value.__doc__.strip()[0].isupper(), name


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (extra 'docs')")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed (extra 'docs')")
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    module = site()
    for key, names in module.public_names().items():
        text = (tmp_path / "site" / "api" / f"{key}.html").read_text()
        for name in names:
            assert f'id="{name}"' in text, name
    assert "repmatch ingest" in (tmp_path / "site" / "commands.html").read_text()


@pytest.mark.slow
def test_the_notebook_runs_and_its_outputs_are_kept(docs_folder: Path) -> None:
    cells = json.loads((ROOT / "docs" / "example.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not any(output["output_type"] == "error" for cell in code for output in cell["outputs"])
    assert sum(bool(cell["outputs"]) for cell in code) >= 8
    names: dict[str, object] = {}
    for cell in code:
        source = "".join(cell["source"]).replace("limit=160", "limit=80")
        exec(compile(source, "example.ipynb", "exec"), names)
    assert (docs_folder / "report.html").stat().st_size > 1_000_000


@pytest.mark.parametrize("path", ["README.md", *(f"docs/{name}.md" for name in GUIDES)])
def test_links_and_pictures_are_there(path: str) -> None:
    text = (ROOT / path).read_text()
    made = set(site().generated())
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http") and target not in made:
            assert (ROOT / path).parent.joinpath(target).exists(), target


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
    exec(compile(block, "CONTRIBUTING.md", "exec"), {"__name__": "contributing"})
    picked = run("--store", toy_store, "select", "toy", "-k", 3, "--strategy", "first", "--json").objects
    assert [row["id"] for row in picked] == ["toy-0", "toy-1", "toy-2"]


def test_the_changelog_has_this_version() -> None:
    import repmatch

    assert f"\n## {repmatch.__version__}" in (ROOT / "CHANGELOG.md").read_text()
